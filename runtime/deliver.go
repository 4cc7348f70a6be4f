package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/trace"
)

const nofollow = unix.O_NOFOLLOW

// deliver brings into the guest what a container stands on: image disks, pushed files, shared directories.
func (c *container) deliver(ctx context.Context, g *guest, client agentClient) error {
	spec := c.rec.Spec()
	for _, d := range append([]imageDisk{spec.Disk}, spec.Volumes...) {
		if err := g.plugDisk(ctx, qemu.Disk{Serial: d.Serial, Path: d.Path, Format: "raw", ReadOnly: true}); err != nil {
			return fmt.Errorf("image: %w", err)
		}
	}
	for _, v := range spec.BlockVolumes {
		if err := g.plugVolume(ctx, v); err != nil {
			return fmt.Errorf("block volume %s: %w", v.Path, err)
		}
	}
	for _, m := range spec.Mounts {
		if m.Via != viaFile && m.Via != viaFiles {
			continue
		}
		if err := trace.Do(ctx, "push files", func(ctx context.Context) error { return pushFiles(ctx, client, m) }); err != nil {
			return fmt.Errorf("push %q to the guest: %w", m.HostPath, err)
		}
	}
	if !c.shares() {
		return nil
	}
	return trace.Do(ctx, "share directories", func(ctx context.Context) error {
		return c.pod.with(g, func() error { return c.share(ctx, g, client) })
	})
}

// with does something for a guest while nothing can tear the pod down: what is started during a teardown would be left over.
func (p *pod) with(g *guest, do func() error) error {
	p.life.Lock()
	defer p.life.Unlock()
	if p.currentGuest() != g {
		return errGuestGone{errors.New("it was torn down meanwhile")}
	}
	return do()
}

// createRequest is the container as the agent wants it.
func (c *container) createRequest(g *guest) (*agentpb.CreateContainerRequest, error) {
	spec, cfg := c.rec.Spec(), c.config()
	oci, err := json.Marshal(spec.OCI)
	if err != nil {
		return nil, err
	}
	security := cfg.GetLinux().GetSecurityContext()
	req := &agentpb.CreateContainerRequest{
		Id:             c.id,
		OciSpec:        oci,
		RootfsDisk:     spec.Disk.Serial,
		RootfsReadonly: security.GetReadonlyRootfs(),
		Stdin:          cfg.GetStdin(),
		StdinOnce:      cfg.GetStdinOnce(),
	}
	for _, v := range spec.Volumes {
		req.Images = append(req.Images, &agentpb.ImageMount{Name: v.Name, Disk: v.Serial})
	}
	for _, m := range spec.Mounts {
		if m.Via != viaHugePages {
			continue
		}
		v, err := m.hugeVolume()
		if err != nil {
			return nil, err
		}
		req.HugeVolumes = append(req.HugeVolumes, v)
	}
	if req.BlockDevices, err = blockDevices(spec.BlockVolumes); err != nil {
		return nil, err
	}
	if req.Submounts, err = c.submounts(g); err != nil {
		return nil, err
	}
	switch ns := security.GetNamespaceOptions(); ns.GetPid() {
	case runtimeapi.NamespaceMode_POD:
		req.PidNamespace = agentpb.PidNamespace_PID_NAMESPACE_POD
	case runtimeapi.NamespaceMode_TARGET:
		req.PidNamespace, req.PidTargetContainer = agentpb.PidNamespace_PID_NAMESPACE_TARGET, c.rt.guestIDOf(ns.GetTargetId())
	default:
		req.PidNamespace = agentpb.PidNamespace_PID_NAMESPACE_CONTAINER
	}
	return req, nil
}

// pushFiles makes the guest's copy of a small file or tree equal to the node's.
func pushFiles(ctx context.Context, client agentClient, m resolvedMount) error {
	req := &agentpb.PutFilesRequest{Name: m.Name, InPlace: m.Via == viaFile}
	var err error
	if m.Via == viaFile {
		req.Entries, err = oneFile(m.HostPath)
	} else {
		req.Entries, err = readTree(m.HostPath)
	}
	if err != nil {
		return err
	}
	_, err = client.PutFiles(ctx, req)
	return err
}

func oneFile(path string) ([]*agentpb.FileEntry, error) {
	e, err := fileEntry("file", path)
	if err != nil {
		return nil, err
	}
	return []*agentpb.FileEntry{{Path: ".", Mode: unix.S_IFDIR | 0o755}, e}, nil
}

// readAttempts is how often a tree is read that is replaced meanwhile.
const readAttempts = 5

// readTree reads a volume as it was at one moment: the kubelet replaces the link "..data" to do so, and removes the
// directory that it led to. A volume without that link is not replaced as a whole.
func readTree(dir string) (out []*agentpb.FileEntry, err error) {
	for range readAttempts {
		before, _ := os.Readlink(filepath.Join(dir, dataLink))
		out, err = walkTree(dir)
		after, _ := os.Readlink(filepath.Join(dir, dataLink))
		if before == after && !errors.Is(err, fs.ErrNotExist) {
			return out, err
		}
	}
	if err == nil {
		err = fmt.Errorf("%s is replaced all the time: %w", dir, errdefs.ErrUnavailable)
	}
	return nil, err
}

const dataLink = "..data"

func walkTree(dir string) ([]*agentpb.FileEntry, error) {
	var out []*agentpb.FileEntry
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		e, err := fileEntry(rel, path)
		if err != nil {
			return err
		}
		out = append(out, e)
		return nil
	})
	return out, err
}

func fileEntry(name, path string) (*agentpb.FileEntry, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	e := &agentpb.FileEntry{Path: name, Mode: st.Mode, Uid: st.Uid, Gid: st.Gid}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		e.SymlinkTarget, err = os.Readlink(path)
	case unix.S_IFREG:
		e.Data, err = os.ReadFile(path)
	}
	return e, err
}

// mountsBelow lists the mounts on a directory and below it. The kernel tells them by their real paths.
func mountsBelow(dir string) ([]*mountinfo.Info, error) {
	parent, err := filepath.EvalSymlinks(filepath.Dir(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	dir = filepath.Join(parent, filepath.Base(dir))
	return mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.Mountpoint != dir && !strings.HasPrefix(i.Mountpoint, dir+"/"), false
	})
}

// removeRunDir removes a pod's run directory. Nothing of ours is mounted there; behind what somebody else has mounted lie the
// node's own files: then nothing is removed.
func removeRunDir(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("%s is mounted; %s is kept until it is unmounted: %w", mounts[0].Mountpoint, dir, errdefs.ErrFailedPrecondition)
	}
	return os.RemoveAll(dir)
}
