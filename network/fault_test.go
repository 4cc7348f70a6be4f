package network

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// withPlugin is the usual network with one more plugin at its end.
func withPlugin(name string) string {
	return strings.TrimSuffix(dualStack, "]}") + `, {"type": "` + name + `"}]}`
}

func TestFailedAddLeavesNothing(t *testing.T) {
	n := newNode(t)
	n.plugin("broken", `
if [ $CNI_COMMAND = ADD ]; then echo '{"cniVersion":"1.0.0","code":100,"msg":"the switch is on fire"}'; exit 1; fi
echo $CNI_COMMAND $CNI_CONTAINERID >>$DIR/calls
`)
	n.network(withPlugin("broken"))
	req := request("broken")
	req.PortMappings = []PortMapping{{ContainerPort: 80, HostPort: 18081}}
	if _, err := n.Setup(t.Context(), req); err == nil || !strings.Contains(err.Error(), "the switch is on fire") {
		t.Errorf("Setup: %v; want the plugin's words", err)
	}
	if calls, err := os.ReadFile(filepath.Join(n.dir, "calls")); err != nil || string(calls) != "DEL pod-broken\n" {
		t.Errorf("the plugin was called with %q (%v); want one DEL", calls, err)
	}
	n.checkLeaks(countFDs(t))
}

