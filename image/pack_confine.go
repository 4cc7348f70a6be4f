package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	goruntime "runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	maxConvertMemory  = 4 << 30
	maxConvertSeconds = 4 * 3600
	maxConvertFiles   = 64
)

// run becomes the program of the job, confined.
func (j *convertJob) run() error {
	// Namespaces and capabilities are a thread's own; exec makes this thread the process.
	goruntime.LockOSThread()
	if len(j.Argv) == 0 || os.Getpid() != 1 {
		return errors.New("not started in namespaces of its own")
	}
	for _, step := range []func() error{j.enterRoot, j.limit, dropPrivileges} {
		if err := step(); err != nil {
			return err
		}
	}
	// The program is the first process of its namespace: with whoever started it gone it has to go too.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("ask for a signal at the parent's death: %w", err)
	}
	return fmt.Errorf("execute %s: %w", j.Argv[0], syscall.Exec(j.Argv[0], j.Argv, os.Environ()))
}

// enterRoot makes a root that has libraries and the process's own /proc, both read-only.
func (j *convertJob) enterRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", j.Root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=1m"); err != nil {
		return fmt.Errorf("mount a new root: %w", err)
	}
	for _, p := range []string{"/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", filepath.Dir(j.Argv[0])} {
		if err := j.show(p); err != nil {
			return fmt.Errorf("show %s in the new root: %w", p, err)
		}
	}
	proc := filepath.Join(j.Root, "proc")
	if err := os.Mkdir(proc, 0o555); err != nil {
		return err
	}
	if err := unix.Mount("proc", proc, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount /proc in the new root: %w", err)
	}
	if err := unix.Chdir(j.Root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
}

// show makes a file or directory appear at the same path in the new root; one that is not there is fine.
func (j *convertJob) show(path string) error {
	target := filepath.Join(j.Root, path)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := os.Lstat(target); err == nil {
		return nil // part of what is there already
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		to, err := os.Readlink(path)
		if err != nil {
			return err
		}
		return os.Symlink(to, target)
	case info.IsDir():
		err = os.Mkdir(target, 0o755)
	default:
		err = os.WriteFile(target, nil, 0o444)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(path, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
}

// limit bounds what a hostile disk can make the program take.
func (j *convertJob) limit() error {
	for _, l := range []struct {
		what int
		name string
		max  uint64
	}{
		{unix.RLIMIT_CORE, "core dumps", 0},
		{unix.RLIMIT_AS, "memory", maxConvertMemory},
		{unix.RLIMIT_CPU, "CPU time", maxConvertSeconds},
		{unix.RLIMIT_NOFILE, "open files", maxConvertFiles},
		{unix.RLIMIT_FSIZE, "file size", j.MaxBytes},
	} {
		if err := syscall.Setrlimit(l.what, &syscall.Rlimit{Cur: l.max, Max: l.max}); err != nil {
			return fmt.Errorf("limit %s to %d: %w", l.name, l.max, err)
		}
	}
	return nil
}

// dropPrivileges becomes nobody, for good.
func dropPrivileges() error {
	for capability := uintptr(0); ; capability++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // beyond the kernel's last one
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", capability, err)
		}
	}
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(nobody, nobody, nobody), syscall.Setresuid(nobody, nobody, nobody)); err != nil {
		return fmt.Errorf("become nobody: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}
