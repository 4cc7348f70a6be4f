package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

const dualStack = `{"cniVersion": "1.0.0", "name": "test", "plugins": [
	{"type": "bridge", "bridge": "cni-test", "isGateway": true, "ipMasq": true, "mtu": 1400, "hairpinMode": true,
	 "ipam": {"type": "host-local", "dataDir": "$DIR/ipam",
	  "ranges": [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]],
	  "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
	{"type": "portmap", "capabilities": {"portMappings": true}},
	{"type": "bandwidth", "capabilities": {"bandwidth": true}}]}`

func request(id string) Request {
	return Request{ID: "pod-" + id, Name: id, Namespace: "default", UID: "uid-" + id}
}

// addresses returns the first IPv4 and IPv6 address.
func addresses(t *testing.T, a *Attachment) (v4, v6 string) {
	t.Helper()
	for _, ip := range a.Addresses() {
		switch {
		case ip.Is4() && v4 == "":
			v4 = ip.String()
		case ip.Is6() && v6 == "":
			v6 = ip.String()
		}
	}
	if v4 == "" || v6 == "" {
		t.Fatalf("addresses are %v; want both families", a.Addresses())
	}
	return v4, v6
}

func TestPodReachesAndIsReached(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	req := request("a")
	req.PortMappings = []PortMapping{{Protocol: "TCP", ContainerPort: 80, HostPort: 18080}}
	a := n.setup(req)
	v4, v6 := addresses(t, a)
	eth0 := a.Interfaces[0]
	want := &Attachment{
		NetNS: filepath.Join(n.dir, "netns", "pod-a"),
		Interfaces: []Interface{{
			Name: "eth0", MAC: eth0.MAC, MTU: 1400, Tap: "tap-eth0",
			Addresses: []netip.Prefix{netip.MustParsePrefix("10.99.0.2/24"), netip.MustParsePrefix("fd99::2/64")},
		}},
		Routes: []Route{
			{Destination: netip.MustParsePrefix("10.99.0.0/24"), Source: netip.MustParseAddr("10.99.0.2"), Interface: "eth0", Scope: 253, Table: 254},
			{Destination: netip.MustParsePrefix("fd99::/64"), Interface: "eth0", Priority: 256, Table: 254},
			{Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("10.99.0.1"), Interface: "eth0", Table: 254},
			{Destination: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fd99::1"), Interface: "eth0", Priority: 1024, Table: 254},
		},
	}
	equal := cmp.Comparer(func(x, y netip.Addr) bool { return x == y })
	prefixes := cmp.Comparer(func(x, y netip.Prefix) bool { return x == y })
	if diff := cmp.Diff(want, a, equal, prefixes); diff != "" {
		t.Fatalf("attachment (-want +got):\n%s", diff)
	}
	recorded, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	var again Attachment
	if err := json.Unmarshal(recorded, &again); err != nil || !reflect.DeepEqual(*a, again) {
		t.Fatalf("after JSON it is %+v (%v); want %+v", again, err, *a)
	}

	const size = 64 << 20
	g := startGuest(t, n, a, false)
	g.serve(":80", size)
	for name, address := range map[string]string{
		"IPv4": net.JoinHostPort(v4, "80"), "IPv6": net.JoinHostPort(v6, "80"), "host port": "10.99.0.1:18080",
	} {
		up, down, err := exchange("", address, size, size)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		t.Logf("%s: to the guest %.0f MB/s, from it %.0f MB/s", name, size/1e6/up.Seconds(), size/1e6/down.Seconds())
	}
	stats, err := n.Stats(a)
	if err != nil {
		t.Fatal(err)
	}
	s := stats[0]
	if len(stats) != 1 || s.Name != "eth0" || s.RxBytes < 3*size || s.TxBytes < 3*size {
		t.Errorf("stats are %+v; want at least %d bytes each way on eth0", stats, 3*size)
	}
	// Without offloads no frame would be longer than the MTU.
	if rx, tx := s.RxBytes/s.RxPackets, s.TxBytes/s.TxPackets; rx < 4*1400 && tx < 4*1400 {
		t.Errorf("frames are %d bytes to the guest and %d from it on average; segmentation offload does not pass", rx, tx)
	}

	other := n.setup(request("b"))
	g2 := startGuest(t, n, other, false)
	if _, _, err := exchange(g2.netns, net.JoinHostPort(v4, "80"), size, size); err != nil {
		t.Errorf("pod to pod: %v", err)
	}
	if _, _, err := exchange(g2.netns, "[fd99::2]:80", 1, size); err != nil {
		t.Errorf("pod to pod by IPv6: %v", err)
	}
}

func TestStatsDirection(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("dir"))
	g := startGuest(t, n, a, false)
	g.serve(":80", 1)
	const size = 8 << 20
	if _, _, err := exchange("", "10.99.0.2:80", size, 1); err != nil {
		t.Fatal(err)
	}
	stats, err := n.Stats(a)
	if err != nil {
		t.Fatal(err)
	}
	if s := stats[0]; s.RxBytes < size || s.TxBytes > size/4 {
		t.Errorf("after %d bytes to the pod its stats are %+v", size, s)
	}
}

