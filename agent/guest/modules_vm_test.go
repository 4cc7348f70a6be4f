package guest_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// firewalls are Debian's programs; what of them this machine has is put into the image.
var firewalls = []string{"nft", "iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"}

// addProgram copies a program, and the libraries that its loader names if it has one.
func (m *machine) addProgram(root, program, name string) {
	m.t.Helper()
	output(m.t, root, "cp", "-L", program, "bin/"+name)
	// It fails for a static program.
	libs, err := exec.Command("ldd", program).Output()
	if err != nil {
		return
	}
	for _, lib := range regexp.MustCompile(`/\S+`).FindAllString(string(libs), -1) {
		m.addFile(root, lib)
	}
}

func (m *machine) addFile(root, file string) {
	m.t.Helper()
	to := filepath.Join(root, file)
	output(m.t, root, "mkdir", "-p", filepath.Dir(to))
	output(m.t, root, "cp", "-L", file, to)
}

// addFirewalls copies the programs, and iptables' extensions.
func (m *machine) addFirewalls(root string) {
	m.t.Helper()
	for _, name := range firewalls {
		if program, err := exec.LookPath(name); err == nil {
			m.addProgram(root, program, name)
		}
	}
	extensions, err := filepath.Glob("/usr/lib/*/xtables/lib*.so")
	if err != nil {
		m.t.Fatal(err)
	}
	for _, lib := range extensions {
		m.addFile(root, lib)
	}
}

// withNetAdmin is a container that may change the pod's network, has the nodes of some devices, and sees the guest's.
func withNetAdmin(args ...string) *specs.Spec {
	spec := containerSpec(args...)
	for _, set := range []*[]string{&spec.Process.Capabilities.Bounding, &spec.Process.Capabilities.Effective, &spec.Process.Capabilities.Permitted} {
		*set = append(*set, "CAP_NET_ADMIN")
	}
	spec.Linux.Devices = []specs.LinuxDevice{
		{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200},
		{Path: "/dev/loop-control", Type: "c", Major: 10, Minor: 237},
		{Path: "/dev/loop7", Type: "b", Major: 7, Minor: 7},
	}
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/guestdev", Type: "bind", Source: "/dev", Options: []string{"rbind", "rprivate", "ro"}})
	return spec
}

// runScript runs a script in a container that may change the network, and gives its output.
func runScript(t *testing.T, c *agent.Client, id, script string) string {
	t.Helper()
	runContainer(t, c, id, withNetAdmin("sh", "-ec", script), nil)
	defer removeContainer(t, c, id)
	stdout, stderr, st := readAll(t, c, &agentpb.ProcessRef{ContainerId: id})
	if st.ExitCode != 0 {
		t.Errorf("exit code %d of\n%s\nstdout:\n%s\nstderr:\n%s", st.ExitCode, script, stdout, stderr)
	}
	return stdout
}

// The kernel loads what a container asks for, and nothing that nobody asked for.
func testModules(t *testing.T, _ *machine, c *agent.Client) {
	stdout := runScript(t, c, "modules", `
loaded() { cut -d" " -f1 /proc/modules | grep -qx "$1"; }
for m in bridge dummy veth macvlan tun loop wireguard; do ! loaded $m || { echo $m is loaded already; exit 1; }; done
for f in fuse loop-control net/tun; do test -c /guestdev/$f; done
brctl addbr br0 && ip link set br0 up
for kind in dummy veth wireguard vrf; do
	case $kind in vrf) more="table 5";; *) more=;; esac
	ip link add t-$kind type $kind $more
	ip link show t-$kind >/dev/null
	ip link del t-$kind
done
ip link add m0 link eth0 type macvlan && ip link del m0
brctl addif br0 eth1 && brctl delif br0 eth1
ip link set br0 down && brctl delbr br0
cat /dev/net/tun >/tmp/tun 2>&1 || true
cat /dev/loop7 >/dev/null
for m in bridge dummy veth macvlan tun loop wireguard; do loaded $m || { echo $m is not loaded; exit 1; }; done
! loaded sctp
if ip link add x0 type nosuchkind 2>/tmp/error; then exit 1; fi
cat /tmp/error
`)
	if !strings.Contains(stdout, "not supported") {
		t.Errorf("a kind of link that no module has: %q", stdout)
	}
}

// nftables, and iptables over it and of the older kind, all without help from outside the container.
func testFirewalls(t *testing.T, _ *machine, c *agent.Client) {
	for _, name := range firewalls {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("needs %s in PATH: Debian's packages iptables and nftables", name)
		}
	}
	stdout := runScript(t, c, "nft", `
nft add table inet t
nft add chain inet t out '{ type nat hook output priority -100; }'
nft add rule inet t out tcp dport 81 counter redirect to :82
nft add chain inet t in '{ type filter hook input priority 0; }'
nft add rule inet t in ct state invalid limit rate 1/second log drop
nft list ruleset
nft delete table inet t
`)
	if !strings.Contains(stdout, "redirect to :82") || !strings.Contains(stdout, "ct state invalid") {
		t.Errorf("rules:\n%s", stdout)
	}
	for _, kind := range []string{"nft", "legacy"} {
		// What a service mesh sets up.
		stdout := runScript(t, c, "iptables-"+kind, fmt.Sprintf(`
mkdir -p /run
for p in iptables-%[1]s ip6tables-%[1]s; do
	$p -t nat -N MESH
	$p -t nat -A MESH -p tcp -j REDIRECT --to-ports 15001
	$p -t nat -A OUTPUT -p tcp -m owner --uid-owner 1337 -j RETURN
	$p -t nat -A OUTPUT -p tcp -m multiport --dports 80,443 -j MESH
	$p -t nat -A POSTROUTING -m mark --mark 0x1 -j MASQUERADE
	$p -t mangle -A PREROUTING -p tcp -m socket -j MARK --set-mark 1337
	$p -t mangle -A PREROUTING -p tcp -m comment --comment mesh -j TPROXY --on-port 15006 --tproxy-mark 1337
	$p -t filter -A INPUT -m conntrack --ctstate INVALID -j DROP
	$p -t raw -A PREROUTING -p udp -j CT --notrack
	for t in nat mangle filter raw; do $p -t $t -S; done
	for t in nat mangle filter raw; do $p -t $t -F; done
	$p -t nat -X MESH
done
`, kind))
		for _, want := range []string{"--to-ports 15001", "--uid-owner 1337", "MASQUERADE", "TPROXY", "--ctstate INVALID", "--notrack"} {
			if strings.Count(stdout, want) != 2 {
				t.Errorf("iptables-%s: %q is not there twice:\n%s", kind, want, stdout)
			}
		}
	}
}
