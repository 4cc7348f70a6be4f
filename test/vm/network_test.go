package vm_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

func hostPort(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }

// dial connects from the node's network namespace, which is vmruntime's.
func (b *bed) dial(ctx context.Context, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	pid := b.VMRuntimePID()
	go func() {
		runtime.LockOSThread() // never unlocked: the thread, in another namespace, ends with the goroutine
		ns, err := netns.GetFromPid(pid)
		if err != nil {
			done <- result{nil, err}
			return
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			done <- result{nil, err}
			return
		}
		// Of two address families the dialer would race on other threads.
		conn, err := (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, address)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

// fetch gets a page from the node.
func (b *bed) fetch(ctx context.Context, url string) (string, error) {
	return b.request(ctx, http.MethodGet, url, "")
}

func (b *bed) post(ctx context.Context, url, body string) (string, error) {
	return b.request(ctx, http.MethodPost, url, body)
}

func (b *bed) request(ctx context.Context, method, url, body string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	client := &http.Client{Transport: &http.Transport{DialContext: b.dial, DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	return string(got), err
}

// A VM pod and a container pod on one network, each serving the other and the node, in both address families.
func TestNetwork(t *testing.T) {
	ctx, b := use(t)
	vm := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Hostname = "a-name"
		cfg.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"default.svc", "svc"}, Options: []string{"ndots:5"}}
		cfg.PortMappings = []*runtimeapi.PortMapping{{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 28080}}
	})
	plain := b.runPod(ctx, t, "", b.podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-plain" }))
	vm.start(of("nginx", images.Nginx))
	client := vm.start(idle("client"))
	plain.start(of("nginx", images.Nginx))
	plain.start(of("server", images.Server))
	plainClient := plain.start(idle("client"))

	client.expect("hostname; cat /etc/hostname", "a-name\na-name")
	client.expect("cat /etc/resolv.conf", "search default.svc svc\nnameserver 10.96.0.10\noptions ndots:5")
	client.expect("grep -c "+vm.ip()+".*a-name /etc/hosts", "1")
	client.expect("cat /sys/class/net/eth0/mtu; ip -4 addr show eth0 | grep -c "+vm.ip(), "1500\n1")

	addresses := []string{vm.ip()}
	for _, a := range vm.status().GetNetwork().GetAdditionalIps() {
		addresses = append(addresses, a.GetIp())
	}
	if len(addresses) != 2 {
		t.Errorf("the pod has addresses %v, want one of each family", addresses)
	}
	for _, a := range addresses {
		vm.until("nginx in the VM answers the node at "+a, func() bool {
			page, err := b.fetch(ctx, "http://"+hostPort(a, 80)+"/")
			return err == nil && page == "nginx\n"
		})
	}
	plainClient.expect("wget -q -O - http://"+hostPort(vm.ip(), 80)+"/", "nginx")
	client.expect("wget -q -O - http://"+hostPort(plain.ip(), 80)+"/", "nginx")
	client.expect("wget -q -O - http://127.0.0.1/", "nginx") // one network for all containers of the pod
	page, err := b.fetch(ctx, "http://"+hostPort(gateway(t, client), 28080)+"/")
	if err != nil || page != "nginx\n" {
		t.Errorf("the host port answers %q, %v", page, err)
	}

	before := networkBytes(t, vm)
	client.sh("dd if=/dev/zero bs=1k count=300 2>/dev/null | tr '\\0' x >/tmp/body; wget -q -O /tmp/echo --post-file=/tmp/body http://" + hostPort(plain.ip(), 8080) + "/echo")
	client.expect("cmp /tmp/body /tmp/echo && stat -c %s /tmp/echo", "307200")
	if after := networkBytes(t, vm); after < before+200<<10 {
		t.Errorf("the pod's interface sent %d bytes, then %d, want 300 KiB more", before, after)
	}
	vm.remove()
	if _, err := b.fetch(ctx, "http://"+hostPort(gateway(t, plainClient), 28080)+"/"); err == nil {
		t.Error("the host port is open when the pod is gone")
	}
}

// gateway is the node's address on the pods' network.
func gateway(t *testing.T, c *ctr) string {
	t.Helper()
	return strings.TrimSpace(c.sh("ip -4 route show default | awk '{print $3}'"))
}

func networkBytes(t *testing.T, p *pod) uint64 {
	t.Helper()
	resp, err := p.rt.PodSandboxStats(p.ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetStats().GetLinux().GetNetwork().GetDefaultInterface().GetTxBytes().GetValue()
}

// The MTU that CNI gives the pod is the guest's.
func TestMTU(t *testing.T) {
	ctx, b := use(t)
	dir := filepath.Join(b.Root, "cni", "conf")
	usual := readFile(filepath.Join(dir, "10-test.conflist"))
	small := strings.Replace(usual, `"type": "bridge",`, `"type": "bridge", "mtu": 1340,`, 1)
	if small == usual {
		t.Fatalf("the node's CNI configuration has no bridge:\n%s", usual)
	}
	file := filepath.Join(dir, "00-small.conflist")
	writeFile(t, file, small)
	t.Cleanup(func() {
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
	})
	p := b.vmPod(ctx, t)
	p.start(idle("c")).expect("cat /sys/class/net/eth0/mtu", fmt.Sprint(1340))
}
