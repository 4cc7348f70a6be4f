package network

import (
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/ndp"
	"golang.org/x/sys/unix"
)

// Types of ICMPv6 messages, and the hop limit that tells that no router has passed them on (RFC 4861).
const (
	icmpRouterSolicitation    = 133
	icmpRouterAdvertisement   = 134
	icmpNeighborSolicitation  = 135
	icmpNeighborAdvertisement = 136

	ndpHopLimit = ndp.HopLimit
)

// routerLifetime is the longest there is (RFC 8319), since a daemon that is away advertises nothing; so the guest keeps its default route for
// 18 hours. advertiseEvery is how often it is told anew.
const (
	routerLifetime = 65535 * time.Second
	advertiseEvery = 10 * time.Minute
)

var (
	allNodes    = netip.MustParseAddr("ff02::1")
	allNodesMAC = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
)

// advertisements has one for each router.
func (l *lease) advertisements() ([][]byte, error) {
	var out [][]byte
	for n, r := range l.routers {
		f, err := ndpFrame(l.advertisement(r, n == 0), serverMAC, allNodesMAC, r.address, allNodes)
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	return out, nil
}

// advertisement says that addresses come by DHCPv6 and which networks are on the link. What holds for the whole link is only in the first.
func (l *lease) advertisement(r router, first bool) *ndp.RouterAdvertisement {
	ra := &ndp.RouterAdvertisement{CurrentHopLimit: 64, ManagedConfiguration: true, OtherConfiguration: true}
	if r.isDefault {
		ra.RouterLifetime = routerLifetime
	}
	for _, p := range r.routes {
		ra.Options = append(ra.Options, &ndp.RouteInformation{
			PrefixLength: uint8(p.Bits()), Prefix: p.Masked().Addr(), RouteLifetime: ndp.Infinity,
		})
	}
	if !first {
		return ra
	}
	ra.Options = append(ra.Options, ndp.NewMTU(uint32(l.mtu)))
	for _, p := range l.onLink6 {
		ra.Options = append(ra.Options, &ndp.PrefixInformation{
			PrefixLength: uint8(p.Bits()), Prefix: p.Masked().Addr(), OnLink: true,
			ValidLifetime: ndp.Infinity, PreferredLifetime: ndp.Infinity,
		})
	}
	for servers := range slices.Chunk(l.dns6, optionRoom/16) {
		ra.Options = append(ra.Options, &ndp.RecursiveDNSServer{Lifetime: ndp.Infinity, Servers: servers})
	}
	for _, domains := range chunkDomains(l.searches) {
		ra.Options = append(ra.Options, &ndp.DNSSearchList{Lifetime: ndp.Infinity, DomainNames: domains})
	}
	return ra
}

// optionRoom is how many bytes of addresses or names the ndp package can put into one option; more options may follow (RFC 8106).
const optionRoom = 240

// chunkDomains divides domains among options.
func chunkDomains(domains []string) (out [][]string) {
	room := 0
	for _, d := range domains {
		need := len(d) + 2
		if room < need {
			out, room = append(out, nil), optionRoom
		}
		out[len(out)-1] = append(out[len(out)-1], d)
		room -= need
	}
	return out
}

func ndpFrame(m ndp.Message, fromMAC, toMAC net.HardwareAddr, from, to netip.Addr) ([]byte, error) {
	payload, err := ndp.MarshalMessageChecksum(m, from, to)
	if err != nil {
		return nil, err
	}
	return packet{
		fromMAC: fromMAC, toMAC: toMAC, from: from, to: to, hopLimit: ndpHopLimit, protocol: unix.IPPROTO_ICMPV6, payload: payload,
	}.frame(), nil
}

func parseNDP(p packet) ndp.Message {
	if p.protocol != unix.IPPROTO_ICMPV6 || p.hopLimit != ndpHopLimit {
		return nil
	}
	m, err := ndp.ParseMessage(p.payload)
	if err != nil {
		return nil
	}
	return m
}

// neighbor answers the guest's question for a neighbor that CNI has set for good, or passes the one for a router's stand-in on
// to the network as the question for its gateway, in the guest's name. What comes back is fromWire's.
func (l *lease) neighbor(p packet, m *ndp.NeighborSolicitation) (toGuest, toWire []byte) {
	if p.from.IsUnspecified() { // only asks whether the address is taken
		return nil, nil
	}
	target := m.TargetAddress
	r, standIn := l.router(target)
	if standIn {
		target = r.gateway
	}
	var err error
	if at := l.neighbors[target]; at != nil {
		toGuest, err = neighborAnswer(m.TargetAddress, at, standIn, true, l.mac, p.from)
	} else if standIn {
		toWire, err = l.ask(r.gateway, p.from)
	}
	if err != nil {
		return nil, nil
	}
	return toGuest, toWire
}

func (l *lease) ask(gateway, from netip.Addr) ([]byte, error) {
	group, err := ndp.SolicitedNodeMulticast(gateway)
	if err != nil {
		return nil, err
	}
	g := group.As16()
	question := &ndp.NeighborSolicitation{
		TargetAddress: gateway, Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: l.mac}},
	}
	return ndpFrame(question, l.mac, net.HardwareAddr{0x33, 0x33, g[12], g[13], g[14], g[15]}, from, group)
}

func neighborAnswer(target netip.Addr, at net.HardwareAddr, isRouter, solicited bool, toMAC net.HardwareAddr, to netip.Addr) ([]byte, error) {
	return ndpFrame(&ndp.NeighborAdvertisement{
		Router: isRouter, Solicited: solicited, Override: true, TargetAddress: target,
		Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: at}},
	}, at, toMAC, target, to)
}

// fromWire makes of a gateway's advertisement one of the router that stands for it: the same MAC, the same receiver.
func (l *lease) fromWire(frame []byte) [][]byte {
	p, ok := parsePacket(frame)
	if !ok {
		return nil
	}
	m, ok := parseNDP(p).(*ndp.NeighborAdvertisement)
	if !ok {
		return nil
	}
	at := p.fromMAC
	for _, o := range m.Options {
		if lla, ok := o.(*ndp.LinkLayerAddress); ok && lla.Direction == ndp.Target {
			at = lla.Addr
		}
	}
	var out [][]byte
	for _, r := range l.standIns() {
		if r.gateway != m.TargetAddress {
			continue
		}
		if f, err := neighborAnswer(r.address, at, true, m.Solicited, p.toMAC, p.to); err == nil {
			out = append(out, f)
		}
	}
	return out
}
