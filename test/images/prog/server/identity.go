package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// printIdentity prints what must differ from guest to guest, a name and a value in each line: what the kernel's random generator gives, and
// what derives from it. It needs CAP_NET_RAW.
func printIdentity() error {
	for name, path := range map[string]string{
		"uuid": "/proc/sys/kernel/random/uuid", "boot_id": "/proc/sys/kernel/random/boot_id", "mac": "/sys/class/net/eth0/address",
	} {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fmt.Println(name, strings.TrimSpace(string(data)))
	}
	random := make([]byte, 16)
	if _, err := unix.Getrandom(random, 0); err != nil {
		return err
	}
	fmt.Printf("random %x\n", random)
	hostname, err := os.Hostname()
	if err != nil {
		return err
	}
	fmt.Println("hostname", hostname)
	link, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	addresses, err := link.Addrs()
	if err != nil || len(addresses) == 0 {
		return fmt.Errorf("eth0 has no address: %w", err)
	}
	fmt.Println("address", addresses[0])
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		for _, name := range []string{"stack", "vdso"} {
			if strings.HasSuffix(line, "["+name+"]\n") {
				fmt.Println(name, strings.Fields(line)[0])
			}
		}
	}
	return printSequences()
}

// printSequences prints what of the initial sequence numbers of two TCP connections comes from the kernel's secret:
// without the part that is the clock. Who has the same secret prints nearly the same.
func printSequences() error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(bigEndian(unix.ETH_P_IP)))
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	limit := unix.NsecToTimeval(int64(10 * time.Second))
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
	); err != nil {
		return err
	}
	for _, port := range []int{40001, 40002} {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}}
		if conn, err := dialer.Dial("tcp4", "127.0.0.1:9"); err == nil { // nobody listens; what it sends is enough
			_ = conn.Close()
		}
		value, err := awaitSYN(fd, port)
		if err != nil {
			return fmt.Errorf("from port %d: %w", port, err)
		}
		fmt.Println("sequence", value)
	}
	return nil
}

func bigEndian(v uint16) uint16 { return v<<8 | v>>8 }

// awaitSYN reads packets up to the first of a connection from the port.
func awaitSYN(fd, port int) (uint32, error) {
	packet, rights := make([]byte, 1500), make([]byte, 128)
	for {
		n, oobn, _, _, err := unix.Recvmsg(fd, packet, rights, 0)
		if err != nil {
			return 0, err
		}
		const header, syn, ack = 20, 2, 16
		if n < 2*header || packet[0]>>4 != 4 || packet[9] != unix.IPPROTO_TCP {
			continue
		}
		tcp := packet[int(packet[0]&15)*4 : n]
		if len(tcp) < header || int(binary.BigEndian.Uint16(tcp)) != port || tcp[13]&(syn|ack) != syn {
			continue
		}
		messages, err := unix.ParseSocketControlMessage(rights[:oobn])
		if err != nil || len(messages) != 1 || len(messages[0].Data) < int(unsafe.Sizeof(unix.Timespec{})) {
			return 0, fmt.Errorf("no time of the packet: %w", err)
		}
		at := (*unix.Timespec)(unsafe.Pointer(&messages[0].Data[0])).Nano()
		// The kernel adds its clock in units of 64 ns, see seq_scale in net/core/secure_seq.c.
		return binary.BigEndian.Uint32(tcp[4:]) - uint32(at>>6), nil
	}
}
