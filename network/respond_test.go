package network

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/mdlayher/ndp"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
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

// Whoever answers, and however often the guest and the daemon begin anew: the guest is always told the same.
func TestMachineKeepsItsNetwork(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("again"))
	for round := range 2 {
		r := respond(t, n, a, machineOptions)
		for range 2 { // the guest is reset, its container restarted
			m := startMachine(t, n, a)
			m.configure(t, round == 1)
			m.serve(":80", 10)
			if _, _, err := exchange("", "[fd99::2]:80", 10, 10); err != nil {
				t.Error(err)
			}
			m.close()
		}
		r.Close()
	}
}

// A daemon that is killed leaves its guest's questions inside the pod, and nothing that hinders the next one.
func TestResponderIsKilled(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("killed"))
	for range 3 {
		killResponder(t, a)
	}
	before := countFilters(t, a)
	capture := captureFrom(t, a)
	m := startMachine(t, n, a)
	guest := m.packets("eth0")
	for range 3 { // nobody answers, and nothing comes out
		writeAll(t, guest, questions(t, a)...)
	}
	r := respond(t, n, a, machineOptions)
	defer r.Close()
	m.configure(t, false)
	if err := m.hears(beyond(t, "fd55::1")); err != nil {
		t.Error(err)
	}
	checkNoLeak(t, capture())
	want := map[string]int{"tap-eth0": len(guestGuards()) + 1, "eth0": len(wireGuards()) + 1}
	if after := countFilters(t, a); !maps.Equal(before, want) || !maps.Equal(after, want) {
		t.Errorf("tc has %v filters after kills and %v after a new beginning; want %v", before, after, want)
	}
	for range 2 {
		if err := n.Unguard(a); err != nil {
			t.Error(err)
		}
	}
	if got := countFilters(t, a); !maps.Equal(got, map[string]int{"tap-eth0": 1, "eth0": 1}) {
		t.Errorf("tc has %v filters after Unguard; want the redirects only", got)
	}
}

func killResponder(t *testing.T, a *Attachment) {
	t.Helper()
	record, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), respondEnv+"="+string(record))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ready := make([]byte, 5)
	_, err = io.ReadFull(out, ready)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil || string(ready) != "ready" {
		t.Fatalf("the responder's process said %q (%v)", ready, err)
	}
}

