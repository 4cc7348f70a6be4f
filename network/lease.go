package network

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// infinite is how long what is handed out holds: as long as the pod, whose network never changes.
const infinite = 0xffffffff * time.Second

// answerLimit is the size that no answer exceeds, in bytes from the IP header on, whatever the MTU.
const answerLimit = 1500

// serverMAC is where the responder's answers come from. It lies on the tap only.
var serverMAC = net.HardwareAddr{0x02, 0x76, 0x6d, 0x72, 0x00, 0x01}

// routerAddr is a link-local address of the responder: 0 is its own, from which DHCPv6 answers come too, the others stand for a
// gateway each.
func routerAddr(n uint16) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: 0x76, 9: 0x6d, 10: 0x72, 14: byte(n >> 8), 15: byte(n)})
}

// lease is all that the responder tells the guest on one interface. It does not change.
type lease struct {
	name string
	mac  net.HardwareAddr
	mtu  int

	// address4 has the prefix length that is handed out, and is invalid without IPv4. server is the identifier of the DHCP server.
	address4 netip.Prefix
	routes4  []Route
	server   netip.Addr

	addresses6 []netip.Addr
	onLink6    []netip.Prefix
	routers    []router

	neighbors map[netip.Addr]net.HardwareAddr

	hostname   string
	dns4, dns6 []netip.Addr
	searches   []string
	// lostSearches is how many search domains were left out because they did not fit.
	lostSearches int
}

// router is a source of router advertisements. Its address is the gateway's own if that is link-local, or one of the
// responder's, which stands for the gateway's. Without a gateway it is nobody's router.
type router struct {
	address, gateway netip.Addr
	isDefault        bool
	routes           []netip.Prefix
}

// leases works out what is to be told on each interface. What concerns the whole guest is told on the primary one only, since
// a name server is asked by way of the interface that named it.
func (a *Attachment) leases(o ResponderOptions) ([]*lease, error) {
	var out []*lease
	for n, i := range a.Interfaces {
		mac, err := net.ParseMAC(i.MAC)
		if err != nil || len(mac) != 6 {
			return nil, invalid("MAC of interface "+i.Name, i.MAC, "an Ethernet address")
		}
		l := &lease{name: i.Name, mac: mac, mtu: i.MTU, neighbors: map[netip.Addr]net.HardwareAddr{}}
		for _, b := range a.Neighbors {
			if at, err := net.ParseMAC(b.MAC); err == nil && b.Interface == i.Name {
				l.neighbors[b.Address] = at
			}
		}
		routes := a.routesOf(i)
		l.set4(i, routes)
		l.set6(i, routes)
		if n == 0 {
			l.setPod(o)
		}
		if err := l.fit(); err != nil {
			return nil, err
		}
		out = append(out, l)
	}
	return out, nil
}

// routesOf are the main table's routes over an interface: those on the link first, then those that need them, default routes
// last. Of two to one destination the better one stays: the messages have no metric.
func (a *Attachment) routesOf(i Interface) []Route {
	var out []Route
	for _, r := range a.Routes {
		if r.Interface == i.Name && r.Table == unix.RT_TABLE_MAIN {
			out = append(out, r)
		}
	}
	slices.SortStableFunc(out, func(x, y Route) int { return cmp.Compare(x.Priority, y.Priority) })
	seen := map[netip.Prefix]bool{}
	out = slices.DeleteFunc(out, func(r Route) bool {
		defer func() { seen[r.Destination] = true }()
		return seen[r.Destination]
	})
	slices.SortStableFunc(out, func(x, y Route) int {
		return cmp.Or(cmp.Compare(rankOf(x), rankOf(y)), cmp.Compare(y.Destination.Bits(), x.Destination.Bits()))
	})
	return out
}

