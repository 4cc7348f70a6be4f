package guest

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// isFakeCrun tells whether this test's program was started as crun, which has that as its first option.
func isFakeCrun(args []string) bool { return len(args) > 1 && args[1] == "--cgroup-manager=cgroupfs" }

// fakeCrun reads the files that crun reads, in its order, and leaves a process behind that waits to be killed. An exec's arguments are
// "wait FIFO", until somebody opens that, or "fail FIFO", which fails then.
func fakeCrun(args []string) error {
	f := flag.NewFlagSet("crun", flag.ContinueOnError)
	value := func(name string) *string { return f.String(name, "", "") }
	root, process, bundle, pidFile := value("root"), value("process"), value("bundle"), value("pid-file")
	for _, name := range []string{"cgroup-manager", "log", "cgroup", "console-socket"} {
		value(name)
	}
	f.Bool("detach", false, "")
	if err := f.Parse(args); err != nil {
		return err
	}
	command := f.Arg(0)
	if err := f.Parse(f.Args()[1:]); err != nil {
		return err
	}
	first := filepath.Join(*bundle, configName)
	if command == "exec" {
		first = filepath.Join(*root, f.Arg(0), statusName)
	}
	if _, err := os.ReadFile(first); err != nil {
		return err
	}
	if command == "exec" {
		if err := fakeExec(*process); err != nil {
			return err
		}
	}
	left := exec.Command("sleep", "1000")
	if err := left.Start(); err != nil {
		return err
	}
	return os.WriteFile(*pidFile, []byte(strconv.Itoa(left.Process.Pid)), 0o600)
}

func fakeExec(process string) error {
	data, err := os.ReadFile(process)
	if err != nil {
		return err
	}
	var p specs.Process
	if err := json.Unmarshal(data, &p); err != nil || len(p.Args) < 2 {
		return err
	}
	if _, err := os.ReadFile(p.Args[1]); err != nil {
		return err
	}
	if p.Args[0] == "fail" {
		return errors.New("the test wants it to fail")
	}
	return nil
}

// crunBed is an agent whose crun is fakeCrun, with one container that runs, "c". What would be cgroups are directories. There can be one at a
// time: it reaps all children of the test.
type crunBed struct {
	*Server
	t *testing.T
	c *container
}

func newCrunBed(t *testing.T) *crunBed {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	b := &crunBed{t: t}
	b.Server, err = New(Options{
		Root: filepath.Join(dir, "vm"), Crun: self, CrunRoot: filepath.Join(dir, "crun"), Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	b.c = b.container("c")
	b.c.main.begin(os.Getpid(), &streams{})
	b.write(filepath.Join(b.opts.CrunRoot, "c", statusName), "{}")
	t.Cleanup(b.end)
	return b
}

func (b *crunBed) end() {
	for _, c := range b.allContainers() {
		for _, p := range c.processes() {
			if pid := p.state().Pid; pid != 0 && int(pid) != os.Getpid() {
				_, err := b.reaper.kill(int(pid), unix.SIGKILL)
				if err != nil {
					b.t.Error(err)
				}
				<-p.exited
			}
			p.release()
		}
		delete(b.containers, c.id)
	}
	if err := b.Close(); err != nil {
		b.t.Error(err)
	}
}

// container makes one that has not been started.
func (b *crunBed) container(id string) *container {
	b.t.Helper()
	cgroup := filepath.Join(b.opts.Root, "cgroup", id)
	c := &container{
		id: id, crunID: id, dir: filepath.Join(b.containersDir(), id), cgroup: cgroup, execs: make(map[string]*process),
		spec:  &specs.Spec{Process: &specs.Process{Args: []string{"main"}}, Linux: &specs.Linux{}},
		pidNS: agentpb.PidNamespace_PID_NAMESPACE_GUEST,
		main:  &process{container: id, out: newOutput(0), exited: make(chan struct{})},
	}
	b.write(filepath.Join(cgroup, "cgroup.events"), "frozen 1\n")
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		b.t.Fatal(err)
	}
	b.containers[id] = c
	return c
}

func (b *crunBed) write(path, text string) {
	b.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		b.t.Fatal(err)
	}
}

