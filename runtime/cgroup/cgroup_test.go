package cgroup

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestGroupLife(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("cgroups can be made by root only")
	}
	g := For("/", "test-of-group-life")
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() { waited <- cmd.Wait() }()
	if err := g.Add(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	pids, err := g.Procs()
	if err != nil || !slices.Equal(pids, []int{cmd.Process.Pid}) {
		t.Fatalf("Procs = %v, %v; want the one process %d", pids, err, cmd.Process.Pid)
	}
	if _, err := g.Stats(); err != nil {
		t.Errorf("Stats: %v", err)
	}
	if err := g.SetCPUQuota(50000, 100000); err != nil {
		t.Errorf("SetCPUQuota: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := g.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	<-waited
	for range 2 {
		if err := g.Delete(); err != nil {
			t.Errorf("Delete: %v", err)
		}
	}
	if pids, err := g.Procs(); err != nil || len(pids) != 0 {
		t.Errorf("Procs after Delete = %v, %v; want none", pids, err)
	}
	if kills, err := g.OOMKills(); err != nil || kills != 0 {
		t.Errorf("OOMKills after Delete = %d, %v; want none", kills, err)
	}
}

// A quota beyond the parent's is no error, and no more than the parent's.
func TestQuotaBeyondTheParents(t *testing.T) {
	if os.Getuid() != 0 || unified() {
		t.Skip("cgroup v1 alone refuses it, and only root can make groups")
	}
	parent := For("/", "test-of-quota")
	g := For("/vmruntime-test-of-quota", "child")
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		if err := errors.Join(g.Delete(), parent.Delete()); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(parent.Add(cmd.Process.Pid), g.Add(cmd.Process.Pid), parent.SetCPUQuota(50000, 100000)); err != nil {
		t.Fatal(err)
	}
	for quota, want := range map[int64]string{40000: "40000", 60000: "-1"} {
		if err := g.SetCPUQuota(quota, 100000); err != nil {
			t.Errorf("SetCPUQuota(%d): %v", quota, err)
		}
		got, err := os.ReadFile("/sys/fs/cgroup/cpu" + g.path() + "/cpu.cfs_quota_us")
		if err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("after SetCPUQuota(%d) the quota is %s, %v; want %s", quota, got, err, want)
		}
	}
}

// What the kernel kills for want of memory is counted, and nothing else.
func TestOOMKills(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("cgroups can be made by root only")
	}
	g := For("/", "test-of-oom-kills")
	t.Cleanup(func() {
		if err := g.Delete(); err != nil {
			t.Error(err)
		}
	})
	limit := "/sys/fs/cgroup/memory/vmruntime-test-of-oom-kills/memory.limit_in_bytes"
	if unified() {
		limit = "/sys/fs/cgroup/vmruntime-test-of-oom-kills/memory.max"
	}
	for want, script := range []string{"read x; kill -9 $$", "read x; exec dd if=/dev/zero of=/dev/null bs=100M count=1"} {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
		input, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(g.Add(cmd.Process.Pid), os.WriteFile(limit, []byte("16777216"), 0), input.Close()); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err == nil || err.Error() != "signal: killed" {
			t.Errorf("%s ends with %v, want it to be killed", script, err)
		}
		if kills, err := g.OOMKills(); err != nil || kills != uint64(want) {
			t.Errorf("after %s: OOMKills = %d, %v; want %d", script, kills, err, want)
		}
	}
}

// What the kubelet writes, and what the kernel has where nobody wrote.
func TestHugetlbLimit(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]int64{"4194304\n": 4 << 20, "0\n": 0, "max\n": 0, "4611686018427387904\n": 0, "9223372036852678656\n": 0} {
		path := filepath.Join(dir, "limit")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readHugetlb(path); got != want || err != nil {
			t.Errorf("%q is %d, %v, want %d", text, got, err, want)
		}
	}
	if got, err := readHugetlb(filepath.Join(dir, "missing")); got != 0 || err != nil {
		t.Errorf("a limit that is not there is %d, %v", got, err)
	}
	for parent, want := range map[string]string{
		"":                                "",
		"/kubepods/podUID":                "/kubepods/podUID",
		"kubepods-podUID.slice":           "kubepods.slice/kubepods-podUID.slice",
		"kubepods-burstable-pod1_2.slice": "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
	} {
		if got := pathOf(parent); got != want {
			t.Errorf("%q is at %q, want %q", parent, got, want)
		}
	}
}