// set4 takes the interface's first IPv4 address; DHCP has room for one. A client makes an on-link route of the prefix
// length, so an address whose network CNI does not have on the link gets the length 32.
func (l *lease) set4(i Interface, routes []Route) {
	at := slices.IndexFunc(i.Addresses, func(p netip.Prefix) bool { return p.Addr().Is4() })
	if at < 0 {
		return
	}
	address := i.Addresses[at]
	connected := func(r Route) bool { return r.Destination == address.Masked() && !r.Gateway.IsValid() }
	if !slices.ContainsFunc(routes, connected) {
		address = netip.PrefixFrom(address.Addr(), 32)
	}
	l.address4 = address
	l.server = netip.AddrFrom4([4]byte{192, 0, 0, 8}) // the dummy address (RFC 7600), which may only be a source
	covered := []netip.Prefix{address.Masked()}
	for _, r := range routes {
		if !r.Destination.Addr().Is4() || connected(r) {
			continue
		}
		onLink := func(p netip.Prefix) bool { return p.Contains(r.Gateway) }
		if r.Gateway.IsValid() && !slices.ContainsFunc(covered, onLink) {
			direct := Route{Destination: netip.PrefixFrom(r.Gateway, 32)}
			l.routes4 = append(l.routes4, direct)
			covered = append(covered, direct.Destination)
		}
		if !r.Gateway.IsValid() {
			covered = append(covered, r.Destination)
		}
		if r.Gateway.IsValid() { // releases are sent there, so it should be an address that the guest can reach
			l.server = r.Gateway
		}
		l.routes4 = append(l.routes4, r)
	}
}

// default4 is the gateway of the default route, if there is one.
func (l *lease) default4() netip.Addr {
	for _, r := range l.routes4 {
		if r.Destination.Bits() == 0 {
			return r.Gateway
		}
	}
	return netip.Addr{}
}

func (l *lease) set6(i Interface, routes []Route) {
	for _, p := range i.Addresses {
		if p.Addr().Is6() && !p.Addr().IsLinkLocalUnicast() {
			l.addresses6 = append(l.addresses6, p.Addr())
		}
	}
	if len(l.addresses6) == 0 {
		return
	}
	for _, r := range routes {
		switch {
		case !r.Destination.Addr().Is6() || r.Destination.Addr().IsLinkLocalUnicast():
		case !r.Gateway.IsValid():
			l.onLink6 = append(l.onLink6, r.Destination)
		default:
			l.addRoute6(r)
		}
	}
	if len(l.routers) == 0 {
		l.routers = []router{{address: routerAddr(0)}}
	}
}

func (l *lease) addRoute6(r Route) {
	at := slices.IndexFunc(l.routers, func(have router) bool { return have.gateway == r.Gateway })
	if at < 0 {
		at = len(l.routers)
		address := r.Gateway
		if !address.IsLinkLocalUnicast() {
			address = routerAddr(uint16(at + 1))
		}
		l.routers = append(l.routers, router{address: address, gateway: r.Gateway})
	}
	if r.Destination.Bits() == 0 {
		l.routers[at].isDefault = true
		return
	}
	l.routers[at].routes = append(l.routers[at].routes, r.Destination)
}

func (l *lease) setPod(o ResponderOptions) {
	l.hostname = o.Hostname
	for _, s := range o.DNS.Servers {
		if a, err := netip.ParseAddr(s); err == nil && a.Unmap().Is4() {
			l.dns4 = append(l.dns4, a.Unmap())
		} else if err == nil {
			l.dns6 = append(l.dns6, a.WithZone(""))
		}
	}
	for _, s := range o.DNS.Searches {
		if s = strings.TrimSuffix(s, "."); s != "" {
			l.searches = append(l.searches, s)
		}
	}
}

// fit takes search domains away from the end until all answers fit into a packet.
func (l *lease) fit() error {
	limit := min(answerLimit, l.mtu)
	for {
		size, err := l.largest() // a name that is too long for an option is an error
		switch {
		case err == nil && size <= limit:
			return nil
		case len(l.searches) > 0:
		case err != nil:
			return fmt.Errorf("answers on interface %s: %w", l.name, err)
		default:
			return fmt.Errorf("interface %s has so many addresses and routes that DHCP takes %d bytes; its MTU leaves %d: %w",
				l.name, size, limit, errdefs.ErrFailedPrecondition)
		}
		l.searches = l.searches[:len(l.searches)-1]
		l.lostSearches++
	}
}

// router finds the responder's router that has an address of its own making.
func (l *lease) router(address netip.Addr) (router, bool) {
	for _, r := range l.routers {
		if r.address == address && r.address != r.gateway && r.gateway.IsValid() {
			return r, true
		}
	}
	return router{}, false
}

// standIns are the routers for whose gateway the network is asked.
func (l *lease) standIns() []router {
	var out []router
	for _, r := range l.routers {
		if _, ok := l.router(r.address); ok && l.neighbors[r.gateway] == nil {
			out = append(out, r)
		}
	}
	return out
}