func TestFragmentsPass(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("udp"))
	g := startGuest(t, n, a, false)
	var server net.PacketConn
	if err := inNetNS(g.netns, func() (err error) {
		server, err = net.ListenPacket("udp", ":53")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var echo sync.WaitGroup
	echo.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			size, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = server.WriteTo(buf[:size], from)
		}
	})
	defer func() { server.Close(); echo.Wait() }()
	for _, address := range []string{"10.99.0.2:53", "[fd99::2]:53"} {
		c, err := dial("", "udp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write(make([]byte, 9000)); err != nil {
			t.Fatal(err)
		}
		if size, err := c.Read(make([]byte, 64<<10)); err != nil || size != 9000 {
			t.Errorf("%s: %d bytes came back (%v); want 9000", address, size, err)
		}
	}
}

// A guest can be restarted: the same taps are taken again and the addresses stay.
func TestNetworkOutlivesGuest(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("again"))
	for range 3 {
		g := startGuest(t, n, a, false)
		g.serve(":80", 1000)
		if _, _, err := exchange("", "10.99.0.2:80", 1000, 1000); err != nil {
			t.Fatal(err)
		}
		if _, err := n.OpenTaps(a); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("OpenTaps while a guest runs: %v; want FailedPrecondition", err)
		}
		g.close()
	}
}

// While a pod's network is held, nothing passes, whichever side asks; then all does again.
func TestHold(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("held"))
	startGuest(t, n, a, false).serve(":80", 1000)
	for _, held := range []bool{false, true, true, false, false} {
		if err := n.Hold(a, held); err != nil {
			t.Fatal(err)
		}
		if _, _, err := exchange("", "10.99.0.2:80", 1000, 1000); (err != nil) != held {
			t.Errorf("held: %v, and an exchange ends with %v", held, err)
		}
	}
	if err := n.Hold(&Attachment{NetNS: n.NetNSPath("gone")}, true); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the network of no pod is held: %v", err)
	}
}

// On a bridge port in hairpin mode every multicast of a pod comes back to it. Neither the namespace's probes nor the guest's own
// may be taken for another node that has the address.
func TestGuestKeepsItsAddresses(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("dad"))
	g := startGuest(t, n, a, true)
	deadline := time.Now().Add(10 * time.Second)
	for {
		var addrs []netlink.Addr
		if err := inNetNS(g.netns, func() (err error) {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			addrs, err = netlink.AddrList(l, netlink.FAMILY_V6)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		tentative := slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&0x40 != 0 })
		if slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&0x08 != 0 }) {
			t.Fatalf("the guest found its address in use: %v", addrs)
		}
		if len(addrs) == 2 && !tentative {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("addresses are still tentative: %+v", addrs)
		}
		time.Sleep(50 * time.Millisecond) // the kernel tells of no end but by the flag
	}
	g.serve(":80", 10)
	if _, _, err := exchange("", "[fd99::2]:80", 10, 10); err != nil {
		t.Error(err)
	}
}

