package crilog

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// crashDir makes the test binary the process that is killed.
const crashDir = "VMRUNTIME_CRILOG_CRASH_DIR"

// sourceBytes is how long each stream of the source is.
const sourceBytes = 1 << 20

// makeSource is the output that is logged: lines of all lengths, some longer than a line of the log, and no newline at
// the end.
func makeSource() map[Stream]string {
	r := rand.New(rand.NewPCG(1, 2))
	out := make(map[Stream]string)
	for s := range streams {
		var b strings.Builder
		for b.Len() < sourceBytes {
			n := r.IntN(200)
			if r.IntN(200) == 0 {
				n = r.IntN(3 * MaxLine)
			}
			for range n {
				b.WriteByte(byte(' ' + r.IntN(90)))
			}
			b.WriteByte('\n')
		}
		out[s] = b.String() + "end"
	}
	return out
}

// crashChild logs the source from where the last child ended, in pieces of all sizes, rotates the log now and then, and
// tells the offsets that it could acknowledge.
func crashChild(dir string) {
	w, err := Open(filepath.Join(dir, "pod", "0.log"), filepath.Join(dir, "log.json"))
	exitOn(err)
	source := makeSource()
	say(w.Offsets())
	for {
		next := w.Next()
		from := map[Stream]uint64{Stdout: next.Stdout, Stderr: next.Stderr}
		done := true
		for s := range streams {
			rest := source[s][from[s]:]
			done = done && rest == ""
			_, err := w.Write(s, time.Now(), from[s], []byte(rest[:min(len(rest), 1+rand.IntN(1500))]))
			exitOn(err)
		}
		say(w.Offsets())
		if done {
			exitOn(w.Flush(time.Now()))
			say(w.Offsets())
			exitOn(w.Close())
			fmt.Println("finished")
			os.Exit(0)
		}
		if rand.IntN(100) == 0 {
			rotate(w)
		}
	}
}

// rotate renames the log as the kubelet does, and reopens it at once or a little later.
func rotate(w *Writer) {
	err := os.Rename(w.path, fmt.Sprintf("%s.%020d", w.path, time.Now().UnixNano()))
	if !os.IsNotExist(err) {
		exitOn(err)
	}
	if rand.IntN(3) > 0 {
		exitOn(w.Reopen())
	}
}

func say(o Offsets) { fmt.Println("safe", o.Stdout, o.Stderr) }

func exitOn(err error) {
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

func TestKillAtAnyMoment(t *testing.T) {
	dir := t.TempDir()
	safe := Offsets{}
	kills := 0
	deadline := time.Now().Add(time.Minute)
	for !killRound(t, dir, &safe) {
		kills++
		if time.Now().After(deadline) || t.Failed() {
			t.Fatalf("not done after %d kills, at %+v", kills, safe)
		}
	}
	if kills == 0 {
		t.Error("the child was never killed")
	}
	source := makeSource()
	compare(t, filepath.Join(dir, "pod"), source)
	files, err := os.ReadDir(filepath.Join(dir, "pod"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d kills, %d files", kills, len(files))
}

// killRound runs a child for a random time and tells whether it came to the end. What one child acknowledges the next
// must have.
func killRound(t *testing.T, dir string, safe *Offsets) bool {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashDir+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	var timer *time.Timer
	finished := false
	for lines.Scan() {
		if lines.Text() == "finished" {
			finished = true
			break
		}
		var now Offsets
		if _, err := fmt.Sscanf(lines.Text(), "safe %d %d", &now.Stdout, &now.Stderr); err != nil {
			t.Errorf("child: %s", lines.Text())
			break
		}
		if now.Stdout < safe.Stdout || now.Stderr < safe.Stderr {
			t.Errorf("%+v were acknowledged, and now the log has %+v", *safe, now)
		}
		*safe = now
		if timer == nil {
			timer = time.AfterFunc(time.Duration(rand.Int64N(int64(6*time.Millisecond))), func() { _ = cmd.Process.Kill() })
		}
	}
	if timer != nil {
		timer.Stop()
	}
	err = cmd.Wait()
	if finished && err != nil {
		t.Logf("killed after the end: %v", err)
	}
	return finished
}
