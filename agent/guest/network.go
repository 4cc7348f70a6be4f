package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const linkTimeout = 10 * time.Second

// configureNetwork gives the guest's devices the pod's names, addresses and routes.
func configureNetwork(ctx context.Context, req *agentpb.ConfigureSandboxRequest) error {
	for _, in := range req.Interfaces {
		if err := configureInterface(ctx, in); err != nil {
			return fmt.Errorf("interface %q: %w", in.Name, err)
		}
	}
	// Gateways are reached through the routes without one.
	sorted := slices.Clone(req.Routes)
	slices.SortStableFunc(sorted, func(a, b *agentpb.Route) int { return min(len(a.Gateway), 1) - min(len(b.Gateway), 1) })
	for _, r := range sorted {
		if err := addRoute(r); err != nil {
			return fmt.Errorf("route to %s: %w", r.Destination, err)
		}
	}
	for _, n := range req.Neighbors {
		if err := addNeighbor(n); err != nil {
			return fmt.Errorf("neighbor %s: %w", n.Address, err)
		}
	}
	return nil
}

func addNeighbor(n *agentpb.Neighbor) error {
	mac, err := net.ParseMAC(n.Mac)
	if err != nil {
		return fmt.Errorf("mac: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	ip, err := optionalIP("address", n.Address)
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(n.Interface)
	if err != nil {
		return fmt.Errorf("interface %q: %w", n.Interface, err)
	}
	return netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac})
}

func configureInterface(ctx context.Context, in *agentpb.Interface) error {
	link, err := linkByMAC(ctx, in.Mac)
	if err != nil {
		return err
	}
	if err := rename(link, in.Name); err != nil {
		return err
	}
	if in.Mtu > 0 {
		if err := netlink.LinkSetMTU(link, int(in.Mtu)); err != nil {
			return fmt.Errorf("mtu %d: %w", in.Mtu, err)
		}
	}
	// Everything is configured from outside: no router advertisements. Without IPv6 the file is not there.
	err = os.WriteFile("/proc/sys/net/ipv6/conf/"+in.Name+"/accept_ra", []byte("0"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, a := range in.Addresses {
		if err := addAddress(link, a); err != nil {
			return fmt.Errorf("address %q: %w", a, err)
		}
	}
	return netlink.LinkSetUp(link)
}

// linkByMAC waits for the device with the given hardware address.
func linkByMAC(ctx context.Context, text string) (netlink.Link, error) {
	mac, err := net.ParseMAC(text)
	if err != nil {
		return nil, fmt.Errorf("mac: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, linkTimeout)
	defer cancel()
	var found netlink.Link
	err = poll(ctx, devicePoll, func() (bool, error) {
		links, err := netlink.LinkList()
		for _, l := range links {
			if bytes.Equal(l.Attrs().HardwareAddr, mac) {
				found = l
				return true, nil
			}
		}
		return false, err
	})
	if err != nil {
		return nil, fmt.Errorf("no device with hardware address %s: %w: %w", mac, err, errdefs.ErrNotFound)
	}
	return found, nil
}

// rename names the device. Another one with that name gets a temporary one and its own later.
func rename(link netlink.Link, name string) error {
	if link.Attrs().Name == name {
		return nil
	}
	if other, err := netlink.LinkByName(name); err == nil {
		if err := renameDown(other, fmt.Sprintf("vm-old%d", other.Attrs().Index)); err != nil {
			return err
		}
	}
	return renameDown(link, name)
}

func renameDown(link netlink.Link, name string) error {
	if err := netlink.LinkSetDown(link); err != nil {
		return err
	}
	if err := netlink.LinkSetName(link, name); err != nil {
		return fmt.Errorf("rename %s to %q: %w", link.Attrs().Name, name, err)
	}
	return nil
}

func addAddress(link netlink.Link, cidr string) error {
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return fmt.Errorf("want CIDR notation: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if addr.IP.To4() == nil {
		// The address is the pod's by assignment; waiting for its detection would delay the start.
		addr.Flags |= unix.IFA_F_NODAD
	}
	// The routes say which prefixes are on the link.
	addr.Flags |= unix.IFA_F_NOPREFIXROUTE
	return netlink.AddrReplace(link, addr)
}

func addRoute(r *agentpb.Route) error {
	route := &netlink.Route{
		Scope: netlink.Scope(r.Scope), Priority: int(r.Priority), Table: int(r.Table), MTU: int(r.Mtu),
	}
	_, dst, err := net.ParseCIDR(r.Destination)
	if err != nil {
		return fmt.Errorf("destination: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	route.Dst = dst
	if route.Gw, err = optionalIP("gateway", r.Gateway); err != nil {
		return err
	}
	if route.Src, err = optionalIP("source", r.Source); err != nil {
		return err
	}
	if r.Interface != "" {
		link, err := netlink.LinkByName(r.Interface)
		if err != nil {
			return fmt.Errorf("interface %q: %w", r.Interface, err)
		}
		route.LinkIndex = link.Attrs().Index
	}
	if r.OnLink {
		route.Flags |= int(netlink.FLAG_ONLINK)
	}
	if route.Gw == nil && route.Scope == netlink.SCOPE_UNIVERSE && dst.IP.To4() != nil {
		// The kernel wants this scope for an IPv4 route without a gateway.
		route.Scope = netlink.SCOPE_LINK
	}
	return netlink.RouteReplace(route)
}

func optionalIP(field, text string) (net.IP, error) {
	if text == "" {
		return nil, nil
	}
	ip := net.ParseIP(text)
	if ip == nil {
		return nil, fmt.Errorf("%s %q is no IP address: %w", field, text, errdefs.ErrInvalidArgument)
	}
	return ip, nil
}
