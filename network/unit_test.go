package network

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestInvalidRequests(t *testing.T) {
	m, err := New(Options{ConfDir: "/nowhere", BinDirs: []string{"/nowhere"}, NetNSDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Request){
		`pod ID is "../x"`:                       func(r *Request) { r.ID = "../x" },
		`pod ID is ""`:                           func(r *Request) { r.ID = "" },
		`pod name is "a;CNI_ARG=b"`:              func(r *Request) { r.Name = "a;CNI_ARG=b" },
		`port mapping 0: host port is "70000"`:   func(r *Request) { r.PortMappings = []PortMapping{{HostPort: 70000, ContainerPort: 1}} },
		`port mapping 0: container port is "0"`:  func(r *Request) { r.PortMappings = []PortMapping{{HostPort: 1}} },
		`port mapping 0: protocol is "icmp"`:     func(r *Request) { r.PortMappings = []PortMapping{{Protocol: "icmp", HostPort: 1, ContainerPort: 1}} },
		`port mapping 0: host IP is "localhost"`: func(r *Request) { r.PortMappings = []PortMapping{{HostIP: "localhost", HostPort: 1, ContainerPort: 1}} },
		`DNS server is "1.2.3"`:                  func(r *Request) { r.DNS.Servers = []string{"1.2.3"} },
		`DNS option is "a\nb"`:                   func(r *Request) { r.DNS.Options = []string{"a\nb"} },
		`annotation kubernetes.io/ingress-bandwidth is "fast"`: func(r *Request) {
			r.Annotations = map[string]string{ingressBandwidth: "fast"}
		},
		`annotation kubernetes.io/egress-bandwidth is "1"`: func(r *Request) {
			r.Annotations = map[string]string{egressBandwidth: "1"}
		},
	} {
		req := Request{ID: "ok"}
		change(&req)
		if _, err := m.Setup(t.Context(), req); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("Setup: %v; want InvalidArgument with %s", err, want)
		}
	}
	if _, err := New(Options{ConfDir: "etc", NetNSDir: "/x"}); !errdefs.IsInvalidArgument(err) ||
		!strings.Contains(err.Error(), "ConfDir") || !strings.Contains(err.Error(), "BinDirs") {
		t.Errorf("New: %v; want both options named", err)
	}
}

func TestBurst(t *testing.T) {
	for rate, want := range map[uint64]uint64{0: 0, 1000: 2097152, 100e6: 25e6, 1e15: 4294967295} {
		if got := burst(rate); got != want {
			t.Errorf("burst(%d) = %d; want %d", rate, got, want)
		}
	}
}

func TestTapName(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range []string{"eth0", "eth1", "elevenchars", "twelve-chars", "fifteen-chars-x", "fifteen-chars-y"} {
		tap := tapName(name)
		if len(tap) > 15 || seen[tap] {
			t.Errorf("tapName(%q) = %q, which is too long or taken", name, tap)
		}
		seen[tap] = true
	}
}

func TestResolvConf(t *testing.T) {
	got := ResolvConf([]string{"10.0.0.10", "fd00::a"}, []string{"a.svc", "svc"}, []string{"ndots:5", "edns0"})
	want := "search a.svc svc\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5 edns0\n"
	if got != want {
		t.Errorf("ResolvConf = %q; want %q", got, want)
	}
	if got := ResolvConf(nil, nil, nil); got != "" {
		t.Errorf("ResolvConf of nothing = %q; want nothing", got)
	}
}

func TestHosts(t *testing.T) {
	got := Hosts("web-0", []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")})
	want := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n" +
		"10.0.0.5\tweb-0\nfd00::5\tweb-0\n"
	if got != want {
		t.Errorf("Hosts = %q; want %q", got, want)
	}
}
