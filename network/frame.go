package network

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Lengths of headers: Ethernet, IPv4 without options, IPv6, UDP and ARP for Ethernet and IPv4.
const (
	etherLen = 14
	ip4Len   = 20
	ip6Len   = 40
	udpLen   = 8
	arpLen   = 28
)

// packet is what an Ethernet frame carries: an IP packet that is no fragment and, if it is UDP, the ports. Addresses and payload of a
// parsed one lie in the frame.
type packet struct {
	fromMAC, toMAC   net.HardwareAddr
	from, to         netip.Addr
	hopLimit         uint8
	protocol         uint8
	fromPort, toPort uint16
	payload          []byte
}

// parsePacket reads a frame. Checksums are not looked at: a guest leaves them to its device.
func parsePacket(frame []byte) (packet, bool) {
	if len(frame) < etherLen {
		return packet{}, false
	}
	p := packet{toMAC: frame[0:6], fromMAC: frame[6:12]}
	ok := false
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		ok = p.parse4(frame[etherLen:])
	case unix.ETH_P_IPV6:
		ok = p.parse6(frame[etherLen:])
	}
	if ok && p.protocol == unix.IPPROTO_UDP {
		ok = p.parseUDP()
	}
	return p, ok
}

func (p *packet) parse4(b []byte) bool {
	if len(b) < ip4Len || b[0]>>4 != 4 {
		return false
	}
	header, total := int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:]))
	const moreAndOffset = 0x3fff
	if header < ip4Len || total < header || len(b) < total || binary.BigEndian.Uint16(b[6:])&moreAndOffset != 0 {
		return false
	}
	p.hopLimit, p.protocol = b[8], b[9]
	p.from, p.to = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	p.payload = b[header:total]
	return true
}

func (p *packet) parse6(b []byte) bool {
	if len(b) < ip6Len || b[0]>>4 != 6 {
		return false
	}
	total := ip6Len + int(binary.BigEndian.Uint16(b[4:]))
	if len(b) < total {
		return false
	}
	p.protocol, p.hopLimit = b[6], b[7]
	p.from, p.to = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	p.payload = b[ip6Len:total]
	return true
}

func (p *packet) parseUDP() bool {
	if len(p.payload) < udpLen {
		return false
	}
	total := int(binary.BigEndian.Uint16(p.payload[4:]))
	if total < udpLen || len(p.payload) < total {
		return false
	}
	p.fromPort, p.toPort = binary.BigEndian.Uint16(p.payload), binary.BigEndian.Uint16(p.payload[2:])
	p.payload = p.payload[udpLen:total]
	return true
}

// frame writes the packet with all checksums but that of ICMPv6, which its payload brings.
func (p packet) frame() []byte {
	payload := p.payload
	if p.protocol == unix.IPPROTO_UDP {
		payload = p.udp()
	}
	f := append(bytes.Clone(p.toMAC), p.fromMAC...)
	if p.from.Is4() {
		f = binary.BigEndian.AppendUint16(f, unix.ETH_P_IP)
		f = append(f, p.header4(len(payload))...)
	} else {
		f = binary.BigEndian.AppendUint16(f, unix.ETH_P_IPV6)
		f = append(f, p.header6(len(payload))...)
	}
	return append(f, payload...)
}

func (p packet) header4(size int) []byte {
	h := make([]byte, ip4Len)
	h[0], h[8], h[9] = 4<<4|ip4Len/4, p.hopLimit, p.protocol
	binary.BigEndian.PutUint16(h[2:], uint16(ip4Len+size))
	copy(h[12:], p.from.AsSlice())
	copy(h[16:], p.to.AsSlice())
	binary.BigEndian.PutUint16(h[10:], ^sum(0, h))
	return h
}

func (p packet) header6(size int) []byte {
	h := make([]byte, ip6Len)
	h[0], h[6], h[7] = 6<<4, p.protocol, p.hopLimit
	binary.BigEndian.PutUint16(h[4:], uint16(size))
	copy(h[8:], p.from.AsSlice())
	copy(h[24:], p.to.AsSlice())
	return h
}

func (p packet) udp() []byte {
	size := uint16(udpLen + len(p.payload))
	u := binary.BigEndian.AppendUint16(nil, p.fromPort)
	u = binary.BigEndian.AppendUint16(u, p.toPort)
	u = binary.BigEndian.AppendUint16(u, size)
	u = append(append(u, 0, 0), p.payload...)
	pseudo := append(p.from.AsSlice(), p.to.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint16(append(pseudo, 0, p.protocol), size)
	check := ^sum(sum(0, pseudo), u)
	if check == 0 { // means that there is none
		check = 0xffff
	}
	binary.BigEndian.PutUint16(u[6:], check)
	return u
}

// sum adds to an Internet checksum (RFC 1071). Only the last call may be for an odd number of bytes.
func sum(begin uint16, b []byte) uint16 {
	s := uint32(begin)
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// arpRequest begins a question for an IPv4 address on Ethernet (RFC 826).
var arpRequest = [8]byte{0, 1, 8, 0, 6, 4, 0, 1}

// parseARP reads a question: who asks, and for which address.
func parseARP(frame []byte) (mac net.HardwareAddr, sender, target netip.Addr, ok bool) {
	if len(frame) < etherLen+arpLen || binary.BigEndian.Uint16(frame[12:]) != unix.ETH_P_ARP {
		return nil, sender, target, false
	}
	b := frame[etherLen:]
	if [8]byte(b) != arpRequest {
		return nil, sender, target, false
	}
	return b[8:14], netip.AddrFrom4([4]byte(b[14:])), netip.AddrFrom4([4]byte(b[24:])), true
}

// arpReply tells a guest where an address is.
func arpReply(at net.HardwareAddr, address netip.Addr, guest net.HardwareAddr, guestAddress netip.Addr) []byte {
	f := append(bytes.Clone(guest), at...)
	f = binary.BigEndian.AppendUint16(f, unix.ETH_P_ARP)
	f = append(f, 0, 1, 8, 0, 6, 4, 0, 2)
	f = append(append(f, at...), address.AsSlice()...)
	return append(append(f, guest...), guestAddress.AsSlice()...)
}
