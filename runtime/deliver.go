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

	"github.com/containerd/errdefs"
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
	return c.pod.with(g, func() error {
		if err := c.share(); err != nil {
			return err
		}
		return g.mountShare(ctx, client)
	})
}

// with does something for a guest while nothing can tear the pod down: what is bound into the shared tree during a teardown
// would be left over, or worse, deleted with the tree.
func (p *pod) with(g *guest, do func() error) error {
	p.life.Lock()
	defer p.life.Unlock()
	if p.currentGuest() != g {
		return errGuestGone{errors.New("it was torn down meanwhile")}
	}
	return do()
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
	if req.Submounts, err = c.submounts(); err != nil {
		return nil, err
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

// submounts are the guest paths of mounts inside directories that are shared read-only, but not recursively so.
func (c *container) submounts() ([]string, error) {
	var out []string
	for _, m := range c.rec.Spec().Mounts {
		if m.Via != viaShare || !m.ReadOnly || m.RecursiveReadOnly {
			continue
		}
		root := filepath.Join(c.pod.shareDir(), m.Name)
		infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
		if err != nil {
			return nil, err
		}
		for _, i := range infos {
			out = append(out, filepath.Join(m.GuestPath, strings.TrimPrefix(i.Mountpoint, root)))
		}
	}
	return out, nil
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

// share binds the container's shared directories and files into the tree that virtiofsd serves.
func (c *container) share() error {
	if err := c.pod.makeShareTree(); err != nil {
		return err
	}
	for _, m := range c.rec.Spec().Mounts {
		if m.Via != viaShare {
			continue
		}
		if err := bindShare(c.pod.shareTargets(), c.pod.shareDir(), m); err != nil {
			return fmt.Errorf("share %q with the guest: %w", m.HostPath, err)
		}
	}
	return nil
}

// makeShareTree makes the root of the shared tree a mount of its own, whose later mounts virtiofsd sees. It is a read-only
// view of the directory in which the daemon makes mount points, so that the guest can plant nothing there.
func (p *pod) makeShareTree() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	dir := p.shareDir()
	if mounted, err := mountinfo.Mounted(dir); err == nil && mounted {
		return nil
	}
	for _, d := range []string{dir, p.shareTargets()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount(p.shareTargets(), dir, "", unix.MS_BIND, ""); err != nil {
		return &fs.PathError{Op: "bind", Path: dir, Err: err}
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, dir, 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return &fs.PathError{Op: "make read-only", Path: dir, Err: err}
	}
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		return &fs.PathError{Op: "make shared", Path: dir, Err: err}
	}
	return nil
}

// bindShare makes a mount's source appear in the shared tree. It is attached when it is as it has to be: what is changed
// later does not reach a virtiofsd that serves already.
func bindShare(targets, tree string, m resolvedMount) error {
	target := filepath.Join(tree, m.Name)
	if mounted, err := mountinfo.Mounted(target); err == nil && mounted {
		return nil
	}
	if err := makeTarget(filepath.Join(targets, m.Name), m.HostPath); err != nil {
		return err
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, m.HostPath, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return &fs.PathError{Op: "open_tree", Path: m.HostPath, Err: err}
	}
	source := os.NewFile(uintptr(fd), m.HostPath)
	defer func() { _ = source.Close() }()
	if err := prepareShare(fd, m); err != nil {
		return &fs.PathError{Op: "mount_setattr", Path: m.HostPath, Err: err}
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &fs.PathError{Op: "move_mount", Path: target, Err: err}
	}
	return nil
}

// prepareShare cuts a tree off from the node's later mounts, or lets them in, and makes a read-only one read-only on the
// node too, so that the guest's kernel need not be trusted with it.
func prepareShare(fd int, m resolvedMount) error {
	propagation := &unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if m.Slave {
		propagation.Propagation = unix.MS_SLAVE
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, propagation); err != nil || !m.ReadOnly {
		return err
	}
	flags := uint(unix.AT_EMPTY_PATH)
	if m.RecursiveReadOnly {
		flags |= unix.AT_RECURSIVE
	}
	return unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

func makeTarget(target, source string) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.MkdirAll(target, 0o755)
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY|nofollow, 0o644)
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
		if err := unmountBelow(filepath.Join(c.pod.shareDir(), m.Name)); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := os.Remove(filepath.Join(c.pod.shareTargets(), m.Name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// unmountBelow unmounts a directory and all below it, the deepest and latest first.
func unmountBelow(dir string) error {
	infos, err := mountsBelow(dir)
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

// removeRunDir removes a pod's run directory with the shared tree in it. Behind a mount that is left lie the node's own
// files: then nothing is removed.
func removeRunDir(dir string) error {
	if err := unmountBelow(dir); err != nil {
		return err
	}
	left, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("%s is still mounted; %s is kept: %w", left[0].Mountpoint, dir, errdefs.ErrFailedPrecondition)
	}
	return os.RemoveAll(dir)
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
