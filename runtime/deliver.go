package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
)

const nofollow = unix.O_NOFOLLOW

// deliver brings into the guest what a container stands on: image disks, pushed files, shared directories.
func (c *container) deliver(ctx context.Context, g *guest, client agentClient) error {
	spec := c.rec.Spec()
	for _, d := range append([]imageDisk{spec.Disk}, spec.Volumes...) {
		if err := g.plugDisk(ctx, d); err != nil {
			return err
		}
	}
	for _, m := range spec.Mounts {
		if m.Via != viaFile && m.Via != viaFiles {
			continue
		}
		if err := pushFiles(ctx, client, m); err != nil {
			return fmt.Errorf("push %q to the guest: %w", m.HostPath, err)
		}
	}
	if !slices.ContainsFunc(spec.Mounts, func(m resolvedMount) bool { return m.Via == viaShare }) {
		return nil
	}
	if err := c.share(); err != nil {
		return err
	}
	return g.mountShare(ctx, client)
}

// createRequest is the container as the agent wants it.
func (c *container) createRequest() (*agentpb.CreateContainerRequest, error) {
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
	switch ns := security.GetNamespaceOptions(); ns.GetPid() {
	case runtimeapi.NamespaceMode_POD:
		req.PidNamespace = agentpb.PidNamespace_PID_NAMESPACE_POD
	case runtimeapi.NamespaceMode_TARGET:
		req.PidNamespace, req.PidTargetContainer = agentpb.PidNamespace_PID_NAMESPACE_TARGET, ns.GetTargetId()
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

func readTree(dir string) ([]*agentpb.FileEntry, error) {
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
		if errors.Is(err, fs.ErrNotExist) {
			return nil // replaced while we read; the watch brings the new one
		}
		out = append(out, e)
		return err
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

// share binds the container's shared directories and files into the tree that virtiofsd serves.
func (c *container) share() error {
	if err := c.pod.makeShareTree(); err != nil {
		return err
	}
	for _, m := range c.rec.Spec().Mounts {
		if m.Via != viaShare {
			continue
		}
		if err := bindShare(filepath.Join(c.pod.shareDir(), m.Name), m); err != nil {
			return fmt.Errorf("share %q with the guest: %w", m.HostPath, err)
		}
	}
	return nil
}

// makeShareTree makes the root of the shared tree a mount of its own, whose later mounts virtiofsd sees.
func (p *pod) makeShareTree() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	dir := p.shareDir()
	if mounted, err := mountinfo.Mounted(dir); err == nil && mounted {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return &fs.PathError{Op: "bind", Path: dir, Err: err}
	}
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		return &fs.PathError{Op: "make shared", Path: dir, Err: err}
	}
	return nil
}

func bindShare(target string, m resolvedMount) error {
	if mounted, err := mountinfo.Mounted(target); err == nil && mounted {
		return nil
	}
	if err := makeTarget(target, m.HostPath); err != nil {
		return err
	}
	if err := unix.Mount(m.HostPath, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return &fs.PathError{Op: "bind", Path: target, Err: err}
	}
	propagation := uintptr(unix.MS_PRIVATE)
	if m.Slave {
		propagation = unix.MS_SLAVE
	}
	if err := unix.Mount("", target, "", propagation|unix.MS_REC, ""); err != nil {
		return &fs.PathError{Op: "set propagation", Path: target, Err: err}
	}
	if m.Slave {
		// Shared again below, so that what appears here goes on to virtiofsd.
		if err := unix.Mount("", target, "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
			return &fs.PathError{Op: "set propagation", Path: target, Err: err}
		}
	}
	return readOnlyShare(target, m)
}

// readOnlyShare makes a read-only mount read-only on the node too, so that the guest's kernel need not be
// trusted with it.
func readOnlyShare(target string, m resolvedMount) error {
	if !m.ReadOnly {
		return nil
	}
	flags := uint(0)
	if m.RecursiveReadOnly {
		flags = unix.AT_RECURSIVE
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, target, flags, attr); err != nil {
		return &fs.PathError{Op: "make read-only", Path: target, Err: err}
	}
	return nil
}

func makeTarget(target, source string) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.MkdirAll(target, 0o755)
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// unshare takes the container's entries out of the shared tree.
func (c *container) unshare() error {
	var errs []error
	for _, m := range c.rec.Spec().Mounts {
		if m.Via != viaShare {
			continue
		}
		target := filepath.Join(c.pod.shareDir(), m.Name)
		if err := unmountBelow(target); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// unmountBelow unmounts a directory and all below it, the deepest and latest first. The tree's own files are safe: what
// is removed afterwards is never behind a mount.
func unmountBelow(dir string) error {
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.Mountpoint != dir && !strings.HasPrefix(i.Mountpoint, dir+"/"), false
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range slices.Backward(infos) {
		if err := unix.Unmount(i.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, &fs.PathError{Op: "unmount", Path: i.Mountpoint, Err: err})
		}
	}
	return errors.Join(errs...)
}

// shareSpec describes the virtiofsd that serves the pod's shared tree.
func (p *pod) shareSpec() (qemu.ShareSpec, error) {
	binary, err := p.rt.cfg.QEMU.FindVirtiofsd()
	if err != nil {
		return qemu.ShareSpec{}, err
	}
	return qemu.ShareSpec{
		Binary:   binary,
		Launcher: p.rt.launcher,
		Dir:      p.shareDir(),
		RunDir:   p.runDir(),
		Place:    p.cgroup().Add,
	}, nil
}
