package vm_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// connect dials until somebody listens.
func (b *bed) connect(ctx context.Context, t *testing.T, address string) *net.TCPConn {
	t.Helper()
	var conn net.Conn
	until(ctx, t, "somebody listens on "+address, func() (listens bool) {
		var err error
		conn, err = b.dial(ctx, "tcp", address)
		return err == nil
	})
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.TCPConn)
}

// The bandwidth plugin bounds a VM pod in both directions, as any other.
func TestBandwidth(t *testing.T) {
	ctx, b := use(t)
	// 500 kB a second, of which 256 KiB pass at once: 2 MiB take 3.7 s, and without the plugin well below one.
	const rate, size, atLeast = 4_000_000, 2 << 20, 3 * time.Second
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "4M", "kubernetes.io/egress-bandwidth": "4M"}
	})
	if got := boundedLinks(t, b, rate/8); got != 2 {
		t.Errorf("%d interfaces of the node are bounded to %d bytes a second, want one for each direction", got, rate/8)
	}
	p.start(shell("out", fmt.Sprintf("head -c %d /dev/zero | nc -l -p 7001", size)))
	conn := b.connect(ctx, t, hostPort(p.ip(), 7001))
	begin := time.Now()
	n, err := io.Copy(io.Discard, conn)
	if took := time.Since(begin); err != nil || n != size || took < atLeast {
		t.Errorf("the pod sent %d bytes in %s, %v; want %d in at least %s", n, took, err, size, atLeast)
	}
	in := p.start(shell("in", "nc -l -p 7002 | wc -c"))
	conn = b.connect(ctx, t, hostPort(p.ip(), 7002))
	begin = time.Now()
	if _, err := conn.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	in.wait()
	if took := time.Since(begin); strings.TrimSpace(in.text()) != fmt.Sprint(size) || took < atLeast {
		t.Errorf("the pod got %q bytes in %s; want %d in at least %s", in.text(), took, size, atLeast)
	}
	p.remove()
	if got := boundedLinks(t, b, rate/8); got != 0 {
		t.Errorf("%d interfaces are bounded when the pod is gone", got)
	}
}

