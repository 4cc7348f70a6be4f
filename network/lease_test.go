package network

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/mdlayher/ndp"
)

const testMAC = "02:00:00:00:00:02"

func testRoute(destination, gateway string) Route {
	r := Route{Destination: netip.MustParsePrefix(destination), Interface: "eth0", Table: 254}
	if gateway != "" {
		r.Gateway = netip.MustParseAddr(gateway)
	}
	return r
}

func testAttachment(addresses []string, routes ...Route) *Attachment {
	i := Interface{Name: "eth0", MAC: testMAC, MTU: 1450, Tap: "tap-eth0"}
	for _, a := range addresses {
		i.Addresses = append(i.Addresses, netip.MustParsePrefix(a))
	}
	return &Attachment{Interfaces: []Interface{i}, Routes: routes}
}

func bridged() *Attachment {
	return testAttachment([]string{"10.0.0.5/24", "fd00::5/64"}, testRoute("10.0.0.0/24", ""), testRoute("0.0.0.0/0", "10.0.0.1"),
		testRoute("fd00::/64", ""), testRoute("::/0", "fd00::1"))
}

func oneLease(t *testing.T, a *Attachment, o ResponderOptions) *lease {
	t.Helper()
	leases, err := a.leases(o)
	if err != nil {
		t.Fatal(err)
	}
	return leases[0]
}

// What CNI made, in the words of DHCP and router advertisements.
func TestLeases(t *testing.T) {
	metric := func(r Route, priority, table int) Route { r.Priority, r.Table = priority, table; return r }
	for name, c := range map[string]struct {
		a      *Attachment
		v4, v6 string
	}{
		"bridge": {
			bridged(),
			"10.0.0.5/24 by 10.0.0.1 router 10.0.0.1",
			"[fd00::5] on link [fd00::/64]; fe80::766d:7200:0:1 for fd00::1 default true []",
		},
		"more routes than a router says": {
			testAttachment([]string{"10.0.0.5/24"}, testRoute("10.0.0.0/24", ""), testRoute("10.9.0.0/16", "10.0.0.9"), testRoute("0.0.0.0/0", "10.0.0.1")),
			"10.0.0.5/24 by 10.0.0.1 router 10.0.0.1 10.9.0.0/16 10.0.0.9, 0.0.0.0/0 10.0.0.1", "[] on link []",
		},
		"gateway that no route covers": {
			testAttachment([]string{"10.0.0.5/32"}, testRoute("0.0.0.0/0", "169.254.1.1"), testRoute("10.9.0.0/16", "169.254.1.1")),
			"10.0.0.5/32 by 169.254.1.1 router 169.254.1.1 169.254.1.1/32 0.0.0.0, 10.9.0.0/16 169.254.1.1, 0.0.0.0/0 169.254.1.1", "[] on link []",
		},
		"own network behind the gateway": {
			testAttachment([]string{"10.0.0.5/24"}, testRoute("10.0.0.1/32", ""), testRoute("10.0.0.0/24", "10.0.0.1"), testRoute("0.0.0.0/0", "10.0.0.1")),
			"10.0.0.5/32 by 10.0.0.1 router 10.0.0.1 10.0.0.1/32 0.0.0.0, 10.0.0.0/24 10.0.0.1, 0.0.0.0/0 10.0.0.1", "[] on link []",
		},
		"no routes": {
			testAttachment([]string{"10.0.0.5/24", "fd00::5/64"}, testRoute("10.0.0.0/24", ""), testRoute("fd00::/64", "")),
			"10.0.0.5/24 by 192.0.0.8", "[fd00::5] on link [fd00::/64]; fe80::766d:7200:0:0 for invalid IP default false []",
		},
		"another's link-local gateway": {
			testAttachment([]string{"fd00::5/128"}, testRoute("::/0", "fe80::9")),
			"", "[fd00::5] on link []; fe80::9 for fe80::9 default true []",
		},
		"several gateways": {
			testAttachment([]string{"fd00::5/64", "fd00::6/64", "fe80::77/64"}, testRoute("fd00::/64", ""), testRoute("fd01::/48", "fd00::2"), testRoute("::/0", "fd00::1")),
			"", "[fd00::5 fd00::6] on link [fd00::/64]; fe80::766d:7200:0:1 for fd00::2 default false [fd01::/48]; fe80::766d:7200:0:2 for fd00::1 default true []",
		},
		"the better of two routes, none of other tables": {
			testAttachment([]string{"10.0.0.5/24"}, testRoute("10.0.0.0/24", ""), metric(testRoute("0.0.0.0/0", "10.0.0.2"), 200, 254),
				metric(testRoute("0.0.0.0/0", "10.0.0.1"), 100, 254), metric(testRoute("0.0.0.0/0", "10.0.0.3"), 0, 100)),
			"10.0.0.5/24 by 10.0.0.1 router 10.0.0.1", "[] on link []",
		},
		"no addresses": {testAttachment(nil), "", "[] on link []"},
	} {
		t.Run(name, func(t *testing.T) {
			l := oneLease(t, c.a, ResponderOptions{})
			if got := text4(l); got != c.v4 {
				t.Errorf("IPv4 is\n%s; want\n%s", got, c.v4)
			}
			if got := text6(l); got != c.v6 {
				t.Errorf("IPv6 is\n%s; want\n%s", got, c.v6)
			}
		})
	}
}

