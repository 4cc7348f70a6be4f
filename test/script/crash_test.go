package script

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/runtime"
)

const (
	// crashSeed decides in which order the points are taken.
	crashSeed = 1
	// crashLines is what container a writes.
	crashLines = 60
)

// points is how many points of each kind are taken; 0 is all.
var points = flag.Int("points", 8, "at how many points of each kind the daemon is killed; 0 is all")

// The daemon is killed as it opens a file of its state: before and after records are written, while disks are made, while
// logs are begun; and while it waits for an answer of QEMU or the guest. The next one has to list what the client was told,
// the client repeats the call that got no answer and goes on to the end of the pod's life, which has to be as if nothing
// had happened. Every third time the recovering daemon is killed too.
func TestCrash(t *testing.T) { killedEverywhere(t, nil, (*life).containerSteps, 30, 12) }

// The same for a machine.
func TestCrashMachine(t *testing.T) { killedEverywhere(t, nil, (*life).machineSteps, 20, 5) }

// The same for a pod that is checkpointed, and another one that is made of that.
func TestCrashCheckpoint(t *testing.T) { killedEverywhere(t, nil, (*life).checkpointSteps, 20, 10) }

// killedEverywhere lives lives of a kind, of which each opens and calls at least so much, with changes to the configuration.
func killedEverywhere(t *testing.T, changes map[string]map[string]any, steps func(*life) []step, leastOpens, leastCalls int) {
	if noBed != "" {
		t.Skip(noBed)
	}
	w := newWorld(theBed, t.TempDir())
	w.changes = changes
	if err := w.repair(); err != nil {
		t.Fatal(err)
	}
	if _, err := guestCommand(w, []string{"step"}); err != nil {
		t.Fatal(err)
	}
	g, err := newGate(w.bed.records, w.bed.program())
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("needs fanotify's permission events, to stop the daemon at a file: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	from := fileSize(w.bed.LogFile("vmruntime"))
	defer func() {
		if err := errors.Join(w.close(), g.close()); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("vmruntime's log:\n%s", logFrom(w.bed.LogFile("vmruntime"), from))
		}
	}()
	opens, calls := countPoints(t, w, g, steps)
	if opens < leastOpens || calls < leastCalls {
		t.Fatal("these are too few: not all is seen")
	}
	killAll(t, w, g, steps, "open", opens, func(n int, kill func(string)) {
		g.arm(n, func(_ int, path string) { kill(path) })
	})
	killAll(t, w, g, steps, "call", calls, func(n int, kill func(string)) {
		w.bed.control.watch(func(r report) {
			if n--; n == -1 {
				kill(r.Kind + " " + r.Text)
			}
		})
	})
	w.bed.control.watch(nil)
}

// killAll lives a life for each point of a kind. arm has the daemon killed at the given one.
func killAll(t *testing.T, w *world, g *gate, steps func(*life) []step, kind string, total int, arm func(n int, kill func(where string))) {
	order := rand.New(rand.NewSource(crashSeed)).Perm(total)
	if *points > 0 {
		order = order[:min(total, *points)]
	}
	for i, point := range order {
		again := -1
		if i%3 == 0 {
			again = i
		}
		name := fmt.Sprintf("%s-%d", kind, point)
		if t.Failed() {
			return // what a failure left behind would fail the next ones too
		}
		t.Run(name, func(t *testing.T) {
			crashAt(t, w, g, &life{w: w, name: name, steps: steps}, again, func(kill func(string)) { arm(point, kill) })
		})
	}
	t.Logf("killed at %d of %d points: %s", len(order), total, kind)
}

// countPoints lives a life undisturbed.
func countPoints(t *testing.T, w *world, g *gate, steps func(*life) []step) (opens, calls int) {
	t.Helper()
	if err := w.startCrashing(); err != nil {
		t.Fatal(err)
	}
	g.arm(-1, nil)
	w.bed.control.watch(func(report) { calls++ })
	l := &life{w: w, name: "whole", steps: steps}
	if err := l.goOn(); err != nil {
		t.Fatal(err)
	}
	w.bed.control.watch(nil)
	opened := g.opened()
	t.Logf("a life opens %d files (%s) and makes %d calls", len(opened), summary(opened), calls)
	return len(opened), calls
}

