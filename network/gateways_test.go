package network

import (
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// afterCNI makes the last plugin of the network a script that changes what the others made; conf is their list.
func afterCNI(n *node, conf, script string) {
	n.t.Helper()
	n.plugin("after", `
if [ $CNI_COMMAND = DEL ]; then exit; fi
conf=$(cat)
in="nsenter --net=$CNI_NETNS"
`+script+`
echo "$conf" | sed 's/.*"prevResult":\({.*}\),"type".*/\1/'
`)
	n.network(strings.TrimSuffix(conf, "]}") + `, {"type": "after"}]}`)
}

// Networks that route to each pod alone give it a host address and a gateway outside of any network: one that answers no ARP, and
// by IPv6 its link-local address or a global one.
func TestMachineGatewaysOffTheLink(t *testing.T) {
	const common = `
$in ip addr flush dev eth0 scope global
$in ip addr add 10.99.0.2/32 dev eth0
$in ip -6 addr add fd99::2/128 dev eth0 nodad
mac=$(ip -o link show cni-test | sed 's/.*link.ether \([^ ]*\).*/\1/')
$in ip route add 169.254.1.1 dev eth0 scope link
$in ip route add default via 169.254.1.1 dev eth0
$in ip neigh replace 169.254.1.1 lladdr $mac dev eth0 nud permanent
`
	for name, c := range map[string]struct {
		script string
		router func(bridge netip.Addr) netip.Addr
	}{
		"link-local": {`
ll=$(ip -6 -o addr show dev cni-test scope link | sed 's/.*inet6 \([^/]*\).*/\1/')
$in ip -6 route replace default via $ll dev eth0`, func(bridge netip.Addr) netip.Addr { return bridge }},
		"global": {`
$in ip -6 route add fd99::1 dev eth0
$in ip -6 route replace default via fd99::1 dev eth0`, func(netip.Addr) netip.Addr { return routerAddr(1) }},
		"global that answers no NDP": {`
$in ip -6 route add fd77::1 dev eth0
$in ip -6 route replace default via fd77::1 dev eth0
$in ip neigh replace fd77::1 lladdr $mac dev eth0 nud permanent`, func(netip.Addr) netip.Addr { return routerAddr(1) }},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			afterCNI(n, dualStack, common+c.script)
			a := n.setup(request("offlink"))
			defer respond(t, n, a, machineOptions).Close()
			m := startMachine(t, n, a)
			ack := m.lease4(a.Interfaces[0]).ACK
			if got := routesText(ack.ClasslessStaticRoute()); ack.SubnetMask().String() != "ffffffff" || got != "169.254.1.1/32 0.0.0.0, 0.0.0.0/0 169.254.1.1" {
				t.Errorf("mask is %s, routes are %s", ack.SubnetMask(), got)
			}
			m.apply4(a.Interfaces[0], ack)
			m.lease6(a.Interfaces[0], false)
			bridge := linkLocal(nodeMAC(t, "cni-test"))
			m.eventually("a default route", hasRoute6("eth0", "::/0", c.router(bridge)))
			for _, address := range []string{"10.55.0.1", "fd55::1"} {
				if err := m.hears(beyond(t, address)); err != nil {
					t.Errorf("to %s: %v", address, err)
				}
			}
			m.serve(":80", 10)
			for _, ip := range []string{"10.99.0.2", "fd99::2"} {
				if _, _, err := exchange("", net.JoinHostPort(ip, "80"), 10, 10); err != nil {
					t.Errorf("from the node to %s: %v", ip, err)
				}
			}
		})
	}
}

