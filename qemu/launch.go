package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// jobFD is where the launcher finds its job.
	jobFD = 3
	// launchFailed is the launcher's exit status when it could not become the program.
	launchFailed = 125
	maxJob       = 1 << 20
)

// job is what a launcher is to become.
type job struct {
	Argv []string `json:"argv"` // Argv[0] is an absolute path
	// Confine, if there, takes away what the program has no need of.
	Confine *confinement `json:"confine,omitempty"`
	// Memory, if there, is replaced by a copy.
	Memory *memoryCopy `json:"memory,omitempty"`
	// ServesFiles says that the program is virtiofsd, and the launcher in a user namespace that is not the node's.
	ServesFiles bool `json:"servesFiles,omitempty"`
}

// confinement is the little world of one QEMU or swtpm.
type confinement struct {
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	Root string `json:"root"` // an empty or unneeded directory, over which the new root is mounted
	// Binds are shown in the new root, read-only if not said otherwise; a symbolic link is copied.
	Binds []bind `json:"binds"`
	KVM   bool   `json:"kvm"` // needs /dev/kvm
	// FDs shows the program its own descriptors as files in fdPath.
	FDs bool `json:"fds,omitempty"`
}

type bind struct {
	Source string `json:"source"`
	Target string `json:"target"`
	// Writable shows what is below as it is, but for programs.
	Writable bool `json:"writable,omitempty"`
	// Copy shows a copy that belongs to the VM's user, of a regular file that this user may not read.
	Copy bool `json:"copy,omitempty"`
}

// LaunchMain is the main function of a re-executed launcher. It waits for its job, which comes when the
// process is in its cgroup, confines itself and becomes QEMU, virtiofsd or swtpm. It never returns; when something cannot be
// done it says so on its error output and exits with status 125. It takes no arguments.
func LaunchMain(args []string) {
	err := fmt.Errorf("unexpected arguments %q", args)
	if len(args) == 0 {
		err = runJob()
	}
	fmt.Fprintln(os.Stderr, "launch:", err)
	os.Exit(launchFailed)
}

func runJob() error {
	// Namespaces and capabilities are a thread's own; exec makes this thread the process.
	runtime.LockOSThread()
	f := os.NewFile(jobFD, "job")
	data, err := io.ReadAll(io.LimitReader(f, maxJob))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("read the job: %w", err)
	}
	if len(data) == 0 {
		return errors.New("no job came: whoever launched this has given up")
	}
	var j job
	if err := json.Unmarshal(data, &j); err != nil {
		return fmt.Errorf("read the job: %w", err)
	}
	if err := limits(); err != nil {
		return err
	}
	if j.Memory != nil {
		if err := j.Memory.run(); err != nil {
			return fmt.Errorf("copy the memory: %w", err)
		}
	}
	if j.ServesFiles {
		if err := serveFiles(); err != nil {
			return err
		}
	}
	if c := j.Confine; c != nil {
		if err := errors.Join(c.namespaces(), c.dropPrivileges()); err != nil {
			return err
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return fmt.Errorf("execute %s: %w", j.Argv[0], syscall.Exec(j.Argv[0], j.Argv, os.Environ()))
}

// serveFiles forbids other user namespaces within this one, and keeps what root may do with files while virtiofsd makes one as
// another user: the guest has decided that its user may, who has groups there of which virtiofsd does not know.
func serveFiles() error {
	if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0); err != nil {
		return fmt.Errorf("forbid user namespaces: %w", err)
	}
	const noSetuidFixup, locked = 1 << 2, 1 << 3 // SECBIT_NO_SETUID_FIXUP of capabilities(7)
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, noSetuidFixup|locked, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities over changes of the user: %w", err)
	}
	return nil
}

