package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// readyTimeout is how long one part of the cluster may take until it answers.
const readyTimeout = 90 * time.Second

// service is a program of the cluster.
type service struct {
	name    string
	program string // in the set, if it has another name
	set     string // of test/tools
	args    []string
	ready   func(ctx context.Context) error // nil: nothing waits for it
}

// services are all programs in the order in which they start.
func (c *Cluster) services() []service {
	return []service{
		{name: "etcd", set: "etcd", program: "server", args: c.etcdArgs(), ready: c.healthy("http://127.0.0.1:2379/readyz")},
		{name: "kube-apiserver", set: "kubernetes", args: c.apiserverArgs(), ready: c.apiReady},
		{name: "kube-controller-manager", set: "kubernetes", args: c.controllerArgs()},
		{name: "kube-scheduler", set: "kubernetes", args: []string{"--kubeconfig", c.path("scheduler.conf"), "--leader-elect=false"}},
		{name: "coredns", set: "coredns", args: []string{"-conf", c.path("Corefile")}, ready: c.healthy("http://127.0.0.1:8181/ready")},
		{name: "metrics-server", set: "metrics-server", args: c.metricsArgs()}, // ready when it has figures, which TestTop waits for
		{name: "kubelet", set: "kubernetes", args: c.kubeletArgs(), ready: c.nodeReady},
		{name: "kube-proxy", set: "kubernetes", args: []string{"--config", c.path("proxy.yaml")}, ready: c.healthy("http://127.0.0.1:10256/healthz")},
	}
}

