// Package cluster brings up a real Kubernetes of one node on vmruntime: etcd, the API server, controller manager,
// scheduler, kubelet, kube-proxy, CoreDNS and the metrics server at the versions that test/tools pins, on a node of
// test/node. The kubelet knows vmruntime's socket only; the RuntimeClass `vm` is that of deploy/.
//
// A cluster lives in the network namespace and below the root directory of its node, so that several can run on one
// machine; all it starts it ends by PID. A test program has one cluster, which its TestMain starts and stops:
//
//	c, err := cluster.Start(ctx, cluster.Options{VMRuntime: program, GuestDir: guest})
//	...
//	err = c.Stop() // also fails when something is left behind
//
// The API is reached from everywhere, as kubectl (Kubectl, KubectlCommand), client-go (Client) or with any other
// client (RestConfig, Kubeconfig). Addresses of pods and Services, node ports and host ports are the node's: Dial
// reaches them, and commands by Node().Command.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/vmruntime/vmruntime/test/images"
	"github.com/vmruntime/vmruntime/test/node"
	"github.com/vmruntime/vmruntime/test/tools"
)

// NodeName is the name of the cluster's node.
const NodeName = "node"

// Options of a cluster.
type Options struct {
	Root      string // "": a new directory in the system's place for temporary files; keep it short, sockets lie below it
	VMRuntime string // the program that serves the CRI
	GuestDir  string // what make guest built
	Accel     string // vmruntime's qemu.accel; "": tcg, which boots everywhere
	LogLevel  string // vmruntime's log level; "": info
}

// Cluster is a running cluster. Its methods are not for concurrent use, except those that only ask the API.
type Cluster struct {
	node    *node.Node
	tools   map[string]string // set name to directory
	proxy   *proxy
	daemons map[string]*node.Daemon
	gates   []string // features of the kubelet that a test turned on
	config  *rest.Config
	client  kubernetes.Interface
}

// Start brings a cluster up and returns when its node is ready. If it fails, nothing is left behind.
func Start(ctx context.Context, o Options) (c *Cluster, err error) {
	c = &Cluster{tools: map[string]string{}, daemons: map[string]*node.Daemon{}}
	for _, name := range []string{"etcd", "kubernetes", "coredns", "metrics-server"} {
		if c.tools[name], err = tools.Dir(name); err != nil {
			return nil, err
		}
	}
	registry, err := images.KubernetesHandler()
	if err != nil {
		return nil, err
	}
	c.node, err = node.Start(ctx, node.Options{
		Root: o.Root, Registry: registry, VMRuntime: o.VMRuntime, GuestDir: o.GuestDir, Accel: o.Accel, LogLevel: o.LogLevel,
	})
	if err != nil {
		return nil, err
	}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(err, c.end())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	if err := c.node.Do(setUpNetwork); err != nil {
		return fmt.Errorf("set up the node's network: %w", err)
	}
	var err error
	if c.proxy, err = startProxy(c.Dial, apiAddress); err != nil {
		return err
	}
	if err := c.writeFiles(); err != nil {
		return err
	}
	if c.config, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig()); err != nil {
		return err
	}
	// Keys that are files are watched, by goroutines that nothing ends.
	if err := rest.LoadTLSFiles(c.config); err != nil {
		return err
	}
	c.config.CertFile, c.config.KeyFile, c.config.CAFile = "", "", ""
	c.config.QPS, c.config.Burst = 100, 200
	if c.client, err = kubernetes.NewForConfig(c.config); err != nil {
		return err
	}
	if err := c.startAll(ctx); err != nil {
		return err
	}
	if err := c.apply(ctx); err != nil {
		return err
	}
	return c.node.SetBaseline(ctx)
}

// apply makes what every cluster has: the RuntimeClass, and the Services of DNS and of the metrics.
func (c *Cluster) apply(ctx context.Context) error {
	for _, file := range []string{filepath.Join(deployDir(), "runtimeclass.yaml"), c.path("dns.yaml"), c.path("metrics.yaml")} {
		if _, err := c.Kubectl(ctx, "apply", "-f", file); err != nil {
			return err
		}
	}
	return nil
}

// deployDir is deploy/ of the source from which this package was built.
func deployDir() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..", "deploy")
}

// Node is the machine that the cluster runs on.
func (c *Cluster) Node() *node.Node { return c.node }

// KubeletPID is the kubelet's process ID, 0 when it does not run.
func (c *Cluster) KubeletPID() int { return c.daemons["kubelet"].PID() }

// Client is client-go as the cluster's administrator.
func (c *Cluster) Client() kubernetes.Interface { return c.client }

// RestConfig is how clients reach the API as the cluster's administrator.
func (c *Cluster) RestConfig() *rest.Config { return rest.CopyConfig(c.config) }

// Kubeconfig is the administrator's configuration file of kubectl. It is good on the whole machine.
func (c *Cluster) Kubeconfig() string { return c.path("admin.conf") }

// Dial connects to an address as the node does: of a pod, a Service, a node port.
func (c *Cluster) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = c.node.Do(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// LogFile is what a daemon printed: one of the control plane or of the node, by its program's name.
func (c *Cluster) LogFile(name string) string { return c.node.LogFile(name) }

// path is a file of the cluster.
func (c *Cluster) path(elem ...string) string {
	return filepath.Join(append([]string{c.node.Root, "cluster"}, elem...)...)
}

func (c *Cluster) tool(set, program string) string { return filepath.Join(c.tools[set], program) }

// Stop removes all pods and ends the cluster. It fails when pods left something on the node, or something of the
// cluster is left on the machine.
func (c *Cluster) Stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	err := c.removePods(ctx)
	if err == nil {
		var lines []string
		if lines, err = c.Leaks(ctx); len(lines) > 0 {
			err = fmt.Errorf("pods left on the node:\n  %s", strings.Join(lines, "\n  "))
		}
	}
	return errors.Join(err, c.end())
}

// end ends what start started, as far as it came.
func (c *Cluster) end() error {
	var errs []error
	for _, name := range stopOrder() {
		errs = append(errs, c.daemons[name].Stop())
	}
	if c.proxy != nil {
		errs = append(errs, c.proxy.close())
	}
	// The kubelet has mounted its directory on itself.
	if err := unix.Unmount(c.kubeletRoot(), 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		errs = append(errs, fmt.Errorf("unmount %s: %w", c.kubeletRoot(), err))
	}
	errs = append(errs, c.node.Stop(), removeLogLinks(c.node.Root))
	return errors.Join(errs...)
}

// removeLogLinks removes the kubelet's links to this node's logs, whose directory is the same for every kubelet.
func removeLogLinks(root string) error {
	const dir = "/var/log/containers"
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		link := filepath.Join(dir, e.Name())
		if target, readErr := os.Readlink(link); readErr == nil && strings.HasPrefix(target, root+"/") {
			err = errors.Join(err, os.Remove(link))
		}
	}
	return err
}