// Whatever is asked while there is no guest, the namespace's own stack does not answer.
func TestNamespaceIsSilent(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("quiet"))
	capture := captureFrom(t, a)
	bridge, err := netlink.LinkByName("cni-test")
	if err != nil {
		t.Fatal(err)
	}
	d := net.Dialer{Timeout: time.Second}
	for _, ip := range []string{"10.99.0.2", "fd99::2"} {
		_, err := d.Dial("tcp", net.JoinHostPort(ip, "81"))
		if err == nil || strings.Contains(err.Error(), "refused") {
			t.Errorf("dial %s: %v; want no answer at all", ip, err)
		}
		mac, err := net.ParseMAC(a.Interfaces[0].MAC)
		if err != nil {
			t.Fatal(err)
		}
		neigh := &netlink.Neigh{LinkIndex: bridge.Attrs().Index, IP: net.ParseIP(ip), HardwareAddr: mac, State: netlink.NUD_PERMANENT}
		if err := netlink.NeighSet(neigh); err != nil {
			t.Fatal(err)
		}
		_, err = d.Dial("tcp", net.JoinHostPort(ip, "81"))
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("dial %s with its MAC known: %v; want a timeout", ip, err)
		}
		if err := netlink.NeighDel(neigh); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range capture() {
		if !f.groupReport() {
			t.Errorf("the namespace sent % x", []byte(f))
		}
	}
	if stats, err := n.Stats(a); err != nil || stats[0] != (InterfaceStats{Name: "eth0"}) {
		t.Errorf("stats are %+v (%v); want nothing counted without a guest", stats, err)
	}
}

func TestPointToPoint(t *testing.T) {
	n := newNode(t)
	n.network(`{"cniVersion": "1.0.0", "name": "test", "plugins": [
		{"type": "ptp", "mtu": 1300, "ipam": {"type": "host-local", "dataDir": "$DIR/ipam",
		 "ranges": [[{"subnet": "10.98.0.0/24"}], [{"subnet": "fd98::/64"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}]}`)
	a, b := n.setup(request("p1")), n.setup(request("p2"))
	if !slices.ContainsFunc(a.Routes, func(r Route) bool { return r.Scope == 253 && r.Destination.String() == "10.98.0.1/32" }) {
		t.Errorf("routes are %+v; want one of link scope to the gateway", a.Routes)
	}
	g1, g2 := startGuest(t, n, a, false), startGuest(t, n, b, false)
	g1.serve(":80", 1<<20)
	v4, v6 := addresses(t, a)
	for _, ip := range []string{v4, v6} {
		for _, from := range []string{"", g2.netns} {
			if _, _, err := exchange(from, net.JoinHostPort(ip, "80"), 1<<20, 1<<20); err != nil {
				t.Errorf("%s from %q: %v", ip, from, err)
			}
		}
	}
}

