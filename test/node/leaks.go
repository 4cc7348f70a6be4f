package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/vishvananda/netlink"
)

// resources are what pods take from a node, each as a line for people.
type resources map[string]bool

// leakTimeout is how long what belongs to removed pods may linger: containerd
// collects its garbage after the call that made it.
const leakTimeout = 10 * time.Second

// Leaks lists what is there beyond what was there when the node had just
// started. It is for a node whose pods have all been removed.
func (n *Node) Leaks(ctx context.Context) ([]string, error) {
	deadline := time.Now().Add(leakTimeout)
	for {
		lines, err := n.inUse(ctx)
		if err != nil || len(lines) == 0 || time.Now().After(deadline) {
			return lines, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// inUse lists what is there now and was not when the node had just started.
func (n *Node) inUse(ctx context.Context) ([]string, error) {
	now, err := n.resources(ctx)
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(now, func(line string, _ bool) bool { return n.baseline[line] })
	return slices.Sorted(maps.Keys(now)), nil
}

func (n *Node) resources(ctx context.Context) (resources, error) {
	r := resources{}
	return r, errors.Join(
		r.addLinks(n.netns), r.addMounts(n.Root), r.addCgroups(n), r.addContainerd(ctx, n.ContainerdSocket()),
		r.addFiles("address reservation", n.path("cni", "ipam", "test"), "last_reserved_ip", "lock"),
		r.addFiles("network namespace", n.path("containerd", "state", "io.containerd.cri.v1.runtime", "netns")),
		r.addFiles("pod directory", n.path("vmruntime", "root", "pods")),
		r.addFiles("container directory", n.path("vmruntime", "root", "containers")),
		r.addFiles("scratch disk", n.path("vmruntime", "root", "images", "scratch")),
		r.addFiles("machine", n.path("vmruntime", "root", "images", "machines")),
		r.addFiles("mounted image", n.path("vmruntime", "root", "images", "views")),
		r.addFiles("image owner", n.path("vmruntime", "root", "images", "owners")),
		r.addFiles("log record", n.path("vmruntime", "root", "logs")),
		r.addFiles("run directory", n.path("run", "s", "pods")),
		r.addFiles("network namespace", n.path("run", "s", "netns")),
		r.addDescriptors(n.VMRuntimePID(), n.Root),
		r.addProcesses(n.Root, n.daemonPIDs()...),
	)
}

func (n *Node) daemonPIDs() []int {
	var pids []int
	for _, d := range n.daemons {
		pids = append(pids, d.PID())
	}
	return pids
}

// addLinks adds the node's network links but the bridge, which CNI keeps.
func (r resources) addLinks(ns *netns) error {
	return ns.do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if name := l.Attrs().Name; name != "cni0" && name != "lo" {
				r[fmt.Sprintf("network link %s (%s)", name, l.Type())] = true
			}
		}
		return err
	})
}

func (r resources) addMounts(root string) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], root+"/") {
			r["mount "+fields[4]] = true
		}
	}
	return nil
}

// addCgroups adds the cgroups of the node's own parent, on every hierarchy, and
// the node's of containerd's and vmruntime's default parents.
func (r resources) addCgroups(n *Node) error {
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*")
	if err != nil {
		return err
	}
	for _, h := range append(hierarchies, "/sys/fs/cgroup") {
		for _, dir := range n.ownCgroups(h)[1:] {
			r["cgroup "+dir] = true
		}
		for _, parent := range []string{h, filepath.Join(h, "k8s.io")} {
			entries, err := os.ReadDir(parent)
			if err != nil {
				continue // not a hierarchy, or nothing there
			}
			for _, e := range entries {
				if e.IsDir() && (n.hasContainer(e.Name()) || n.hadPod(e.Name())) {
					r["cgroup "+filepath.Join(parent, e.Name())] = true
				}
			}
		}
	}
	return nil
}

// ownCgroups are the node's own parent in a hierarchy and what is below it, each
// after its parent; the first is there always, also if the hierarchy is none.
func (n *Node) ownCgroups(hierarchy string) []string {
	dirs := []string{filepath.Join(hierarchy, n.CgroupParent())}
	for i := 0; i < len(dirs); i++ {
		entries, _ := os.ReadDir(dirs[i]) // what has gone has nothing below it
		for _, e := range entries {
			if e.IsDir() {
				dirs = append(dirs, filepath.Join(dirs[i], e.Name()))
			}
		}
	}
	return dirs
}

// hasContainer tells whether containerd's CRI has the container or sandbox:
// other nodes use the same default parent at the same time.
func (n *Node) hasContainer(id string) bool {
	for _, kind := range []string{"sandboxes", "containers"} {
		if _, err := os.Stat(n.path("containerd", "root", "io.containerd.grpc.v1.cri", kind, id)); err == nil {
			return true
		}
	}
	return false
}

