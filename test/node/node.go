// Package node brings up a private node: containerd, and in front of it
// vmruntime, with CNI networking and a registry of test images.
//
// Everything lies below one directory and one network namespace, so that nodes
// do not touch one another nor the machine's own containerd. What a node starts
// it ends by PID. Leaks says what pods left behind while the node runs; Stop
// fails when something of the node survives it.
//
//	Root/
//	  cni/         configuration and address reservations
//	  containerd/  root, state, configuration
//	  vmruntime/   root, state, configuration
//	  run/         sockets
//	  log/         what the daemons print
package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/vmruntime/vmruntime/test/images"
	"github.com/vmruntime/vmruntime/test/tools"
)

// Options of a node. The zero value is a node with containerd only, in a new
// directory that Stop removes.
type Options struct {
	Root     string       // "": a new directory in the system's place for temporary files
	Registry http.Handler // "": images.Handler
	// VMRuntime is the program that serves the CRI; "" for containerd alone.
	VMRuntime string
	GuestDir  string // what make guest built
	Accel     string // vmruntime's qemu.accel; "": tcg, which boots everywhere
	LogLevel  string // vmruntime's log level; "": info
}

// Node is a running node. Its methods are not for concurrent use, except those
// that only read.
type Node struct {
	Root string

	options    Options
	containerd *Daemon
	vmruntime  *Daemon
	daemons    []*Daemon // all that run, and some that have ended
	netns      *netns
	registry   *registryServer
	crictl     string
	tools      map[string]string // set name to directory
	ownsRoot   bool
	baseline   resources
}

// Start brings a node up and returns when its CRI answers. If it fails,
// nothing is left behind.
func Start(ctx context.Context, o Options) (n *Node, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a node needs root: it makes namespaces, mounts and cgroups")
	}
	n = &Node{Root: o.Root, options: o, tools: map[string]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Stop())
			n = nil
		}
	}()
	if err := n.makeRoot(); err != nil {
		return n, err
	}
	for _, name := range []string{"containerd", "runc", "cni", "cri-tools"} {
		if n.tools[name], err = tools.Dir(name); err != nil {
			return n, err
		}
	}
	n.crictl = filepath.Join(n.tools["cri-tools"], "crictl")
	handler := o.Registry
	if handler == nil {
		if handler, err = images.Handler(); err != nil {
			return n, err
		}
	}
	if n.netns, err = newNetNS(n.name()); err != nil {
		return n, err
	}
	if n.registry, err = startRegistry(n.netns, handler); err != nil {
		return n, err
	}
	if err := n.writeConfigs(); err != nil {
		return n, err
	}
	if err := n.StartContainerd(ctx); err != nil {
		return n, err
	}
	if o.VMRuntime != "" {
		if err := n.StartVMRuntime(ctx); err != nil {
			return n, err
		}
	}
	return n, n.SetBaseline(ctx)
}

// SetBaseline has Leaks compare with what is there now. It is for those who add
// to the node what is no pod's.
func (n *Node) SetBaseline(ctx context.Context) (err error) {
	n.baseline, err = n.resources(ctx)
	return err
}

func (n *Node) makeRoot() error {
	if n.Root == "" {
		root, err := os.MkdirTemp("", "vmr-")
		if err != nil {
			return err
		}
		n.Root, n.ownsRoot = root, true
	}
	if err := os.MkdirAll(n.Root, 0o711); err != nil {
		return err
	}
	// QEMU's own user has to pass through.
	if err := os.Chmod(n.Root, 0o711); err != nil {
		return err
	}
	for _, dir := range []string{"cni/conf", "cni/ipam", "containerd", "vmruntime", "run", "log", "registry/_default"} {
		if err := os.MkdirAll(filepath.Join(n.Root, dir), 0o711); err != nil {
			return err
		}
	}
	return nil
}

// name is the node's name on the machine: of its network namespace.
func (n *Node) name() string { return "node-" + filepath.Base(n.Root) }

// CgroupParent is a cgroup for the node's pods alone, for their
// cgroup_parent: what is left there is the node's.
func (n *Node) CgroupParent() string { return "/" + n.name() }

func (n *Node) path(elem ...string) string {
	return filepath.Join(append([]string{n.Root}, elem...)...)
}

// ContainerdSocket is containerd's own socket.
func (n *Node) ContainerdSocket() string { return n.path("run", "containerd.sock") }

// MetricsSocket is where vmruntime serves its metrics.
func (n *Node) MetricsSocket() string { return n.path("run", "metrics.sock") }