// respondUntilKilled is the process that killResponder ends.
func respondUntilKilled() {
	a := &Attachment{}
	err := json.Unmarshal([]byte(os.Getenv(respondEnv)), a)
	if err == nil {
		_, err = (&Manager{}).Respond(a, machineOptions)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Print("ready")
	select {}
}

// countFilters counts tc's filters on both sides of eth0; the heads of u32's tables are none.
func countFilters(t *testing.T, a *Attachment) map[string]int {
	t.Helper()
	out := map[string]int{}
	err := inNetNS(a.NetNS, func() error {
		for _, name := range []string{"eth0", "tap-eth0"} {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			list, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
			if err != nil {
				return err
			}
			for _, f := range list {
				if u, ok := f.(*netlink.U32); ok && u.Sel != nil {
					out[name]++
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// packets opens an interface of the guest for raw frames.
func (m *machine) packets(name string) (f *os.File) {
	m.t.Helper()
	all, err := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{Val: 1 << 16}})
	if err != nil {
		m.t.Fatal(err)
	}
	err = inNetNS(m.netns, func() (err error) {
		f, err = openPackets(name, all)
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { f.Close() })
	return f
}

func writeAll(t *testing.T, to *os.File, list ...[]byte) {
	t.Helper()
	for _, f := range list {
		if _, err := to.Write(f); err != nil {
			t.Fatal(err)
		}
	}
}

// questions are one of each kind that a guest asks the responder.
func questions(t *testing.T, a *Attachment) [][]byte {
	t.Helper()
	mac, err := net.ParseMAC(a.Interfaces[0].MAC)
	if err != nil {
		t.Fatal(err)
	}
	solicitation, err := ndpFrame(&ndp.RouterSolicitation{}, mac, net.HardwareAddr{0x33, 0x33, 0, 0, 0, 2}, linkLocal(mac), netip.MustParseAddr("ff02::2"))
	if err != nil {
		t.Fatal(err)
	}
	l := &lease{mac: mac}
	neighbor, err := l.ask(routerAddr(1), linkLocal(mac))
	if err != nil {
		t.Fatal(err)
	}
	return [][]byte{discover(t, mac), solicit(t, mac), solicitation, neighbor}
}

var broadcastMAC = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func discover(t *testing.T, mac net.HardwareAddr, mods ...dhcpv4.Modifier) []byte {
	t.Helper()
	m, err := dhcpv4.NewDiscovery(mac, mods...)
	if err != nil {
		t.Fatal(err)
	}
	return clientFrame4(mac, m)
}

func clientFrame4(mac net.HardwareAddr, m *dhcpv4.DHCPv4) []byte {
	return packet{
		fromMAC: mac, toMAC: broadcastMAC, from: netip.IPv4Unspecified(), to: netip.AddrFrom4([4]byte{255, 255, 255, 255}), hopLimit: 64,
		protocol: unix.IPPROTO_UDP, fromPort: portDHCPClient, toPort: portDHCPServer, payload: m.ToBytes(),
	}.frame()
}

func solicit(t *testing.T, mac net.HardwareAddr) []byte {
	t.Helper()
	m, err := dhcpv6.NewSolicit(mac)
	if err != nil {
		t.Fatal(err)
	}
	return clientFrame6(mac, m)
}

func clientFrame6(mac net.HardwareAddr, m *dhcpv6.Message) []byte {
	return packet{
		fromMAC: mac, toMAC: net.HardwareAddr{0x33, 0x33, 0, 1, 0, 2}, from: linkLocal(mac), to: netip.MustParseAddr("ff02::1:2"), hopLimit: 1,
		protocol: unix.IPPROTO_UDP, fromPort: portDHCP6Client, toPort: portDHCP6Server, payload: m.ToBytes(),
	}.frame()
}

// What servers and routers of the network say reaches a container's guest as ever, and never a machine.
func TestForeignAnswersStayOut(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("foreign"))
	m := startMachine(t, n, a)
	guest := m.packets("eth0")
	all, err := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{}})
	if err != nil {
		t.Fatal(err)
	}
	bridge, err := openPackets("cni-test", all)
	if err != nil {
		t.Fatal(err)
	}
	defer bridge.Close()
	foreign := foreignFrames(t)
	last := packet{
		fromMAC: serverMAC, toMAC: broadcastMAC, from: netip.MustParseAddr("10.99.0.1"), to: netip.MustParseAddr("10.99.0.255"),
		hopLimit: 64, protocol: unix.IPPROTO_UDP, fromPort: 67, toPort: 69, payload: []byte("the end"),
	}.frame()
	check := func(when string, want int) {
		t.Helper()
		for _, f := range foreign {
			writeAll(t, bridge, f)
		}
		writeAll(t, bridge, last)
		if got := countUntil(t, guest, foreign, last); got != want {
			t.Errorf("%s: %d of %d foreign frames reached the guest; want %d", when, got, len(foreign), want)
		}
	}
	check("without a responder", len(foreign))
	r := respond(t, n, a, machineOptions)
	check("with a responder", 0)
	r.Close()
	check("with the responder closed", 0)
	if err := n.Unguard(a); err != nil {
		t.Fatal(err)
	}
	check("after Unguard", len(foreign))
}

// foreignFrames are a DHCP server's and a router's answers, advertisements behind extension headers among them.
func foreignFrames(t *testing.T) (out [][]byte) {
	t.Helper()
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	from := linkLocal(mac)
	for _, p := range []packet{
		{toMAC: broadcastMAC, from: netip.MustParseAddr("10.99.0.1"), to: netip.MustParseAddr("255.255.255.255"), fromPort: 67, toPort: 68},
		{toMAC: allNodesMAC, from: from, to: allNodes, fromPort: 547, toPort: 546},
	} {
		p.fromMAC, p.hopLimit, p.protocol, p.payload = mac, 64, unix.IPPROTO_UDP, []byte("foreign")
		out = append(out, p.frame())
	}
	ra, err := ndp.MarshalMessageChecksum(&ndp.RouterAdvertisement{RouterLifetime: routerLifetime}, from, allNodes)
	if err != nil {
		t.Fatal(err)
	}
	p := packet{fromMAC: mac, toMAC: allNodesMAC, from: from, to: allNodes, hopLimit: ndpHopLimit, protocol: unix.IPPROTO_ICMPV6, payload: ra}
	out = append(out, p.frame())
	for _, header := range []uint8{unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS, unix.IPPROTO_FRAGMENT, unix.IPPROTO_ROUTING} {
		hidden := p
		hidden.protocol = header
		hidden.payload = append([]byte{unix.IPPROTO_ICMPV6, 0, 1, 4, 0, 0, 0, 0}, ra...)
		out = append(out, hidden.frame())
	}
	return out
}

// countUntil counts the frames that come before the last one does.
func countUntil(t *testing.T, from *os.File, list [][]byte, last []byte) (count int) {
	t.Helper()
	if err := from.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64<<10)
	for {
		size, err := from.Read(buf)
		if err != nil {
			t.Fatalf("the last frame did not come: %v", err)
		}
		if bytes.Equal(buf[:size], last) {
			return count
		}
		if slices.ContainsFunc(list, func(f []byte) bool { return bytes.Equal(buf[:size], f) }) {
			count++
		}
	}
}

// A guest that floods is answered at a bounded rate, and served as soon as it behaves.
func TestFloodIsBounded(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("flood"))
	r := respond(t, n, a, machineOptions)
	defer r.Close()
	m := startMachine(t, n, a)
	guest := m.packets("eth0")
	ask := discover(t, mustMAC(t, a))
	var answers atomic.Int64
	var reader sync.WaitGroup
	reader.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			size, err := guest.Read(buf)
			if err != nil {
				return
			}
			if p, ok := parsePacket(buf[:size]); ok && p.toPort == portDHCPClient {
				answers.Add(1)
			}
		}
	})
	start := time.Now()
	sent := 0
	for ; time.Since(start) < 3*time.Second; sent++ {
		if _, err := guest.Write(ask); err != nil && !errors.Is(err, unix.ENOBUFS) {
			t.Fatal(err)
		}
	}
	bound := int64(answerBurst + answersPerSecond*time.Since(start)/time.Second + 1)
	if got := answers.Load(); got == 0 || got > bound {
		t.Errorf("%d questions had %d answers; want some, at most %d", sent, got, bound)
	}
	t.Logf("%d questions in %v had %d answers", sent, time.Since(start), answers.Load())
	guest.Close()
	reader.Wait()
	m.lease4(a.Interfaces[0])
}

func mustMAC(t *testing.T, a *Attachment) net.HardwareAddr {
	t.Helper()
	mac, err := net.ParseMAC(a.Interfaces[0].MAC)
	if err != nil {
		t.Fatal(err)
	}
	return mac
}
