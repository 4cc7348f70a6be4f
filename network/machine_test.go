package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/dhcpv6/nclient6"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// machine is a guest that configures itself: router advertisements are its kernel's, DHCP is a client library's.
type machine struct {
	*guest
	a *Attachment
}

// startMachine plugs in a guest as a machine's firmware and kernel find it: it knows only its MACs.
func startMachine(t *testing.T, n *node, a *Attachment) *machine {
	t.Helper()
	g := plugGuest(t, n, a, map[string]string{
		"accept_ra": "2", "router_solicitations": "3", "accept_dad": "1", "dad_transmits": "1", "accept_ra_rt_info_max_plen": "128",
	})
	err := inNetNS(g.netns, func() error {
		for _, i := range a.Interfaces {
			l, err := netlink.LinkByName(i.Name)
			if err != nil {
				return err
			}
			mac, err := net.ParseMAC(i.MAC)
			if err != nil {
				return err
			}
			if err := errors.Join(netlink.LinkSetHardwareAddr(l, mac), netlink.LinkSetUp(l)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return &machine{guest: g, a: a}
}

// eventually waits for a condition on what the kernel has done, which it tells of in no other way.
func (m *machine) eventually(what string, holds func() (bool, error)) {
	m.t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		var ok bool
		err := inNetNS(m.netns, func() (err error) {
			ok, err = holds()
			return err
		})
		if err != nil {
			m.t.Fatal(err)
		}
		if ok {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("%s: has not come about; routes are %v", what, m.routes())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (m *machine) routes() (out []string) {
	m.t.Helper()
	err := inNetNS(m.netns, func() error {
		list, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
		for _, r := range list {
			out = append(out, r.String())
		}
		return err
	})
	if err != nil {
		m.t.Error(err)
	}
	return out
}

// hasRoute6 tells of a route that the kernel made of an advertisement; gw is invalid for one on the link.
func hasRoute6(name, dst string, gw netip.Addr) func() (bool, error) {
	want := netip.MustParsePrefix(dst)
	return func() (bool, error) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return false, err
		}
		list, err := netlink.RouteList(l, netlink.FAMILY_V6)
		return slices.ContainsFunc(list, func(r netlink.Route) bool {
			have, ok := prefixOf(r.Dst)
			if !ok {
				have = netip.MustParsePrefix("::/0")
			}
			return have == want && addrOf(r.Gw) == gw
		}), err
	}
}

// lease4 asks by DHCPv4 on an interface.
func (m *machine) lease4(i Interface) *nclient4.Lease {
	m.t.Helper()
	var c *nclient4.Client
	err := inNetNS(m.netns, func() (err error) {
		c, err = nclient4.New(i.Name, nclient4.WithTimeout(2*time.Second), nclient4.WithRetry(3))
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(m.t.Context(), 10*time.Second)
	defer cancel()
	l, err := c.Request(ctx)
	if err != nil {
		m.t.Fatalf("DHCPv4 on %s: %v", i.Name, err)
	}
	return l
}

// apply4 configures the interface as a client does by RFC 3442.
func (m *machine) apply4(i Interface, ack *dhcpv4.DHCPv4) {
	m.t.Helper()
	err := inNetNS(m.netns, func() error {
		l, err := netlink.LinkByName(i.Name)
		if err != nil {
			return err
		}
		mtu, err := dhcpv4.GetUint16(dhcpv4.OptionInterfaceMTU, ack.Options)
		if err != nil {
			return err
		}
		address := &net.IPNet{IP: ack.YourIPAddr, Mask: ack.SubnetMask()}
		if err := errors.Join(netlink.LinkSetMTU(l, int(mtu)), netlink.AddrReplace(l, &netlink.Addr{IPNet: address})); err != nil {
			return err
		}
		routes := ack.ClasslessStaticRoute()
		if routes == nil && len(ack.Router()) > 0 {
			routes = append(routes, &dhcpv4.Route{Dest: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, Router: ack.Router()[0]})
		}
		for _, r := range routes {
			nl := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: r.Dest, Gw: r.Router}
			if r.Router.IsUnspecified() {
				nl.Gw, nl.Scope = nil, unix.RT_SCOPE_LINK
			}
			if err := netlink.RouteReplace(nl); err != nil {
				return fmt.Errorf("%s: %w", r, err)
			}
		}
		return nil
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// client6 makes a DHCPv6 client for an interface. Zones are numbers, since the net package remembers names of another namespace.
func (m *machine) client6(i Interface) *nclient6.Client {
	m.t.Helper()
	mac, err := net.ParseMAC(i.MAC)
	if err != nil {
		m.t.Fatal(err)
	}
	own := linkLocal(mac)
	var c *nclient6.Client
	m.eventually("a link-local address that is not tentative", func() (bool, error) {
		l, err := netlink.LinkByName(i.Name)
		if err != nil {
			return false, err
		}
		zone := strconv.Itoa(l.Attrs().Index)
		conn, err := net.ListenUDP("udp6", &net.UDPAddr{IP: own.AsSlice(), Port: portDHCP6Client, Zone: zone})
		if errors.Is(err, unix.EADDRNOTAVAIL) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		servers := &net.UDPAddr{IP: net.ParseIP("ff02::1:2"), Port: portDHCP6Server, Zone: zone}
		c, err = nclient6.NewWithConn(conn, mac, nclient6.WithTimeout(2*time.Second), nclient6.WithRetry(3), nclient6.WithBroadcastAddr(servers))
		return err == nil, err
	})
	return c
}

// lease6 asks by DHCPv6, in two messages or four, and configures the addresses.
func (m *machine) lease6(i Interface, rapid bool) *dhcpv6.Message {
	m.t.Helper()
	c := m.client6(i)
	defer c.Close()
	ctx, cancel := context.WithTimeout(m.t.Context(), 10*time.Second)
	defer cancel()
	var reply *dhcpv6.Message
	var err error
	if rapid {
		reply, err = c.RapidSolicit(ctx)
	} else if adv, serr := c.Solicit(ctx); serr == nil {
		reply, err = c.Request(ctx, adv)
	} else {
		err = serr
	}
	if err != nil {
		m.t.Fatalf("DHCPv6 on %s: %v", i.Name, err)
	}
	err = inNetNS(m.netns, func() error {
		l, err := netlink.LinkByName(i.Name)
		if err != nil {
			return err
		}
		for _, a := range reply.Options.OneIANA().Options.Addresses() {
			host := &net.IPNet{IP: a.IPv6Addr, Mask: net.CIDRMask(128, 128)}
			if err := netlink.AddrReplace(l, &netlink.Addr{IPNet: host, Flags: unix.IFA_F_NODAD}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return reply
}

func addresses6(m *dhcpv6.Message) (out []netip.Addr) {
	for _, a := range m.Options.OneIANA().Options.Addresses() {
		if a.ValidLifetime == infinite && a.PreferredLifetime == infinite {
			out = append(out, addrOf(a.IPv6Addr))
		}
	}
	return out
}

// beyond gives the node an address behind the gateway and a server on it that says hello.
func beyond(t *testing.T, address string) (hostPort string) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr(address)
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(ip, ip.BitLen())), Flags: unix.IFA_F_NODAD}
	if err := netlink.AddrReplace(lo, addr); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("hello"))
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		if err := netlink.AddrDel(lo, addr); err != nil {
			t.Error(err)
		}
	})
	// The kernel makes an IPv6 address's route in its own time.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		c, err := net.DialTimeout("tcp", l.Addr().String(), time.Second)
		if err == nil {
			c.Close()
			return l.Addr().String()
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// hears says whether a server's hello comes to the guest.
func (m *machine) hears(hostPort string) error {
	c, err := dial(m.netns, "tcp", hostPort)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 5)
	if _, err := c.Read(buf); err != nil || string(buf) != "hello" {
		return fmt.Errorf("read %q: %w", buf, err)
	}
	return nil
}

var machineOptions = ResponderOptions{
	DNS:      DNS{Servers: []string{"10.96.0.10", "fd96::10"}, Searches: []string{"default.svc.cluster.local", "cluster.local."}, Options: []string{"ndots:5"}},
	Hostname: "web-0",
}

func respond(t *testing.T, n *node, a *Attachment, o ResponderOptions) *Responder {
	t.Helper()
	r, err := n.Respond(a, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// routesText is one "destination gateway" for each route, in their order.
func routesText(list dhcpv4.Routes) string {
	var out []string
	for _, r := range list {
		out = append(out, r.Dest.String()+" "+r.Router.String())
	}
	return strings.Join(out, ", ")
}
