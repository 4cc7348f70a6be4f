package vm_test

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (c *ctr) stats() *runtimeapi.ContainerStats {
	c.t.Helper()
	resp, err := c.rt.ContainerStats(c.ctx, &runtimeapi.ContainerStatsRequest{ContainerId: c.id})
	if err != nil {
		c.t.Fatalf("ContainerStats: %v", err)
	}
	return resp.GetStats()
}

func checkContainerStats(t *testing.T, from string, s *runtimeapi.ContainerStats) {
	t.Helper()
	if s.GetAttributes().GetMetadata().GetName() != "c" || s.GetAttributes().GetLabels()["l"] != "v" {
		t.Errorf("%s: attributes %v", from, s.GetAttributes())
	}
	values := map[string]uint64{
		"CPU time":    s.GetCpu().GetUsageCoreNanoSeconds().GetValue(),
		"CPU at":      uint64(s.GetCpu().GetTimestamp()),
		"working set": s.GetMemory().GetWorkingSetBytes().GetValue(),
		"memory":      s.GetMemory().GetUsageBytes().GetValue(),
		"RSS":         s.GetMemory().GetRssBytes().GetValue(),
		"page faults": s.GetMemory().GetPageFaults().GetValue(),
		"available":   s.GetMemory().GetAvailableBytes().GetValue(),
		"written":     s.GetWritableLayer().GetUsedBytes().GetValue(),
	}
	for name, v := range values {
		if v == 0 {
			t.Errorf("%s: %s is 0: %v", from, name, s)
		}
	}
	// 30 MB held in memory and 1 MiB written.
	if v := values["memory"]; v < 30<<20 || v > 64<<20 {
		t.Errorf("%s: %d bytes of memory, want 30 MiB up to the limit", from, v)
	}
	if v := values["CPU time"]; v > 600e9 {
		t.Errorf("%s: %d ns of CPU", from, v)
	}
}

// Statistics by each of the calls that give them.
func TestStats(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Labels = map[string]string{"stats": "yes"} })
	c := p.start(with(shell("c", "dd if=/dev/zero of=/written bs=1M count=1; dd if=/dev/zero of=/dev/shm/held bs=1M count=30; echo ready; while :; do sleep 3600; done"),
		func(c *runtimeapi.ContainerConfig) {
			c.Labels = map[string]string{"l": "v"}
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}
		})).ready("ready")
	checkContainerStats(t, "ContainerStats", c.stats())
	list, err := b.rt.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: p.id, LabelSelector: map[string]string{"l": "v"}}})
	if err != nil || len(list.GetStats()) != 1 {
		t.Fatalf("ListContainerStats: %v, %v, want one", list, err)
	}
	checkContainerStats(t, "ListContainerStats", list.GetStats()[0])

	one, err := b.rt.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatalf("PodSandboxStats: %v", err)
	}
	checkPodStats(t, "PodSandboxStats", one.GetStats())
	all, err := b.rt.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{LabelSelector: map[string]string{"stats": "yes"}}})
	if err != nil || len(all.GetStats()) != 1 {
		t.Fatalf("ListPodSandboxStats: %v, %v, want one", all, err)
	}
	checkPodStats(t, "ListPodSandboxStats", all.GetStats()[0])
	checkStreams(ctx, t, p, c)
}

func checkPodStats(t *testing.T, from string, s *runtimeapi.PodSandboxStats) {
	t.Helper()
	l := s.GetLinux()
	values := map[string]uint64{
		"CPU time":    l.GetCpu().GetUsageCoreNanoSeconds().GetValue(),
		"working set": l.GetMemory().GetWorkingSetBytes().GetValue(),
		"processes":   l.GetProcess().GetProcessCount().GetValue(),
		"received":    l.GetNetwork().GetDefaultInterface().GetRxBytes().GetValue(),
	}
	for name, v := range values {
		if v == 0 {
			t.Errorf("%s: %s is 0: %v", from, name, s)
		}
	}
	if l.GetNetwork().GetDefaultInterface().GetName() != "eth0" || len(l.GetContainers()) != 1 {
		t.Fatalf("%s: interface %v, %d containers, want eth0 and one", from, l.GetNetwork().GetDefaultInterface(), len(l.GetContainers()))
	}
	checkContainerStats(t, from, l.GetContainers()[0])
}

