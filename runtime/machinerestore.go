package runtime

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/qga"
	"github.com/vmruntime/vmruntime/image/seed"
	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/runtime/annotation"
	"github.com/vmruntime/vmruntime/runtime/archive"
)

// A machine that is restored as another pod believes to be the one that was saved, which may run beside it. So its network is held from
// before it goes on until qemu-guest-agent in it has given its interfaces the hardware addresses, addresses and routes of the new pod.
// The seed is the new pod's from the start: a guest that reboots reads it.

// canBeTold says why the guest could not be told who it is in another pod, or nil.
func (g *guest) canBeTold(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	ga, err := g.guestAgent(ctx)
	if err == nil {
		err = runInGuest(ctx, ga, "ip link show dev lo")
	}
	return err
}

// runInGuest runs a script of the guest's shell. What it says is in the error if it fails.
func runInGuest(ctx context.Context, ga *qga.Client, script string) error {
	var said bytes.Buffer
	code, err := ga.Exec(ctx, qga.Command{Args: []string{"/bin/sh", "-c", script}, Stderr: &said})
	if err != nil {
		return err
	}
	if code != 0 {
		return fmt.Errorf("a script in the guest ended with %d: %s: %w", code, strings.TrimSpace(said.String()), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// movable refuses a machine that can be restored in its own sandbox only.
func (m *checkpointMachine) movable() error {
	if m.Unmovable == "" {
		return nil
	}
	return fmt.Errorf("the machine could not be told the addresses of another pod, which takes qemu-guest-agent with guest-exec and the command ip in the guest (%s); "+
		"`vmruntime vm snapshot` and `vmruntime vm restore` take it back to what it was: %w", m.Unmovable, errdefs.ErrFailedPrecondition)
}

// fitsMachine refuses a pod that asks for another machine than that of the checkpoint. What only its seed tells may differ.
func (m *checkpointManifest) fitsMachine(cfg *runtimeapi.PodSandboxConfig) error {
	was, err := hardware(m.Pod.M)
	if err != nil {
		return err
	}
	is, err := hardware(cfg)
	if err != nil {
		return err
	}
	if was != is {
		return fmt.Errorf("config.annotations with the prefix %s ask for another machine than that of the checkpoint; they have to be the same "+
			"but for user-data, vendor-data, network-config, ignition and ssh-keys: %w", annotation.Prefix, errdefs.ErrInvalidArgument)
	}
	return m.Machine.movable()
}

func hardware(cfg *runtimeapi.PodSandboxConfig) (annotation.Machine, error) {
	asked, err := annotation.Parse(cfg.GetAnnotations())
	if err != nil {
		return annotation.Machine{}, err
	}
	for _, s := range []*annotation.Source{&asked.UserData, &asked.VendorData, &asked.NetworkConfig, &asked.Ignition, &asked.SSHKeys} {
		*s = annotation.Source{}
	}
	return *asked, nil
}

// decideRestoredMachine is decideMachine, for what has to be the machine that was saved.
func (p *pod) decideRestoredMachine(ctx context.Context, id string, from *machineSpec, spec *containerSpec) (err error) {
	if spec.Machine, err = p.rt.decideMachine(ctx, p, id, spec); err != nil {
		return err
	}
	if spec.Mounts, err = machineMounts(id, spec.Config.M); err != nil {
		return err
	}
	if len(spec.Mounts) > 0 {
		return fmt.Errorf("mounts: a volume that is shared with the node by virtiofs is in no checkpoint: %w", errdefs.ErrInvalidArgument)
	}
	was, err := json.Marshal(from)
	if err != nil {
		return err
	}
	is, err := json.Marshal(spec.Machine)
	if err != nil {
		return err
	}
	if !bytes.Equal(was, is) {
		return fmt.Errorf("devices, or limits of the pod or the container: the machine would be %s, that of the checkpoint is %s: %w", is, was, errdefs.ErrInvalidArgument)
	}
	return nil
}

// restoreMachine makes the network, the machine's files and its QEMU, which waits with what was saved until the container is started.
func (p *pod) restoreMachine(ctx context.Context, m *checkpointManifest, c *container, r *archive.Reader) error {
	p.life.Lock()
	defer p.life.Unlock()
	if err := p.restoreNetwork(ctx, m); err != nil {
		return err
	}
	if err := p.holdNetwork(m.Interfaces); err != nil {
		return err
	}
	files, err := c.makeMachineFiles()
	if err != nil {
		return err
	}
	files.there = true
	if err := c.unpackOwn(m, r); err != nil {
		return err
	}
	g, err := c.loadSaved(ctx, files, r)
	if err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
		defer cancel()
		return errors.Join(err, p.endGuest(end, g))
	}
	g.log.Info("restored a machine")
	return p.update(func(s *podStatus) error { s.ReadyAt = time.Now(); return nil })
}

// unpackOwn writes disk and variables, not the seed.
func (c *container) unpackOwn(m *checkpointManifest, r *archive.Reader) error {
	dir, err := c.rt.images.OpenMachine(c.id)
	if err != nil {
		return err
	}
	defer dir.Close()
	own := []string{machineFiles{}.root(), machineFiles{}.vars()}
	if err := m.Machine.unpack(dir, r, own); err != nil {
		return err
	}
	return m.Machine.place(dir, own)
}

// startRestoredMachine lets a machine of a checkpoint go on where it was. The caller holds the container's life.
func (c *container) startRestoredMachine(ctx context.Context) error {
	p := c.pod
	p.life.Lock()
	defer p.life.Unlock()
	g := c.machineGuest()
	if g == nil || !g.alive() {
		return fmt.Errorf("the VM with the restored machine has ended: %w", errdefs.ErrFailedPrecondition)
	}
	err := c.openLog()
	if err == nil {
		err = g.vm.Resume(ctx)
	}
	if err == nil {
		err = c.rec.Update(func(s *containerStatus) error { s.StartedAt = time.Now(); return nil })
	}
	if err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
		defer cancel()
		return errors.Join(err, p.endGuest(end, g))
	}
	c.rt.containerEvent(c, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	c.awaitOutput(ctx)
	c.watchMachine(g)
	g.owned.Go(g.tell)
	return nil
}

// waitsForStart tells of a machine whose container has not been started that it was restored, and stands still until it is.
func (c *container) waitsForStart(ctx context.Context, g *guest) (bool, error) {
	if c.rec.Spec().Restored == nil {
		return false, nil
	}
	state, err := g.vm.State(ctx)
	return state != stateRunning, err
}

// started refuses to let a restored machine go on whose container has not been started.
func (g *guest) started() error {
	if g.machine == nil {
		return nil
	}
	c, err := g.pod.rt.containerByID(g.machine.container)
	if err != nil || !c.rec.Status().StartedAt.IsZero() {
		return err
	}
	return fmt.Errorf("container %s, a restored machine, is created; it goes on when it is started: %w", c.id, errdefs.ErrFailedPrecondition)
}

// endUnstarted ends a restored machine that is removed before it was started.
func (c *container) endUnstarted(ctx context.Context) error {
	if !c.isMachine() || !c.rec.Status().StartedAt.IsZero() {
		return nil
	}
	c.pod.life.Lock()
	defer c.pod.life.Unlock()
	g := c.machineGuest()
	if g == nil {
		return nil
	}
	return c.pod.endGuest(ctx, g)
}

// holdNetwork keeps a guest that believes to have these interfaces off the pod's network.
func (p *pod) holdNetwork(believes []checkpointInterface) error {
	if err := p.update(func(s *podStatus) error { s.Held = believes; return nil }); err != nil {
		return err
	}
	return p.rt.net.Hold(p.rec.Status().Network, true)
}

// letNetworkGo ends holdNetwork.
func (p *pod) letNetworkGo() error {
	s := p.rec.Status()
	if s.Held == nil {
		return nil
	}
	if err := p.rt.net.Hold(s.Network, false); err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return p.update(func(s *podStatus) error { s.Held = nil; return nil })
}

// tell lets a restored machine know who it is now, until it does or has ended, and then lets its network go.
func (g *guest) tell() {
	for g.pod.rec.Status().Held != nil {
		err := g.tryTell()
		if err == nil {
			g.log.Info("the restored machine knows its addresses")
			g.setClock()
			return
		}
		g.log.Warn("telling a restored machine its addresses; it is tried again, and has no network until then", "error", err)
		select {
		case <-time.After(releaseRetry):
		case <-g.ctx.Done():
			return
		}
	}
}

func (g *guest) tryTell() error {
	ctx, cancel := context.WithTimeout(g.ctx, bootTimeout)
	defer cancel()
	ga, err := g.guestAgent(ctx)
	if err != nil {
		return err
	}
	entropy := make([]byte, 32)
	if _, err := rand.Read(entropy); err != nil {
		return err
	}
	s := g.pod.rec.Status()
	if err := runInGuest(ctx, ga, identityScript(s.Held, s.Network, g.pod.hostname(), entropy)); err != nil {
		return err
	}
	return g.pod.letNetworkGo()
}

// identityHead begins the script: dev finds the interface that has one of two hardware addresses, since the script may have run before.
const identityHead = `set -e
dev() {
	for d in /sys/class/net/*; do
		[ -e "$d/device" ] || continue
		case $(cat "$d/address") in "$1" | "$2") echo "${d##*/}"; return ;; esac
	done
	echo "no interface has the hardware address $1" >&2
	return 1
}
`

// reseedCommand has the kernel draw a new key from its pool at once, by the ioctl RNDRESEEDCRNG of random(4), with what can make one of
// Python and Perl. Without either the kernel does so by itself within minutes.
const reseedCommand = `python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom"), 0x5207)' 2>/dev/null ||
	perl -e 'open(F, "<", "/dev/urandom") and ioctl(F, 0x5207, 0)' 2>/dev/null || true
`

// identityScript gives the guest's interfaces, which have the hardware addresses that were, what CNI has made. It takes what ip of iproute2 and of
// busybox have in common. Links stay up: at a change of that, what configures networks in the guest would do so as it was configured.
func identityScript(were []checkpointInterface, is *network.Attachment, hostname string, entropy []byte) string {
	var b strings.Builder
	b.WriteString(identityHead)
	fmt.Fprintf(&b, "echo %x >/dev/urandom\n", entropy)
	b.WriteString(reseedCommand)
	fmt.Fprintf(&b, "echo %s >/proc/sys/kernel/hostname\n", hostname)
	for n, i := range seedInterfaces(is) {
		fmt.Fprintf(&b, "n=$(dev %s %s)\n", were[n].MAC, i.MAC)
		fmt.Fprintf(&b, "ip link set dev \"$n\" address %s\nip link set dev \"$n\" up\n", i.MAC) // down only in a guest that has just booted again
		b.WriteString("ip -4 addr flush dev \"$n\"\nip -6 addr flush dev \"$n\" || true\nip -6 route flush dev \"$n\" || true\n")
		if local, err := linkLocal(i.MAC); err == nil {
			fmt.Fprintf(&b, "ip -6 addr add %s/64 dev \"$n\" || true\n", local) // where it has IPv6
		}
		for _, a := range i.Addresses {
			fmt.Fprintf(&b, "ip addr add %s dev \"$n\"\n", a)
		}
		for _, r := range i.Routes {
			b.WriteString(routeCommand(i, r))
		}
	}
	return b.String()
}

func routeCommand(i seed.Interface, r seed.Route) string {
	family, to, via := "-6", r.To.Masked().String(), ""
	if r.To.Addr().Is4() {
		family = "-4"
	}
	if r.To.Bits() == 0 {
		to = "default"
	}
	if r.Via.IsValid() {
		via = " via " + r.Via.String()
		if !onLink(i, r.Via) {
			via += " onlink"
		}
	}
	return fmt.Sprintf("ip %s route replace %s%s dev \"$n\"\n", family, to, via)
}

// onLink tells whether an address lies in a subnet of the interface.
func onLink(i seed.Interface, a netip.Addr) bool {
	for _, p := range i.Addresses {
		if p.Contains(a) {
			return true
		}
	}
	return a.Is6() && a.IsLinkLocalUnicast()
}

// linkLocal is the address that the kernel makes of a hardware address (RFC 4291, appendix A).
func linkLocal(mac string) (netip.Addr, error) {
	hw, err := net.ParseMAC(mac)
	if err != nil || len(hw) != 6 {
		return netip.Addr{}, fmt.Errorf("hardware address %q has to have 6 bytes: %w", mac, errdefs.ErrInvalidArgument)
	}
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: hw[0] ^ 2, 9: hw[1], 10: hw[2], 11: 0xff, 12: 0xfe, 13: hw[3], 14: hw[4], 15: hw[5]}), nil
}
