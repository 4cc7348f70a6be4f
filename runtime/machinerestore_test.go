package runtime

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/network"
)

// The script gives each interface all that CNI has made, in an order in which the guest can take it.
func TestIdentityScript(t *testing.T) {
	is := &network.Attachment{
		Interfaces: []network.Interface{
			{Name: "eth0", MAC: "02:00:00:00:00:02", Addresses: []netip.Prefix{netip.MustParsePrefix("10.1.0.5/24"), netip.MustParsePrefix("fd00::5/64")}},
			{Name: "net1", MAC: "02:00:00:00:00:03", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/32")}},
		},
		Routes: []network.Route{
			{Destination: netip.MustParsePrefix("10.1.0.0/24"), Interface: "eth0", Table: mainTable},
			{Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("10.1.0.1"), Interface: "eth0", Table: mainTable},
			{Destination: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fe80::1"), Interface: "eth0", Table: mainTable},
			{Destination: netip.MustParsePrefix("198.51.100.0/24"), Gateway: netip.MustParseAddr("203.0.113.1"), Interface: "net1", Table: mainTable},
			{Destination: netip.MustParsePrefix("198.51.100.0/24"), Interface: "eth0", Table: 100},
		},
	}
	were := []checkpointInterface{{MAC: "0a:00:00:00:00:01"}, {MAC: "0a:00:00:00:00:09"}}
	got := identityScript(were, is, "db", []byte{1, 0xff})
	want := identityHead + `echo 01ff >/dev/urandom
python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom"), 0x5207)' 2>/dev/null ||
	perl -e 'open(F, "<", "/dev/urandom") and ioctl(F, 0x5207, 0)' 2>/dev/null || true
echo db >/proc/sys/kernel/hostname
n=$(dev 0a:00:00:00:00:01 02:00:00:00:00:02)
ip link set dev "$n" address 02:00:00:00:00:02
ip link set dev "$n" up
ip -4 addr flush dev "$n"
ip -6 addr flush dev "$n" || true
ip -6 route flush dev "$n" || true
ip -6 addr add fe80::ff:fe00:2/64 dev "$n" || true
ip addr add 10.1.0.5/24 dev "$n"
ip addr add fd00::5/64 dev "$n"
ip -4 route replace 10.1.0.0/24 dev "$n"
ip -4 route replace default via 10.1.0.1 dev "$n"
ip -6 route replace default via fe80::1 dev "$n"
n=$(dev 0a:00:00:00:00:09 02:00:00:00:00:03)
ip link set dev "$n" address 02:00:00:00:00:03
ip link set dev "$n" up
ip -4 addr flush dev "$n"
ip -6 addr flush dev "$n" || true
ip -6 route flush dev "$n" || true
ip -6 addr add fe80::ff:fe00:3/64 dev "$n" || true
ip addr add 192.0.2.7/32 dev "$n"
ip -4 route replace 198.51.100.0/24 via 203.0.113.1 onlink dev "$n"
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if out, err := exec.Command("sh", "-n", "-c", got).CombinedOutput(); err != nil {
		t.Errorf("a shell says %v: %s", err, out)
	}
}

// Only what the seed tells may differ between the machine that was saved and the pod that it is to be.
func TestFitsMachine(t *testing.T) {
	pod := func(pairs ...string) *runtimeapi.PodSandboxConfig {
		cfg := &runtimeapi.PodSandboxConfig{Annotations: map[string]string{"vmruntime.io/firmware": "efi"}}
		for i := 0; i < len(pairs); i += 2 {
			cfg.Annotations["vmruntime.io/"+pairs[i]] = pairs[i+1]
		}
		return cfg
	}
	m := &checkpointManifest{Machine: &checkpointMachine{}}
	m.Pod.M = pod("user-data", "#!/bin/sh")
	for name, tc := range map[string]struct {
		pod  *runtimeapi.PodSandboxConfig
		want func(error) bool
		word string
	}{
		"the same":        {pod("user-data", "#!/bin/sh"), nil, ""},
		"another seed":    {pod("user-data", "#cloud-config", "vendor-data", "#cloud-config"), nil, ""},
		"no annotations":  {&runtimeapi.PodSandboxConfig{}, errdefs.IsInvalidArgument, "another machine"},
		"other disks":     {pod("disk-bus", "sata"), errdefs.IsInvalidArgument, "another machine"},
		"no such setting": {pod("disk", "sata"), errdefs.IsInvalidArgument, "unknown"},
	} {
		err := m.fitsMachine(tc.pod)
		if tc.want == nil && err != nil || tc.want != nil && (!tc.want(err) || !strings.Contains(err.Error(), tc.word)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	m.Machine.Unmovable = "the guest does not run qemu-guest-agent"
	if err := m.fitsMachine(m.Pod.M); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), m.Machine.Unmovable) {
		t.Errorf("a machine that cannot be told its addresses: %v", err)
	}
}
