package network

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A guest that knows nothing gets all that CNI gave to the pod and reaches, and is reached by, what a pod does.
func TestMachineConfiguresItself(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("machine"))
	r := respond(t, n, a, machineOptions)
	defer r.Close()
	capture := captureFrom(t, a)
	m := startMachine(t, n, a)
	m.configure(t, false)
	m.serve(":80", 1000)
	v4, v6 := addresses(t, a)
	for _, ip := range []string{v4, v6} {
		if _, _, err := exchange("", net.JoinHostPort(ip, "80"), 1000, 1000); err != nil {
			t.Errorf("from the node: %v", err)
		}
	}
	for _, address := range []string{"10.55.0.1", "fd55::1"} {
		if err := m.hears(beyond(t, address)); err != nil {
			t.Errorf("to %s beyond the gateway: %v", address, err)
		}
	}
	m.eventually("the router is reachable with the gateway's MAC", m.neighborIs("eth0", routerAddr(1), nodeMAC(t, "cni-test")))
	checkNoLeak(t, capture())
}

// configure checks what eth0 is told on the usual network and configures the guest by it.
func (m *machine) configure(t *testing.T, rapid bool) {
	t.Helper()
	eth0 := m.a.Interfaces[0]
	v4, v6 := addresses(t, m.a)
	ack := m.lease4(eth0).ACK
	mtu, _ := dhcpv4.GetUint16(dhcpv4.OptionInterfaceMTU, ack.Options)
	for what, got := range map[string][2]any{
		"address":  {ack.YourIPAddr.String(), v4},
		"mask":     {ack.SubnetMask().String(), "ffffff00"},
		"lease":    {ack.IPAddressLeaseTime(0), infinite},
		"router":   {ack.Router()[0].String(), "10.99.0.1"},
		"DNS":      {ack.DNS()[0].String(), "10.96.0.10"},
		"search":   {ack.DomainSearch().String(), "[default.svc.cluster.local cluster.local]"},
		"hostname": {ack.HostName(), "web-0"},
		"MTU":      {mtu, uint16(1400)},
		"routes":   {len(ack.ClasslessStaticRoute()), 0}, // the router says it all
	} {
		if got[0] != got[1] {
			t.Errorf("DHCPv4's %s is %v; want %v", what, got[0], got[1])
		}
	}
	m.apply4(eth0, ack)
	reply := m.lease6(eth0, rapid)
	if got := addresses6(reply); len(got) != 1 || got[0].String() != v6 {
		t.Errorf("DHCPv6's addresses are %v; want %s", got, v6)
	}
	if dns := reply.Options.DNS(); len(dns) != 1 || dns[0].String() != "fd96::10" {
		t.Errorf("DHCPv6's name servers are %v", dns)
	}
	m.eventually("a default route", hasRoute6("eth0", "::/0", routerAddr(1)))
	m.eventually("the network on the link", hasRoute6("eth0", "fd99::/64", netip.Addr{}))
}

func (m *machine) neighborIs(name string, address netip.Addr, mac net.HardwareAddr) func() (bool, error) {
	return func() (bool, error) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return false, err
		}
		list, err := netlink.NeighList(l.Attrs().Index, netlink.FAMILY_V6)
		return slices.ContainsFunc(list, func(n netlink.Neigh) bool {
			return addrOf(n.IP) == address && n.HardwareAddr.String() == mac.String() && n.State&netlink.NUD_REACHABLE != 0 && n.Flags&netlink.NTF_ROUTER != 0
		}), err
	}
}

func nodeMAC(t *testing.T, name string) net.HardwareAddr {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().HardwareAddr
}

// checkNoLeak looks for the guest's questions to the responder in what came out on the node.
func checkNoLeak(t *testing.T, frames []frame) {
	t.Helper()
	seen := false
	for _, f := range frames {
		seen = true
		p, ok := parsePacket(f)
		switch {
		case !ok:
		case p.toPort == portDHCPServer, p.toPort == portDHCP6Server:
			t.Errorf("DHCP came out: % x", []byte(f))
		case p.protocol == unix.IPPROTO_ICMPV6 && len(p.payload) > 0 && p.payload[0] == icmpRouterSolicitation:
			t.Errorf("a router solicitation came out: % x", []byte(f))
		case p.protocol == unix.IPPROTO_ICMPV6 && len(p.payload) >= 24 && p.payload[0] == icmpNeighborSolicitation &&
			binary.BigEndian.Uint32(p.payload[16:]) == 0x766d7200:
			t.Errorf("a question for the responder's router came out: % x", []byte(f))
		}
	}
	if !seen {
		t.Error("nothing at all came out")
	}
}