// fifo makes one, and gives what opens it for the crun that reads it.
func (b *crunBed) fifo() (path string, open func()) {
	b.t.Helper()
	path = filepath.Join(b.t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		b.t.Fatal(err)
	}
	return path, func() {
		b.t.Helper()
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			b.t.Fatal(err)
		}
		f.Close()
	}
}

// exec has a command started in "c", and gives its error when it has been.
func (b *crunBed) exec(ctx context.Context, id string, args ...string) <-chan error {
	b.t.Helper()
	data, err := json.Marshal(&specs.Process{Args: args})
	if err != nil {
		b.t.Fatal(err)
	}
	begun := make(chan error, 1)
	go func() {
		_, err := b.Exec(ctx, &agentpb.ExecRequest{ContainerId: "c", ExecId: id, Process: data})
		begun <- err
	}()
	b.until("the exec "+id+" is known", func() bool {
		b.c.mu.Lock()
		defer b.c.mu.Unlock()
		return b.c.execs[id] != nil || len(begun) > 0
	})
	return begun
}

func (b *crunBed) until(what string, holds func() bool) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	defer cancel()
	if err := poll(ctx, time.Millisecond, func() (bool, error) { return holds(), nil }); err != nil {
		b.t.Fatalf("%s: %v", what, err)
	}
}

// within is what comes from a channel, which has to come before long.
func within[T any](t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(20 * time.Second):
		t.Fatal("not within 20 s: " + what)
	}
	panic("not reached")
}

// not fails if something comes from a channel within a moment.
func not[T any](t *testing.T, what string, from <-chan T) {
	t.Helper()
	select {
	case v := <-from:
		t.Fatalf("%s: %v", what, v)
	case <-time.After(200 * time.Millisecond):
	}
}

