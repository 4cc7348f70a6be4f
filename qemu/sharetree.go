package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// The tree that a virtiofsd shows lies in a mount namespace of its own, which belongs to the node's user namespace:
//
//	/targets  where this process makes mount points
//	/share    a read-only view of it, on which the shared directories are mounted; virtiofsd makes it its root
//
// virtiofsd lives in another user namespace and sees a copy. What the kernel copies, or spreads, into a mount namespace of
// another user namespace keeps its flags for good: there no read-only mount can be made writable or taken away. Nothing but
// virtiofsd holds the tree, by a descriptor that it knows nothing of, so that the mounts go when it does.
const (
	treeTargets = "/targets"
	treeRoot    = "/share"
	// treeFD is the number of the tree's namespace in virtiofsd.
	treeFD = firstFD + 1
)

// ShareMount is a directory or file to show to a guest.
type ShareMount struct {
	// Name of the entry in the share; no slash.
	Name string
	// Source is a path in this process's mount namespace. What is mounted below it is shown too.
	Source string
	// ReadOnly holds for Source itself; with RecursiveReadOnly for what is mounted below it, too. It is kept by the node's
	// kernel, not by virtiofsd or the guest.
	ReadOnly, RecursiveReadOnly bool
	// Slave lets what is mounted later on the node below Source appear, and go, if Source lies on a shared mount.
	Slave bool
}

// onThread runs do on a thread that ends with it: the namespaces that it enters are no other goroutine's.
func onThread(do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // the main thread does not end, and is taken while this goroutine waits
			defer runtime.UnlockOSThread()
			done <- onThread(do)
			return
		}
		done <- do()
	}()
	return <-done
}

// startInTree makes a tree and starts a launcher there, as root of a user namespace of its own, which has no power over anything
// of the node but files. It hands the tree over as treeFD, and
// returns the namespace's number. dir is covered while the tree is made.
func startInTree(cmd *exec.Cmd, dir, binary string) (number uint64, err error) {
	err = onThread(func() error {
		if err := makeTree(dir, binary); err != nil {
			return err
		}
		ns, err := os.Open("/proc/thread-self/ns/mnt")
		if err != nil {
			return err
		}
		defer func() { _ = ns.Close() }()
		if number, err = treeNumber(ns); err != nil {
			return err
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, ns)
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER | unix.CLONE_NEWIPC
		if err := cmd.Start(); errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EUSERS) {
			return fmt.Errorf("own user namespace: %w; the sysctl user.max_user_namespaces has to be above the number of VM pods", err)
		} else if err != nil {
			return err
		}
		return nil
	})
	return number, err
}

// makeTree gives the thread a mount namespace with nothing but an empty tree, and what a program needs to run.
func makeTree(dir, binary string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("own mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("cut mounts off from the node's: %w", err)
	}
	c := confinement{Root: dir, Binds: programBinds(binary)}
	if err := c.fillRoot(); err != nil {
		return err
	}
	targets, root, proc := filepath.Join(dir, treeTargets), filepath.Join(dir, treeRoot), filepath.Join(dir, "proc")
	for _, d := range []string{targets, root, proc} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
		data                   string
	}{
		{"proc", proc, "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		// The source says whose tree it is to whoever looks at virtiofsd's mounts.
		{dir, targets, "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "mode=0755,size=1m"},
		{targets, root, "", unix.MS_BIND, ""},
		{"", root, "", unix.MS_SHARED, ""},
	} {
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return &fs.PathError{Op: "mount", Path: m.target, Err: err}
		}
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, root, 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return &fs.PathError{Op: "make read-only", Path: root, Err: err}
	}
	return enter(dir)
}

// treeNumber is a namespace's number, which no other has while it lives.
func treeNumber(ns *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &st); err != nil {
		return 0, &fs.PathError{Op: "fstat", Path: ns.Name(), Err: err}
	}
	return st.Ino, nil
}