func text4(l *lease) string {
	if !l.address4.IsValid() {
		return ""
	}
	options := dhcpv4.DHCPv4{Options: dhcpv4.OptionsFromList(l.options4()...)}
	out := fmt.Sprintf("%s by %s", l.address4, l.server)
	for _, r := range options.Router() {
		out += " router " + r.String()
	}
	return strings.TrimSuffix(out+" "+routesText(options.ClasslessStaticRoute()), " ")
}

func text6(l *lease) string {
	out := fmt.Sprintf("%v on link %v", l.addresses6, l.onLink6)
	for _, r := range l.routers {
		out += fmt.Sprintf("; %s for %s default %v %v", r.address, r.gateway, r.isDefault, r.routes)
	}
	return out
}

func TestInvalidResponderOptions(t *testing.T) {
	long := strings.Repeat("a", 64)
	for want, o := range map[string]ResponderOptions{
		`DNS server is "dns"`:                 {DNS: DNS{Servers: []string{"dns"}}},
		`hostname is "a b"`:                   {Hostname: "a b"},
		`hostname is "` + long + `"`:          {Hostname: long},
		`DNS search domain is "a..b"`:         {DNS: DNS{Searches: []string{"a..b"}}},
		`DNS search domain is "` + long + `"`: {DNS: DNS{Searches: []string{long}}},
	} {
		_, err := (&Manager{}).Respond(bridged(), o)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("Respond: %v; want InvalidArgument with %s", err, want)
		}
	}
}

// Search domains that do not fit are left out from the end; too many routes are an error.
func TestAnswersFitIntoPackets(t *testing.T) {
	var o ResponderOptions
	for n := range 32 {
		o.DNS.Searches = append(o.DNS.Searches, fmt.Sprintf("%s%02d.example.com", strings.Repeat("x", 48), n))
	}
	l := oneLease(t, bridged(), o)
	size, err := l.largest()
	if err != nil || size > 1450 || len(l.searches) < 15 || len(l.searches)+l.lostSearches != 32 {
		t.Errorf("%d of 32 domains in %d bytes, %d lost (%v)", len(l.searches), size, l.lostSearches, err)
	}
	a := bridged()
	for n := range 300 {
		a.Routes = append(a.Routes, testRoute(fmt.Sprintf("10.%d.%d.0/24", 1+n/256, n%256), "10.0.0.1"))
	}
	if _, err := a.leases(o); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "interface eth0") {
		t.Errorf("300 routes: %v; want FailedPrecondition", err)
	}
}

