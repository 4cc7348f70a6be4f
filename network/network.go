// Package network gives a pod its network through CNI and hands it to a VM as taps.
//
// A pod has one named network namespace. CNI puts its interfaces there, addresses included, and they stay
// there: CNI CHECK, and whoever looks into the namespace, sees what CNI made. Beside every interface lies a
// persistent tap, and tc redirects all that comes in on one to the other:
//
//	node       | namespace NetNSDir/ID                     | guest
//	bridge --- | eth0 --ingress--> redirect --> tap-eth0 ---- virtio-net: eth0's
//	           | eth0 <-- redirect <--ingress-- tap-eth0     | MAC, addresses, routes
//
// Invariants:
//   - Every name derives from the pod's ID: the namespace, the CNI attachment and by them all that plugins make.
//   - The namespace's own stack never sees a frame that comes in, so only the guest answers: ARP, NDP, TCP.
//   - The network belongs to the pod and not to a QEMU: taps are persistent, a restarted guest takes them again.
//   - Setup leaves nothing behind when it fails. Teardown needs only the ID, also after a reboot: the
//     configuration that an attachment was made with is taken from libcni's cache.
//   - Nothing is kept in memory: the CNI configuration is read at each use, so no change of it can be missed.
//   - A Responder tells a guest without an agent what CNI made, and nothing else does: while it is set up, DHCP and router
//     discovery pass neither from the guest to the pod's network nor back, daemon or not.
package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
)

// teardownTimeout bounds the teardown of one pod; setupTimeout, its set-up. Both are far above what the usual plugins
// take (0.2 s) and together below the kubelet's runtime request timeout of two minutes.
const (
	setupTimeout    = 60 * time.Second
	teardownTimeout = 45 * time.Second
)

// Options say where the node's CNI lies.
type Options struct {
	// ConfDir holds the CNI configurations; the first by name is used, as containerd does.
	ConfDir string
	// BinDirs are searched for plugins in this order.
	BinDirs []string
	// NetNSDir holds the pods' network namespaces, one bind mount each. It is made when missing and must not be
	// shared with another program.
	NetNSDir string
}

// Manager makes and unmakes the networks of pods. Its methods may be called concurrently for different pods.
type Manager struct {
	opts Options
}

// New makes a Manager. That CNI is usable is not asked for here but by Ready, since network plugins are
// installed after the node has started.
func New(o Options) (*Manager, error) {
	if err := errors.Join(
		absolute("ConfDir", o.ConfDir),
		absolute("NetNSDir", o.NetNSDir),
		absolute("BinDirs", o.BinDirs...),
	); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.NetNSDir, 0o711); err != nil {
		return nil, fmt.Errorf("make the directory of network namespaces: %w", err)
	}
	return &Manager{opts: o}, nil
}

