package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses of the cluster. The node has a network namespace of its own, so they are the same for every cluster.
const (
	nodeIPv4    = "10.89.0.1"
	nodeIPv6    = "fd00:89::1"
	podCIDRs    = "10.88.0.0/16,fd00:88::/64" // test/node's CNI configuration
	serviceIPv4 = "10.96.0.1"                 // the Service `kubernetes`
	dnsIPv4     = "10.96.0.10"
	dnsIPv6     = "fd00:96::a"
	// serviceCIDRs are the ranges of Service addresses.
	serviceCIDRs = "10.96.0.0/16,fd00:96::/112"
	apiAddress   = nodeIPv4 + ":6443"
	metricsPort  = "4443"
)

// nodeLink carries the node's addresses. Loopback cannot: it is no valid address of an endpoint.
const nodeLink = "node0"

// setUpNetwork makes the node's link, and lets the node forward as kube-proxy expects. It is for a thread in the
// node's network namespace.
func setUpNetwork() error {
	// Both ends are here: a link that is up, for addresses to be good on it.
	peer := nodeLink + "-peer"
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: nodeLink}, PeerName: peer}
	if err := netlink.LinkAdd(link); err != nil {
		return fmt.Errorf("add link %s: %w", nodeLink, err)
	}
	other, err := netlink.LinkByName(peer)
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.LinkSetUp(link), netlink.LinkSetUp(other)); err != nil {
		return err
	}
	for _, cidr := range []string{nodeIPv4 + "/24", nodeIPv6 + "/64"} {
		address, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		address.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, address); err != nil {
			return fmt.Errorf("add address %s: %w", cidr, err)
		}
	}
	var errs []error
	for _, key := range []string{
		"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding",
		"net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables",
	} {
		errs = append(errs, os.WriteFile(filepath.Join("/proc/sys", key), []byte("1"), 0o644))
	}
	return errors.Join(errs...)
}