// Socket is where the CRI is served: vmruntime's socket if the node has it.
func (n *Node) Socket() string {
	if n.options.VMRuntime == "" {
		return n.ContainerdSocket()
	}
	return n.path("run", "vmruntime.sock")
}

// LogFile is what a daemon ("containerd", "vmruntime") printed.
func (n *Node) LogFile(name string) string { return n.path("log", name+".log") }

// Tool is the path of a program of a tool set.
func (n *Node) Tool(set, program string) string { return filepath.Join(n.tools[set], program) }

// Command is a command in the node's network namespace. URLs of exec, attach
// and port-forward, and host ports, are reachable only from there.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + n.netns.path, "--", name}, args...)...)
}

// Do runs f on a thread that is in the node's network namespace, for what f does
// itself, not in other goroutines.
func (n *Node) Do(f func() error) error { return n.netns.do(f) }

// Crictl runs crictl against Socket and returns its standard output.
func (n *Node) Crictl(ctx context.Context, args ...string) (string, error) {
	cmd := n.Command(ctx, n.crictl, append(n.CrictlFlags(), args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("crictl %v: %w\n%s%s", args, err, &stdout, &stderr)
	}
	return stdout.String(), nil
}

// CrictlFlags are the flags that point crictl at this node.
func (n *Node) CrictlFlags() []string {
	return []string{
		"--config", "/dev/null", "--timeout", "60s",
		"--runtime-endpoint", "unix://" + n.Socket(), "--image-endpoint", "unix://" + n.Socket(),
	}
}

// StartContainerd starts containerd after Start or StopContainerd.
func (n *Node) StartContainerd(ctx context.Context) error {
	var err error
	n.containerd, err = n.StartDaemon("containerd", n.Tool("containerd", "containerd"), "--config", n.path("containerd", "config.toml"))
	if err != nil {
		return err
	}
	return n.await(ctx, n.containerd, n.ContainerdSocket())
}

// StopContainerd ends containerd. Its containers go on.
func (n *Node) StopContainerd() error { return n.containerd.Stop() }

// StartVMRuntime starts vmruntime after Start, StopVMRuntime or KillVMRuntime.
func (n *Node) StartVMRuntime(ctx context.Context) error {
	var err error
	n.vmruntime, err = n.StartDaemon("vmruntime", n.options.VMRuntime, "serve", "--config", n.path("vmruntime", "vmruntime.toml"))
	if err != nil {
		return err
	}
	return n.await(ctx, n.vmruntime, n.Socket())
}

// StopVMRuntime ends vmruntime with SIGTERM. VM pods go on.
func (n *Node) StopVMRuntime() error { return n.vmruntime.Stop() }

// KillVMRuntime ends vmruntime with SIGKILL. VM pods go on.
func (n *Node) KillVMRuntime() error { return n.vmruntime.Kill() }

// VMRuntimePID is vmruntime's process ID, 0 when it does not run.
func (n *Node) VMRuntimePID() int { return n.vmruntime.PID() }

// ContainerdPID is containerd's process ID, 0 when it does not run.
func (n *Node) ContainerdPID() int { return n.containerd.PID() }

// stopTimeout bounds Stop, whose context is its own.
const stopTimeout = 60 * time.Second

// Stop removes all pods, ends the daemons and removes the node. It fails when
// something is left: a process, a mount, a cgroup.
func (n *Node) Stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	var errs []error
	if n.containerd.Running() {
		errs = append(errs, n.removePods(ctx))
	}
	errs = append(errs, n.vmruntime.Stop(), n.containerd.Stop(), n.registry.close())
	if n.netns != nil {
		errs = append(errs, n.survivors(), n.removeCgroups(), n.netns.remove())
	}
	if n.ownsRoot {
		errs = append(errs, os.RemoveAll(n.Root))
	}
	return errors.Join(errs...)
}

func (n *Node) removePods(ctx context.Context) error {
	if n.options.VMRuntime != "" && !n.vmruntime.Running() {
		if err := n.StartVMRuntime(ctx); err != nil {
			return fmt.Errorf("start vmruntime to remove its pods: %w", err)
		}
	}
	if _, err := n.Crictl(ctx, "rmp", "--all", "--force"); err != nil {
		return err
	}
	return nil
}

// SaveLogs copies what the daemons printed to a directory that outlives the
// node.
func (n *Node) SaveLogs(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.CopyFS(dir, os.DirFS(n.path("log")))
}
