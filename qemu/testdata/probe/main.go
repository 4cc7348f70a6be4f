// Command probe tries, with all the powers that its user namespace has, what it must not be able to do to the node, and says
// for each attempt how it ended. Its root is a share with the read-only entry ro, which has a mount below it, and the
// writable entry rw.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	for _, try := range []struct {
		what string
		err  error
	}{
		{"make ro writable by mount", unix.Mount("", "/ro", "", unix.MS_REMOUNT|unix.MS_BIND, "")},
		{"make ro writable by mount_setattr", unix.MountSetattr(unix.AT_FDCWD, "/ro", 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})},
		{"make the root writable", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, "")},
		{"unmount ro", unix.Unmount("/ro", unix.MNT_DETACH)},
		{"unmount what is below ro", unix.Unmount("/ro/below", unix.MNT_DETACH)},
		{"bind what is under a mount", unix.Mount("/ro", "/rw/below", "", unix.MS_BIND, "")},
		{"change the file system's own flags", unix.Mount("", "/rw", "", unix.MS_REMOUNT|unix.MS_RDONLY, "")},
		{"write to ro", write("/ro/planted")},
		{"write to the root", write("/planted")},
		{"mount proc", unix.Mount("proc", "/rw", "proc", 0, "")},
		{"mount sysfs", unix.Mount("sysfs", "/rw", "sysfs", 0, "")},
		{"mount a block device's file system", unix.Mount("/rw/file", "/rw", "ext4", 0, "")},
		{"make a block device", unix.Mknod("/rw/disk", unix.S_IFBLK|0o600, int(unix.Mkdev(254, 0)))},
		{"make a character device", unix.Mknod("/rw/mem", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 1)))},
		{"make a user namespace", userNamespace()},
		{"set the node's host name", unix.Sethostname([]byte("planted"))},
		{"set the node's clock", unix.ClockSettime(unix.CLOCK_REALTIME, &unix.Timespec{})},
		{"clear the kernel's log", klogClear()},
		{"turn off accounting", unix.Acct("")},
	} {
		fmt.Printf("%s: %v\n", try.what, try.err)
	}
}

func write(path string) error {
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY, 0o600)
	if err == nil {
		err = unix.Close(fd)
	}
	return err
}

func userNamespace() error {
	null, err := os.Open("/rw/file") // there is no /dev/null
	if err != nil {
		return err
	}
	defer func() { _ = null.Close() }()
	cmd := exec.Command(os.Args[0])
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, os.Stdout, os.Stderr
	return errors.Unwrap(cmd.Run())
}

func klogClear() error {
	_, err := unix.Klogctl(unix.SYSLOG_ACTION_CLEAR, nil)
	return err
}