func message4(kind dhcpv4.MessageType, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	mac, _ := net.ParseMAC(testMAC)
	m, _ := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithHwAddr(mac), dhcpv4.WithMessageType(kind)}, mods...)...)
	return m
}

func TestDHCPv4Conversation(t *testing.T) {
	l := oneLease(t, bridged(), machineOptions)
	requested := func(ip string) dhcpv4.Modifier {
		return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(ip)))
	}
	server := func(ip string) dhcpv4.Modifier {
		return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(ip)))
	}
	ciaddr := dhcpv4.WithClientIP(net.ParseIP("10.0.0.5"))
	stranger := dhcpv4.WithHwAddr(net.HardwareAddr{2, 0, 0, 0, 0, 3})
	const none = "none"
	for name, c := range map[string]struct {
		m    *dhcpv4.DHCPv4
		want string // type, yiaddr, lease in seconds, destination
	}{
		"discover":                {message4(dhcpv4.MessageTypeDiscover), "OFFER 10.0.0.5 4294967295 to 10.0.0.5"},
		"discover by broadcast":   {message4(dhcpv4.MessageTypeDiscover, dhcpv4.WithBroadcast(true)), "OFFER 10.0.0.5 4294967295 to 255.255.255.255"},
		"discover of another MAC": {message4(dhcpv4.MessageTypeDiscover, stranger), none},
		"discover by a relay":     {message4(dhcpv4.MessageTypeDiscover, dhcpv4.WithGatewayIP(net.IP{1, 2, 3, 4})), none},
		"select":                  {message4(dhcpv4.MessageTypeRequest, requested("10.0.0.5"), server("10.0.0.1")), "ACK 10.0.0.5 4294967295 to 10.0.0.5"},
		"select another server":   {message4(dhcpv4.MessageTypeRequest, requested("10.0.0.5"), server("10.0.0.2")), none},
		"reboot":                  {message4(dhcpv4.MessageTypeRequest, requested("10.0.0.5")), "ACK 10.0.0.5 4294967295 to 10.0.0.5"},
		"reboot elsewhere":        {message4(dhcpv4.MessageTypeRequest, requested("10.7.0.5")), "NAK 0.0.0.0 0 to 255.255.255.255"},
		"renew":                   {message4(dhcpv4.MessageTypeRequest, ciaddr), "ACK 10.0.0.5 4294967295 to 10.0.0.5"},
		"request of nothing":      {message4(dhcpv4.MessageTypeRequest), "NAK 0.0.0.0 0 to 255.255.255.255"},
		"inform":                  {message4(dhcpv4.MessageTypeInform, ciaddr), "ACK 0.0.0.0 0 to 10.0.0.5"},
		"decline":                 {message4(dhcpv4.MessageTypeDecline, requested("10.0.0.5"), server("10.0.0.1")), none},
		"release":                 {message4(dhcpv4.MessageTypeRelease, ciaddr, server("10.0.0.1")), none},
		"BOOTP":                   {message4(dhcpv4.MessageTypeNone), none},
		"a server's offer":        {message4(dhcpv4.MessageTypeOffer), none},
	} {
		mac, _ := net.ParseMAC(testMAC)
		got := none
		if list, _ := l.fromGuest(clientFrame4(mac, c.m)); len(list) == 1 {
			p, ok := parsePacket(list[0])
			m, err := dhcpv4.FromBytes(p.payload)
			if !ok || err != nil || m.TransactionID != c.m.TransactionID {
				t.Fatalf("%s: the answer is %+v (%v)", name, p, err)
			}
			got = fmt.Sprintf("%s %s %d to %s", m.MessageType(), m.YourIPAddr, m.IPAddressLeaseTime(0)/time.Second, p.to)
		}
		if got != c.want {
			t.Errorf("%s: the answer is %q; want %q", name, got, c.want)
		}
	}
}

