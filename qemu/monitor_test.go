package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

// The faults here cannot be forced from a real QEMU, so the far end is ours.

type request struct {
	Execute string `json:"execute"`
	ID      string `json:"id"`
}

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}`

// peer connects a monitor to a far end that greets and then is script.
func peer(t *testing.T, notify func(qmp.Event), script func(conn *net.UnixConn, in *bufio.Scanner)) *Monitor {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(runDir(t), "qmp"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() {
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer conn.Close()
		in := bufio.NewScanner(conn)
		in.Split(splitObjects)
		fmt.Fprintln(conn, greeting)
		if r := nextRequest(in); r.Execute == "qmp_capabilities" {
			answer(conn, r, "{}")
			script(conn, in)
		}
	})
	m, err := dialMonitor(t.Context(), l.Addr().String(), notify, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(m.Disconnect(), l.Close()); err != nil {
			t.Error(err)
		}
		served.Wait()
	})
	return m
}

// nextRequest returns a zero request at the end. Requests follow one another without a new line, as JSON does.
func nextRequest(in *bufio.Scanner) (r request) {
	if in.Scan() {
		_ = json.Unmarshal(in.Bytes(), &r)
	}
	return r
}

func splitObjects(data []byte, _ bool) (int, []byte, error) {
	dec := json.NewDecoder(strings.NewReader(string(data)))
	var raw json.RawMessage
	if dec.Decode(&raw) != nil {
		return 0, nil, nil
	}
	return int(dec.InputOffset()), raw, nil
}

func answer(conn net.Conn, r request, result string) {
	fmt.Fprintf(conn, "{\"return\": %s, \"id\": %q}\n", result, r.ID)
}

func TestMonitorMatchesAnswersByID(t *testing.T) {
	m := peer(t, nil, func(conn *net.UnixConn, in *bufio.Scanner) {
		a, b := nextRequest(in), nextRequest(in)
		answer(conn, request{ID: "never asked"}, `"stray"`)
		answer(conn, b, fmt.Sprintf("%q", b.Execute))
		answer(conn, a, fmt.Sprintf("%q", a.Execute))
		nextRequest(in)
	})
	var wg sync.WaitGroup
	for _, name := range []string{"first", "second"} {
		wg.Go(func() {
			var got string
			if err := m.Execute(t.Context(), name, nil, &got); err != nil || got != name {
				t.Errorf("%s: got %q, %v", name, got, err)
			}
		})
	}
	wg.Wait()
	if v := m.Version(); v.String() != "7.2.22" {
		t.Errorf("version %s", v)
	}
}

func TestMonitorLargeReply(t *testing.T) {
	large := strings.Repeat("x", 1<<20)
	m := peer(t, nil, func(conn *net.UnixConn, in *bufio.Scanner) {
		for r := nextRequest(in); r.ID != ""; r = nextRequest(in) {
			answer(conn, r, fmt.Sprintf("%q", large))
		}
	})
	for range 3 {
		var got string
		if err := m.Execute(t.Context(), "large", nil, &got); err != nil || got != large {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	out, err := m.Run([]byte(`{"execute": "large"}`))
	if err != nil || len(out) < len(large) {
		t.Errorf("Run: %d bytes, %v", len(out), err)
	}
}

func TestMonitorUnreadEventsBlockNothing(t *testing.T) {
	const events = 3 * maxQueuedEvents
	var seen atomic.Int64
	m := peer(t, func(qmp.Event) { seen.Add(1) }, func(conn *net.UnixConn, in *bufio.Scanner) {
		r := nextRequest(in)
		for i := range events {
			fmt.Fprintf(conn, "{\"event\": \"E\", \"data\": {\"n\": %d}}\n", i)
		}
		answer(conn, r, "{}")
		nextRequest(in)
	})
	ctx, cancel := context.WithCancel(t.Context())
	unread, err := m.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Execute(t.Context(), "command", nil, nil); err != nil {
		t.Fatal(err)
	}
	if n := seen.Load(); n != events {
		t.Errorf("%d events noticed, want %d", n, events)
	}
	last := -1.0
	for last != events-1 {
		e := <-unread
		n := e.Data["n"].(float64)
		if n <= last {
			t.Fatalf("event %v after %v", n, last)
		}
		last = n
	}
	cancel()
	for range unread { // closed with the context
		t.Error("an event after the last one")
	}
}

func TestMonitorContextEnds(t *testing.T) {
	release := make(chan struct{})
	m := peer(t, nil, func(conn *net.UnixConn, in *bufio.Scanner) {
		slow := nextRequest(in)
		<-release
		answer(conn, slow, `"late"`)
		answer(conn, nextRequest(in), `"right"`)
		nextRequest(in)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := m.Execute(ctx, "slow", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	close(release)
	var got string
	if err := m.Execute(t.Context(), "next", nil, &got); err != nil || got != "right" {
		t.Errorf("the next command got %q, %v", got, err)
	}
}

func TestMonitorErrors(t *testing.T) {
	m := peer(t, nil, func(conn *net.UnixConn, in *bufio.Scanner) {
		for r := nextRequest(in); r.ID != ""; r = nextRequest(in) {
			fmt.Fprintf(conn, "{\"error\": {\"class\": \"DeviceNotFound\", \"desc\": \"no such\"}, \"id\": %q}\n", r.ID)
		}
	})
	err := m.Execute(t.Context(), "device_del", nil, nil)
	var refused *CommandError
	if !errors.As(err, &refused) || refused.Command != "device_del" || refused.Desc != "no such" || !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	if _, err := m.Run([]byte(`{"execute": "device_del"}`)); !errors.As(err, &refused) {
		t.Errorf("Run: %v", err)
	}
	if _, err := m.Run([]byte(`device_del`)); err == nil {
		t.Error("Run takes what is no JSON")
	}
}

func TestMonitorConnectionBreaks(t *testing.T) {
	for name, last := range map[string]string{
		"closed": "", "garbage": "garbage\n", "endless line": strings.Repeat("x", maxReply+1),
	} {
		t.Run(name, func(t *testing.T) {
			m := peer(t, nil, func(conn *net.UnixConn, in *bufio.Scanner) {
				nextRequest(in)
				fmt.Fprint(conn, last)
			})
			events, err := m.Events(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Execute(t.Context(), "x", nil, nil); !errdefs.IsUnavailable(err) {
				t.Errorf("the command that waits: %v", err)
			}
			for range events {
				t.Error("an event")
			}
			if err := m.Execute(t.Context(), "x", nil, nil); !errdefs.IsUnavailable(err) {
				t.Errorf("a later command: %v", err)
			}
			if _, err := m.Events(t.Context()); !errdefs.IsUnavailable(err) {
				t.Errorf("a later subscription: %v", err)
			}
		})
	}
}

func TestMonitorPassesDescriptors(t *testing.T) {
	// The scanner would lose the rights, so this far end reads by itself.
	got := make(chan string, 1)
	m := peer(t, nil, func(conn *net.UnixConn, _ *bufio.Scanner) {
		data, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*4))
		n, oobn, _, _, err := conn.ReadMsgUnix(data, rights)
		if err != nil {
			return
		}
		var r request
		_ = json.Unmarshal(data[:n], &r)
		got <- readPassed(rights[:oobn])
		answer(conn, r, "{}")
	})
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("passed"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := m.Execute(t.Context(), "getfd", props{"fdname": "x"}, nil, f); err != nil {
		t.Fatal(err)
	}
	if s := <-got; s != "passed" {
		t.Errorf("through the descriptor came %q", s)
	}
}

func readPassed(rights []byte) string {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil || len(messages) != 1 {
		return fmt.Sprint(len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fmt.Sprint(fds, err)
	}
	f := os.NewFile(uintptr(fds[0]), "passed")
	defer f.Close()
	data := make([]byte, 64)
	n, err := f.Read(data)
	if err != nil {
		return err.Error()
	}
	return string(data[:n])
}

func TestMonitorNoGreeting(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(runDir(t), "qmp"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // it accepts nobody, as a QEMU that hangs
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := dialMonitor(ctx, l.Addr().String(), nil, slog.Default()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