// limits forbids core dumps, which would hold the guest's memory, and allows all the open files that may be had.
func limits() error {
	if err := syscall.Setrlimit(unix.RLIMIT_CORE, &syscall.Rlimit{}); err != nil {
		return fmt.Errorf("limit of core dumps: %w", err)
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	files.Cur = files.Max
	if err := syscall.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	return nil
}

func (c *confinement) namespaces() error {
	for _, ns := range []struct {
		name string
		flag int
	}{{"mount", unix.CLONE_NEWNS}, {"network", unix.CLONE_NEWNET}, {"IPC", unix.CLONE_NEWIPC}} {
		if err := unix.Unshare(ns.flag); err != nil {
			return fmt.Errorf("own %s namespace: %w", ns.name, err)
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := c.fillRoot(); err != nil {
		return err
	}
	return enter(c.Root)
}

// fillRoot mounts a new root over Root with what the program needs.
func (c *confinement) fillRoot() error {
	size, err := c.size()
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", c.Root, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, fmt.Sprintf("mode=0755,size=%d", size)); err != nil {
		return fmt.Errorf("mount a new root: %w", err)
	}
	for _, b := range c.Binds {
		if err := c.bind(b); err != nil {
			return fmt.Errorf("show %s in the new root: %w", b.Source, err)
		}
	}
	if c.FDs {
		// Of this process, which becomes the program; the kernel lets no other one look in.
		if err := c.bind(bind{Source: fmt.Sprintf("/proc/%d/fd", os.Getpid()), Target: fdPath}); err != nil {
			return fmt.Errorf("show descriptors in the new root: %w", err)
		}
	}
	return c.devices()
}

// size is what the new root has to hold, in bytes.
func (c *confinement) size() (int64, error) {
	size := int64(mib)
	for _, b := range c.Binds {
		if !b.Copy {
			continue
		}
		info, err := os.Stat(b.Source)
		if err != nil {
			return 0, err
		}
		size += info.Size() + 4096
	}
	return size, nil
}

func (c *confinement) copy(source, target string) error {
	from, err := os.Open(source)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Chown(int(c.UID), int(c.GID)), to.Close())
}

func (c *confinement) bind(b bind) error {
	target := filepath.Join(c.Root, b.Target)
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	info, err := os.Lstat(b.Source)
	if err != nil {
		return err
	}
	switch {
	case b.Copy:
		return c.copy(b.Source, target)
	case info.Mode()&os.ModeSymlink != 0:
		to, err := os.Readlink(b.Source)
		if err != nil {
			return err
		}
		return os.Symlink(to, target)
	case info.IsDir():
		err = os.MkdirAll(target, 0o755)
	default:
		err = os.WriteFile(target, nil, 0o444)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(b.Source, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_NOSUID | unix.MS_NODEV)
	if b.Writable {
		flags |= unix.MS_NOEXEC
	} else {
		flags |= unix.MS_RDONLY
	}
	return unix.Mount("", target, "", flags, "")
}

// devices makes the few device files that QEMU opens. /dev/kvm belongs to the VM's own user, so that it
// needs no group of the host.
func (c *confinement) devices() error {
	dir := filepath.Join(c.Root, "dev")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	type device struct {
		name         string
		major, minor uint32
	}
	devices := []device{{"null", 1, 3}, {"urandom", 1, 9}}
	if c.KVM {
		var st unix.Stat_t
		if err := unix.Stat("/dev/kvm", &st); err != nil {
			return fmt.Errorf("/dev/kvm: %w", err)
		}
		devices = append(devices, device{"kvm", unix.Major(st.Rdev), unix.Minor(st.Rdev)})
	}
	for _, d := range devices {
		path := filepath.Join(dir, d.name)
		if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("make /dev/%s: %w", d.name, err)
		}
		if err := os.Chown(path, int(c.UID), int(c.GID)); err != nil {
			return fmt.Errorf("make /dev/%s: %w", d.name, err)
		}
	}
	return nil
}

// enter makes root the root, read-only, and forgets the old one.
func enter(root string) error {
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	const flags = unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NOEXEC
	if err := unix.Mount("", "/", "", flags, ""); err != nil {
		return fmt.Errorf("make the new root read-only: %w", err)
	}
	return nil
}

// dropPrivileges becomes the VM's user, without groups and capabilities.
func (c *confinement) dropPrivileges() error {
	if c.UID == 0 || c.GID == 0 {
		return errors.New("it must not run as root")
	}
	for capability := uintptr(0); ; capability++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // beyond the kernel's last one
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", capability, err)
		}
	}
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("leave all groups: %w", err)
	}
	if err := syscall.Setresgid(int(c.GID), int(c.GID), int(c.GID)); err != nil {
		return fmt.Errorf("become group %d: %w", c.GID, err)
	}
	if err := syscall.Setresuid(int(c.UID), int(c.UID), int(c.UID)); err != nil {
		return fmt.Errorf("become user %d: %w", c.UID, err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop all capabilities: %w", err)
	}
	return nil
}