func absolute(field string, paths ...string) error {
	if len(paths) == 0 {
		return fmt.Errorf("network option %s is empty; it needs a directory: %w", field, errdefs.ErrInvalidArgument)
	}
	for _, p := range paths {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("network option %s is %q; it must be an absolute path: %w", field, p, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Attachment is a pod's network as CNI made it; it is recorded with the pod. The guest takes over all of it.
type Attachment struct {
	// NetNS is the path of the pod's network namespace.
	NetNS string `json:"netns"`
	// Interfaces in the order of their making; the first with a CNI result is the pod's primary one.
	Interfaces []Interface `json:"interfaces"`
	// Routes of all tables, including the ones to directly connected networks: addresses are to be added
	// without their implied prefix route (IFA_F_NOPREFIXROUTE).
	Routes []Route `json:"routes,omitempty"`
	// Neighbors that were set for good: networks that do not answer ARP or NDP need them.
	Neighbors []Neighbor `json:"neighbors,omitempty"`
}

// Interface is one network interface of a pod.
type Interface struct {
	Name string `json:"name"`
	// MAC in colon notation. The guest's device has the same.
	MAC string `json:"mac"`
	MTU int    `json:"mtu"`
	// Addresses with their prefix length; the kernel's own link-local address is not among them.
	Addresses []netip.Prefix `json:"addresses,omitempty"`
	// Tap is the name of the tap in the namespace that carries this interface's frames to the guest.
	Tap string `json:"tap"`
}

// Route is one unicast route of the namespace.
type Route struct {
	// Destination is 0.0.0.0/0 or ::/0 for a default route.
	Destination netip.Prefix `json:"destination"`
	// Gateway and Source are invalid (zero) when the route has none.
	Gateway   netip.Addr `json:"gateway,omitzero"`
	Source    netip.Addr `json:"source,omitzero"`
	Interface string     `json:"interface"`
	// MTU is 0 when the route has none of its own.
	MTU int `json:"mtu,omitempty"`
	// Scope as in rtnetlink(7): 0 universe, 253 link.
	Scope    int `json:"scope,omitempty"`
	Priority int `json:"priority,omitempty"`
	// Table is 254 for the main table.
	Table int `json:"table"`
	// OnLink says that the gateway is reached directly though no route covers it.
	OnLink bool `json:"onLink,omitempty"`
}

// Neighbor is a permanent ARP or NDP entry.
type Neighbor struct {
	Address   netip.Addr `json:"address"`
	MAC       string     `json:"mac"`
	Interface string     `json:"interface"`
}

// Addresses returns the pod's addresses: those of the primary interface come first, the first of all is the pod's IP.
func (a *Attachment) Addresses() []netip.Addr {
	var out []netip.Addr
	for _, i := range a.Interfaces {
		for _, p := range i.Addresses {
			out = append(out, p.Addr())
		}
	}
	return out
}

// NetNSPath is the path of the network namespace of the pod with this ID, there or not.
func (m *Manager) NetNSPath(id string) string {
	return filepath.Join(m.opts.NetNSDir, id)
}

// PreparedInterface is what CNI's first interface is named, unless a plugin has its own way.
const PreparedInterface = gocni.DefaultPrefix + "0"

// Prepare makes the network namespace of a pod that is not known yet, and in it the tap of PreparedInterface, which it opens as OpenTaps
// does. A Setup with Request.Prepared goes on with it.
func (m *Manager) Prepare(id string) (tap *os.File, err error) {
	if err := validateID(id); err != nil {
		return nil, err
	}
	path := m.NetNSPath(id)
	if err := makeNetNS(path); err != nil {
		return nil, err
	}
	err = inNetNS(path, func() error {
		tap, err = openTap(tapName(PreparedInterface))
		return err
	})
	if err == nil {
		err = keepTap(tap)
	}
	if err != nil {
		if tap != nil {
			err = errors.Join(err, tap.Close())
		}
		return nil, errors.Join(err, removeNetNS(path))
	}
	return tap, nil
}

// Unprepare takes away what Prepare has made, of which CNI has not heard.
func (m *Manager) Unprepare(id string) error {
	if err := validateID(id); err != nil {
		return err
	}
	return removeNetNS(m.NetNSPath(id))
}

// Setup makes a pod's network: its namespace, what CNI puts there, a tap per interface. When it fails, all of it
// has been taken away again. Errors: ErrInvalidArgument for a request that cannot be met, ErrAlreadyExists when the pod
// has a network, ErrUnavailable while CNI is not configured, ErrResourceExhausted when no address is left.
func (m *Manager) Setup(ctx context.Context, req Request) (*Attachment, error) {
	if err := req.validate(); err != nil {
		return nil, err
	}
	c, err := m.load()
	if err != nil {
		return nil, err
	}
	// A plugin that is missing fails ADD half way, and then DEL too: what was made could not be given back.
	if _, err := m.usable(c); err != nil {
		return nil, err
	}
	path := m.NetNSPath(req.ID)
	if !req.Prepared {
		if err := makeNetNS(path); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	a, err := attach(ctx, c, req, path)
	if err != nil {
		return nil, errors.Join(err, m.Teardown(context.WithoutCancel(ctx), req))
	}
	return a, nil
}

func attach(ctx context.Context, c gocni.CNI, req Request, path string) (*Attachment, error) {
	order, err := addToCNI(ctx, c, req, path)
	if err != nil {
		return nil, err
	}
	a := &Attachment{NetNS: path}
	if err := inNetNS(path, func() error { return a.read(order) }); err != nil {
		return nil, fmt.Errorf("read what CNI made: %w", err)
	}
	if err := inNetNS(path, a.connectTaps); err != nil {
		return nil, err
	}
	return a, nil
}

// Teardown takes a pod's network away. Only the request's ID must be set; the rest serves plugins when Setup did not
// get to its end. It succeeds when nothing is there, and runs all its steps whatever fails. The namespace stays
// while CNI has not given back what it took, so that a later call can try again.
func (m *Manager) Teardown(ctx context.Context, req Request) error {
	if err := validateID(req.ID); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
	defer cancel()
	path := m.NetNSPath(req.ID)
	if err := m.removeFromCNI(ctx, req, path); err != nil {
		return fmt.Errorf("tear down the network of pod %s: %w", req.ID, err)
	}
	return removeNetNS(path)
}

// List returns the IDs of all pods that have a network here, sorted: those with a namespace, and those of which CNI
// still holds addresses from before a reboot. It serves to find networks that no pod owns.
func (m *Manager) List() ([]string, error) {
	entries, err := os.ReadDir(m.opts.NetNSDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if validateID(e.Name()) == nil {
			ids = append(ids, e.Name())
		}
	}
	cached, err := m.cachedAttachments("")
	if err != nil {
		return nil, err
	}
	for _, c := range cached {
		if c.NetNS == m.NetNSPath(c.ContainerID) {
			ids = append(ids, c.ContainerID)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}