func TestCancelledAddLeavesNothing(t *testing.T) {
	n := newNode(t)
	fifo := filepath.Join(n.dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	n.plugin("hangs", `
if [ $CNI_COMMAND = DEL ]; then exit 0; fi
echo waiting >$DIR/fifo
exec sleep 600
`)
	n.network(withPlugin("hangs"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { _, err := n.Setup(ctx, request("hangs")); done <- err }()
	if _, err := os.ReadFile(fifo); err != nil { // returns when the plugin is at it
		t.Fatal(err)
	}
	cancel()
	select {
	case err := <-done:
		if err == nil {
			t.Error("Setup succeeded though it was cancelled")
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Setup did not end when it was cancelled")
	}
	n.checkLeaks(countFDs(t))
}

// What CNI made may be of no use to a VM; that is found out after ADD.
func TestUnusableNetworkLeavesNothing(t *testing.T) {
	for name, c := range map[string]struct{ command, want string }{
		"interface down": {"ip link set eth0 down", "no Ethernet interface that is up"},
		"several gateways": {
			"ip route add 10.96.0.0/16 nexthop via 10.99.0.1 dev eth0 nexthop via 10.99.0.9 dev eth0", "can have one gateway",
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.plugin("after", `
if [ $CNI_COMMAND = DEL ]; then exit; fi
conf=$(cat)
nsenter --net=$CNI_NETNS `+c.command+`
echo "$conf" | sed 's/.*"prevResult":\({.*}\),"type".*/\1/'
`)
			n.network(withPlugin("after"))
			if _, err := n.Setup(t.Context(), request("unusable")); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Setup: %v; want %q", err, c.want)
			}
		})
	}
}

func TestFailedDelIsTriedAgain(t *testing.T) {
	n := newNode(t)
	n.plugin("stubborn", `
if [ $CNI_COMMAND = ADD ]; then sed 's/.*"prevResult":\({.*}\),"type".*/\1/'; exit; fi
if [ ! -e $DIR/relent ]; then echo '{"cniVersion":"1.0.0","code":100,"msg":"not now"}'; exit 1; fi
`)
	n.network(withPlugin("stubborn"))
	req := request("stubborn")
	if _, err := n.Setup(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if err := n.Teardown(t.Context(), req); err == nil || !strings.Contains(err.Error(), "not now") {
		t.Errorf("Teardown: %v; want the plugin's words", err)
	}
	if ids, err := n.List(); err != nil || !slices.Equal(ids, []string{req.ID}) {
		t.Errorf("List() = %q, %v; want the pod that could not be torn down", ids, err)
	}
	if err := os.WriteFile(filepath.Join(n.dir, "relent"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	n.teardown(req)
}

func TestAddressesUsedUp(t *testing.T) {
	n := newNode(t)
	n.network(strings.ReplaceAll(dualStack, `"subnet": "10.99.0.0/24"`, `"subnet": "10.99.0.0/30"`))
	n.setup(request("first"))
	_, err := n.Setup(t.Context(), request("second"))
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no free address") {
		t.Errorf("Setup: %v; want ResourceExhausted", err)
	}
	if leases := n.leases(); len(leases) != 2 {
		t.Errorf("leases are %q; want those of the first pod only", leases)
	}
}

// After a reboot namespaces and links are gone, but what plugins keep on disk is not, and the configuration may be another.
func TestTeardownAfterReboot(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	req := request("reboot")
	req.PortMappings = []PortMapping{{ContainerPort: 80, HostPort: 18082}}
	a, err := n.Setup(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if err := removeNetNS(a.NetNS); err != nil {
		t.Fatal(err)
	}
	deleteVeths(t)
	for _, tool := range []string{"iptables", "ip6tables"} {
		if out, err := exec.Command(tool, "-t", "nat", "-F").CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", tool, err, out)
		}
	}
	if err := os.RemoveAll(n.conf()); err != nil {
		t.Fatal(err)
	}
	if ids, err := n.List(); err != nil || !slices.Equal(ids, []string{req.ID}) {
		t.Errorf("List() = %q, %v; want the pod of before the reboot", ids, err)
	}
	if _, err := n.OpenTaps(a); !errdefs.IsNotFound(err) && !errors.Is(err, os.ErrNotExist) {
		t.Errorf("OpenTaps: %v; want it not found", err)
	}
	for range 2 {
		if err := n.Teardown(t.Context(), Request{ID: req.ID}); err != nil {
			t.Errorf("Teardown by ID: %v", err)
		}
	}
}

// deleteVeths does at once what the kernel does in its own time: a pair goes with the namespace of one end.
func deleteVeths(t *testing.T) {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Type() != "veth" {
			continue
		}
		if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			t.Error(err)
		}
	}
}

func TestTeardownOfNothing(t *testing.T) {
	n := newNode(t)
	for range 2 { // without a configuration, and with one
		if err := n.Teardown(t.Context(), Request{ID: "pod-never"}); err != nil {
			t.Errorf("Teardown: %v", err)
		}
		n.network(dualStack)
	}
	// A file without a mount is what a crash between the two leaves.
	if err := os.WriteFile(n.NetNSPath("pod-half"), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	n.teardown(Request{ID: "pod-half"})
}

func TestSetupTwice(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("twice"))
	if _, err := n.Setup(t.Context(), request("twice")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second Setup: %v; want AlreadyExists", err)
	}
	g := startGuest(t, n, a, false)
	g.serve(":80", 1)
	if _, _, err := exchange("", "10.99.0.2:80", 1, 1); err != nil {
		t.Errorf("the first network suffered: %v", err)
	}
}

func TestReady(t *testing.T) {
	n := newNode(t)
	n.plugin("moody", `
if [ $CNI_COMMAND = STATUS ] && [ -e $DIR/sulk ]; then echo '{"cniVersion":"1.1.0","code":50,"msg":"no route to the controller"}'; exit 1; fi
`)
	steps := []struct {
		name string
		do   func() error
		want string
	}{
		{"no file", func() error { return nil }, "no network config found in " + n.conf()},
		{"no JSON", func() error { n.network("{"); return nil }, "10-test.conflist"},
		{"no plugin", func() error {
			n.network(`{"cniVersion": "1.1.0", "name": "x", "plugins": [{"type": "absent", "ipam": {"type": "absent-ipam"}}]}`)
			return nil
		}, `CNI plugin "absent-ipam"`},
		{"usable", func() error { n.network(dualStack); return nil }, ""},
		{"plugin says no", func() error {
			n.network(`{"cniVersion": "1.1.0", "name": "x", "plugins": [{"type": "moody"}]}`)
			return os.WriteFile(filepath.Join(n.dir, "sulk"), nil, 0o644)
		}, "no route to the controller"},
		{"plugin says yes", func() error { return os.Remove(filepath.Join(n.dir, "sulk")) }, ""},
		{"no directory", func() error { return os.RemoveAll(n.conf()) }, n.conf()},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.Fatal(err)
		}
		err := n.Ready(t.Context())
		switch {
		case s.want == "" && err != nil:
			t.Errorf("%s: %v; want ready", s.name, err)
		case s.want != "" && (!errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), s.want)):
			t.Errorf("%s: %v; want Unavailable with %q", s.name, err, s.want)
		}
	}
	if _, err := n.Setup(t.Context(), request("early")); !errdefs.IsUnavailable(err) {
		t.Errorf("Setup: %v; want Unavailable", err)
	}
}

// The descriptor of a tap is all that QEMU gets: it works for another user in another network namespace.
func TestTapServesAnotherUser(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("user"))
	taps, err := n.OpenTaps(a)
	if err != nil {
		t.Fatal(err)
	}
	capture := captureFrom(t, a)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), tapEnv+"=1")
	cmd.ExtraFiles = taps
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET, Credential: &syscall.Credential{Uid: 65534, Gid: 65534},
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("use the tap: %v: %s", err, out)
	}
	taps[0].Close()
	if !slices.ContainsFunc(capture(), func(f frame) bool { return len(f) > 14 && string(f[12:14]) == "\x88\xb5" }) {
		t.Error("the frame that was written did not come out on the node")
	}
}