// startCrashing starts a daemon of a crash test. Its template is there before anything is counted.
func (w *world) startCrashing() error {
	if err := w.startDaemon(w.changes); err != nil {
		return err
	}
	switch {
	case w.spares():
		return w.awaitLog("a guest waits for its pod")
	case w.changes["template"]["enabled"] == true:
		return w.awaitTemplate()
	}
	return nil
}

func summary(opened []string) string {
	count := make(map[string]int)
	for _, path := range opened {
		count[strings.Split(path, string(filepath.Separator))[0]]++
	}
	return fmt.Sprint(count)
}

func crashAt(t *testing.T, w *world, g *gate, l *life, again int, arm func(kill func(string))) {
	if w.bed.VMRuntimePID() == 0 {
		if err := w.startCrashing(); err != nil {
			t.Fatal(err)
		}
	}
	pid := w.bed.VMRuntimePID()
	var mu sync.Mutex
	where := "the end"
	arm(func(at string) {
		mu.Lock()
		defer mu.Unlock()
		where = at
		_ = syscall.Kill(pid, syscall.SIGKILL) // the test's own child; it may have ended
	})
	err := l.goOn()
	g.arm(-1, nil)
	w.bed.control.watch(nil)
	mu.Lock()
	defer mu.Unlock()
	if err != nil {
		if kerr := errors.Join(w.bed.KillVMRuntime(), w.disconnect()); kerr != nil {
			t.Fatal(kerr)
		}
		if again >= 0 {
			killRecovery(t, w, g, again)
		}
		if err := w.startCrashing(); err != nil {
			t.Fatalf("killed at %s in %s (%v): %v", where, l.at(), err, err)
		}
		if err := l.holds(); err != nil {
			t.Fatalf("killed at %s in %s: %v", where, l.at(), err)
		}
		at := l.at()
		if err := l.goOn(); err != nil {
			t.Fatalf("killed at %s in %s; then %s: %v", where, at, l.at(), err)
		}
	}
	if w.spares() || w.limits != nil { // the daemon ends with itself what waits, and the template that is made
		if err := errors.Join(w.disconnect(), w.bed.StopVMRuntime()); err != nil {
			t.Fatal(err)
		}
	}
	left, err := w.leaks(context.Background())
	if err != nil || len(left) > 0 {
		t.Fatalf("killed at %s: left when all was removed: %v\n  %s", where, err, strings.Join(left, "\n  "))
	}
}

// killRecovery starts a daemon and kills it while it recovers, at the open of the given number if it gets there.
func killRecovery(t *testing.T, w *world, g *gate, open int) {
	t.Helper()
	g.arm(open%12, func(pid int, _ string) { _ = syscall.Kill(pid, syscall.SIGKILL) })
	_ = w.startDaemon(w.changes) // ended, or ready when it opened fewer files
	g.arm(-1, nil)
	if err := errors.Join(w.bed.KillVMRuntime(), w.disconnect()); err != nil {
		t.Fatal(err)
	}
}

// life is one pod's life as a client lives it that may lose its server at any call: it knows what was answered, and repeats
// what was not.
type life struct {
	w    *world
	name string
	next int // the step that was not answered yet
	// attempts is how many archives were begun.
	attempts int
	// steps are the whole life.
	steps func(*life) []step
}

type step struct {
	name string
	do   func(*life) error
	// before and after are what list prints when the step was not begun and when it was answered; between, either.
	after []string
}

func (l *life) a() string { return l.name + "-a" }
func (l *life) b() string { return l.name + "-b" }

// shared is a directory that container b shares with the node, if there is a virtiofsd. With changes to the configuration there is none:
// a share does not depend on how the VM has begun, and is in the other lives.
func (l *life) shared(cfg *runtimeapi.ContainerConfig) {
	if l.w.changes != nil {
		return
	}
	if _, err := runtime.Default().QEMU.FindVirtiofsd(); err == nil {
		cfg.Mounts = []*runtimeapi.Mount{{ContainerPath: "/shared", HostPath: filepath.Join(l.w.logs, "shared")}}
	}
}