// boundedLinks counts the node's interfaces that send no more than so many bytes a second.
func boundedLinks(t *testing.T, b *bed, rate uint64) (n int) {
	t.Helper()
	err := b.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			queues, failed := netlink.QdiscList(l)
			if err = errors.Join(err, failed); slices.ContainsFunc(queues, func(q netlink.Qdisc) bool { tbf, ok := q.(*netlink.Tbf); return ok && tbf.Rate == rate }) {
				n++
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// secondNetwork is a plugin that adds an interface of another network, as Multus does, and reports what was there before it.
const secondNetwork = `#!/bin/sh
conf=$(cat)
if [ "$CNI_COMMAND" = VERSION ]; then echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}'; exit; fi
if [ "$CNI_COMMAND" = CHECK ]; then exit; fi
export CNI_IFNAME=net1
second='{"cniVersion":"1.0.0","name":"second","type":"bridge","bridge":"cni1","mtu":1400,"ipam":{"type":"host-local","dataDir":"$ROOT/cni/ipam",
"ranges":[[{"subnet":"10.89.0.0/16"}],[{"subnet":"fd00:89::/64"}]],"routes":[{"dst":"10.90.0.0/16","gw":"10.89.0.1"}]}}'
if [ "$CNI_COMMAND" = DEL ]; then echo "$second" | $BRIDGE; exit; fi
echo "$second" | $BRIDGE >/dev/null || exit 1
echo "$conf" | sed 's/.*"prevResult":\({.*}\),"type".*/\1/'
`

// withSecondNetwork has the node give pods a second interface for the time of the test.
func (b *bed) withSecondNetwork(ctx context.Context, t *testing.T) {
	t.Helper()
	config, dir := filepath.Join(b.Root, "vmruntime", "vmruntime.toml"), t.TempDir()
	usual := readFile(config)
	_, rest, found := strings.Cut(usual, `bin_dirs = ["`)
	bin, _, _ := strings.Cut(rest, `"`)
	if !found {
		t.Fatalf("the node's configuration has no bin_dirs:\n%s", usual)
	}
	script := strings.NewReplacer("$ROOT", b.Root, "$BRIDGE", filepath.Join(bin, "bridge")).Replace(secondNetwork)
	if err := os.WriteFile(filepath.Join(dir, "second"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(b.Root, "cni", "conf")
	file := filepath.Join(conf, "00-two.conflist")
	writeFile(t, file, strings.Replace(readFile(filepath.Join(conf, "10-test.conflist")), `{"type": "firewall"}`, `{"type": "firewall"}, {"type": "second"}`, 1))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
		b.configure(ctx, t, config, usual)
		if err := b.Do(func() error {
			bridge, err := netlink.LinkByName("cni1")
			if err == nil {
				err = netlink.LinkDel(bridge)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	})
	b.configure(ctx, t, config, strings.Replace(usual, `bin_dirs = ["`, fmt.Sprintf(`bin_dirs = [%q, "`, dir), 1))
}

// All interfaces of a pod are the guest's, each with its own hardware address, MTU, addresses and routes.
func TestSeveralInterfaces(t *testing.T) {
	ctx, b := use(t)
	b.withSecondNetwork(ctx, t)
	one, two := b.vmPod(ctx, t), b.vmPod(ctx, t)
	first, second := one.start(idle("c")), two.start(idle("c"))
	two.start(of("server", images.Server))
	first.expect("ls /sys/class/net | tr '\\n' ' '; cat /sys/class/net/eth0/mtu /sys/class/net/net1/mtu", "eth0 lo net1 1500\n1400")
	first.expect("cat /sys/class/net/eth0/address /sys/class/net/net1/address | sort -u | wc -l", "2")
	first.expect("ip route show dev net1 | grep -o '^10.90.0.0/16 via 10.89.0.1'", "10.90.0.0/16 via 10.89.0.1")
	first.expect("ip -4 route | awk '$1 == \"default\" {print $5}'", "eth0")
	for _, tt := range []struct{ link, family, network string }{
		{"eth0", "inet", "10.88."}, {"eth0", "inet6", "fd00:88:"}, {"net1", "inet", "10.89."}, {"net1", "inet6", "fd00:89:"},
	} {
		address := strings.TrimSpace(second.sh(fmt.Sprintf("ip -o addr show dev %s | awk '$3 == \"%s\" {print $4}' | cut -d/ -f1 | grep -v ^fe80", tt.link, tt.family)))
		if !strings.HasPrefix(address, tt.network) {
			t.Errorf("%s of the second pod has %q, want an address of %s", tt.link, address, tt.network)
			continue
		}
		one.until("the pods reach one another at "+address, func() bool {
			resp, err := first.execSync(20, "wget", "-q", "-O", "-", "http://"+hostPort(address, 8080)+"/")
			return err == nil && strings.HasPrefix(string(resp.GetStdout()), "hello from")
		})
	}
	ips := []string{one.status().GetNetwork().GetIp()}
	for _, a := range one.status().GetNetwork().GetAdditionalIps() {
		ips = append(ips, a.GetIp())
	}
	if len(ips) != 4 || !strings.HasPrefix(ips[0], "10.88.") {
		t.Errorf("the pod's addresses are %v, want four, that of the cluster's network first", ips)
	}
}

// Without a CNI configuration the network is not ready, no VM pod begins, and nothing is left of the attempt. With one all is well, and
// nobody has to be told.
func TestNoNetwork(t *testing.T) {
	ctx, b := use(t)
	file := filepath.Join(b.Root, "cni", "conf", "10-test.conflist")
	usual := readFile(file)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	back := func() { writeFile(t, file, usual) }
	t.Cleanup(func() {
		back()
		until(context.Background(), t, "the network is ready again", func() bool { return b.networkReady(t).GetStatus() })
	})
	until(ctx, t, "the network is not ready", func() bool { return !b.networkReady(t).GetStatus() })
	if c := b.networkReady(t); c.GetReason() == "" || !strings.Contains(c.GetMessage(), filepath.Dir(file)) {
		t.Errorf("the condition is %v, want a reason and a message that names the directory", c)
	}
	cfg := b.podConfig(t)
	_, err := b.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handlerVM})
	refused(t, err, codes.Unavailable, "the CNI configuration in "+filepath.Dir(file), "install a network plugin")
	list, err := b.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil || len(list.GetItems()) > 0 {
		t.Errorf("the sandboxes are %v, %v; want none", list.GetItems(), err)
	}
	if leaks, err := b.Leaks(ctx); err != nil || len(leaks) > 0 {
		t.Errorf("left of the attempt: %q, %v", leaks, err)
	}
	back()
	until(ctx, t, "the network is ready again", func() bool { return b.networkReady(t).GetStatus() })
	b.runPod(ctx, t, handlerVM, cfg).start(idle("c")).expect("cat /sys/class/net/eth0/operstate", "up")
}

func (b *bed) networkReady(t *testing.T) *runtimeapi.RuntimeCondition {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	resp, err := b.rt.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range resp.GetStatus().GetConditions() {
		if c.GetType() == runtimeapi.NetworkReady {
			return c
		}
	}
	t.Fatalf("the conditions %v have no %s", resp.GetStatus().GetConditions(), runtimeapi.NetworkReady)
	return nil
}
