// Package cgroup holds the one cgroup that a VM pod has on the node: QEMU and its helpers live in it, below
// the pod's cgroup parent that the kubelet made. It hides whether the node has cgroup v1 or v2, and whether
// systemd or the file system is asked to make groups: a parent that ends in ".slice" is systemd's name for
// one, as the kubelet's systemd driver passes it.
//
// A group's name derives from the pod's ID, so that it is found again after a restart.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Stats is what the node spends on a pod: QEMU, its helpers and the guest's memory.
type Stats struct {
	CPUUsageNano, CPUUserNano, CPUSystemNano uint64
	// Periods of the CPU quota, those in which it was reached, and how long processes were held back.
	CPUPeriods, CPUThrottledPeriods, CPUThrottledNano uint64

	MemoryUsageBytes      uint64
	MemoryWorkingSetBytes uint64
	MemoryRSSBytes        uint64
	MemoryCacheBytes      uint64
	PageFaults            uint64
	MajorPageFaults       uint64
	Processes             uint64
	// OOMKills is how many processes of the group the kernel has killed for want of memory.
	OOMKills uint64
}

// Group names a pod's cgroup. The group itself exists from the first Add until Delete.
type Group struct {
	parent string
	name   string
}

// For returns the group of a pod below the cgroup parent that the CRI request gave. An empty parent is the
// root, as crictl leaves it.
func For(parent, podID string) Group {
	if parent == "/" {
		parent = ""
	}
	return Group{parent: parent, name: "vmruntime-" + podID}
}

func (g Group) systemd() bool { return strings.HasSuffix(g.parent, ".slice") }

func (g Group) scope() string { return g.name + ".scope" }

// path is the group's path below each hierarchy's mount point.
func (g Group) path() string { return filepath.Join("/", g.parent, g.name) }

func unified() bool { return cgroups.Mode() == cgroups.Unified }

// Add moves a process into the group, which is made when it is missing.
func (g Group) Add(pid int) error {
	if err := g.add(pid); err != nil {
		return fmt.Errorf("cgroup %s below %q: add process %d: %w", g.name, g.parent, pid, err)
	}
	return nil
}

func (g Group) add(pid int) error {
	if unified() {
		m, err := g.make2(pid)
		if err != nil {
			return err
		}
		return m.AddProc(uint64(pid))
	}
	c, err := g.make1()
	if err != nil {
		return err
	}
	return c.AddProc(uint64(pid))
}

func (g Group) make2(pid int) (*cgroup2.Manager, error) {
	if g.systemd() {
		return cgroup2.NewSystemd(g.parent, g.scope(), pid, &cgroup2.Resources{})
	}
	return cgroup2.NewManager("/sys/fs/cgroup", g.path(), &cgroup2.Resources{})
}

func (g Group) make1() (cgroup1.Cgroup, error) {
	if g.systemd() {
		return cgroup1.New(cgroup1.Slice(g.parent, g.scope()), &specs.LinuxResources{}, cgroup1.WithHierarchy(cgroup1.Systemd))
	}
	return cgroup1.New(cgroup1.StaticPath(g.path()), &specs.LinuxResources{})
}

func (g Group) load2() (*cgroup2.Manager, error) {
	if g.systemd() {
		return cgroup2.LoadSystemd(g.parent, g.scope())
	}
	m, err := cgroup2.Load(g.path())
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", g.path())); err != nil {
		return nil, err
	}
	return m, nil
}

func (g Group) load1() (cgroup1.Cgroup, error) {
	if g.systemd() {
		return cgroup1.Load(cgroup1.Slice(g.parent, g.scope()), cgroup1.WithHierarchy(cgroup1.Systemd))
	}
	return cgroup1.Load(cgroup1.StaticPath(g.path()))
}

func gone(err error) bool {
	return errors.Is(err, cgroup1.ErrCgroupDeleted) || errors.Is(err, fs.ErrNotExist)
}

