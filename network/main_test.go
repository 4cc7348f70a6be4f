package network

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/test/tools"
)

const (
	insideEnv = "VMRUNTIME_NETWORK_TEST_INSIDE"
	tapEnv    = "VMRUNTIME_NETWORK_TEST_TAP"
	// respondEnv has the attachment that a process of its own answers for.
	respondEnv = "VMRUNTIME_NETWORK_TEST_RESPOND"
	// busyboxEnv has where the package busybox-static is unpacked: apt does not work in the tests' namespaces.
	busyboxEnv = "VMRUNTIME_NETWORK_TEST_BUSYBOX"
)

// TestMain runs the tests in network and mount namespaces of their own, with /var/lib/cni on a tmpfs: CNI acts on the node
// that it runs on.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv(tapEnv) != "":
		tapUser()
	case os.Getenv(respondEnv) != "":
		respondUntilKilled()
	case os.Geteuid() != 0:
		goleak.VerifyTestMain(m)
	case os.Getenv(insideEnv) == "":
		os.Exit(reexecute())
	default:
		if err := prepareNode(); err != nil {
			fmt.Fprintln(os.Stderr, "prepare the test's node:", err)
			os.Exit(1)
		}
		goleak.VerifyTestMain(m)
	}
}

func reexecute() int {
	runtime.LockOSThread() // Pdeathsig is of the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	if flag.Parse(); !testing.Short() {
		dir, err := tools.Debs("busybox-static")
		if err != nil {
			fmt.Fprintln(os.Stderr, "get busybox-static:", err)
			return 1
		}
		cmd.Env = append(cmd.Env, busyboxEnv+"="+dir)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return exit.ExitCode()
	case err != nil:
		fmt.Fprintln(os.Stderr, "run the tests in namespaces of their own:", err)
		return 1
	}
	return 0
}

func prepareNode() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/var/lib", "tmpfs", 0, ""); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0); err != nil {
		return err
	}
	for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte("1"), 0); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// node is a Manager with directories of its own, whose test ends with a look for leaks.
type node struct {
	*Manager
	t       *testing.T
	dir     string
	scripts string
}

func newNode(t *testing.T) *node {
	t.Helper()
	if testing.Short() {
		t.Skip("needs network namespaces and CNI plugins: run by make test")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces")
	}
	bin, err := tools.Dir("cni")
	if err != nil {
		t.Skipf("needs the CNI plugins: %v", err)
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		t.Skip("needs iptables, which the plugins portmap and bridge call")
	}
	n := &node{t: t, dir: t.TempDir()}
	n.scripts = filepath.Join(n.dir, "bin")
	for _, d := range []string{n.scripts, n.conf()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.Manager, err = New(Options{ConfDir: n.conf(), BinDirs: []string{n.scripts, bin}, NetNSDir: filepath.Join(n.dir, "netns")})
	if err != nil {
		t.Fatal(err)
	}
	fds := countFDs(t)
	t.Cleanup(func() { n.checkLeaks(fds) })
	return n
}

func (n *node) conf() string { return filepath.Join(n.dir, "net.d") }

// network writes the node's CNI configuration; $DIR stands for the test's directory.
func (n *node) network(conf string) {
	n.t.Helper()
	conf = strings.ReplaceAll(conf, "$DIR", n.dir)
	if err := os.WriteFile(filepath.Join(n.conf(), "10-test.conflist"), []byte(conf), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// plugin writes a CNI plugin as a shell script.
func (n *node) plugin(name, body string) {
	n.t.Helper()
	script := "#!/bin/sh\nset -e\nexec 2>>" + n.dir + "/" + name + ".log\n" +
		"if [ $CNI_COMMAND = VERSION ]; then echo '{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"1.0.0\",\"1.1.0\"]}'; exit; fi\n" +
		strings.ReplaceAll(body, "$DIR", n.dir)
	if err := os.WriteFile(filepath.Join(n.scripts, name), []byte(script), 0o755); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) setup(req Request) *Attachment {
	n.t.Helper()
	a, err := n.Setup(n.t.Context(), req)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { n.teardown(req) })
	return a
}

func (n *node) teardown(req Request) {
	n.t.Helper()
	if err := n.Teardown(n.t.Context(), req); err != nil {
		n.t.Errorf("Teardown: %v", err)
	}
}

// checkLeaks runs after all teardowns. The bridge and the plugins' base chains stay by design.
func (n *node) checkLeaks(fds int) {
	n.t.Helper()
	if left := n.leases(); len(left) > 0 {
		n.t.Errorf("addresses still leased: %q", left)
	}
	if left, _ := filepath.Glob("/var/lib/cni/results/*"); len(left) > 0 {
		n.t.Errorf("CNI still has attachments on record: %q", left)
	}
	if ids, err := n.List(); err != nil || len(ids) > 0 {
		n.t.Errorf("List() = %q, %v; want none", ids, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte(n.dir)) {
		n.t.Errorf("mounts are left below %s (%v)", n.dir, err)
	}
	links, err := netlink.LinkList()
	if err != nil {
		n.t.Error(err)
	}
	for _, l := range links {
		switch l.Type() {
		case "bridge":
			if err := netlink.LinkDel(l); err != nil {
				n.t.Error(err)
			}
		case "veth", "tuntap", "ifb":
			n.t.Errorf("interface %s (%s) is left", l.Attrs().Name, l.Type())
		}
	}
	for _, tool := range []string{"iptables-save", "ip6tables-save"} {
		out, err := exec.Command(tool).Output()
		if err != nil {
			n.t.Errorf("%s: %v", tool, err)
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, "CNI-DN-") || strings.Contains(line, "pod-") {
				n.t.Errorf("%s: rule is left: %s", tool, line)
			}
		}
	}
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		n.t.Error(err)
	}
	threads, _ := filepath.Glob("/proc/self/task/*/ns/net")
	for _, thread := range threads {
		if ns, err := os.Readlink(thread); err == nil && ns != home { // a thread may have ended by now
			n.t.Errorf("%s is still in another network namespace", thread)
		}
	}
	if now := countFDs(n.t); now > fds {
		n.t.Errorf("%d descriptors are open, %d were before the test", now, fds)
	}
}

// leases lists what host-local has given out.
func (n *node) leases() []string {
	all, _ := filepath.Glob(filepath.Join(n.dir, "ipam", "*", "*"))
	var out []string
	for _, f := range all {
		if net.ParseIP(filepath.Base(f)) != nil {
			out = append(out, filepath.Base(f))
		}
	}
	return out
}

func countFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, e := range entries {
		target, _ := os.Readlink("/proc/self/fd/" + e.Name())
		if !strings.Contains(target, "eventpoll") && !strings.Contains(target, "eventfd") { // the Go runtime's own
			count++
		}
	}
	return count
}

// tapUser is another process with another user and network namespace, as QEMU is, that uses a tap by its descriptor only.
func tapUser() {
	if err := useTap(3); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func useTap(fd int) error {
	req, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, req); err != nil {
		return fmt.Errorf("TUNGETIFF: %w", err)
	}
	if got := req.Uint16(); got&unix.IFF_VNET_HDR == 0 || got&unix.IFF_TAP == 0 || got&unix.IFF_NO_PI == 0 {
		return fmt.Errorf("flags are %#x", got)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, 12); err != nil {
		return fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD: %w", err)
	}
	frame := make([]byte, 12+60) // a broadcast of an experimental protocol behind an empty virtio-net header
	copy(frame[12:], "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5")
	_, err = unix.Write(fd, frame)
	return err
}
