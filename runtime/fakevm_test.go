package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/qga"
	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/qemu"
)

// fakeVM is a VM whose QEMU, this process, answers each command by what the function gives.
func fakeVM(t *testing.T, result func(command string) string) *qemu.VM {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm") // short, for a socket
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "qmp.sock"))
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintln(conn, `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}`)
		for in := json.NewDecoder(conn); ; {
			var c struct{ Execute, ID string }
			if in.Decode(&c) != nil {
				return
			}
			fmt.Fprintf(conn, "{\"return\": %s, \"id\": %q}\n", result(c.Execute), c.ID)
		}
	})
	vm, err := qemu.Attach(t.Context(), qemu.Record{PID: os.Getpid(), RunDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(vm.Close(), l.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
		served.Wait()
	})
	return vm
}

// fakeMachine makes a container the machine of its pod, which runs in a VM.
func fakeMachine(t *testing.T, rt *Runtime, id string, vm *qemu.VM) *container {
	t.Helper()
	c, err := rt.containerByID(id)
	if err != nil {
		t.Fatal(err)
	}
	c.pod.setGuest(&guest{pod: c.pod, vm: vm, machine: newMachineParts(c.id), log: rt.log})
	err = errors.Join(
		c.rec.Update(func(s *containerStatus) error { s.StartedAt = time.Now(); return nil }),
		c.pod.update(func(s *podStatus) error { s.Network = &network.Attachment{}; return nil }),
	)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// What was saved is good only if the VM has not gone on since.
func TestStoodStill(t *testing.T) {
	for state, good := range map[string]bool{"postmigrate": true, "finish-migrate": true, "running": false, "paused": false, "prelaunch": false} {
		g := &guest{vm: fakeVM(t, func(string) string { return fmt.Sprintf(`{"status": %q}`, state) })}
		if err := g.stoodStill(t.Context()); good && err != nil || !good && !errdefs.IsAborted(err) {
			t.Errorf("%s: %v", state, err)
		}
	}
}

// A guest that does not answer because it was stopped is waited for; one that runs and does not is given up.
func TestStopped(t *testing.T) {
	for state, want := range map[string]bool{"paused": true, "postmigrate": true, "running": false, "shutdown": false} {
		g := &guest{vm: fakeVM(t, func(string) string { return fmt.Sprintf(`{"status": %q}`, state) })}
		if got := g.stopped(t.Context()); got != want {
			t.Errorf("a guest that is %q counts as stopped: %v", state, got)
		}
	}
}

// Machines are asked side by side: each of two answers when the other one has been asked too.
func TestMachinesAskedTogether(t *testing.T) {
	rt := withPods(t)
	var both sync.WaitGroup
	both.Add(2)
	selected := map[*pod]bool{}
	for _, id := range []string{"cc1", "aa3"} {
		vm := fakeVM(t, func(command string) string {
			switch command {
			case "query-balloon":
				both.Done()
				both.Wait()
				return `{"actual": 1048576}`
			case "qom-get":
				return `{"last-update": 1, "stats": {"stat-total-memory": 1000}}`
			case "query-blockstats":
				return `[{"qdev": "disk-root", "stats": {"rd_operations": 7}}]`
			}
			return "{}"
		})
		selected[fakeMachine(t, rt, id, vm).pod] = true
	}
	for p, a := range askAll(t.Context(), selected, allNow) {
		if a.memory.Total != 1000 || a.disks["root"].Reads != 7 || a.guest != nil {
			t.Errorf("pod %s answers %+v, want memory and disks", p.id, a)
		}
	}
}

// A command that qemu-guest-agent does not take, since it hangs, goes on to SSH before the time is over.
func TestExecBeyondHungAgent(t *testing.T) {
	rt := withPods(t)
	rt.secret = make([]byte, 32)
	vm := fakeVM(t, func(command string) string {
		if command == "query-chardev" {
			return `[{"label": "guestagent", "frontend-open": true}]`
		}
		return "{}"
	})
	hung, err := net.Listen("unix", vm.GuestAgentSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	c := fakeMachine(t, rt, "cc1", vm)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	_, err = c.machineExec(ctx, []string{"true"}, execIO{})
	if !errors.Is(err, qga.ErrNotBegun) || !strings.Contains(err.Error(), "at least one address") || ctx.Err() != nil {
		t.Errorf("%v (%v), want what qemu-guest-agent and SSH say", err, ctx.Err())
	}
	if m := c.pod.currentGuest().machine; m.qga != nil {
		if err := m.qga.Close(); err != nil {
			t.Error(err)
		}
	}
}
