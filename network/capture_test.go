package network

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// frame is an Ethernet frame.
type frame []byte

// groupReport tells of MLD and IGMP reports: they only tell switches which groups to deliver, and the guest is in the same ones.
func (f frame) groupReport() bool {
	if len(f) < 64 {
		return false
	}
	switch binary.BigEndian.Uint16(f[12:]) {
	case unix.ETH_P_IPV6:
		const hopByHop, mldReport = 0, 143
		return f[20] == hopByHop && f[62] == mldReport
	case unix.ETH_P_IP:
		const igmp = 2
		return f[23] == igmp
	}
	return false
}

// captureFrom collects what comes out of the pod at the node's end of eth0. The function it returns ends that.
func captureFrom(t *testing.T, a *Attachment) func() []frame {
	t.Helper()
	var peer int
	if err := inNetNS(a.NetNS, func() error {
		l, err := netlink.LinkByName("eth0")
		if err == nil {
			peer = l.Attrs().ParentIndex
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: peer}); err != nil {
		t.Fatal(err)
	}
	tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	return func() []frame {
		defer unix.Close(fd)
		var out []frame
		for {
			buf := make([]byte, 2048)
			size, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return out
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING {
				out = append(out, frame(buf[:size]))
			}
		}
	}
}