// inTree runs do on a thread in the server's tree.
func (s *ShareServer) inTree(do func() error) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", s.rec.PID, treeFD))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("virtiofsd, process %d, is gone: %w", s.rec.PID, errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }()
	var kind unix.Statfs_t
	if err := unix.Fstatfs(int(ns.Fd()), &kind); err != nil {
		return &fs.PathError{Op: "fstatfs", Path: ns.Name(), Err: err}
	}
	if number, err := treeNumber(ns); err != nil || kind.Type != unix.NSFS_MAGIC || number != s.rec.Tree {
		return errors.Join(err, fmt.Errorf("descriptor %d of process %d is not the share's mount namespace: %w", treeFD, s.rec.PID, errdefs.ErrNotFound))
	}
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("own root directory: %w", err)
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter the share's mount namespace: %w", err)
		}
		return do()
	})
}

// Add shows a directory or file to the guest. One that is shown under this name already is no error.
func (s *ShareServer) Add(m ShareMount) error {
	if err := checkShareName(m.Name); err != nil {
		return err
	}
	info, err := os.Stat(m.Source)
	if err != nil {
		return err
	}
	tree, err := m.detached()
	if err != nil {
		return fmt.Errorf("share %s: %w", m.Source, err)
	}
	defer func() { _ = tree.Close() }()
	return s.inTree(func() error {
		target := filepath.Join(treeRoot, m.Name)
		if mounted, err := mountinfo.Mounted(target); err == nil && mounted {
			return nil
		}
		if err := makeTarget(filepath.Join(treeTargets, m.Name), info.IsDir()); err != nil {
			return err
		}
		if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("share %s: %w", m.Source, &fs.PathError{Op: "move_mount", Path: target, Err: err})
		}
		return nil
	})
}

// detached is a copy of the mounts at and below the source that is as it has to be before anybody sees it: cut off from the
// node's later mounts unless they are to appear, and read-only if asked.
func (m ShareMount) detached() (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, &fs.PathError{Op: "open_tree", Path: m.Source, Err: err}
	}
	tree := os.NewFile(uintptr(fd), m.Source)
	propagation := &unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if m.Slave {
		propagation.Propagation = unix.MS_SLAVE
	}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, propagation)
	if err == nil && m.ReadOnly {
		flags := uint(unix.AT_EMPTY_PATH)
		if m.RecursiveReadOnly {
			flags |= unix.AT_RECURSIVE
		}
		err = unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	if err != nil {
		return nil, errors.Join(&fs.PathError{Op: "mount_setattr", Path: m.Source, Err: err}, tree.Close())
	}
	return tree, nil
}

func makeTarget(target string, dir bool) error {
	if dir {
		return os.MkdirAll(target, 0o755)
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// Remove takes an entry out of the share with all that is mounted below it. One that is not there is no error, nor is
// a server that has ended.
func (s *ShareServer) Remove(name string) error {
	if err := checkShareName(name); err != nil {
		return err
	}
	err := s.inTree(func() error {
		target := filepath.Join(treeRoot, name)
		if err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return &fs.PathError{Op: "unmount", Path: target, Err: err}
		}
		if err := os.Remove(filepath.Join(treeTargets, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Mounts lists where something is mounted in an entry of the share, as paths in the entry; that of the entry itself is empty.
func (s *ShareServer) Mounts(name string) (paths []string, err error) {
	if err := checkShareName(name); err != nil {
		return nil, err
	}
	err = s.inTree(func() error {
		root := filepath.Join(treeRoot, name)
		infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
		for _, i := range infos {
			paths = append(paths, strings.TrimPrefix(i.Mountpoint, root))
		}
		return err
	})
	return paths, err
}

func checkShareName(name string) error {
	var p problems
	p.rule(filepath.IsLocal(name) && filepath.Base(name) == name && name != ".", "share.name", name, "one element of a path")
	return errors.Join(p...)
}
