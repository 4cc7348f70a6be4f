package script

import (
	"errors"
	"strings"
	"sync"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Machines are asked for their statistics side by side: the answers of two, each of which waits until the other one has been asked too, come in
// the time that one has.
func TestMachinesAskedTogether(t *testing.T) {
	if noBed != "" {
		t.Skip(noBed)
	}
	w := newWorld(theBed, t.TempDir())
	if err := w.startDaemon(nil); err != nil {
		t.Fatal(err)
	}
	defer func() {
		w.bed.control.watch(nil)
		if err := errors.Join(w.close(), w.repair()); err != nil {
			t.Error(err)
		}
	}()
	for _, name := range []string{"one", "two"} {
		if err := errors.Join(w.run(name, "kernel=/boot/kernel"), w.create(name, "os-"+name, nil, machine), w.start("os-"+name)); err != nil {
			t.Fatal(err)
		}
	}
	for what, ask := range map[string]func() (int, error){
		"ListContainerStats": func() (known int, err error) {
			ctx, cancel := call()
			defer cancel()
			resp, err := w.rt.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
			for _, s := range resp.GetStats() {
				known += isFree(s.GetMemory())
			}
			return known, err
		},
		"ListPodSandboxStats": func() (known int, err error) {
			ctx, cancel := call()
			defer cancel()
			resp, err := w.rt.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
			for _, p := range resp.GetStats() {
				for _, s := range p.GetLinux().GetContainers() {
					known += isFree(s.GetMemory())
				}
			}
			return known, err
		},
		"ListPodSandboxMetrics": func() (known int, err error) {
			ctx, cancel := call()
			defer cancel()
			resp, err := w.rt.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
			for _, p := range resp.GetPodMetrics() {
				for _, c := range p.GetContainerMetrics() {
					for _, m := range c.GetMetrics() {
						if m.GetName() == "container_memory_usage_bytes" && m.GetValue().GetValue() == machineMemory-machineFree {
							known++
						}
					}
				}
			}
			return known, err
		},
	} {
		w.bed.control.watch(bothAsked("query-balloon"))
		if known, err := ask(); err != nil || known != 2 {
			t.Errorf("%s: the memory of %d machines is known (%v), want 2", what, known, err)
		}
		w.bed.control.watch(nil)
	}
}

// isFree is 1 if the balloon's driver has told of the memory.
func isFree(m *runtimeapi.MemoryUsage) int {
	if m.GetAvailableBytes().GetValue() == machineFree {
		return 1
	}
	return 0
}

// bothAsked holds a command up until two machines have been asked.
func bothAsked(command string) func(report) {
	var asked sync.WaitGroup
	var mu sync.Mutex
	names := make(map[string]bool)
	asked.Add(2)
	return func(r report) {
		if !strings.HasPrefix(r.Text, command) {
			return
		}
		mu.Lock()
		if !names[r.Name] {
			names[r.Name] = true
			asked.Done()
		}
		mu.Unlock()
		asked.Wait()
	}
}
