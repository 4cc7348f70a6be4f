package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		crashChild(dir)
	}
	goleak.VerifyTestMain(m)
}

var at = time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)

const stamp = "2026-01-02T03:04:05.0000006Z"

func open(t *testing.T, dir string) *Writer {
	t.Helper()
	w, err := Open(filepath.Join(dir, "pod", "0.log"), filepath.Join(dir, "state", "log.json"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func write(t *testing.T, w *Writer, s Stream, data string) Offsets {
	t.Helper()
	next := w.Next().Stdout
	if s == Stderr {
		next = w.Next().Stderr
	}
	got, err := w.Write(s, at, next, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestLines(t *testing.T) {
	long := strings.Repeat("x", MaxLine)
	for _, tc := range []struct {
		name   string
		writes []string
		// want are tag and content of the lines, offset what is in the file before Flush.
		want   []string
		offset uint64
	}{
		{"one line", []string{"hello\n"}, []string{"F hello"}, 6},
		{"empty line", []string{"\n"}, []string{"F "}, 1},
		{"several in a piece", []string{"a\nb\n\nc\n"}, []string{"F a", "F b", "F ", "F c"}, 7},
		{"one in several pieces", []string{"a", "b", "c\n"}, []string{"F abc"}, 4},
		{"unfinished", []string{"a\nbc"}, []string{"F a", "P bc"}, 2},
		{"carriage return kept", []string{"a\r\n"}, []string{"F a\r"}, 3},
		{"longest whole line", []string{long + "\n"}, []string{"F " + long}, MaxLine + 1},
		{"longest held", []string{long}, []string{"P " + long}, 0},
		{"one byte too long", []string{long + "y\n"}, []string{"P " + long, "F y"}, MaxLine + 2},
		{"too long in pieces", []string{long, "y", "z\n"}, []string{"P " + long, "F yz"}, MaxLine + 3},
		{"two and a half", []string{long + long + "z"}, []string{"P " + long, "P " + long, "P z"}, 2 * MaxLine},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			w := open(t, dir)
			for _, s := range tc.writes {
				write(t, w, Stdout, s)
			}
			if got := w.Offsets(); got != (Offsets{Stdout: tc.offset}) {
				t.Errorf("offsets %+v, want %d", got, tc.offset)
			}
			if err := w.Flush(at); err != nil {
				t.Fatal(err)
			}
			if got, want := w.Offsets().Stdout, uint64(len(strings.Join(tc.writes, ""))); got != want {
				t.Errorf("offset after Flush %d, want %d", got, want)
			}
			var want strings.Builder
			for _, line := range tc.want {
				fmt.Fprintf(&want, "%s stdout %s\n", stamp, line)
			}
			if got := content(t, w.path); got != want.String() {
				t.Errorf("log:\n%.300s\nwant:\n%.300s", got, want.String())
			}
		})
	}
}

func TestStreamsAreApart(t *testing.T) {
	w := open(t, t.TempDir())
	write(t, w, Stdout, "o")
	write(t, w, Stderr, "e\n")
	if got := write(t, w, Stdout, "ut\n"); got != (Offsets{Stdout: 4, Stderr: 2}) {
		t.Errorf("offsets %+v", got)
	}
	want := stamp + " stderr F e\n" + stamp + " stdout F out\n"
	if got := content(t, w.path); got != want {
		t.Errorf("log %q", got)
	}
	if _, err := w.Write(Stream(2), at, 0, nil); err == nil {
		t.Error("a third stream is taken")
	}
}

func TestFileMode(t *testing.T) {
	w := open(t, t.TempDir())
	info, err := os.Stat(w.path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o640 {
		t.Errorf("mode %o", info.Mode().Perm())
	}
}

func TestBytesTakenBefore(t *testing.T) {
	w := open(t, t.TempDir())
	write(t, w, Stdout, "abc\nde")
	for _, again := range []struct {
		offset uint64
		data   string
	}{{0, "abc\n"}, {0, "abc\nde"}, {2, "c\nde"}, {4, "def\n"}} {
		if _, err := w.Write(Stdout, at, again.offset, []byte(again.data)); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := content(t, w.path), stamp+" stdout F abc\n"+stamp+" stdout F def\n"; got != want {
		t.Errorf("log %q, want %q", got, want)
	}
}

func TestGap(t *testing.T) {
	w := open(t, t.TempDir())
	write(t, w, Stdout, "ab")
	got, err := w.Write(Stdout, at, 10, []byte("c\n"))
	if err != nil || got.Stdout != 12 {
		t.Errorf("offset %d, error %v", got.Stdout, err)
	}
	if got, want := content(t, w.path), stamp+" stdout P ab\n"+stamp+" stdout F c\n"; got != want {
		t.Errorf("log %q, want %q", got, want)
	}
}

func TestFirstOpenLeavesOtherContent(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "pod", "0.log")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	old := stamp + " stdout F old\n"
	if err := os.WriteFile(path, []byte(old), 0o640); err != nil {
		t.Fatal(err)
	}
	w := open(t, dir)
	if got := w.Offsets(); got != (Offsets{}) {
		t.Errorf("offsets %+v", got)
	}
	write(t, w, Stdout, "new\n")
	if got, want := content(t, path), old+stamp+" stdout F new\n"; got != want {
		t.Errorf("log %q", got)
	}
}

func TestBrokenCheckpointIsAnError(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log.json")
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "0.log"), path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("error %v", err)
	}
}

func TestClosed(t *testing.T) {
	w := open(t, t.TempDir())
	if err := errors.Join(w.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	_, err := w.Write(Stdout, at, 0, []byte("x\n"))
	for _, err := range []error{err, w.Flush(at), w.Reopen()} {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
}

// TestKillAtEveryByte leaves the log cut at every byte of a batch, as a kill within the write would.
func TestKillAtEveryByte(t *testing.T) {
	dir := t.TempDir()
	w := open(t, dir)
	source := map[Stream]string{Stdout: "one\ntwo\n" + strings.Repeat("y", MaxLine+9) + "\n\nend\n", Stderr: "err\nlast"}
	write(t, w, Stdout, "one\n")
	write(t, w, Stderr, "err\n")
	before := len(content(t, w.path))
	write(t, w, Stdout, strings.TrimPrefix(source[Stdout], "one\n"))
	whole, saved := content(t, w.path), content(t, w.checkpoint)
	for cut := before; cut <= len(whole); cut++ {
		if cut > before+120 && cut < len(whole)-120 {
			continue // the inside of the long line is all alike
		}
		if err := os.WriteFile(w.checkpoint, []byte(saved), 0o600); err != nil {
			t.Fatal(err)
		}
		// In place: the inode stays.
		if err := os.WriteFile(w.path, []byte(whole[:cut]), 0o640); err != nil {
			t.Fatal(err)
		}
		finish(t, open(t, dir), source)
		compare(t, filepath.Dir(w.path), source)
		if t.Failed() {
			t.Fatalf("cut at byte %d", cut)
		}
	}
}

// finish writes what a Writer has not of the source.
func finish(t *testing.T, w *Writer, source map[Stream]string) {
	t.Helper()
	from := map[Stream]uint64{Stdout: w.Next().Stdout, Stderr: w.Next().Stderr}
	for s, text := range source {
		if from[s] > uint64(len(text)) {
			t.Fatalf("%s: offset %d is beyond the source's %d bytes", s, from[s], len(text))
		}
		if _, err := w.Write(s, at, from[s], []byte(text[from[s]:])); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Flush(at), w.Close()); err != nil {
		t.Fatal(err)
	}
}

// compare joins a directory's log files, the rotated first by name, and compares them with the source.
func compare(t *testing.T, dir string, source map[Stream]string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		files = append(files, e.Name())
	}
	// The log itself sorts before what it was renamed to.
	slices.SortFunc(files, func(a, b string) int {
		if (a == "0.log") != (b == "0.log") {
			return map[bool]int{true: 1, false: -1}[a == "0.log"]
		}
		return strings.Compare(a, b)
	})
	got := make(map[string]*strings.Builder)
	for s := range source {
		got[s.String()] = &strings.Builder{}
	}
	for _, name := range files {
		decode(t, content(t, filepath.Join(dir, name)), got)
	}
	for s, text := range source {
		if have := got[s.String()].String(); have != text {
			i := 0
			for i < min(len(have), len(text)) && have[i] == text[i] {
				i++
			}
			t.Errorf("%s: %d bytes in the log, %d in the source, different from byte %d", s, len(have), len(text), i)
		}
	}
}

// decode is what the kubelet does with a log.
func decode(t *testing.T, log string, into map[string]*strings.Builder) {
	t.Helper()
	for line := range strings.Lines(log) {
		f := strings.SplitN(line, " ", 4)
		if len(f) != 4 || !strings.HasSuffix(line, "\n") || into[f[1]] == nil {
			t.Fatalf("malformed line %.80q", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			t.Fatal(err)
		}
		if f[2] == "P" {
			f[3] = strings.TrimSuffix(f[3], "\n")
		}
		into[f[1]].WriteString(f[3])
	}
}

func TestRotation(t *testing.T) {
	source := map[Stream]string{Stdout: "one\ntwo\nthree\n", Stderr: ""}
	rename := func(t *testing.T, w *Writer) {
		if err := os.Rename(w.path, w.path+".20260102-030405"); err != nil {
			t.Fatal(err)
		}
	}
	for name, then := range map[string]func(t *testing.T, dir string, w *Writer) *Writer{
		"reopened": func(t *testing.T, _ string, w *Writer) *Writer {
			if err := w.Reopen(); err != nil {
				t.Fatal(err)
			}
			return w
		},
		"killed before Reopen": func(t *testing.T, dir string, _ *Writer) *Writer {
			w := open(t, dir)
			if _, err := os.Stat(w.path); !errors.Is(err, fs.ErrNotExist) {
				t.Error("a new log is made before Reopen; the kubelet may rename the old one back over it")
			}
			write(t, w, Stdout, "three\n")
			return open(t, dir)
		},
		"killed within Reopen": func(t *testing.T, dir string, w *Writer) *Writer {
			if err := os.WriteFile(w.path, nil, 0o640); err != nil {
				t.Fatal(err)
			}
			return open(t, dir)
		},
		"renamed back": func(t *testing.T, dir string, w *Writer) *Writer {
			if err := os.Rename(w.path+".20260102-030405", w.path); err != nil {
				t.Fatal(err)
			}
			write(t, w, Stdout, "ee\n")
			return open(t, dir)
		},
		"reopened twice": func(t *testing.T, dir string, w *Writer) *Writer {
			if err := errors.Join(w.Reopen(), w.Reopen()); err != nil {
				t.Fatal(err)
			}
			return open(t, dir)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			w := open(t, dir)
			write(t, w, Stdout, "one\ntw")
			rename(t, w)
			write(t, w, Stdout, "o\nthr")
			finish(t, then(t, dir, w), source)
			compare(t, filepath.Dir(w.path), source)
		})
	}
}

func TestRotatedFileIsGone(t *testing.T) {
	dir := t.TempDir()
	w := open(t, dir)
	write(t, w, Stdout, "one\n")
	if err := errors.Join(w.Close(), os.Remove(w.path)); err != nil {
		t.Fatal(err)
	}
	if got := open(t, dir).Offsets(); got.Stdout != 4 {
		t.Errorf("offsets %+v", got)
	}
}

func TestReopenThatFailsKeepsTheOldFile(t *testing.T) {
	dir := t.TempDir()
	w := open(t, dir)
	rotated := w.path + ".1"
	if err := errors.Join(os.Rename(w.path, rotated), os.Mkdir(w.path, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := w.Reopen(); err == nil {
		t.Fatal("a directory was opened as the log")
	}
	write(t, w, Stdout, "one\n")
	if got, want := content(t, rotated), stamp+" stdout F one\n"; got != want {
		t.Errorf("log %q", got)
	}
}

// TestFullDisk lets a batch fail in its middle by a limit on the size of files.
func TestFullDisk(t *testing.T) {
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	if os.Getenv(limitedEnv) == "" {
		runLimited(t)
		return
	}
	dir := t.TempDir()
	w := open(t, dir)
	write(t, w, Stdout, "before\n")
	restore := limitFileSize(t, 1000)
	got, err := w.Write(Stdout, at, 7, bytes.Repeat([]byte("lost\n"), 100))
	restore()
	if !errors.Is(err, syscall.EFBIG) {
		t.Errorf("error %v", err)
	}
	if got.Stdout != 507 {
		t.Errorf("offset %d; what is lost must count as written", got.Stdout)
	}
	w = open(t, dir) // killed now
	if w.Offsets() != got {
		t.Errorf("offsets %+v after a restart, %+v before", w.Offsets(), got)
	}
	write(t, w, Stdout, "after\n")
	if got, want := content(t, w.path), stamp+" stdout F before\n"+stamp+" stdout F after\n"; got != want {
		t.Errorf("log %q", got)
	}
}

// limitedEnv marks the process in which the limit is set: it holds for everything that a process writes, the files of
// the go command included.
const limitedEnv = "CRILOG_TEST_LIMITED"

func runLimited(t *testing.T) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), limitedEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Errorf("%v: %s", err, out)
	}
}

func limitFileSize(t *testing.T, size uint64) (restore func()) {
	t.Helper()
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: size, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCheckpointBoundsTheCount(t *testing.T) {
	w := open(t, t.TempDir())
	first := content(t, w.checkpoint)
	line := strings.Repeat("x", 1<<20) + "\n"
	for range 5 {
		write(t, w, Stdout, line)
	}
	if content(t, w.checkpoint) == first {
		t.Errorf("no checkpoint in %d bytes", 5*len(line))
	}
}

// BenchmarkWrite takes chunks as the agent gives them: 256 KiB of lines of 100 bytes.
func BenchmarkWrite(b *testing.B) {
	dir := b.TempDir()
	w, err := Open(filepath.Join(dir, "0.log"), filepath.Join(dir, "log.json"))
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	chunk := bytes.Repeat(append(bytes.Repeat([]byte("x"), 99), '\n'), 256<<10/100)
	b.SetBytes(int64(len(chunk)))
	offset := uint64(0)
	for b.Loop() {
		if _, err := w.Write(Stdout, at, offset, chunk); err != nil {
			b.Fatal(err)
		}
		offset += uint64(len(chunk))
		if rand.IntN(100) == 0 {
			if err := os.Truncate(w.path, 0); err != nil {
				b.Fatal(err)
			}
		}
	}
}
