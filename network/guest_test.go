package network

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// guest stands for a VM: another network namespace whose interfaces have the pod's MACs, addresses and routes, and frames
// carried between its taps and the pod's with their virtio-net headers, as QEMU does.
type guest struct {
	t     *testing.T
	netns string
	files []*os.File
	pumps sync.WaitGroup
	once  sync.Once
}

// startGuest runs a guest until the test ends or close is called. dad makes it probe for duplicate addresses.
func startGuest(t *testing.T, n *node, a *Attachment, dad bool) *guest {
	t.Helper()
	settings := map[string]string{}
	if dad {
		settings = map[string]string{"accept_dad": "1", "dad_transmits": "1"}
	}
	g := plugGuest(t, n, a, settings)
	if err := inNetNS(g.netns, func() error { return configure(a) }); err != nil {
		t.Fatalf("configure the guest as %+v: %v", a, err)
	}
	return g
}

// plugGuest runs a guest that nobody has configured yet; the settings are IPv6's for its interfaces.
func plugGuest(t *testing.T, n *node, a *Attachment, settings map[string]string) *guest {
	t.Helper()
	g := &guest{t: t, netns: filepath.Join(n.dir, "guest-"+filepath.Base(a.NetNS))}
	taps, err := n.OpenTaps(a)
	if err != nil {
		t.Fatal(err)
	}
	g.files = taps
	t.Cleanup(g.close)
	if err := makeNetNS(g.netns); err != nil {
		t.Fatal(err)
	}
	var inner []*os.File
	err = inNetNS(g.netns, func() error {
		for name, value := range settings {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/"+name, []byte(value), 0); err != nil {
				return err
			}
		}
		for _, i := range a.Interfaces {
			f, err := openTap(i.Name)
			if err != nil {
				return err
			}
			inner = append(inner, f)
			g.files = append(g.files, f)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range taps {
		g.carry(taps[i], inner[i])
		g.carry(inner[i], taps[i])
	}
	return g
}

const offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN

func (g *guest) carry(from, to *os.File) {
	g.t.Helper()
	conn, err := from.SyscallConn()
	if err != nil {
		g.t.Fatal(err)
	}
	if err := conn.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloads) }); err != nil {
		g.t.Fatal(err)
	}
	if err != nil {
		g.t.Fatal(err)
	}
	g.pumps.Go(func() {
		buf := make([]byte, 128<<10)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			if _, err := to.Write(buf[:n]); errors.Is(err, os.ErrClosed) {
				return
			}
		}
	})
}

// close ends the guest as QEMU's end does.
func (g *guest) close() {
	g.once.Do(func() {
		for _, f := range g.files {
			f.Close()
		}
		g.pumps.Wait()
		if err := removeNetNS(g.netns); err != nil {
			g.t.Error(err)
		}
	})
}

// configure does what an agent in the guest has to.
func configure(a *Attachment) error {
	index := map[string]int{}
	for _, i := range a.Interfaces {
		l, err := netlink.LinkByName(i.Name)
		if err != nil {
			return err
		}
		index[i.Name] = l.Attrs().Index
		mac, err := net.ParseMAC(i.MAC)
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkSetHardwareAddr(l, mac), netlink.LinkSetMTU(l, i.MTU), netlink.LinkSetUp(l)); err != nil {
			return err
		}
		for _, p := range i.Addresses {
			if err := netlink.AddrReplace(l, &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NOPREFIXROUTE}); err != nil {
				return err
			}
		}
	}
	for _, r := range a.Routes {
		nl := &netlink.Route{
			LinkIndex: index[r.Interface], Dst: ipNet(r.Destination), Gw: r.Gateway.AsSlice(), MTU: r.MTU,
			Scope: netlink.Scope(r.Scope), Priority: r.Priority, Table: r.Table,
		}
		if !r.Source.Is6() { // an address that is still tentative cannot be a source
			nl.Src = r.Source.AsSlice()
		}
		if r.OnLink {
			nl.Flags = int(netlink.FLAG_ONLINK)
		}
		if err := netlink.RouteReplace(nl); err != nil {
			return err
		}
	}
	for _, n := range a.Neighbors {
		mac, err := net.ParseMAC(n.MAC)
		if err != nil {
			return err
		}
		neigh := &netlink.Neigh{LinkIndex: index[n.Interface], IP: n.Address.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT}
		if err := netlink.NeighSet(neigh); err != nil {
			return err
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// serve runs a TCP server in the guest: what a client sends is swallowed until it ends its direction, then size bytes are sent
// back after a line with the number swallowed.
func (g *guest) serve(address string, reply int64) {
	g.t.Helper()
	var l net.Listener
	err := inNetNS(g.netns, func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		g.t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { answer(c, reply) })
		}
	})
	g.t.Cleanup(func() { l.Close(); conns.Wait() })
}

func answer(c net.Conn, reply int64) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.Copy(io.Discard, c); err != nil {
		return
	}
	_, _ = io.CopyN(c, zero{}, reply)
}

// zero reads as zeros without end.
type zero struct{}

func (zero) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// exchange sends and then receives that many bytes; netns is "" for the node. It returns the time each took.
func exchange(netns, address string, send, receive int64) (out, in time.Duration, err error) {
	c, err := dial(netns, "tcp", address)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	start := time.Now()
	if _, err := io.CopyN(c, zero{}, send); err != nil {
		return 0, 0, err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return 0, 0, err
	}
	first := make([]byte, 1)
	if _, err := io.ReadFull(c, first); err != nil {
		return 0, 0, err
	}
	mid := time.Now()
	got, err := io.Copy(io.Discard, c)
	if err == nil && got+1 != receive {
		err = io.ErrUnexpectedEOF
	}
	return mid.Sub(start), time.Since(mid), err
}

func dial(netns, network, address string) (c net.Conn, err error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	if netns == "" {
		return d.Dial(network, address)
	}
	err = inNetNS(netns, func() (err error) {
		c, err = d.Dial(network, address)
		return err
	})
	return c, err
}
