package script

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
)

// listenHere makes a listening socket in a directory of the test.
func listenHere(t *testing.T) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// The real monitor drives the fake, which refuses what QEMU would: the wrong order, a missing descriptor.
func TestFakeHotPlug(t *testing.T) {
	l := listenHere(t)
	q := newFakeQEMU(nil)
	q.faults, q.trace = &faults{}, func(string, string) {}
	var served sync.WaitGroup
	served.Go(func() {
		if conn, err := l.AcceptUnix(); err == nil {
			q.serveMonitor(conn)
		}
	})
	conn, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	m := qemu.NewMonitor(conn, nil, slog.Default())
	defer func() {
		if err := m.Disconnect(); err != nil {
			t.Error(err)
		}
		served.Wait()
	}()
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	refused := func(command string, args any) {
		t.Helper()
		var want *qemu.CommandError
		if err := m.Execute(ctx, command, args, nil); !errors.As(err, &want) {
			t.Errorf("%s %v: %v, want QEMU's refusal", command, args, err)
		}
	}
	device := map[string]any{"driver": "scsi-hd", "id": "d", "drive": "n"}
	node := map[string]any{"driver": "raw", "node-name": "n", "file": map[string]any{"driver": "file", "filename": "/dev/fdset/1"}}
	refused("device_add", device)
	refused("blockdev-add", node)
	refused("add-fd", map[string]any{"opaque": "x"})
	refused("no-such-command", nil)
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(
		m.Execute(ctx, "add-fd", map[string]any{"opaque": "x"}, nil, f),
		m.Execute(ctx, "blockdev-add", node, nil),
		m.Execute(ctx, "device_add", device, nil),
	); err != nil {
		t.Error(err)
	}
}

// A host that reads output by offsets gets each byte once, over sessions that are lost again and again.
func TestFakeOutputOverLostSessions(t *testing.T) {
	const lines = 3000
	l := listenHere(t)
	f := &faults{drop: 20000}
	g := &fakeGuest{faults: f, trace: func(string, string) {}}
	port := &fakePort{listener: l, faults: f}
	var served sync.WaitGroup
	served.Go(func() {
		if err := g.serve(port); !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	defer func() {
		g.drop(func(*process) bool { return true })
		if err := port.Close(); err != nil {
			t.Error(err)
		}
		served.Wait()
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ref := &agentpb.ProcessRef{ContainerId: "c"}
	script := []string{"lines 3000", "exit 3"}
	if err := g.add(newProcess("c", "", argsOf(mustOCI(t, script)))); err != nil {
		t.Fatal(err)
	}
	if _, err := g.StartContainer(ctx, &agentpb.StartContainerRequest{Id: "c"}); err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	sessions := 0
	for eof := false; !eof; sessions++ {
		c, err := agent.Dial(ctx, l.Addr().String())
		if errdefs.IsUnavailable(err) && ctx.Err() == nil {
			continue // lost as it began
		}
		if err != nil {
			t.Fatal(err)
		}
		for {
			at := uint64(got.Len())
			resp, err := c.ReadOutput(ctx, &agentpb.ReadOutputRequest{Process: ref, MaxBytes: 16 << 10, StdoutOffset: at, StdoutAcknowledged: at})
			if err != nil {
				if !errdefs.IsUnavailable(err) {
					t.Fatalf("session %d: %v", sessions, err)
				}
				break
			}
			for _, ch := range resp.GetChunks() {
				got.Write(ch.GetData())
			}
			if eof = resp.GetEof(); eof {
				break
			}
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if sessions < 3 {
		t.Errorf("%d sessions, want more: nothing was lost", sessions)
	}
	i := 0
	for line := range strings.Lines(got.String()) {
		if line != lineText(i)+"\n" {
			t.Fatalf("line %d is %q, want %q", i, line, lineText(i))
		}
		i++
	}
	if i != lines {
		t.Errorf("%d lines, want %d", i, lines)
	}
}

func mustOCI(t *testing.T, args []string) []byte {
	t.Helper()
	data, err := json.Marshal(&specs.Spec{Process: &specs.Process{Args: args}})
	if err != nil {
		t.Fatal(err)
	}
	return data
}