// stopOrder are the programs in the order in which they end.
func stopOrder() []string {
	return []string{"kube-proxy", "kubelet", "metrics-server", "coredns", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"}
}

func (c *Cluster) etcdArgs() []string {
	return []string{
		"--name=node", "--data-dir=" + c.path("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=node=http://127.0.0.1:2380",
	}
}

func (c *Cluster) apiserverArgs() []string {
	pki := func(file string) string { return c.path("pki", file) }
	return []string{
		"--etcd-servers=http://127.0.0.1:2379", "--advertise-address=" + nodeIPv4, "--secure-port=6443",
		"--service-cluster-ip-range=" + serviceCIDRs, "--allow-privileged=true",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--client-ca-file=" + pki("ca.crt"), "--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"),
		"--kubelet-certificate-authority=" + pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--kubelet-client-certificate=" + pki("apiserver.crt"), "--kubelet-client-key=" + pki("apiserver.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + pki("service-account.crt"), "--service-account-signing-key-file=" + pki("service-account.key"),
		"--requestheader-client-ca-file=" + pki("ca.crt"), "--requestheader-allowed-names=front-proxy",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--feature-gates=" + stopSignals,
		"--proxy-client-cert-file=" + pki("front-proxy.crt"), "--proxy-client-key-file=" + pki("front-proxy.key"),
		"--enable-aggregator-routing", // to endpoints: the node has no route to the addresses of Services
	}
}

func (c *Cluster) controllerArgs() []string {
	config := c.path("controller-manager.conf")
	return []string{
		"--kubeconfig=" + config, "--authentication-kubeconfig=" + config, "--authorization-kubeconfig=" + config,
		"--leader-elect=false", "--use-service-account-credentials",
		"--service-account-private-key-file=" + c.path("pki", "service-account.key"), "--root-ca-file=" + c.path("pki", "ca.crt"),
		"--cluster-signing-cert-file=" + c.path("pki", "ca.crt"), "--cluster-signing-key-file=" + c.path("pki", "ca.key"),
	}
}

// stopSignals lets containers say by which signal they are stopped.
const stopSignals = "ContainerStopSignals=true"

func (c *Cluster) kubeletArgs() []string {
	return []string{
		"--feature-gates=" + strings.Join(append([]string{stopSignals}, c.gates...), ","),
		"--config=" + c.path("kubelet.yaml"), "--kubeconfig=" + c.path("kubelet.conf"), "--root-dir=" + c.kubeletRoot(),
		"--hostname-override=" + NodeName, "--node-ip=" + nodeIPv4 + "," + nodeIPv6, "--node-labels=vmruntime.io/ready=true", "--v=2",
	}
}

// metricsArgs have the figures of the last quarter of a minute.
func (c *Cluster) metricsArgs() []string {
	config := c.path("node-admin.conf")
	return []string{
		"--kubeconfig=" + config, "--authentication-kubeconfig=" + config, "--authorization-kubeconfig=" + config,
		"--bind-address=" + nodeIPv4, "--secure-port=" + metricsPort, "--metric-resolution=15s",
		"--tls-cert-file=" + c.path("pki", "metrics-server.crt"), "--tls-private-key-file=" + c.path("pki", "metrics-server.key"),
		"--kubelet-preferred-address-types=InternalIP", "--kubelet-use-node-status-port",
	}
}

// startAll starts every program, each when those before it are ready.
func (c *Cluster) startAll(ctx context.Context) error {
	if err := c.makeCgroups(); err != nil {
		return err
	}
	for _, s := range c.services() {
		if err := c.startService(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) startService(ctx context.Context, s service) error {
	d, err := c.node.StartDaemon(s.name, c.tool(s.set, cmp.Or(s.program, s.name)), s.args...)
	if err != nil {
		return err
	}
	c.daemons[s.name] = d
	if s.ready == nil {
		return nil
	}
	err = Await(ctx, readyTimeout, s.name+" to be ready", func(ctx context.Context) error {
		if !d.Running() {
			return errEnded
		}
		return s.ready(ctx)
	})
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, d.Tail())
	}
	return err
}

// errEnded is the error of a program that will never be ready.
var errEnded = errors.New("it has ended")

// Await calls try until it returns nil. The error of one that takes longer is try's last.
func Await(ctx context.Context, timeout time.Duration, what string, try func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if errors.Is(err, errEnded) {
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %s for %s: %w", timeout, what, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// healthy asks an address on the node.
func (c *Cluster) healthy(url string) func(context.Context) error {
	return func(ctx context.Context) error {
		transport := &http.Transport{DialContext: c.Dial, DisableKeepAlives: true}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return err
		}
		response, err := transport.RoundTrip(request)
		if err != nil {
			return err
		}
		if response.StatusCode != http.StatusOK {
			err = fmt.Errorf("GET %s: %s", url, response.Status)
		}
		return errors.Join(err, response.Body.Close())
	}
}

// apiReady also waits for the namespace that no one but the API server makes.
func (c *Cluster) apiReady(ctx context.Context) error {
	if _, err := c.client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx); err != nil {
		return err
	}
	_, err := c.client.CoreV1().Namespaces().Get(ctx, metav1.NamespaceSystem, metav1.GetOptions{})
	return err
}

// nodeReady also waits for the service account without which no pod is admitted.
func (c *Cluster) nodeReady(ctx context.Context) error {
	n, err := c.client.CoreV1().Nodes().Get(ctx, NodeName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, condition := range n.Status.Conditions {
		if condition.Type == corev1.NodeReady && condition.Status != corev1.ConditionTrue {
			return fmt.Errorf("node %s: %s", NodeName, condition.Message)
		}
	}
	if len(n.Spec.Taints) > 0 || len(n.Status.Conditions) == 0 {
		return fmt.Errorf("node %s: conditions %v, taints %v", NodeName, n.Status.Conditions, n.Spec.Taints)
	}
	_, err = c.client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
	return err
}

// podsWeight is, by the file that holds it, the weight of all pods together among the machine's processes: four times
// what it is by itself, one process's. With that, guests that are emulated beside builds do not boot in time.
var podsWeight = map[string]string{"cpu.shares": "4096", "cpu.weight": "400"}

// makeCgroups makes the node's parent on each hierarchy: the kubelet wants its root to be there.
func (c *Cluster) makeCgroups() error {
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		return err
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err == nil { // v2 alone: those are cgroups, not hierarchies
		hierarchies = []string{"/sys/fs/cgroup/cgroup.procs"}
	}
	for _, procs := range hierarchies {
		dir := filepath.Join(filepath.Dir(procs), c.node.CgroupParent())
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		for name, weight := range podsWeight {
			file := filepath.Join(dir, name)
			if _, err := os.Stat(file); err != nil {
				continue // another hierarchy's
			}
			if err := os.WriteFile(file, []byte(weight), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// restart starts a service again that has been stopped.
func (c *Cluster) restart(ctx context.Context, name string) error {
	if err := c.daemons[name].Stop(); err != nil {
		return err
	}
	for _, s := range c.services() {
		if s.name == name {
			return c.startService(ctx, s)
		}
	}
	return fmt.Errorf("service %q is unknown, want one of %v", name, stopOrder())
}

// RestartKubelet ends the kubelet and starts it again. Pods go on.
func (c *Cluster) RestartKubelet(ctx context.Context) error { return c.restart(ctx, "kubelet") }

// SetKubeletFeatures restarts the kubelet with feature gates ("Name=true") besides those that the cluster's kubelet always has.
func (c *Cluster) SetKubeletFeatures(ctx context.Context, gates ...string) error {
	c.gates = gates
	return c.RestartKubelet(ctx)
}

// RestartVMRuntime ends vmruntime with SIGTERM and starts it again. Pods go on.
func (c *Cluster) RestartVMRuntime(ctx context.Context) error {
	return errors.Join(c.node.StopVMRuntime(), c.node.StartVMRuntime(ctx))
}

// RestartContainerd ends containerd and starts it again. Pods go on.
func (c *Cluster) RestartContainerd(ctx context.Context) error {
	return errors.Join(c.node.StopContainerd(), c.node.StartContainerd(ctx))
}
