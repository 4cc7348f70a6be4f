package network

import (
	"bytes"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/mdlayher/ndp"
	"golang.org/x/sys/unix"
)

// fromGuest answers a frame of the guest's device, or passes a question on to the network. It never fails: what is not understood has
// no answer.
func (l *lease) fromGuest(frame []byte) (toGuest [][]byte, toWire []byte) {
	if len(frame) < etherLen || !bytes.Equal(frame[6:12], l.mac) {
		return nil, nil
	}
	if mac, sender, target, ok := parseARP(frame); ok {
		if at := l.neighbors[target]; at != nil && sender != target {
			return [][]byte{arpReply(at, target, mac, sender)}, nil
		}
		return nil, nil
	}
	p, ok := parsePacket(frame)
	if !ok {
		return nil, nil
	}
	switch {
	case p.protocol == unix.IPPROTO_UDP && p.toPort == portDHCPServer && p.from.Is4():
		return frames(l.dhcp4(p)), nil
	case p.protocol == unix.IPPROTO_UDP && p.toPort == portDHCP6Server && p.from.Is6():
		return frames(l.dhcp6(p)), nil
	}
	switch m := parseNDP(p).(type) {
	case *ndp.RouterSolicitation:
		out, _ := l.advertisements() // fit has made them before
		return out, nil
	case *ndp.NeighborSolicitation:
		answer, question := l.neighbor(p, m)
		return frames(answer), question
	}
	return nil, nil
}

// frames leaves out what is nil.
func frames(list ...[]byte) [][]byte {
	var out [][]byte
	for _, f := range list {
		if f != nil {
			out = append(out, f)
		}
	}
	return out
}

// largest is the length of the longest answer from the IP header on, to a client with an identifier of the longest kind.
func (l *lease) largest() (int, error) {
	largest := 0
	if l.address4.IsValid() {
		req, err := dhcpv4.NewDiscovery(l.mac, dhcpv4.WithOption(dhcpv4.OptClientIdentifier(make([]byte, 64))))
		if err != nil {
			return 0, err
		}
		reply, err := l.reply4(req, dhcpv4.MessageTypeOffer)
		if err != nil {
			return 0, err
		}
		largest = ip4Len + udpLen + len(reply.ToBytes())
	}
	if len(l.addresses6) == 0 {
		return largest, nil
	}
	req, err := dhcpv6.NewSolicit(l.mac, dhcpv6.WithClientID(&dhcpv6.DUIDOpaque{Data: make([]byte, 128)}))
	if err != nil {
		return 0, err
	}
	for range 2 { // more associations than this are not usual
		req.AddOption(&dhcpv6.OptIAPD{})
	}
	largest = max(largest, ip6Len+udpLen+len(l.reply6(req).ToBytes()))
	ads, err := l.advertisements()
	for _, f := range ads {
		largest = max(largest, len(f)-etherLen)
	}
	return largest, err
}

// told lists the addresses that a lease hands out, for the log.
func (l *lease) told() []netip.Addr {
	out := l.addresses6
	if l.address4.IsValid() {
		out = append([]netip.Addr{l.address4.Addr()}, out...)
	}
	return out
}
