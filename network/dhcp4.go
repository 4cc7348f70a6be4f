package network

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"
	"golang.org/x/sys/unix"
)

const portDHCPServer, portDHCPClient = 67, 68

// dhcp4 answers a DHCP message (RFC 2131), or not.
func (l *lease) dhcp4(p packet) []byte {
	req, err := dhcpv4.FromBytes(p.payload)
	if err != nil || !l.address4.IsValid() || !l.ours(req) {
		return nil
	}
	kind := l.kind4(req)
	if kind == dhcpv4.MessageTypeNone {
		return nil
	}
	reply, err := l.reply4(req, kind)
	if err != nil {
		return nil
	}
	out := packet{
		fromMAC: serverMAC, toMAC: l.mac, from: l.server, to: l.address4.Addr(),
		hopLimit: 64, protocol: unix.IPPROTO_UDP, fromPort: portDHCPServer, toPort: portDHCPClient, payload: reply.ToBytes(),
	}
	// A client without an address may be unable to take a packet for it.
	if noAddress := req.ClientIPAddr.IsUnspecified(); kind == dhcpv4.MessageTypeNak || noAddress && req.IsBroadcast() {
		out.toMAC, out.to = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, netip.AddrFrom4([4]byte{255, 255, 255, 255})
	}
	return out.frame()
}

// ours tells of a question that the guest's own device asks this server, and no relay.
func (l *lease) ours(req *dhcpv4.DHCPv4) bool {
	id := addrOf(req.ServerIdentifier())
	return req.OpCode == dhcpv4.OpcodeBootRequest && req.ClientHWAddr.String() == l.mac.String() &&
		req.GatewayIPAddr.IsUnspecified() && (!id.IsValid() || id == l.server)
}

// kind4 is the type of the answer, None without one.
func (l *lease) kind4(req *dhcpv4.DHCPv4) dhcpv4.MessageType {
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeInform:
		return dhcpv4.MessageTypeAck
	case dhcpv4.MessageTypeRequest:
		wanted := addrOf(req.RequestedIPAddress())
		if !wanted.IsValid() {
			wanted = addrOf(req.ClientIPAddr)
		}
		if wanted != l.address4.Addr() {
			return dhcpv4.MessageTypeNak
		}
		return dhcpv4.MessageTypeAck
	}
	return dhcpv4.MessageTypeNone // the address is the pod's: it is not taken back, and no other can be given
}

func (l *lease) reply4(req *dhcpv4.DHCPv4, kind dhcpv4.MessageType) (*dhcpv4.DHCPv4, error) {
	mods := []dhcpv4.Modifier{dhcpv4.WithMessageType(kind), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(l.server.AsSlice()))}
	switch {
	case kind == dhcpv4.MessageTypeNak:
		return dhcpv4.NewReplyFromRequest(req, mods...)
	case req.MessageType() == dhcpv4.MessageTypeInform:
		mods = append(mods, dhcpv4.WithClientIP(req.ClientIPAddr))
	default:
		mods = append(mods, dhcpv4.WithClientIP(req.ClientIPAddr), dhcpv4.WithYourIP(l.address4.Addr().AsSlice()),
			dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(infinite)))
	}
	for _, o := range l.options4() {
		mods = append(mods, dhcpv4.WithOption(o))
	}
	return dhcpv4.NewReplyFromRequest(req, mods...)
}

func (l *lease) options4() []dhcpv4.Option {
	out := []dhcpv4.Option{
		dhcpv4.OptSubnetMask(net.CIDRMask(l.address4.Bits(), 32)),
		dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, binary.BigEndian.AppendUint16(nil, uint16(min(l.mtu, 0xffff)))),
	}
	gateway := l.default4()
	if gateway.IsValid() {
		out = append(out, dhcpv4.OptRouter(gateway.AsSlice()))
	}
	// A client that knows this option heeds no other routes (RFC 3442), so it has all. What the router option tells as well needs none.
	if n := len(l.routes4); n > 1 || n == 1 && !gateway.IsValid() {
		out = append(out, dhcpv4.OptClasslessStaticRoute(l.classless()...))
	}
	if len(l.dns4) > 0 {
		out = append(out, dhcpv4.OptDNS(netIPs(l.dns4)...))
	}
	if len(l.searches) > 0 {
		out = append(out, dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: l.searches}))
	}
	if l.hostname != "" {
		out = append(out, dhcpv4.OptHostName(l.hostname))
	}
	return out
}

func (l *lease) classless() []*dhcpv4.Route {
	var out []*dhcpv4.Route
	for _, r := range l.routes4 {
		gateway := net.IPv4zero.To4() // on the link
		if r.Gateway.IsValid() {
			gateway = r.Gateway.AsSlice()
		}
		dest := &net.IPNet{IP: r.Destination.Addr().AsSlice(), Mask: net.CIDRMask(r.Destination.Bits(), 32)}
		out = append(out, &dhcpv4.Route{Dest: dest, Router: gateway})
	}
	return out
}

func netIPs(addrs []netip.Addr) []net.IP {
	var out []net.IP
	for _, a := range addrs {
		out = append(out, a.AsSlice())
	}
	return out
}