// SetCPUQuota bounds the group to quota microseconds of CPU time in each period of so many microseconds. cgroup v1 refuses one beyond the
// parent's, as when a pod grows and the kubelet has not enlarged the parent yet: then the parent's alone holds.
func (g Group) SetCPUQuota(quota int64, period uint64) error {
	err := g.setCPUQuota(quota, period)
	if errors.Is(err, syscall.EINVAL) && !unified() {
		err = g.setCPUQuota(-1, period)
	}
	if err != nil {
		return fmt.Errorf("cgroup %s: CPU quota %d/%d: %w", g.name, quota, period, err)
	}
	return nil
}

func (g Group) setCPUQuota(quota int64, period uint64) error {
	var err error
	if unified() {
		var m *cgroup2.Manager
		if m, err = g.load2(); err == nil {
			err = m.Update(&cgroup2.Resources{CPU: &cgroup2.CPU{Max: cgroup2.NewCPUMax(&quota, &period)}})
		}
	} else {
		var c cgroup1.Cgroup
		if c, err = g.load1(); err == nil {
			err = c.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &quota, Period: &period}})
		}
	}
	return err
}

// Procs lists the processes in the group; a missing group has none.
func (g Group) Procs() ([]int, error) {
	var pids []int
	if unified() {
		m, err := g.load2()
		if gone(err) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		procs, err := m.Procs(true)
		for _, p := range procs {
			pids = append(pids, int(p))
		}
		return pids, ignoreGone(err)
	}
	c, err := g.load1()
	if gone(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	procs, err := c.Processes(cgroup1.Cpu, true)
	for _, p := range procs {
		pids = append(pids, p.Pid)
	}
	return pids, ignoreGone(err)
}

func ignoreGone(err error) error {
	if gone(err) {
		return nil
	}
	return err
}

// Kill ends every process in the group and waits until it is empty or the context ends.
func (g Group) Kill(ctx context.Context) error {
	for {
		pids, err := g.Procs()
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("cgroup %s: kill process %d: %w", g.name, pid, err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cgroup %s: processes %v outlive SIGKILL: %w", g.name, pids, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Delete removes the empty group. A missing one is no error.
func (g Group) Delete() error {
	var err error
	if unified() {
		var m *cgroup2.Manager
		if m, err = g.load2(); err == nil {
			if g.systemd() {
				err = m.DeleteSystemd()
			} else {
				err = m.Delete()
			}
		}
	} else {
		var c cgroup1.Cgroup
		if c, err = g.load1(); err == nil {
			err = c.Delete()
		}
	}
	if err = ignoreGone(err); err != nil {
		return fmt.Errorf("cgroup %s: delete: %w", g.name, err)
	}
	return nil
}

// Stats reads the group's counters.
func (g Group) Stats() (Stats, error) {
	if unified() {
		return g.stats2()
	}
	return g.stats1()
}

func (g Group) stats2() (Stats, error) {
	m, err := g.load2()
	if err != nil {
		return Stats{}, err
	}
	s, err := m.Stat()
	if err != nil {
		return Stats{}, err
	}
	usage, inactive := s.GetMemory().GetUsage(), s.GetMemory().GetInactiveFile()
	return Stats{
		CPUUsageNano:          s.GetCPU().GetUsageUsec() * 1000,
		CPUUserNano:           s.GetCPU().GetUserUsec() * 1000,
		CPUSystemNano:         s.GetCPU().GetSystemUsec() * 1000,
		CPUPeriods:            s.GetCPU().GetNrPeriods(),
		CPUThrottledPeriods:   s.GetCPU().GetNrThrottled(),
		CPUThrottledNano:      s.GetCPU().GetThrottledUsec() * 1000,
		MemoryUsageBytes:      usage,
		MemoryWorkingSetBytes: usage - min(usage, inactive),
		MemoryRSSBytes:        s.GetMemory().GetAnon(),
		MemoryCacheBytes:      s.GetMemory().GetFile(),
		PageFaults:            s.GetMemory().GetPgfault(),
		MajorPageFaults:       s.GetMemory().GetPgmajfault(),
		Processes:             s.GetPids().GetCurrent(),
		OOMKills:              s.GetMemoryEvents().GetOomKill(),
	}, nil
}

func (g Group) stats1() (Stats, error) {
	c, err := g.load1()
	if err != nil {
		return Stats{}, err
	}
	s, err := c.Stat(cgroup1.IgnoreNotExist)
	if err != nil {
		return Stats{}, err
	}
	usage, inactive := s.GetMemory().GetUsage().GetUsage(), s.GetMemory().GetTotalInactiveFile()
	return Stats{
		CPUUsageNano:          s.GetCPU().GetUsage().GetTotal(),
		CPUUserNano:           s.GetCPU().GetUsage().GetUser(),
		CPUSystemNano:         s.GetCPU().GetUsage().GetKernel(),
		CPUPeriods:            s.GetCPU().GetThrottling().GetPeriods(),
		CPUThrottledPeriods:   s.GetCPU().GetThrottling().GetThrottledPeriods(),
		CPUThrottledNano:      s.GetCPU().GetThrottling().GetThrottledTime(),
		MemoryUsageBytes:      usage,
		MemoryWorkingSetBytes: usage - min(usage, inactive),
		MemoryRSSBytes:        s.GetMemory().GetTotalRSS(),
		MemoryCacheBytes:      s.GetMemory().GetTotalCache(),
		PageFaults:            s.GetMemory().GetTotalPgFault(),
		MajorPageFaults:       s.GetMemory().GetTotalPgMajFault(),
		Processes:             s.GetPids().GetCurrent(),
		OOMKills:              s.GetMemoryOomControl().GetOomKill(),
	}, nil
}

// OOMKills is Stats.OOMKills; of a missing group none were killed.
func (g Group) OOMKills() (uint64, error) {
	s, err := g.Stats()
	return s.OOMKills, ignoreGone(err)
}

// KillOrphan ends and removes the group of a pod whose cgroup parent nobody knows any more, wherever it is.
func KillOrphan(ctx context.Context, podID string) error {
	root := "/sys/fs/cgroup"
	if !unified() {
		root = filepath.Join(root, string(cgroup1.Cpu))
	}
	var errs []error
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() || strings.TrimSuffix(d.Name(), ".scope") != "vmruntime-"+podID {
			return ignoreGone(err)
		}
		parent, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		if strings.HasSuffix(d.Name(), ".scope") {
			parent = filepath.Base(parent)
		}
		g := For(parent, podID)
		errs = append(errs, g.Kill(ctx), g.Delete())
		return fs.SkipDir
	})
	return errors.Join(append(errs, err)...)
}

// HugetlbLimit is how many bytes of huge pages of a size, like 2MB, the kubelet allows to a cgroup parent; 0 is none, which also is what
// a group without such a limit has: then nobody has counted on any.
func HugetlbLimit(parent, size string) (int64, error) {
	dir, file := filepath.Join("/sys/fs/cgroup/hugetlb", pathOf(parent)), "hugetlb."+size+".limit_in_bytes"
	if unified() {
		dir, file = filepath.Join("/sys/fs/cgroup", pathOf(parent)), "hugetlb."+size+".max"
	}
	return readHugetlb(filepath.Join(dir, file))
}

// unbounded is what the kubelet, and a kernel of cgroup v1, mean by no limit, or less.
const unbounded = 1 << 62

func readHugetlb(path string) (int64, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // no such controller, or the root
	}
	if err != nil {
		return 0, err
	}
	limit := strings.TrimSpace(string(text))
	if limit == "max" {
		return 0, nil
	}
	n, err := strconv.ParseInt(limit, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if n >= unbounded {
		return 0, nil
	}
	return n, nil
}

// pathOf is a cgroup parent's path below a hierarchy's mount point. systemd keeps a-b.slice in a.slice.
func pathOf(parent string) string {
	if !strings.HasSuffix(parent, ".slice") {
		return parent
	}
	name := filepath.Base(parent)
	path := ""
	for i, c := range name {
		if c == '-' && i > 0 {
			path = filepath.Join(path, name[:i]+".slice")
		}
	}
	return filepath.Join(path, name)
}