func message6(kind dhcpv6.MessageType, options ...dhcpv6.Option) *dhcpv6.Message {
	m := &dhcpv6.Message{MessageType: kind, TransactionID: dhcpv6.TransactionID{1, 2, 3}}
	m.AddOption(dhcpv6.OptClientID(&dhcpv6.DUIDOpaque{Data: []byte("client")}))
	for _, o := range options {
		m.AddOption(o)
	}
	return m
}

func association(id byte, ips ...string) *dhcpv6.OptIANA {
	out := &dhcpv6.OptIANA{IaId: [4]byte{id}}
	for _, ip := range ips {
		out.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP(ip)})
	}
	return out
}

func TestDHCPv6Conversation(t *testing.T) {
	l := oneLease(t, bridged(), machineOptions)
	server := dhcpv6.OptServerID(serverDUID)
	other := dhcpv6.OptServerID(&dhcpv6.DUIDOpaque{Data: []byte("other")})
	rapid := &dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit}
	anonymous := message6(dhcpv6.MessageTypeInformationRequest)
	anonymous.Options.Options = nil
	const none = "none"
	const whole = " 1: fd00::5 for ever;"
	for name, c := range map[string]struct {
		m    *dhcpv6.Message
		want string
	}{
		"solicit":             {message6(dhcpv6.MessageTypeSolicit, association(1)), "ADVERTISE" + whole},
		"solicit, rapidly":    {message6(dhcpv6.MessageTypeSolicit, rapid, association(1)), "REPLY" + whole},
		"solicit of a server": {message6(dhcpv6.MessageTypeSolicit, server), none},
		"two associations":    {message6(dhcpv6.MessageTypeSolicit, association(1), association(2)), "ADVERTISE" + whole + " 2: NoAddrsAvail;"},
		"request":             {message6(dhcpv6.MessageTypeRequest, server, association(1, "fd00::5")), "REPLY" + whole},
		"request elsewhere":   {message6(dhcpv6.MessageTypeRequest, other, association(1, "fd00::5")), none},
		"renew":               {message6(dhcpv6.MessageTypeRenew, server, association(1, "fd00::5")), "REPLY" + whole},
		"renew of another address": {
			message6(dhcpv6.MessageTypeRenew, server, association(1, "fd00::9")),
			"REPLY 1: fd00::5 for ever, fd00::9 no more;",
		},
		"rebind":              {message6(dhcpv6.MessageTypeRebind, association(1, "fd00::5")), "REPLY" + whole},
		"confirm":             {message6(dhcpv6.MessageTypeConfirm, association(1, "fd00::5")), "REPLY Success"},
		"confirm elsewhere":   {message6(dhcpv6.MessageTypeConfirm, association(1, "fd07::5")), "REPLY NotOnLink"},
		"confirm nothing":     {message6(dhcpv6.MessageTypeConfirm, association(1)), none},
		"information":         {message6(dhcpv6.MessageTypeInformationRequest), "REPLY"},
		"anonymous":           {anonymous, "REPLY"},
		"release":             {message6(dhcpv6.MessageTypeRelease, server, association(1, "fd00::5")), "REPLY Success"},
		"decline":             {message6(dhcpv6.MessageTypeDecline, server, association(1, "fd00::5")), "REPLY Success"},
		"a server's reply":    {message6(dhcpv6.MessageTypeReply, server), none},
		"prefix delegation":   {message6(dhcpv6.MessageTypeSolicit, association(1), &dhcpv6.OptIAPD{}), "ADVERTISE" + whole + " PD: NoPrefixAvail;"},
		"a temporary address": {message6(dhcpv6.MessageTypeSolicit, &dhcpv6.OptIATA{}), "ADVERTISE TA: NoAddrsAvail;"},
	} {
		mac, _ := net.ParseMAC(testMAC)
		got := none
		if list, _ := l.fromGuest(clientFrame6(mac, c.m)); len(list) == 1 {
			p, ok := parsePacket(list[0])
			m, err := dhcpv6.MessageFromBytes(p.payload)
			if !ok || err != nil || m.TransactionID != c.m.TransactionID || !m.Options.ServerID().Equal(serverDUID) {
				t.Fatalf("%s: the answer is %+v (%v)", name, p, err)
			}
			if status := m.Options.Status(); status == nil && (len(m.Options.DNS()) != 1 || m.Options.DomainSearchList() == nil) {
				t.Errorf("%s: name servers are missing from %s", name, m.Summary())
			}
			got = reply6Text(m)
		}
		if got != c.want {
			t.Errorf("%s: the answer is %q; want %q", name, got, c.want)
		}
	}
}

