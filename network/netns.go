package network

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nsfsMagic is the file system type of namespace files, from linux/magic.h.
const nsfsMagic = 0x6e736673

// onOwnThread runs fn on a thread of its own, which is thrown away: whatever fn does to the thread's namespaces never reaches
// another goroutine. The thread goes back to its network namespace first, since the process's first thread
// cannot be thrown away and stands for the whole process in /proc.
func onOwnThread(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- fmt.Errorf("open the node's network namespace: %w", err)
			return
		}
		defer home.Close()
		err = fn()
		done <- errors.Join(err, unix.Setns(int(home.Fd()), unix.CLONE_NEWNET))
	}()
	return <-done
}

// inNetNS runs fn on a thread in a network namespace.
func inNetNS(path string, fn func() error) error {
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open the pod's network namespace: %w", err)
	}
	defer ns.Close()
	if !isNSFile(ns) {
		return fmt.Errorf("%s is not a network namespace (as after a reboot): %w", path, errdefs.ErrNotFound)
	}
	return onOwnThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return fn()
	})
}

func isNSFile(f *os.File) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &st) == nil && st.Type == nsfsMagic
}

// makeNetNS makes a network namespace that lives by a bind mount at path.
func makeNetNS(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make the file for a network namespace: %w", err)
	}
	used := isNSFile(f)
	f.Close()
	if used {
		return fmt.Errorf("network namespace %s: %w", path, errdefs.ErrAlreadyExists)
	}
	err = onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount the network namespace at %s: %w", path, err)
		}
		return prepareNetNS()
	})
	if err != nil {
		return errors.Join(err, removeNetNS(path))
	}
	return nil
}

// prepareNetNS sets lo up and keeps the namespace's IPv6 from speaking for itself on the interfaces to come. The guest has the
// same addresses: a probe for duplicates that is still under way here would make it give up its own.
func prepareNetNS() error {
	for name, value := range map[string]string{
		"accept_dad": "0", "dad_transmits": "0", "accept_ra": "0", "router_solicitations": "0",
	} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/default/"+name, []byte(value), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6 has none
			return fmt.Errorf("set IPv6's %s: %w", name, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// removeNetNS takes the mount and its file away. The namespace goes with the last user, such as a QEMU with an open tap.
func removeNetNS(path string) error {
	for isNetNS(path) {
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount network namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the file of a network namespace: %w", err)
	}
	return nil
}
