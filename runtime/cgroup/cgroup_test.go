package cgroup

import (
	"context"
	"os"
	"os/exec"
	"slices"
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
}
