package state

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// crashRoot makes the test binary the process that is killed.
const crashRoot = "VMRUNTIME_STATE_CRASH_ROOT"

// crashChild makes, changes and removes records until it is killed. It says what it begins and what is done.
func crashChild(root string) {
	fail := func(err error) {
		fmt.Println("error", err)
		os.Exit(1)
	}
	s, err := Open[spec, status](root)
	if err != nil {
		fail(err)
	}
	if _, _, err := s.Load(); err != nil {
		fail(err)
	}
	fmt.Println("ready")
	for i := 0; ; i++ {
		id := fmt.Sprintf("r%d", i%3)
		step := func(what string, count int, do func() error) {
			fmt.Println("begin", id, what, count)
			if err := do(); err != nil {
				fail(err)
			}
			fmt.Println("done", id, what, count)
		}
		if _, err := s.Get(id); err == nil {
			step("absent", 0, func() error { return s.Remove(id) })
		}
		step("present", i, func() error { _, err := s.Create(id, spec{Name: id}, status{Count: i}); return err })
		r, err := s.Get(id)
		if err != nil {
			fail(err)
		}
		for j := range 3 {
			step("present", i*100+j, func() error {
				return r.Update(func(s *status) error { s.Count = i*100 + j; return nil })
			})
		}
	}
}

// known is what the parent may find of a record: the last thing done, or the one begun after it.
type known struct{ done, begun string }

func TestKillAtAnyMoment(t *testing.T) {
	root := t.TempDir()
	rounds := 120
	if testing.Short() {
		rounds = 15
	}
	want := make(map[string]known)
	steps := 0
	for range rounds {
		steps += killRound(t, root, want)
		checkRound(t, root, want)
		if t.Failed() {
			return
		}
	}
	if steps == 0 {
		t.Error("no child came to do anything before it was killed")
	}
	t.Logf("%d kills, %d finished steps", rounds, steps)
}

// killRound runs a child, kills it a random time after it has said some of what it does, however slow it is, and notes all that.
func killRound(t *testing.T, root string, want map[string]known) int {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashRoot+"="+root)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if lines.Scan(); lines.Text() != "ready" {
		t.Errorf("child: %s", lines.Text())
	}
	kill := func() { _ = cmd.Process.Kill() }
	steps := 0
	for left := rand.IntN(12); ; left-- {
		if left == 0 {
			timer := time.AfterFunc(time.Duration(rand.Int64N(int64(4*time.Millisecond))), kill)
			defer timer.Stop()
		}
		if !lines.Scan() {
			break
		}
		steps += note(t, lines.Text(), want)
	}
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait() // killed
	return steps
}

func note(t *testing.T, line string, want map[string]known) int {
	t.Helper()
	f := strings.Fields(line)
	if len(f) != 4 || f[0] == "error" {
		t.Errorf("child: %s", line)
		return 0
	}
	k, value := want[f[1]], f[2]+" "+f[3]
	if f[0] == "begin" {
		k.begun = value
		want[f[1]] = k
		return 0
	}
	want[f[1]] = known{done: value, begun: value}
	return 1
}

// checkRound loads what the killed child left: all whole, each as last done or as begun.
func checkRound(t *testing.T, root string, want map[string]known) {
	t.Helper()
	records, broken, err := open(t, root).Load()
	if err != nil || len(broken) > 0 {
		t.Fatalf("load after a kill: %v, broken %v", err, broken)
	}
	found := make(map[string]string)
	for _, r := range records {
		found[r.ID()] = fmt.Sprintf("present %d", r.Status().Count)
		if r.Spec().Name != r.ID() {
			t.Errorf("record %s has the spec %+v", r.ID(), r.Spec())
		}
	}
	for id, k := range want {
		got, present := found[id]
		if !present {
			got = "absent 0"
		}
		if k.done == "" {
			k.done = "absent 0"
		}
		if got != k.done && got != k.begun {
			t.Errorf("record %s is %q; done was %q, begun %q", id, got, k.done, k.begun)
		}
		want[id] = known{done: got, begun: got}
	}
	for _, name := range names(t, root) {
		if strings.HasPrefix(name, ".") {
			t.Errorf("%s is left after a load", name)
		}
	}
}