// hadPod tells whether a cgroup is that of a VM pod that the node's vmruntime
// told of.
func (n *Node) hadPod(cgroup string) bool {
	id, ok := strings.CutPrefix(cgroup, "vmruntime-")
	if !ok {
		return false
	}
	log, err := os.ReadFile(n.LogFile("vmruntime"))
	return err == nil && strings.Contains(string(log), id)
}

// removeCgroups removes the node's own parent, which has no process when all
// pods are gone.
func (n *Node) removeCgroups() error {
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*")
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range append(hierarchies, "/sys/fs/cgroup") {
		for _, dir := range slices.Backward(n.ownCgroups(h)) {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// addContainerd adds containers, leases and writable snapshots.
func (r resources) addContainerd(ctx context.Context, socket string) error {
	client, err := containerd.New(socket, containerd.WithDefaultNamespace("k8s.io"), containerd.WithTimeout(10*time.Second))
	if err != nil {
		return fmt.Errorf("connect to containerd: %w", err)
	}
	defer client.Close()
	containers, err := client.Containers(ctx)
	if err != nil {
		return err
	}
	for _, c := range containers {
		r["containerd container "+c.ID()] = true
	}
	leases, err := client.LeasesService().List(ctx)
	if err != nil {
		return err
	}
	for _, l := range leases {
		r["containerd lease "+l.ID] = true
	}
	return client.SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted {
			r["containerd snapshot "+i.Name] = true
		}
		return nil
	})
}

func (r resources) addFiles(kind, dir string, except ...string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if !slices.ContainsFunc(except, func(x string) bool { return strings.HasPrefix(e.Name(), x) }) {
			r[kind+" "+filepath.Join(dir, e.Name())] = true
		}
	}
	return err
}

// addDescriptors adds what vmruntime holds open for a pod: pidfds, taps, and
// files of pods. The same thing held twice is two lines.
func (r resources) addDescriptors(pid int, root string) error {
	if pid == 0 {
		return nil
	}
	count := map[string]int{}
	for _, target := range openFiles(pid) {
		if target == "anon_inode:[pidfd]" || target == "/dev/net/tun" ||
			strings.HasPrefix(target, filepath.Join(root, "vmruntime/root/pods")+"/") {
			count[target]++
			r[fmt.Sprintf("descriptor of vmruntime: %s, number %d", target, count[target])] = true
		}
	}
	return nil
}

func openFiles(pid int) []string {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // the process has ended
	}
	var targets []string
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			targets = append(targets, target)
		}
	}
	return targets
}

// addProcesses adds the processes that belong to a node by their arguments,
// their open files or their root file system.
func (r resources) addProcesses(root string, except ...int) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || slices.Contains(except, pid) {
			continue
		}
		if why := processOf(pid, root); why != "" {
			r[fmt.Sprintf("process %d (%s)", pid, why)] = true
		}
	}
	return nil
}

// processOf says why a process belongs to the node, or nothing.
func processOf(pid int, root string) string {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	// A process that has ended in the meantime reads as nothing.
	args, _ := os.ReadFile(filepath.Join(proc, "cmdline"))
	line := strings.TrimSpace(strings.ReplaceAll(string(args), "\x00", " "))
	own := pid == os.Getppid() || strings.Contains(line, "go test") || strings.Contains(line, "go run")
	if !own && strings.Contains(line, root+"/") {
		return "arguments " + line
	}
	mounts, _ := os.ReadFile(filepath.Join(proc, "mountinfo"))
	for m := range strings.Lines(string(mounts)) {
		fields := strings.Fields(m)
		if len(fields) > 4 && fields[4] == "/" && strings.Contains(m, root+"/") {
			return "root file system of the node, arguments " + line
		}
	}
	for _, target := range openFiles(pid) {
		if strings.HasPrefix(target, filepath.Join(root, "vmruntime")+"/") {
			return "open file " + target + ", arguments " + line
		}
	}
	return ""
}

// survivors fails when a process or mount of the node is left after its
// daemons have ended; what it finds it ends and unmounts, so that one failed
// test does not spoil the next.
func (n *Node) survivors() error {
	r := resources{}
	if err := errors.Join(r.addProcesses(n.Root), r.addMounts(n.Root)); err != nil || len(r) == 0 {
		return err
	}
	lines := slices.Sorted(maps.Keys(r))
	err := fmt.Errorf("left behind after the node stopped:\n  %s", strings.Join(lines, "\n  "))
	return errors.Join(err, clean(n.Root, lines))
}
