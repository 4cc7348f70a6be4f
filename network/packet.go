package network

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// openPackets opens a link of the thread's network namespace for raw frames. It sees what comes in before tc does, as far as the filter
// lets pass; what is written goes out.
func openPackets(name string, filter []bpf.RawInstruction) (*os.File, error) {
	// Of protocol 0 it gets nothing until it is bound, when the filter is in place.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket; it needs CAP_NET_RAW: %w", err)
	}
	if err := bindPackets(fd, name, filter); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open a packet socket on %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func bindPackets(fd int, name string, filter []bpf.RawInstruction) error {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	program := make([]unix.SockFilter, len(filter))
	for n, i := range filter {
		program[n] = unix.SockFilter{Code: i.Op, Jt: i.Jt, Jf: i.Jf, K: i.K}
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &fprog); err != nil {
		return fmt.Errorf("attach a filter: %w", err)
	}
	// Spares a copy of each frame that goes out. A kernel before 4.20 cannot; there the filter sees and refuses them.
	_ = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	const receiveBuffer = 64 << 10 // what waits longer than the rate allows is stale
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer); err != nil {
		return err
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL)) // others see only what tc lets pass
	return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index})
}

// program builds a classic BPF filter: a list of tests, each of which accepts a frame or leaves it to the next.
type program []bpf.Instruction

// field is a test of a frame's bytes for a value under a mask; size is in bytes.
type field struct {
	offset uint32
	size   int
	value  uint32
	mask   uint32
}

const whole = 0xffffffff

// accept takes the frames of which all fields are as told.
func (p *program) accept(fields ...field) {
	// Each field takes three instructions; the last one of all is the return.
	left := len(fields) * 3
	for _, f := range fields {
		left -= 3
		*p = append(*p,
			bpf.LoadAbsolute{Off: f.offset, Size: f.size},
			bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: f.mask},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: f.value, SkipTrue: uint8(left + 1)},
		)
	}
	*p = append(*p, bpf.RetConstant{Val: 1 << 16})
}

// begin refuses what the link itself sends, and frames of a VLAN, which is another network.
func begin() program {
	const outgoing = 4 // PACKET_OUTGOING
	return program{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: outgoing, SkipTrue: 1},
		bpf.RetConstant{},
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
		bpf.RetConstant{},
	}
}

func (p program) assemble() ([]bpf.RawInstruction, error) {
	return bpf.Assemble(append(p, bpf.RetConstant{}))
}

func etherType(t uint32) field { return field{12, 2, t, whole} }

// fields4 and fields6 take packets whose IP header is the shortest, as all of these protocols' are.
func fields4(port uint32) []field {
	return []field{etherType(unix.ETH_P_IP), {14, 1, 4<<4 | ip4Len/4, whole}, {23, 1, unix.IPPROTO_UDP, whole}, {20, 2, 0, 0x3fff}, {36, 2, port, whole}}
}

func fields6(protocol uint32, more ...field) []field {
	return append([]field{etherType(unix.ETH_P_IPV6), {20, 1, protocol, whole}}, more...)
}

// target takes messages of neighbor discovery about an address.
func target(kind uint32, a netip.Addr) []field {
	out := fields6(unix.IPPROTO_ICMPV6, field{54, 1, kind, whole})
	b := a.As16()
	for n := 0; n < 16; n += 4 {
		out = append(out, field{uint32(62 + n), 4, binary.BigEndian.Uint32(b[n:]), whole})
	}
	return out
}

// guestFilter takes the guest's questions that a lease has an answer to.
func (l *lease) guestFilter() ([]bpf.RawInstruction, error) {
	p := begin()
	p.accept(fields4(portDHCPServer)...)
	p.accept(fields6(unix.IPPROTO_UDP, field{56, 2, portDHCP6Server, whole})...)
	p.accept(fields6(unix.IPPROTO_ICMPV6, field{54, 1, icmpRouterSolicitation, whole})...)
	for _, r := range l.routers {
		p.accept(target(icmpNeighborSolicitation, r.address)...)
	}
	for a := range l.neighbors {
		if a.Is6() {
			p.accept(target(icmpNeighborSolicitation, a)...)
			continue
		}
		b := a.As4()
		p.accept(etherType(unix.ETH_P_ARP), field{20, 2, 1, whole}, field{38, 4, binary.BigEndian.Uint32(b[:]), whole})
	}
	return p.assemble()
}

// wireFilter takes what the network says about the gateways that a router stands for.
func (l *lease) wireFilter() ([]bpf.RawInstruction, error) {
	p := begin()
	for _, r := range l.standIns() {
		p.accept(target(icmpNeighborAdvertisement, r.gateway)...)
	}
	return p.assemble()
}