// containerSteps are the life of a pod with two containers. The states are those that ListPodSandbox and ListContainers must give
// after the step; container a ends by itself at any time after its start.
func (l *life) containerSteps() []step {
	pod, stopped := "pod "+l.name+" ready", "pod "+l.name+" notready"
	a, b := "container "+l.a()+" ", "container "+l.b()+" "
	return []step{
		{"run", func(l *life) error { return l.run() }, []string{pod}},
		{"create a", func(l *life) error {
			return l.create(l.a(), []string{fmt.Sprintf("lines %d 4ms", crashLines), "exit 5"})
		}, []string{pod, a + "created"}},
		{"start a", func(l *life) error { return l.start(l.a()) }, []string{pod, a + "running|exited"}},
		{"create b", func(l *life) error { return l.create(l.b(), []string{"out begun", "trap bye", "wait"}, l.shared) }, []string{pod, a + "running|exited", b + "created"}},
		{"start b", func(l *life) error { return l.start(l.b()) }, []string{pod, a + "running|exited", b + "running"}},
		{"exec b", (*life).exec, []string{pod, a + "running|exited", b + "running"}},
		{"stop b", func(l *life) error { return l.w.stop(l.b(), 10) }, []string{pod, a + "running|exited", b + "exited"}},
		{"end of a", (*life).endOfA, []string{pod, a + "exited", b + "exited"}},
		{"remove b", func(l *life) error { return l.w.removeContainer(l.b()) }, []string{pod, a + "exited"}},
		{"stop", func(l *life) error { return l.w.stopPod(l.name) }, []string{stopped, a + "exited"}},
		{"remove", func(l *life) error { return l.w.removePod(l.name) }, nil},
	}
}

// machineSteps are the life of a pod with a machine.
func (l *life) machineSteps() []step {
	pod, stopped := "pod "+l.name+" ready", "pod "+l.name+" notready"
	m := "container " + l.a() + " "
	return []step{
		{"run", func(l *life) error { return l.run(machineAnnotations()...) }, []string{pod}},
		{"create", func(l *life) error { return l.create(l.a(), nil, machine, l.shared) }, []string{pod, m + "created"}},
		{"start", func(l *life) error { return l.start(l.a()) }, []string{pod, m + "running"}},
		{"boot", func(l *life) error { _, err := loggedCommand(l.w, []string{l.a(), "stdout up"}); return err }, []string{pod, m + "running"}},
		{"stop", func(l *life) error { return l.w.stop(l.a(), 10) }, []string{pod, m + "exited"}},
		{"end", (*life).endOfMachine, []string{pod, m + "exited"}},
		{"remove machine", func(l *life) error { return l.w.removeContainer(l.a()) }, []string{pod}},
		{"stop pod", func(l *life) error { return l.w.stopPod(l.name) }, []string{stopped}},
		{"remove", func(l *life) error { return l.w.removePod(l.name) }, nil},
	}
}

// restored is the name of the pod that is made from the checkpoint, and of its container.
func (l *life) restored() string { return l.name + "-r" }