// A ptp network has its own subnet behind the gateway, not on the link.
func TestMachinePointToPoint(t *testing.T) {
	n := newNode(t)
	n.network(`{"cniVersion": "1.0.0", "name": "test", "plugins": [
		{"type": "ptp", "mtu": 1300, "ipam": {"type": "host-local", "dataDir": "$DIR/ipam",
		 "ranges": [[{"subnet": "10.98.0.0/24"}], [{"subnet": "fd98::/64"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}]}`)
	var machines []*machine
	for _, name := range []string{"p1", "p2"} {
		a := n.setup(request(name))
		defer respond(t, n, a, machineOptions).Close()
		m := startMachine(t, n, a)
		ack := m.lease4(a.Interfaces[0]).ACK
		want := "10.98.0.1/32 0.0.0.0, 10.98.0.0/24 10.98.0.1, 0.0.0.0/0 10.98.0.1"
		if got := routesText(ack.ClasslessStaticRoute()); got != want {
			t.Errorf("routes are %s; want %s", got, want)
		}
		m.apply4(a.Interfaces[0], ack)
		m.lease6(a.Interfaces[0], false)
		m.eventually("a default route", hasRoute6("eth0", "::/0", routerAddr(1)))
		machines = append(machines, m)
	}
	machines[0].serve(":80", 10)
	v4, v6 := addresses(t, machines[0].a)
	for _, ip := range []string{v4, v6} {
		for _, from := range []string{"", machines[1].netns} {
			if _, _, err := exchange(from, net.JoinHostPort(ip, "80"), 10, 10); err != nil {
				t.Errorf("%s from %q: %v", ip, from, err)
			}
		}
	}
}

func TestMachineWithSeveralInterfaces(t *testing.T) {
	n := newNode(t)
	second := `{"cniVersion":"1.0.0","name":"second","type":"bridge","bridge":"cni-second","isGateway":true,"ipam":{"type":"host-local",` +
		`"dataDir":"$DIR/ipam","ranges":[[{"subnet":"10.97.0.0/24"}],[{"subnet":"fd97::/64"}]]}}`
	real := filepath.Join(n.opts.BinDirs[1], "bridge")
	n.plugin("second", `
conf=$(cat)
export CNI_IFNAME=net1
if [ $CNI_COMMAND = DEL ]; then echo '`+second+`' | `+real+`; exit; fi
echo '`+second+`' | `+real+` >/dev/null
nsenter --net=$CNI_NETNS ip route add 10.56.0.0/16 via 10.97.0.1
nsenter --net=$CNI_NETNS ip -6 route add fd56::/32 via fd97::1
echo "$conf" | sed 's/.*"prevResult":\({.*}\),"type".*/\1/'
`)
	n.network(strings.TrimSuffix(dualStack, "]}") + `, {"type": "second"}]}`)
	a := n.setup(request("several"))
	defer respond(t, n, a, machineOptions).Close()
	m := startMachine(t, n, a)
	m.configure(t, false)
	net1 := a.Interfaces[1]
	ack := m.lease4(net1).ACK
	if got := routesText(ack.ClasslessStaticRoute()); got != "10.56.0.0/16 10.97.0.1" || len(ack.Router()) > 0 || len(ack.DNS()) > 0 || ack.HostName() != "" {
		t.Errorf("net1 is told %s", ack.Summary())
	}
	m.apply4(net1, ack)
	if reply := m.lease6(net1, true); len(addresses6(reply)) != 1 || addresses6(reply)[0] != a.Interfaces[1].Addresses[1].Addr() || reply.Options.DNS() != nil {
		t.Errorf("net1 is told %s", reply.Summary())
	}
	m.eventually("the route over net1", hasRoute6("net1", "fd56::/32", routerAddr(1)))
	m.eventually("the network on net1", hasRoute6("net1", "fd97::/64", netip.Addr{}))
	for _, address := range []string{"10.55.0.1", "fd55::1", "10.56.0.1", "fd56::1"} {
		if err := m.hears(beyond(t, address)); err != nil {
			t.Errorf("to %s: %v", address, err)
		}
	}
	err := inNetNS(m.netns, func() error {
		for destination, want := range map[string]string{"10.56.0.1": "net1", "fd56::1": "net1", "10.55.0.1": "eth0", "fd55::1": "eth0"} {
			routes, err := netlink.RouteGet(net.ParseIP(destination))
			if err != nil {
				return err
			}
			l, err := netlink.LinkByIndex(routes[0].LinkIndex)
			if err != nil {
				return err
			}
			if l.Attrs().Name != want {
				t.Errorf("%s is reached over %s; want %s", destination, l.Attrs().Name, want)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
