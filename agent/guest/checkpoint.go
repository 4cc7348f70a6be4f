package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// freezeTimeout bounds the wait for processes that are inside the kernel.
const freezeTimeout = 30 * time.Second

// Freeze stops the processes of containers, all or none. Execs are not started in them until they are thawed.
func (s *Server) Freeze(ctx context.Context, req *agentpb.FreezeRequest) (*agentpb.FreezeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	resp, err := s.freezeAll(ctx, req.GetContainerIds())
	if err != nil {
		return nil, errors.Join(err, s.thawAll(req.GetContainerIds()))
	}
	return resp, nil
}

func (s *Server) freezeAll(ctx context.Context, ids []string) (*agentpb.FreezeResponse, error) {
	for _, id := range ids {
		c, err := s.container(id)
		if err != nil {
			return nil, err
		}
		if err := c.holdExecs(ctx); err != nil {
			return nil, err
		}
	}
	resp := &agentpb.FreezeResponse{}
	for _, id := range ids {
		ends, err := s.freeze(ctx, id)
		if err != nil {
			return nil, err
		}
		resp.Ends = append(resp.Ends, &agentpb.OutputEnd{ContainerId: id, Stdout: ends[stdout], Stderr: ends[stderr]})
	}
	return resp, nil
}

func (s *Server) freeze(ctx context.Context, id string) (ends [2]uint64, err error) {
	c, err := s.container(id)
	if err != nil {
		return ends, err
	}
	c.lifecycle.Lock()
	defer c.lifecycle.Unlock()
	if st := c.main.state(); !st.Started || st.Exited {
		return ends, fmt.Errorf("container %q is not running: %w", id, errdefs.ErrFailedPrecondition)
	}
	if err := os.WriteFile(filepath.Join(c.cgroup, "cgroup.freeze"), []byte("1"), 0); err != nil {
		return ends, fmt.Errorf("freeze container %q: %w", id, err)
	}
	err = poll(ctx, 2*time.Millisecond, func() (bool, error) {
		return readFlat(filepath.Join(c.cgroup, "cgroup.events"))["frozen"] == 1, nil
	})
	if err != nil {
		return ends, fmt.Errorf("container %q does not freeze: %w", id, err)
	}
	return c.main.out.hold(), nil
}

// Thaw lets containers go on.
func (s *Server) Thaw(_ context.Context, req *agentpb.ThawRequest) (*agentpb.Empty, error) {
	ids := req.GetContainerIds()
	if len(ids) == 0 {
		for _, c := range s.allContainers() {
			ids = append(ids, c.id)
		}
	}
	return &agentpb.Empty{}, s.thawAll(ids)
}

func (s *Server) thawAll(ids []string) error {
	var errs []error
	for _, id := range ids {
		c, err := s.container(id)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		err = os.WriteFile(filepath.Join(c.cgroup, "cgroup.freeze"), []byte("0"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("thaw container %q: %w", id, err))
		}
		c.main.out.release()
		c.letExecsGo()
	}
	return errors.Join(errs...)
}

// Adopt makes a restored guest another pod.
func (s *Server) Adopt(ctx context.Context, req *agentpb.AdoptRequest) (*agentpb.Empty, error) {
	if err := s.inPod(func() error { return readdress(req.GetHardware()) }); err != nil {
		return nil, fmt.Errorf("adopt the guest: %w", err)
	}
	if _, err := s.ConfigureSandbox(ctx, req.GetSandbox()); err != nil {
		return nil, err
	}
	// What was drawn from the pool before the checkpoint must not be drawn again.
	if err := reseed(); err != nil {
		return nil, fmt.Errorf("reseed the random pool: %w", err)
	}
	return &agentpb.Empty{}, nil
}

// readdress takes what addresses and routes devices have away and gives them the pod's hardware addresses.
func readdress(addresses []*agentpb.HardwareAddress) error {
	if len(addresses) == 0 {
		return nil
	}
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	byMAC := make(map[string]netlink.Link)
	for _, l := range links {
		byMAC[l.Attrs().HardwareAddr.String()] = l
	}
	for _, a := range addresses {
		mac, err := net.ParseMAC(a.GetNew())
		if err != nil {
			return fmt.Errorf("hardware.new: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		link := byMAC[a.GetOld()]
		if link == nil {
			link = byMAC[mac.String()]
		}
		if link == nil {
			return fmt.Errorf("no device with hardware address %s: %w", a.GetOld(), errdefs.ErrNotFound)
		}
		if err := readdressLink(link, mac); err != nil {
			return fmt.Errorf("interface %q: %w", link.Attrs().Name, err)
		}
	}
	return nil
}

func readdressLink(link netlink.Link, mac net.HardwareAddr) error {
	// Down, it loses its routes and neighbours.
	if err := netlink.LinkSetDown(link); err != nil {
		return err
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("take address %s away: %w", a.IPNet, err)
		}
	}
	return netlink.LinkSetHardwareAddr(link, mac)
}

// reseed draws a new key from the pool, as RNDRESEEDCRNG in random(4) does.
func reseed() error {
	f, err := os.OpenFile("/dev/random", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return errno
	}
	return nil
}

// Freeze is not for a machine.
func (m *machineSession) Freeze(context.Context, *agentpb.FreezeRequest) (*agentpb.FreezeResponse, error) {
	return nil, notInMachine("Freeze")
}

// Thaw is not for a machine.
func (m *machineSession) Thaw(context.Context, *agentpb.ThawRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("Thaw")
}

// Adopt is not for a machine.
func (m *machineSession) Adopt(context.Context, *agentpb.AdoptRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("Adopt")
}