// checkpointSteps are the life of a pod that is checkpointed while it writes its log, and that of the pod restored from it.
func (l *life) checkpointSteps() []step {
	pod, a := "pod "+l.name+" ready", "container "+l.a()+" "
	r, ra := "pod "+l.restored()+" ready", a // it has to be called what it was
	return []step{
		{"run", func(l *life) error { return l.run() }, []string{pod}},
		{"create", func(l *life) error {
			return l.create(l.a(), []string{"trap bye", fmt.Sprintf("lines %d 4ms", checkpointLines), "wait"})
		}, []string{pod, a + "created"}},
		{"start", func(l *life) error { return l.start(l.a()) }, []string{pod, a + "running"}},
		{"lines", func(l *life) error { return l.logged(l.a(), 5) }, []string{pod, a + "running"}},
		{"checkpoint", (*life).checkpoint, []string{pod, a + "running"}},
		{"all lines", func(l *life) error { return l.logged(l.a(), checkpointLines-1) }, []string{pod, a + "running"}},
		{"stop", func(l *life) error { return l.w.stop(l.a(), 10) }, []string{pod, a + "exited"}},
		{"restore", (*life).restore, []string{pod, a + "exited", r, ra + "created"}},
		{"remove container", func(l *life) error { return l.w.removeContainer(l.a()) }, []string{pod, r, ra + "created"}},
		{"stop pod", func(l *life) error { return l.w.stopPod(l.name) }, []string{"pod " + l.name + " notready", r, ra + "created"}},
		{"remove", func(l *life) error { return l.w.removePod(l.name) }, []string{r, ra + "created"}},
		{"start restored", func(l *life) error { return l.start(l.restored()) }, []string{r, ra + "running"}},
		{"all restored lines", func(l *life) error { return l.logged(l.restored(), checkpointLines-1) }, []string{r, ra + "running"}},
		{"stop restored", func(l *life) error { return l.w.stop(l.restored(), 10) }, []string{r, ra + "exited"}},
		{"ends", (*life).endOfRestored, []string{r, ra + "exited"}},
		{"remove restored container", func(l *life) error { return l.w.removeContainer(l.restored()) }, []string{r}},
		{"stop restored pod", func(l *life) error { return l.w.stopPod(l.restored()) }, []string{"pod " + l.restored() + " notready"}},
		{"remove restored", func(l *life) error { return l.w.removePod(l.restored()) }, nil},
	}
}

// checkpointLines is what the container writes: some before it is checkpointed, the others after.
const checkpointLines = 300

func (l *life) logged(name string, line int) error {
	_, err := loggedCommand(l.w, []string{name, "stdout " + lineText(line)})
	return err
}

// archive is the directory of the latest attempt.
func (l *life) archive() string {
	return filepath.Join(l.w.logs, fmt.Sprintf("%s-archive-%d", l.name, l.attempts))
}

// checkpoint makes an archive, unless an unanswered call has. What is half made is no archive.
func (l *life) checkpoint() error {
	if l.attempts > 0 {
		if _, err := os.Stat(filepath.Join(l.archive(), "manifest.sha256")); err == nil {
			return nil
		}
		if err := l.refusedRestore(); err != nil {
			return err
		}
	}
	l.attempts++
	if err := os.MkdirAll(l.archive(), 0o700); err != nil {
		return err
	}
	ctx, cancel := call()
	defer cancel()
	_, err := l.w.rt.CheckpointPod(ctx, &runtimeapi.CheckpointPodRequest{
		PodSandboxId: l.w.pods[l.name].id, ContainerIds: []string{l.w.containers[l.a()].id}, OutputPath: l.archive(),
	})
	return err
}

func (l *life) refusedRestore() error {
	err := l.tryRestore()
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "the checkpoint is damaged") {
		return fmt.Errorf("restored from an archive that was cut off: %w, want InvalidArgument", err)
	}
	return nil
}

func (l *life) tryRestore() error {
	name := l.restored()
	p := &sandbox{name: name, cfg: l.w.podConfig(name)}
	if err := os.MkdirAll(p.cfg.GetLogDirectory(), 0o755); err != nil {
		return err
	}
	cfg := proto.CloneOf(l.w.containers[l.a()].cfg)
	cfg.LogPath = name + ".log"
	cfg.Metadata.Name = l.a()
	ctx, cancel := call()
	defer cancel()
	resp, err := l.w.rt.RestorePod(ctx, &runtimeapi.RestorePodRequest{
		CheckpointPath: l.archive(), Config: p.cfg, RuntimeHandler: "vm", ContainerConfigs: []*runtimeapi.ContainerConfig{cfg},
	})
	if err != nil {
		return err
	}
	p.id = resp.GetPodSandboxId()
	l.w.pods[name] = p
	l.w.containers[name] = &ctr{name: name, id: resp.GetRestoredContainers()[0].GetContainerId(), pod: p, cfg: cfg}
	return nil
}

// restore makes a pod of the archive, in place of one that an unanswered call has made.
func (l *life) restore() error {
	ctx, cancel := call()
	defer cancel()
	list, err := l.w.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, item := range list.GetItems() {
		if item.GetMetadata().GetName() != l.restored() {
			continue
		}
		if _, err := l.w.rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: item.GetId()}); err != nil {
			return err
		}
	}
	return l.tryRestore()
}

