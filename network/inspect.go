package network

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// read fills in what lies in the thread's network namespace, which may be more than CNI's results say: meta plugins such as
// Multus report one network and make several. The interfaces named in order come first.
func (a *Attachment) read(order []string) error {
	links, err := podLinks()
	if err != nil {
		return err
	}
	if len(links) == 0 {
		return fmt.Errorf("CNI made no Ethernet interface that is up; a VM needs one: %w", errdefs.ErrFailedPrecondition)
	}
	rank := func(l netlink.Link) int {
		if i := slices.Index(order, l.Attrs().Name); i >= 0 {
			return i
		}
		return len(order)
	}
	slices.SortStableFunc(links, func(x, y netlink.Link) int {
		return cmp.Or(cmp.Compare(rank(x), rank(y)), cmp.Compare(x.Attrs().Index, y.Attrs().Index))
	})
	names := map[int]string{}
	for _, l := range links {
		i, err := readInterface(l)
		if err != nil {
			return err
		}
		names[l.Attrs().Index] = i.Name
		a.Interfaces = append(a.Interfaces, i)
	}
	if a.Routes, err = readRoutes(names); err != nil {
		return err
	}
	a.Neighbors, err = readNeighbors(names)
	return err
}

// podLinks are the Ethernet interfaces that are up and stand for themselves. The tunnels that kernels put into every
// namespace are down.
func podLinks() ([]netlink.Link, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var out []netlink.Link
	for _, l := range all {
		at := l.Attrs()
		if at.EncapType == "ether" && at.Flags&net.FlagUp != 0 && at.MasterIndex == 0 {
			out = append(out, l)
		}
	}
	return out, nil
}

func readInterface(l netlink.Link) (Interface, error) {
	at := l.Attrs()
	i := Interface{Name: at.Name, MAC: at.HardwareAddr.String(), MTU: at.MTU, Tap: tapName(at.Name)}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return i, fmt.Errorf("list addresses of %s: %w", at.Name, err)
	}
	own := linkLocal(at.HardwareAddr)
	for _, a := range addrs {
		p, ok := prefixOf(a.IPNet)
		if ok && p.Addr() != own {
			i.Addresses = append(i.Addresses, p)
		}
	}
	return i, nil
}

// linkLocal is the address that the kernel gives an interface by itself (RFC 4291, appendix A).
func linkLocal(mac net.HardwareAddr) netip.Addr {
	if len(mac) != 6 {
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}

func readRoutes(names map[int]string) ([]Route, error) {
	all, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []Route
	var errs []error
	for _, r := range all {
		if r.Type != unix.RTN_UNICAST || r.Table == unix.RT_TABLE_LOCAL || ownLinkLocal(r) {
			continue
		}
		if len(r.MultiPath) > 0 || r.Via != nil || r.Encap != nil {
			errs = append(errs, fmt.Errorf("route %s: a VM's routes can have one gateway of their own family and no encapsulation: %w",
				r, errdefs.ErrNotImplemented))
			continue
		}
		if name, ok := names[r.LinkIndex]; ok {
			out = append(out, routeOf(r, name))
		}
	}
	slices.SortStableFunc(out, func(x, y Route) int { return cmp.Compare(rankOf(x), rankOf(y)) })
	return out, errors.Join(errs...)
}

// ownLinkLocal tells of fe80::/64, which every kernel makes by itself.
func ownLinkLocal(r netlink.Route) bool {
	return r.Protocol == unix.RTPROT_KERNEL && r.Dst != nil && r.Dst.IP.To4() == nil && r.Dst.IP.IsLinkLocalUnicast()
}

// rankOf puts a route before those that need it: a gateway must be reachable when its route is added.
func rankOf(r Route) int {
	if r.Gateway.IsValid() {
		return 1
	}
	return 0
}

func routeOf(r netlink.Route, name string) Route {
	out := Route{
		Interface: name, MTU: r.MTU, Scope: int(r.Scope), Priority: r.Priority, Table: r.Table,
		OnLink: r.Flags&int(netlink.FLAG_ONLINK) != 0,
	}
	out.Destination, _ = prefixOf(r.Dst)
	if !out.Destination.IsValid() {
		out.Destination = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Family == netlink.FAMILY_V6 {
			out.Destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	out.Gateway, out.Source = addrOf(r.Gw), addrOf(r.Src)
	return out
}

func readNeighbors(names map[int]string) ([]Neighbor, error) {
	all, err := netlink.NeighList(0, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list neighbors: %w", err)
	}
	var out []Neighbor
	for _, n := range all {
		name, ok := names[n.LinkIndex]
		ip := addrOf(n.IP)
		if ok && n.State&netlink.NUD_PERMANENT != 0 && ip.IsValid() && len(n.HardwareAddr) == 6 {
			out = append(out, Neighbor{Address: ip, MAC: n.HardwareAddr.String(), Interface: name})
		}
	}
	return out, nil
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	ones, _ := n.Mask.Size()
	p := netip.PrefixFrom(addrOf(n.IP), ones)
	return p, p.IsValid()
}