// A meta plugin makes more than it reports, as Multus does; and networks differ in how a gateway is reached.
func TestAllInterfacesAreHandedOver(t *testing.T) {
	n := newNode(t)
	second := `{"cniVersion":"1.0.0","name":"second","type":"bridge","bridge":"cni-second","isGateway":true,"ipam":{"type":"host-local","dataDir":"$DIR/ipam","subnet":"10.97.0.0/24"}}`
	n.plugin("meta", `
PATH=/work-bin:$PATH
conf=$(cat)
if [ $CNI_COMMAND = DEL ]; then
	echo '`+second+`' | CNI_IFNAME=network-1-quite bridge-real
	exit
fi
echo '`+second+`' | CNI_IFNAME=network-1-quite bridge-real >/dev/null
nsenter --net=$CNI_NETNS ip route replace default via 169.254.1.1 dev eth0 onlink
nsenter --net=$CNI_NETNS ip neigh replace 169.254.1.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent
nsenter --net=$CNI_NETNS tc qdisc add dev eth0 clsact
nsenter --net=$CNI_NETNS ip route add 10.96.0.0/16 via 10.97.0.1 dev network-1-quite mtu 1200 table 100
echo "$conf" | sed 's/.*"prevResult":\({.*}\),"type".*/\1/'
`)
	if err := os.Symlink(filepath.Join(n.opts.BinDirs[1], "bridge"), filepath.Join(n.scripts, "bridge-real")); err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile(filepath.Join(n.scripts, "meta"))
	if err != nil {
		t.Fatal(err)
	}
	patched := strings.ReplaceAll(string(script), "/work-bin", n.scripts)
	if err := os.WriteFile(filepath.Join(n.scripts, "meta"), []byte(patched), 0o755); err != nil {
		t.Fatal(err)
	}
	n.network(strings.ReplaceAll(dualStack, `{"type": "portmap", "capabilities": {"portMappings": true}}`, `{"type": "meta"}`))
	a := n.setup(request("meta"))
	if len(a.Interfaces) != 2 || a.Interfaces[0].Name != "eth0" || a.Interfaces[1].Name != "network-1-quite" {
		t.Fatalf("interfaces are %+v; want eth0 and network-1-quite", a.Interfaces)
	}
	if tap := a.Interfaces[1].Tap; len(tap) > 15 || tap == "tap-eth0" {
		t.Errorf("tap of the second interface is %q", tap)
	}
	gateway := netip.MustParseAddr("169.254.1.1")
	for _, want := range []Route{
		{Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: gateway, Interface: "eth0", Table: 254, OnLink: true},
		{Destination: netip.MustParsePrefix("10.96.0.0/16"), Gateway: netip.MustParseAddr("10.97.0.1"), Interface: "network-1-quite", MTU: 1200, Table: 100},
	} {
		if !slices.Contains(a.Routes, want) {
			t.Errorf("routes are %+v; want %+v among them", a.Routes, want)
		}
	}
	if want := (Neighbor{Address: gateway, MAC: "02:00:00:00:00:01", Interface: "eth0"}); !slices.Contains(a.Neighbors, want) {
		t.Errorf("neighbors are %+v; want %+v", a.Neighbors, want)
	}
	g := startGuest(t, n, a, false)
	g.serve(":80", 10)
	for _, ip := range []string{"10.99.0.2:80", "10.97.0.2:80"} {
		if _, _, err := exchange("", ip, 10, 10); err != nil {
			t.Errorf("%s: %v", ip, err)
		}
	}
}

func TestBandwidth(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	req := request("slow")
	req.Annotations = map[string]string{ingressBandwidth: "40M", egressBandwidth: "80M"}
	a := n.setup(req)
	g := startGuest(t, n, a, false)
	const size = 10 << 20
	g.serve(":80", size)
	up, down, err := exchange("", "10.99.0.2:80", size, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes: in %v at 40 Mbit/s, out %v at 80 Mbit/s", size, up, down)
	// 84 Mbit less the burst of a quarter of a second.
	if up < 1500*time.Millisecond || up > 6*time.Second {
		t.Errorf("to the pod it took %v; want about 1.85 s", up)
	}
	if down < 600*time.Millisecond || down > 4*time.Second {
		t.Errorf("from the pod it took %v; want about 0.8 s", down)
	}
}

func TestManyAtOnce(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	const pods = 12
	var work sync.WaitGroup
	start := time.Now()
	for i := range pods {
		work.Go(func() {
			req := request(fmt.Sprint("many", i))
			if _, err := n.Setup(t.Context(), req); err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	made := time.Since(start)
	ids, err := n.List()
	if err != nil || len(ids) != pods {
		t.Errorf("List() = %q, %v; want %d", ids, err, pods)
	}
	for _, id := range ids {
		work.Go(func() { n.teardown(Request{ID: id}) })
	}
	work.Wait()
	t.Logf("%d pods at once: set up in %v, torn down in %v", pods, made, time.Since(start)-made)
}

func TestSetupCostsOfOne(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	for range 3 {
		start := time.Now()
		req := request("one")
		if _, err := n.Setup(context.Background(), req); err != nil {
			t.Fatal(err)
		}
		made := time.Since(start)
		n.teardown(Request{ID: req.ID})
		t.Logf("set up in %v, torn down in %v", made, time.Since(start)-made)
	}
}