// endOfRestored holds that no line is missing: what the restored log has begins with one that was not logged yet, or was logged after
// the checkpoint.
func (l *life) endOfRestored() error {
	if line, err := l.w.containerLine(l.restored()); err != nil || line != "exited 0 Completed" {
		return fmt.Errorf("the restored container is %q (%w), want exited 0 Completed", line, err)
	}
	text, err := l.w.logText(l.restored())
	if err != nil {
		return err
	}
	var first int
	if _, err := fmt.Sscanf(text, "stdout line %d", &first); err != nil || first < 5 {
		return fmt.Errorf("the restored log begins with %.40q, want a line after the fifth: %w", text, err)
	}
	var want strings.Builder
	for i := first; i < checkpointLines; i++ {
		fmt.Fprintf(&want, "stdout %s\n", lineText(i))
	}
	want.WriteString("stdout bye\n")
	if text != want.String() {
		return fmt.Errorf("the restored log is %q, want the lines from %d on, and bye", text, first)
	}
	return nil
}

// endOfMachine holds that the machine powered off, and that its whole console is in the log, once.
func (l *life) endOfMachine() error {
	if line, err := l.w.containerLine(l.a()); err != nil || line != "exited 0 Completed" {
		return fmt.Errorf("the machine is %q (%w), want exited 0 Completed", line, err)
	}
	var want strings.Builder
	for i := range machineLines {
		fmt.Fprintf(&want, "stdout %s\n", lineText(i))
	}
	want.WriteString("stdout up\nstdout bye\n")
	text, err := l.w.logText(l.a())
	if err != nil || text != want.String() {
		return fmt.Errorf("the log of the machine is %q (%w), want its %d lines, up, and bye", text, err, machineLines)
	}
	return nil
}

func (l *life) at() string {
	steps := l.steps(l)
	return "step " + steps[min(l.next, len(steps)-1)].name
}

// goOn does what is left of the life.
func (l *life) goOn() error {
	for steps := l.steps(l); l.next < len(steps); l.next++ {
		if err := steps[l.next].do(l); err != nil {
			return fmt.Errorf("%s: %w", steps[l.next].name, err)
		}
	}
	return nil
}

// holds compares what is listed with what the client knows: the state after the last answered step, or that after the step
// under way, or for removals something between.
func (l *life) holds() error {
	got, err := l.w.list()
	if err != nil {
		return err
	}
	steps := l.steps(l)
	var before []string
	if l.next > 0 {
		before = steps[l.next-1].after
	}
	lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
	if got == "" {
		lines = nil
	}
	for _, line := range lines {
		if !slices.ContainsFunc(slices.Concat(before, steps[l.next].after), func(want string) bool { return matches(line, want) }) {
			return fmt.Errorf("listed is %q, want %q or %q", lines, before, steps[l.next].after)
		}
	}
	for _, want := range before {
		stays := slices.ContainsFunc(steps[l.next].after, func(s string) bool { return subject(s) == subject(want) })
		if stays && !slices.ContainsFunc(lines, func(line string) bool { return subject(line) == subject(want) }) {
			return fmt.Errorf("listed is %q, in which %q is missing", lines, want)
		}
	}
	return nil
}

// subject is what a line is about: "pod NAME", "container NAME".
func subject(line string) string { return line[:strings.LastIndex(line, " ")] }

// matches compares a line with a wanted one, which may allow several states.
func matches(line, want string) bool {
	return subject(line) == subject(want) && slices.Contains(strings.Split(want[len(subject(want))+1:], "|"), line[len(subject(line))+1:])
}

// run makes the sandbox, or takes the one that an unanswered call has made.
func (l *life) run(annotations ...string) error {
	ctx, cancel := call()
	defer cancel()
	list, err := l.w.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range list.GetItems() {
		if p.GetMetadata().GetName() == l.name {
			return l.adopt(ctx, p.GetId())
		}
	}
	return l.w.run(l.name, annotations...)
}

// machineAnnotations ask for all that may stand beside a machine.
func machineAnnotations() []string {
	out := []string{"kernel=/boot/kernel"}
	if _, err := exec.LookPath("swtpm"); err == nil {
		out = append(out, "tpm=true")
	}
	return out
}