func reply6Text(m *dhcpv6.Message) string {
	out := m.MessageType.String()
	if s := m.Options.Status(); s != nil {
		out += " " + s.StatusCode.String()
	}
	for _, ia := range m.Options.IANA() {
		var list []string
		if s := ia.Options.Status(); s != nil {
			list = append(list, s.StatusCode.String())
		}
		for _, a := range ia.Options.Addresses() {
			span := "no more"
			if a.ValidLifetime == infinite && ia.T1 == infinite && ia.T2 == infinite {
				span = "for ever"
			}
			list = append(list, a.IPv6Addr.String()+" "+span)
		}
		out += fmt.Sprintf(" %d: %s;", ia.IaId[0], strings.Join(list, ", "))
	}
	for range m.Options.IATA() {
		out += " TA: " + iana.StatusNoAddrsAvail.String() + ";"
	}
	for _, pd := range m.Options.IAPD() {
		out += " PD: " + pd.Options.Status().StatusCode.String() + ";"
	}
	return out
}

func TestRouterAdvertisement(t *testing.T) {
	l := oneLease(t, bridged(), machineOptions)
	mac, _ := net.ParseMAC(testMAC)
	solicitation, err := ndpFrame(&ndp.RouterSolicitation{}, mac, allNodesMAC, linkLocal(mac), netip.MustParseAddr("ff02::2"))
	if err != nil {
		t.Fatal(err)
	}
	list, _ := l.fromGuest(solicitation)
	if len(list) != 1 {
		t.Fatalf("%d answers; want one", len(list))
	}
	p, _ := parsePacket(list[0])
	want := &ndp.RouterAdvertisement{
		CurrentHopLimit: 64, ManagedConfiguration: true, OtherConfiguration: true, RouterLifetime: routerLifetime,
		Options: []ndp.Option{
			ndp.NewMTU(1450),
			&ndp.PrefixInformation{PrefixLength: 64, Prefix: netip.MustParseAddr("fd00::"), OnLink: true, ValidLifetime: infinite, PreferredLifetime: infinite},
			&ndp.RecursiveDNSServer{Lifetime: infinite, Servers: []netip.Addr{netip.MustParseAddr("fd96::10")}},
			&ndp.DNSSearchList{Lifetime: infinite, DomainNames: []string{"default.svc.cluster.local", "cluster.local"}},
		},
	}
	if diff := cmp.Diff(want, parseNDP(p), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("the advertisement differs (-want +got):\n%s", diff)
	}
	solicitation[21] = 64 // the hop limit of a frame that a router has passed on
	if list, _ := l.fromGuest(solicitation); len(list) > 0 {
		t.Error("a solicitation from another link was answered")
	}
}

func TestPacer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pacer
		start := time.Now()
		const events = 1000
		for range events {
			time.Sleep(p.next(time.Now()))
		}
		want := time.Second * (events - answerBurst) / answersPerSecond
		if got := time.Since(start).Round(time.Second); got != want {
			t.Errorf("%d events took %v; want %v", events, got, want)
		}
		time.Sleep(time.Minute)
		for n := range answerBurst {
			if d := p.next(time.Now()); d > 0 {
				t.Fatalf("event %d after a rest waits %v", n, d)
			}
		}
	})
}

