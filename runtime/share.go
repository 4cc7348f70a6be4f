package runtime

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

const shareTag = "shares"

// A guest has at most one share, which begins with the first container that needs it and ends with the guest. It is recorded
// before virtiofsd runs, and plugged only after that: what a daemon finds that was killed between is known by its record,
// and used by nobody.

// shares tells whether the container has mounts that go through the share.
func (c *container) shares() bool {
	return slices.ContainsFunc(c.rec.Spec().Mounts, func(m resolvedMount) bool { return m.Via == viaShare })
}

// share shows the container's directories and files to the guest.
func (c *container) share(ctx context.Context, g *guest, client agentClient) error {
	g.plug.Lock()
	defer g.plug.Unlock()
	ctx, cancel := context.WithTimeout(ctx, plugTimeout)
	defer cancel()
	if g.share == nil {
		if err := g.startShare(ctx); err != nil {
			return err
		}
	}
	for _, m := range c.rec.Spec().Mounts {
		if m.Via != viaShare {
			continue
		}
		if err := g.share.Add(m.shareMount()); err != nil {
			return err
		}
	}
	_, err := client.MountShare(ctx, &agentpb.MountShareRequest{Tag: shareTag})
	return err
}

func (m resolvedMount) shareMount() qemu.ShareMount {
	return qemu.ShareMount{Name: m.Name, Source: m.HostPath, ReadOnly: m.ReadOnly, RecursiveReadOnly: m.RecursiveReadOnly, Slave: m.Slave}
}

// unshare takes the container's entries out of the share. Without a guest there is none.
func (c *container) unshare() error {
	g := c.pod.currentGuest()
	if g == nil {
		return nil
	}
	g.plug.Lock()
	defer g.plug.Unlock()
	if g.share == nil {
		return nil
	}
	var errs []error
	for _, m := range c.rec.Spec().Mounts {
		if m.Via == viaShare {
			errs = append(errs, g.share.Remove(m.Name))
		}
	}
	return errors.Join(errs...)
}

// submounts are the guest paths of mounts inside directories that are shared read-only, but not recursively so.
func (c *container) submounts(g *guest) ([]string, error) {
	g.plug.Lock()
	defer g.plug.Unlock()
	var out []string
	for _, m := range c.rec.Spec().Mounts {
		if m.Via != viaShare || !m.ReadOnly || m.RecursiveReadOnly {
			continue
		}
		paths, err := g.share.Mounts(m.Name)
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			out = append(out, filepath.Join(m.GuestPath, path))
		}
	}
	return out, nil
}

// shareSpec describes a virtiofsd of the pod.
func (p *pod) shareSpec() (qemu.ShareSpec, error) {
	binary, err := p.rt.cfg.QEMU.FindVirtiofsd()
	return qemu.ShareSpec{Binary: binary, Launcher: p.rt.launcher, RunDir: p.runDir(), Place: p.cgroup().Add}, err
}

// startShare starts virtiofsd and plugs it. The caller holds plug.
func (g *guest) startShare(ctx context.Context) error {
	spec, err := g.pod.shareSpec()
	if err != nil {
		return err
	}
	if uids, gids := ocispec.Users(g.pod.config()); uids != nil {
		spec.Users = qemu.IDRange{First: uids.GetHostId(), Count: uids.GetLength()}
		spec.Groups = qemu.IDRange{First: gids.GetHostId(), Count: gids.GetLength()}
	}
	spec.Keep = func(r qemu.ShareRecord) error { return g.keepShare(&r) }
	server, err := qemu.StartShareServer(ctx, spec)
	if err != nil {
		return errors.Join(fmt.Errorf("start virtiofsd: %w", err), g.keepShare(nil))
	}
	if err := g.vm.AddShare(ctx, qemu.Share{Tag: shareTag, Socket: server.Socket()}); err != nil {
		return errors.Join(fmt.Errorf("plug the share: %w", err), g.dropShare(server))
	}
	g.followShare(server)
	return nil
}

func (g *guest) keepShare(r *qemu.ShareRecord) error {
	return g.pod.update(func(s *podStatus) error {
		s.Guest.Share = r
		return nil
	})
}

// dropShare ends a virtiofsd that the guest does not use.
func (g *guest) dropShare(server *qemu.ShareServer) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(g.ctx), plugTimeout)
	defer cancel()
	return errors.Join(server.Kill(ctx), server.Close(), g.keepShare(nil))
}

// followShare ends the guest when virtiofsd ends before it: every process that uses a shared directory would hang for
// good. The caller holds plug, or nobody else knows the guest yet.
func (g *guest) followShare(server *qemu.ShareServer) {
	g.share = server
	g.owned.Go(func() {
		select {
		case <-g.ctx.Done():
			return
		case <-server.Done():
		}
		if g.ends(g.ctx) {
			return // it ended with its QEMU
		}
		g.log.Warn("virtiofsd ended; its VM is ended too", "stderr", server.Stderr())
		ctx, cancel := context.WithTimeout(context.WithoutCancel(g.ctx), plugTimeout)
		defer cancel()
		if err := g.vm.Kill(ctx); err != nil {
			g.log.Error("ending a VM without virtiofsd", "error", err)
		}
	})
}

// recoverShare takes up the guest's virtiofsd. A guest that has lost its own is of no use.
func (g *guest) recoverShare(ctx context.Context, record *qemu.ShareRecord) error {
	if record == nil {
		return nil
	}
	g.plug.Lock()
	defer g.plug.Unlock()
	plugged, err := g.vm.HasShare(ctx, shareTag)
	if err != nil {
		return err
	}
	server, err := qemu.AttachShareServer(*record)
	switch {
	case err == nil && plugged:
		g.followShare(server)
		return nil
	case err == nil:
		return g.dropShare(server)
	case plugged:
		return errors.Join(err, g.vm.Kill(ctx))
	case errdefs.IsNotFound(err):
		return g.keepShare(nil)
	}
	return err
}