func (l *life) adopt(ctx context.Context, id string) error {
	resp, err := l.w.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		return err
	}
	if resp.GetStatus().GetNetwork().GetIp() == "" {
		return fmt.Errorf("the sandbox %s that is listed has no address", id)
	}
	l.w.pods[l.name] = &sandbox{name: l.name, id: id, cfg: l.w.podConfig(l.name)}
	return nil
}

// create likewise.
func (l *life) create(name string, script []string, change ...func(*runtimeapi.ContainerConfig)) error {
	ctx, cancel := call()
	defer cancel()
	list, err := l.w.rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return err
	}
	for _, c := range list.GetContainers() {
		if c.GetMetadata().GetName() == name {
			p := l.w.pods[l.name]
			l.w.containers[name] = &ctr{name: name, id: c.GetId(), pod: p, cfg: l.w.containerConfig(name, script)}
			return nil
		}
	}
	return l.w.create(l.name, name, script, change...)
}

// start starts the container, unless an unanswered call has.
func (l *life) start(name string) error {
	line, err := l.w.containerLine(name)
	if err != nil {
		return err
	}
	if line != "created" {
		return nil
	}
	return l.w.start(name)
}

func (l *life) exec() error {
	resp, err := l.w.exec(l.b(), 10, []string{"out over", "exit 3"})
	if err != nil {
		return err
	}
	if string(resp.GetStdout()) != "over\n" || resp.GetExitCode() != 3 {
		return fmt.Errorf("exec printed %q and exited with %d, want over and 3", resp.GetStdout(), resp.GetExitCode())
	}
	return nil
}

// endOfA holds that both containers ended as they should, were started once, and have their whole logs.
func (l *life) endOfA() error {
	var line string
	var err error
	if !l.w.until(func() bool {
		line, err = l.w.containerLine(l.a())
		return err != nil || strings.HasPrefix(line, "exited")
	}) || err != nil || line != "exited 5 Error" {
		return fmt.Errorf("container a is %q (%w), want exited 5 Error", line, err)
	}
	if line, err := l.w.containerLine(l.b()); err != nil || line != "exited 0 Completed" {
		return fmt.Errorf("container b is %q (%w), want exited 0 Completed", line, err)
	}
	if _, err := wholeLogCommand(l.w, []string{l.a(), fmt.Sprint(crashLines)}); err != nil {
		return err
	}
	text, err := l.w.logText(l.b())
	if err != nil || text != "stdout begun\nstdout bye\n" {
		return fmt.Errorf("the log of b is %q (%w), want begun and bye", text, err)
	}
	starts := 0
	for _, r := range l.w.bed.control.reports(l.w.pods[l.name].id) {
		if strings.HasPrefix(r.Text, "StartContainer ") && !strings.Contains(r.Text, "rehearsal") {
			starts++
		}
	}
	if starts != 2 {
		return fmt.Errorf("the guest was told %d times to start a container, want 2", starts)
	}
	return l.oneShare()
}

// oneShare holds that the pod has one virtiofsd, and nothing beside that and QEMU. The fake QEMU does not wait for it as the real
// one does: the launcher may still be on its way to become virtiofsd.
func (l *life) oneShare() error {
	cfg := new(runtimeapi.ContainerConfig)
	l.shared(cfg)
	want := slices.Repeat([]string{"virtiofsd"}, len(cfg.Mounts))
	var found []string
	var err error
	if !l.w.until(func() bool {
		found, err = l.sessionsBesideQEMU()
		return err != nil || slices.Equal(found, want)
	}) {
		return fmt.Errorf("beside QEMU run %q, it has to be %q", found, want)
	}
	return err
}

// sessionsBesideQEMU are the names of the pod's processes that lead a session: virtiofsd has a child, which does not.
func (l *life) sessionsBesideQEMU() (names []string, err error) {
	helpers, err := l.w.helpersOf(l.name)
	for pid, name := range helpers {
		if session, err := unix.Getsid(pid); err == nil && session == pid { // no session: it has ended in the meantime
			names = append(names, name)
		}
	}
	return names, err
}
