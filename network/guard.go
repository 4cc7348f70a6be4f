package network

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// sinkName is a tap of the pod's namespace that nobody opens: what is redirected there is gone. tc's own way to drop, act_gact,
// is missing in kernels that have everything else the pod's network needs.
const sinkName = "vmruntime-sink"

// guard is a tc filter that keeps frames off the redirect: those of one protocol that have all keys.
type guard struct {
	protocol uint16
	keys     []netlink.TcU32Key
}

// key asks for the value, under the mask, of the 32 bits at an offset from the network header.
func key(offset int32, value, mask uint32) netlink.TcU32Key {
	return netlink.TcU32Key{Off: offset, Val: value, Mask: mask}
}

// udp4To asks for UDP that is not a later fragment, behind a header without options.
func udp4To(port uint32) guard {
	return guard{unix.ETH_P_IP, []netlink.TcU32Key{
		key(0, 5<<24, 0xf<<24), key(4, 0, 0x1fff), key(8, unix.IPPROTO_UDP<<16, 0xff<<16), key(20, port, 0xffff),
	}}
}

func udp6To(port uint32) guard {
	return guard{unix.ETH_P_IPV6, []netlink.TcU32Key{key(4, unix.IPPROTO_UDP<<8, 0xff<<8), key(40, port, 0xffff)}}
}

func icmp6(kind uint32, more ...netlink.TcU32Key) guard {
	keys := []netlink.TcU32Key{key(4, unix.IPPROTO_ICMPV6<<8, 0xff<<8), key(40, kind<<24, 0xff<<24)}
	return guard{unix.ETH_P_IPV6, append(keys, more...)}
}

// guestGuards keep the guest's questions to the responder off the pod's network.
func guestGuards() []guard {
	r := routerAddr(0).As16()
	word := func(i int) uint32 {
		return uint32(r[i])<<24 | uint32(r[i+1])<<16 | uint32(r[i+2])<<8 | uint32(r[i+3])
	}
	return []guard{
		udp4To(portDHCPServer),
		udp6To(portDHCP6Server),
		icmp6(icmpRouterSolicitation),
		// All routers of the responder differ in the last 16 bits only. The target stands behind the ICMPv6 header.
		icmp6(icmpNeighborSolicitation,
			key(48, word(0), 0xffffffff), key(52, word(4), 0xffffffff), key(56, word(8), 0xffffffff), key(60, word(12), 0xffff0000)),
	}
}

// wireGuards keep the answers of foreign servers and routers off the guest.
func wireGuards() []guard {
	out := []guard{udp4To(portDHCPClient), udp6To(portDHCP6Client), icmp6(icmpRouterAdvertisement)}
	// An advertisement may hide behind extension headers (RFC 7113). It always has a link-local source and the hop limit 255,
	// which nothing else with such headers has: MLD's hop limit is 1.
	for _, header := range []uint32{unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT, unix.IPPROTO_DSTOPTS} {
		out = append(out, guard{unix.ETH_P_IPV6, []netlink.TcU32Key{
			key(4, header<<8|ndpHopLimit, 0xffff), key(8, 0xfe800000, 0xffc00000),
		}})
	}
	return out
}

// setGuards makes the filters on both sides of an interface what they are to be, whatever an earlier run left.
func (i Interface) setGuards(sink netlink.Link) error {
	tap, err := netlink.LinkByName(i.Tap)
	if err != nil {
		return fmt.Errorf("tap %s: %w", i.Tap, err)
	}
	wire, err := netlink.LinkByName(i.Name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", i.Name, err)
	}
	return errors.Join(reconcile(tap, sink, guestGuards()), reconcile(wire, sink, wireGuards()))
}

// reconcile adds the guards that a link lacks and takes away those that it should not have. Without any, sink may be nil.
func reconcile(link, sink netlink.Link, want []guard) error {
	all, err := netlink.FilterList(link, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return fmt.Errorf("list the tc filters of %s: %w", link.Attrs().Name, err)
	}
	for _, f := range all {
		u, ok := f.(*netlink.U32)
		if !ok || u.Sel == nil || u.Priority != guard4Priority && u.Priority != guard6Priority {
			continue
		}
		rest := slices.DeleteFunc(slices.Clone(want), func(g guard) bool {
			return g.protocol == u.Protocol && slices.Equal(g.keys, u.Sel.Keys)
		})
		if len(rest) < len(want) {
			want = rest
			continue
		}
		if err := netlink.FilterDel(u); err != nil {
			return fmt.Errorf("delete a tc filter of %s: %w", link.Attrs().Name, err)
		}
	}
	for _, g := range want {
		if err := addGuard(link, sink, g); err != nil {
			return err
		}
	}
	return nil
}

func addGuard(link, sink netlink.Link, g guard) error {
	priority := uint16(guard4Priority)
	if g.protocol == unix.ETH_P_IPV6 {
		priority = guard6Priority
	}
	err := netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: priority, Protocol: g.protocol,
		},
		Sel:     &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Keys: slices.Clip(g.keys)},
		Actions: []netlink.Action{netlink.NewMirredAction(sink.Attrs().Index)},
	})
	if err != nil {
		return fmt.Errorf("keep DHCP and router discovery of %s from passing with tc: %w", link.Attrs().Name, err)
	}
	return nil
}

// setGuards is to run in the pod's network namespace, like dropGuards.
func (a *Attachment) setGuards() error {
	if err := makeTap(Interface{Tap: sinkName, MTU: 1500}); err != nil { // tc heeds no MTU
		return fmt.Errorf("make tap %s: %w", sinkName, err)
	}
	sink, err := netlink.LinkByName(sinkName)
	if err != nil {
		return err
	}
	for _, i := range a.Interfaces {
		if err := i.setGuards(sink); err != nil {
			return err
		}
	}
	return nil
}

func (a *Attachment) dropGuards() error {
	var errs []error
	for _, i := range a.Interfaces {
		for _, name := range []string{i.Tap, i.Name} {
			link, err := netlink.LinkByName(name)
			if err == nil {
				err = reconcile(link, nil, nil)
			}
			errs = append(errs, err)
		}
	}
	sink, err := netlink.LinkByName(sinkName)
	switch {
	case errors.As(err, &netlink.LinkNotFoundError{}):
		return errors.Join(errs...)
	case err == nil:
		err = netlink.LinkDel(sink)
	}
	return errors.Join(append(errs, err)...)
}