// QEMU and virtiofsd live in the pod's cgroup, as the users and with the powers that they need.
func TestConfinement(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{mount("/m", t.TempDir())} })).ready("ready")
	info := p.verboseInfo()
	qemu := procStatus(t, info.Guest.QEMU.PID)
	user := fmt.Sprint(info.UID)
	if ids := strings.Fields(qemu["Uid"]); user == "0" || !slices.Equal(ids, []string{user, user, user, user}) {
		t.Errorf("QEMU has the user IDs %s, want %s alone", qemu["Uid"], user)
	}
	if ids := strings.Fields(qemu["Gid"]); !slices.Equal(ids, []string{user, user, user, user}) || qemu["Groups"] != "" {
		t.Errorf("QEMU has the group IDs %s and groups %q, want %s alone", qemu["Gid"], qemu["Groups"], user)
	}
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"} {
		if strings.Trim(qemu[set], "0") != "" {
			t.Errorf("QEMU has capabilities %s %s, want none", set, qemu[set])
		}
	}
	if qemu["NoNewPrivs"] != "1" || qemu["Seccomp"] != "2" {
		t.Errorf("QEMU has NoNewPrivs %s and Seccomp %s, want 1 and 2", qemu["NoNewPrivs"], qemu["Seccomp"])
	}
	for _, ns := range []string{"mnt", "net", "ipc"} {
		if sameNamespace(t, info.Guest.QEMU.PID, b.VMRuntimePID(), ns) {
			t.Errorf("QEMU is in vmruntime's %s namespace", ns)
		}
	}
	if info.Guest.Share == nil {
		t.Fatal("no record of virtiofsd")
	}
	for name, pid := range map[string]int{"QEMU": info.Guest.QEMU.PID, "virtiofsd": info.Guest.Share.PID} {
		groups := readFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		for _, want := range []string{"memory", "cpu"} {
			if !inCgroup(groups, want, b.CgroupParent()+"/") {
				t.Errorf("%s is not below %s in the hierarchy of %s:\n%s", name, b.CgroupParent(), want, groups)
			}
		}
	}
	for _, ns := range []string{"user", "mnt", "net", "ipc"} {
		if sameNamespace(t, info.Guest.Share.PID, b.VMRuntimePID(), ns) {
			t.Errorf("virtiofsd is in vmruntime's %s namespace", ns)
		}
	}
	c.expect("touch /m/file && echo ok", "ok")
}

// inCgroup tells whether a process, by its /proc/PID/cgroup, is below a parent in a controller's hierarchy (v1) or in
// the one there is (v2).
func inCgroup(groups, controller, parent string) bool {
	for line := range strings.Lines(groups) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) == 3 && (slices.Contains(strings.Split(fields[1], ","), controller) || fields[1] == "") && strings.HasPrefix(fields[2], parent) {
			return true
		}
	}
	return false
}

func sameNamespace(t *testing.T, a, b int, ns string) bool {
	t.Helper()
	var links [2]string
	for i, pid := range []int{a, b} {
		var err error
		if links[i], err = os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns", ns)); err != nil {
			t.Fatal(err)
		}
	}
	return links[0] == links[1]
}

// procStatus is /proc/PID/status by field.
func procStatus(t *testing.T, pid int) map[string]string {
	t.Helper()
	f, err := os.Open(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := map[string]string{}
	scanner := bufio.NewScanner(f)
	for scanner.Scan() {
		name, value, _ := strings.Cut(scanner.Text(), ":")
		out[name] = strings.TrimSpace(value)
	}
	return out
}