// One guest's frame that a library stumbles over does not end the process.
func TestPanicIsKept(t *testing.T) {
	var log bytes.Buffer
	r := &Responder{log: slog.New(slog.NewTextHandler(&log, nil))}
	r.guarded(func([]byte) { panic("out of range") }, nil)
	if !strings.Contains(log.String(), "out of range") {
		t.Errorf("the log has %q", log.String())
	}
}

// FuzzFrames gives the responder arbitrary frames of the guest and of the network. What it answers is to be well-formed and small.
func FuzzFrames(f *testing.F) {
	a := testAttachment([]string{"10.0.0.5/32", "fd00::5/64"}, testRoute("0.0.0.0/0", "169.254.1.1"), testRoute("fd00::/64", ""),
		testRoute("::/0", "fd00::1"), testRoute("fd01::/48", "fd00::2"))
	a.Neighbors = []Neighbor{
		{Address: netip.MustParseAddr("169.254.1.1"), MAC: "02:00:00:00:00:09", Interface: "eth0"},
		{Address: netip.MustParseAddr("fd00::2"), MAC: "02:00:00:00:00:09", Interface: "eth0"},
	}
	leases, err := a.leases(machineOptions)
	if err != nil {
		f.Fatal(err)
	}
	l := leases[0]
	for _, s := range seeds(f, l) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		toGuest, toWire := l.fromGuest(b)
		for _, out := range append(toGuest, l.fromWire(b)...) {
			if len(out) > etherLen+1450+600 { // a client's own identifiers come back to it
				t.Errorf("an answer has %d bytes", len(out))
			}
			_, isPacket := parsePacket(out)
			isARP := len(out) == etherLen+arpLen
			if !isPacket && !isARP {
				t.Errorf("an answer is malformed: % x", out)
			}
		}
		if p, ok := parsePacket(toWire); toWire != nil && (!ok || parseNDP(p) == nil || p.fromMAC.String() != testMAC) {
			t.Errorf("a question to the network is malformed: % x", toWire)
		}
	})
}

func seeds(f *testing.F, l *lease) (out [][]byte) {
	server := dhcpv6.OptServerID(serverDUID)
	for _, kind := range []dhcpv4.MessageType{dhcpv4.MessageTypeDiscover, dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeInform} {
		out = append(out, clientFrame4(l.mac, message4(kind, dhcpv4.WithClientIP(net.IP{10, 0, 0, 5}))))
	}
	for _, m := range []*dhcpv6.Message{
		message6(dhcpv6.MessageTypeSolicit, association(1), &dhcpv6.OptIAPD{}, dhcpv6.OptRequestedOption(dhcpv6.OptionDNSRecursiveNameServer)),
		message6(dhcpv6.MessageTypeRenew, server, association(1, "fd00::9")), message6(dhcpv6.MessageTypeConfirm, association(1, "fd00::5")),
	} {
		out = append(out, clientFrame6(l.mac, m))
	}
	for _, m := range []ndp.Message{
		&ndp.RouterSolicitation{}, &ndp.NeighborSolicitation{TargetAddress: l.routers[0].address},
		&ndp.NeighborSolicitation{TargetAddress: netip.MustParseAddr("fd00::2")},
		&ndp.NeighborAdvertisement{TargetAddress: netip.MustParseAddr("fd00::1"), Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: serverMAC}}},
	} {
		frame, err := ndpFrame(m, l.mac, allNodesMAC, linkLocal(l.mac), allNodes)
		if err != nil {
			f.Fatal(err)
		}
		out = append(out, frame)
	}
	arp := arpReply(l.mac, netip.MustParseAddr("10.0.0.5"), broadcastMAC, netip.MustParseAddr("169.254.1.1"))
	arp[etherLen+7] = 1 // a request
	return append(out, arp)
}
