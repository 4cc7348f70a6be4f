package network

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tapName derives a tap's name from its interface's, within the kernel's 15 bytes.
func tapName(ifName string) string {
	const prefix = "tap-"
	if len(prefix)+len(ifName) < unix.IFNAMSIZ {
		return prefix + ifName
	}
	h := fnv.New32a()
	h.Write([]byte(ifName))
	return fmt.Sprintf("%s%08x", prefix, h.Sum32())
}

// openTap opens a tap of the thread's network namespace and makes it when it is not there. Frames carry a virtio-net
// header, so that checksums and segmentation are left to whoever needs them done.
func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun, which taps are made by; load the module tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("tap %s is in use by another guest: %w", name, errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("attach to tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// connectTaps makes a tap beside each interface and ties the two together.
func (a *Attachment) connectTaps() error {
	for _, i := range a.Interfaces {
		if err := makeTap(i); err != nil {
			return fmt.Errorf("make tap %s: %w", i.Tap, err)
		}
		if err := connect(i.Name, i.Tap); err != nil {
			return fmt.Errorf("connect %s with tap %s: %w", i.Name, i.Tap, err)
		}
	}
	return nil
}

// keepTap has a tap outlive those who have it open.
func keepTap(f *os.File) error {
	if err := unix.IoctlSetInt(int(f.Fd()), unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make tap %s persistent: %w", f.Name(), err)
	}
	return nil
}

// makeTap makes an interface's tap ready, which may be there already and have its guest.
func makeTap(i Interface) error {
	if _, err := netlink.LinkByName(i.Tap); err != nil {
		f, err := openTap(i.Tap)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := keepTap(f); err != nil {
			return err
		}
	}
	// The tap is a wire: an IPv6 stack on it would talk to the guest.
	err := os.WriteFile("/proc/sys/net/ipv6/conf/"+i.Tap+"/disable_ipv6", []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("keep IPv6 off it: %w", err)
	}
	link, err := netlink.LinkByName(i.Tap)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMTU(link, i.MTU); err != nil {
		return fmt.Errorf("set its MTU to %d: %w", i.MTU, err)
	}
	return netlink.LinkSetUp(link)
}

func connect(a, b string) error {
	la, err := netlink.LinkByName(a)
	if err != nil {
		return err
	}
	lb, err := netlink.LinkByName(b)
	if err != nil {
		return err
	}
	return errors.Join(redirect(la, lb), redirect(lb, la))
}

// Priorities of tc's filters, of which the lowest is asked first: guards keep frames off the redirect. Those that plugins
// make usually have lower ones.
const (
	guard4Priority   = 8
	guard6Priority   = 9
	redirectPriority = 10
)

// redirect sends all that comes in on one link out of the other. The filter is u32 without a condition: every kernel
// with tc has it, unlike matchall.
func redirect(from, to netlink.Link) error {
	index := from.Attrs().Index
	err := netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0),
	}})
	if err != nil && !errors.Is(err, unix.EEXIST) { // a plugin may have made one, or a clsact, which serves as well
		return fmt.Errorf("add an ingress qdisc to %s: %w", from.Attrs().Name, err)
	}
	err = netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: redirectPriority, Protocol: unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	})
	if err != nil {
		return fmt.Errorf("redirect %s to %s with tc (needs cls_u32 and act_mirred): %w", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

// OpenTaps opens the tap of each interface, in their order, for QEMU to use: IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, not
// blocking. A descriptor works in any process of any user and namespace. One tap can be open once; while the last
// guest's QEMU has it the error is ErrFailedPrecondition, and ErrNotFound when the network is gone.
func (m *Manager) OpenTaps(a *Attachment) ([]*os.File, error) {
	var files []*os.File
	err := inNetNS(a.NetNS, func() error {
		for _, i := range a.Interfaces {
			if _, err := netlink.LinkByName(i.Tap); err != nil {
				return fmt.Errorf("tap %s of interface %s: %w: %w", i.Tap, i.Name, err, errdefs.ErrNotFound)
			}
			f, err := openTap(i.Tap)
			if err != nil {
				return err
			}
			files = append(files, f)
		}
		return nil
	})
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, fmt.Errorf("open the taps of %s: %w", a.NetNS, err)
	}
	return files, nil
}

// Hold keeps every frame from passing between the guest and the pod's network, or lets them pass again. The guest does not notice: its link
// stays up. It succeeds when that is so already.
func (m *Manager) Hold(a *Attachment, held bool) error {
	err := inNetNS(a.NetNS, func() error {
		var errs []error
		for _, i := range a.Interfaces {
			tap, err := netlink.LinkByName(i.Tap)
			if err == nil && held {
				err = netlink.LinkSetDown(tap)
			} else if err == nil {
				err = netlink.LinkSetUp(tap)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("tap %s: %w", i.Tap, err))
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("hold or let go the network of %s: %w", a.NetNS, err)
	}
	return nil
}