// A checkpoint has no exec in it of which crun has run half: those that are being started are waited for, others wait.
func TestFreezeAwaitsExecs(t *testing.T) {
	b := newCrunBed(t)
	path, open := b.fifo()
	first := b.exec(t.Context(), "first", "wait", path)
	frozen := make(chan error, 1)
	go func() {
		_, err := b.Freeze(t.Context(), &agentpb.FreezeRequest{ContainerIds: []string{"c"}})
		frozen <- err
	}()
	not(t, "the container is frozen while a command is being started", frozen)
	open()
	if err := errors.Join(within(t, "the exec", first), within(t, "the freeze", frozen)); err != nil {
		t.Fatal(err)
	}

	second := b.exec(t.Context(), "second", "go")
	ctx, cancel := context.WithCancel(t.Context())
	third := b.exec(ctx, "third", "go")
	not(t, "a command is started in a frozen container", second)
	cancel()
	if err := within(t, "the exec whose client has gone", third); !errors.Is(err, context.Canceled) {
		t.Errorf("an exec whose client has gone: %v", err)
	}
	fourth := b.exec(t.Context(), "fourth", "go")
	removed := make(chan error, 1)
	go func() {
		_, err := b.RemoveExec(t.Context(), &agentpb.ProcessRef{ContainerId: "c", ExecId: "fourth"})
		removed <- err
	}()
	if err := within(t, "the exec that is removed", fourth); !errors.Is(err, context.Canceled) {
		t.Errorf("an exec that is removed while its container is frozen: %v", err)
	}
	if err := within(t, "the removal", removed); err != nil {
		t.Error(err)
	}
	if _, err := b.Thaw(t.Context(), &agentpb.ThawRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := within(t, "the exec in the container that goes on", second); err != nil {
		t.Error(err)
	}
}

// A freeze that fails lets execs go.
func TestFreezeFailsForExecs(t *testing.T) {
	b := newCrunBed(t)
	path, open := b.fifo()
	first := b.exec(t.Context(), "first", "wait", path)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := b.Freeze(ctx, &agentpb.FreezeRequest{ContainerIds: []string{"c"}}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("freeze while a command is being started: %v", err)
	}
	second := b.exec(t.Context(), "second", "go")
	if err := within(t, "the exec after the freeze", second); err != nil {
		t.Error(err)
	}
	open()
	if err := within(t, "the exec before it", first); err != nil {
		t.Error(err)
	}
}

// Who removes an exec that is being started waits until it has been, or has failed.
func TestRemoveExecOfHalf(t *testing.T) {
	for _, how := range []string{"wait", "fail"} {
		t.Run(how, func(t *testing.T) {
			b := newCrunBed(t)
			path, open := b.fifo()
			begun := b.exec(t.Context(), "half", how, path)
			_, p, err := b.process(&agentpb.ProcessRef{ContainerId: "c", ExecId: "half"})
			if err != nil {
				t.Fatal(err)
			}
			killed := make(chan error, 1)
			go func() { killed <- b.killExec(t.Context(), b.c, p) }()
			not(t, "killed while it is being started", killed)
			open()
			if err := within(t, "the exec", begun); (err != nil) != (how == "fail") {
				t.Error(err)
			}
			if err := within(t, "its end", killed); err != nil {
				t.Error(err)
			}
		})
	}
}

// A container whose crun had been started before, and has ended, is run by another one.
func TestPreparedRunHasEnded(t *testing.T) {
	for name, want := range map[string]string{"waits": preparedID, "has ended": "first"} {
		t.Run(name, func(t *testing.T) {
			b := newCrunBed(t)
			if err := b.prepareRun(t.Context()); err != nil {
				t.Fatal(err)
			}
			if want != preparedID {
				if _, err := b.reaper.kill(b.prepared.pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				b.until("the crun's end", b.prepared.hasEnded)
			}
			c := b.container("first")
			_, err := b.StartContainer(t.Context(), &agentpb.StartContainerRequest{Id: c.id})
			if err != nil || c.crunID != want || b.prepared != nil {
				t.Errorf("crun calls the container %q, %v; want %q", c.crunID, err, want)
			}
		})
	}
}

// A guest that waits for its pod has a crun wait for the next exec when it has rehearsed one, and not only when there has been none for a while.
func TestStandbyExec(t *testing.T) {
	b := newCrunBed(t)
	if err := b.standbyExec(); err != nil || b.nextExec.waiting != nil {
		t.Errorf("before there was an exec %v waits, %v", b.nextExec.waiting, err)
	}
	if err := within(t, "the exec", b.exec(t.Context(), "rehearsal", "go")); err != nil {
		t.Fatal(err)
	}
	rested := make(chan struct{})
	go func() { b.keepExec(); close(rested) }()
	b.until("a crun is to be started after a rest", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.nextExec.resting
	})
	if err := b.standbyExec(); err != nil {
		t.Fatal(err)
	}
	b.mu.Lock()
	first, resting := b.nextExec.waiting, b.nextExec.resting
	b.mu.Unlock()
	if first == nil || !resting {
		t.Fatalf("crun %v waits; the rest goes on: %v", first, resting)
	}
	within(t, "the rest's end", rested)
	if b.nextExec.waiting != first {
		t.Error("another crun waits after the rest")
	}
	if err := within(t, "the next exec", b.exec(t.Context(), "next", "go")); err != nil {
		t.Fatal(err)
	}
	if _, p, err := b.process(&agentpb.ProcessRef{ContainerId: "c", ExecId: "next"}); err != nil || p.run != filepath.Base(first.dir()) {
		t.Errorf("the next exec is run by another crun: %+v, %v", p, err)
	}
}

func runFakeCrun() {
	if err := fakeCrun(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fake crun:", err)
		os.Exit(1)
	}
	os.Exit(0)
}
