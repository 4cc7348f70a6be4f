package sshexec

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func execute(t *testing.T, c *Client, stdin string, args ...string) (stdout, stderr string, code int32) {
	t.Helper()
	var out, errOut bytes.Buffer
	code, err := c.Exec(deadline(t, time.Minute), Command{Args: args, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errOut})
	if err != nil {
		t.Fatalf("exec %q: %v", args, err)
	}
	return out.String(), errOut.String(), code
}

func TestExec(t *testing.T) {
	g := newGuest(t)
	c := g.dial(t, "root")
	t.Run("basics", func(t *testing.T) { testBasics(t, c, "") })
	t.Run("noisy login", func(t *testing.T) { testBasics(t, g.dial(t, "noisy"), "more noise\n") })
	t.Run("environment", func(t *testing.T) { testEnvironment(t, c) })
	t.Run("invalid", func(t *testing.T) { testInvalid(t, g, c) })
	t.Run("terminal", func(t *testing.T) { testTerminal(t, c) })
	t.Run("large streams", func(t *testing.T) { testLarge(t, c) })
	t.Run("stdin not read", func(t *testing.T) { testStdinNotRead(t, c) })
	t.Run("cancel", func(t *testing.T) { testCancel(t, g, c) })
	t.Run("cancel at any time", func(t *testing.T) { testCancelRace(t, g, c) })
	t.Run("failing writer", func(t *testing.T) { testWriter(t, g, c) })
	t.Run("slow writer", func(t *testing.T) { testSlowWriter(t, c) })
	t.Run("background", func(t *testing.T) { testBackground(t, g, c) })
	t.Run("many at once", func(t *testing.T) { testMany(t, g, c) })
	t.Run("dial", func(t *testing.T) { testDialGuest(t, g, c) })
	t.Run("guest dies", func(t *testing.T) { testGuestDies(t, g, c) })
}

func testBasics(t *testing.T, c *Client, noise string) {
	var all strings.Builder
	for b := 1; b < 256; b++ {
		all.WriteByte(byte(b))
	}
	for _, test := range []struct {
		stdin          string
		args           []string
		stdout, stderr string
		code           int32
	}{
		{"", []string{"sh", "-c", "echo out; echo err >&2; exit 3"}, "out\n", "err\n", 3},
		{"", []string{"true"}, "", "", 0},
		{"", []string{"printf", `%s|`, "a b", "", "'", "\n", "ü", "!x", `\`, "$HOME"}, "a b||'|\n|ü|!x|\\|$HOME|", "", 0},
		{"", []string{"printf", "%s", all.String()}, all.String(), "", 0},
		{"\x00in\xff", []string{"cat"}, "\x00in\xff", "", 0},
		{"x", []string{"sh", "-c", "cat >/dev/null; echo end"}, "end\n", "", 0},
		{"", []string{"sh", "-c", "kill -TERM $$"}, "", "", 143},
		{"", []string{"sh", "-c", "kill -KILL $$"}, "", "", 137},
	} {
		stdout, stderr, code := execute(t, c, test.stdin, test.args...)
		if stdout != test.stdout || stderr != noise+test.stderr || code != test.code {
			t.Errorf("%q: stdout %q, stderr %q, code %d", test.args, stdout, stderr, code)
		}
	}
	for path, want := range map[string]int32{"no-such-program": 127, "/etc/passwd": 126} {
		if _, stderr, code := execute(t, c, "", path); code != want || !strings.Contains(stderr, path) {
			t.Errorf("%s: code %d, stderr %q", path, code, stderr)
		}
	}
}

func testEnvironment(t *testing.T, c *Client) {
	var out bytes.Buffer
	_, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"env"}, Env: []string{"A=b 'c\nd", "x.y=1"}, Stdout: &out})
	if err != nil || !strings.Contains(out.String(), "A=b 'c\nd\nx.y=1\n") || !strings.Contains(out.String(), "PATH=") {
		t.Errorf("environment %q, %v", out.String(), err)
	}
	begin := time.Now()
	execute(t, c, "", "true")
	t.Logf("one command takes %s", time.Since(begin).Round(time.Millisecond))
}

func testInvalid(t *testing.T, g *testGuest, c *Client) {
	for _, args := range [][]string{nil, {"a\x00"}, {"echo", strings.Repeat("x", 130<<10)}} {
		if _, err := c.Exec(deadline(t, time.Minute), Command{Args: args}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: %v", args, err)
		}
	}
	if stdout, _, _ := execute(t, c, "", "printf", "%s", strings.Repeat("x", 120<<10)); len(stdout) != 120<<10 {
		t.Errorf("of a long argument %d bytes came", len(stdout))
	}
	if _, err := g.dial(t, "nologin").Exec(deadline(t, time.Minute), Command{Args: []string{"true"}}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "not available") {
		t.Errorf("a user whose shell runs nothing: %v", err)
	}
	closed := g.dial(t, "closed")
	if _, err := closed.Exec(deadline(t, time.Minute), Command{Args: []string{"true"}, TTY: true}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a terminal that is not permitted: %v", err)
	}
	if _, err := closed.DialGuest(deadline(t, time.Minute), "tcp", "localhost:22"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("forwarding that is not permitted: %v", err)
	}
}

func testTerminal(t *testing.T, c *Client) {
	in, typed := io.Pipe()
	seen := newWatch()
	resize := make(chan Size)
	result := make(chan error, 1)
	go func() {
		code, err := c.Exec(deadline(t, time.Minute), Command{
			Args: []string{"sh", "-c", `test -t 0 && test -t 2 && echo $TERM; stty size; read x; echo "got $x"; stty size; kill -INT $$; read y; exit 9`},
			Env:  []string{"TERM=vt100"}, TTY: true, Size: Size{132, 43}, Resize: resize, Stdin: in, Stdout: seen,
		})
		if err == nil && code != 130 {
			err = fmt.Errorf("exit status %d", code)
		}
		result <- err
	}()
	seen.wait(t, "vt100\r\n43 132\r\n")
	resize <- Size{100, 20}
	if _, err := typed.Write([]byte("hello\r")); err != nil {
		t.Fatal(err)
	}
	seen.wait(t, "got hello\r\n20 100\r\n")
	if err := <-result; err != nil {
		t.Error(err)
	}
	_ = typed.Close()
	// Control keys reach the program.
	in, typed = io.Pipe()
	seen = newWatch()
	go func() {
		_, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"sh", "-c", "trap 'echo int; exit 1' INT; echo ready; while :; do sleep 0.1; done"}, TTY: true, Stdin: in, Stdout: seen})
		result <- err
	}()
	seen.wait(t, "ready")
	if _, err := typed.Write([]byte{3}); err != nil {
		t.Fatal(err)
	}
	seen.wait(t, "int")
	if err := <-result; err != nil {
		t.Error(err)
	}
	_ = typed.Close()
}

// watch is a Writer whose content can be waited for.
type watch struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func newWatch() *watch { return &watch{} }

func (w *watch) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Write(p)
}

func (w *watch) wait(t *testing.T, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%q", text), func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return strings.Contains(w.buf.String(), text)
	})
}

func testLarge(t *testing.T, c *Client) {
	const size = 100 << 20
	sent, got := sha256.New(), sha256.New()
	var n int64
	begin := time.Now()
	code, err := c.Exec(deadline(t, 3*time.Minute), Command{
		Args: []string{"cat"}, Stdin: io.TeeReader(io.LimitReader(rand.New(rand.NewSource(1)), size), sent),
		Stdout: writerFunc(func(p []byte) (int, error) {
			n += int64(len(p))
			return got.Write(p)
		}),
	})
	if err != nil || code != 0 || n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Errorf("code %d, %d bytes, %v", code, n, err)
	}
	t.Logf("100 MiB in and out in %s", time.Since(begin).Round(time.Millisecond))
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A command that ends without reading its input is not held up by it.
func testStdinNotRead(t *testing.T, c *Client) {
	in, typed := io.Pipe()
	defer typed.Close()
	code, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"false"}, Stdin: in})
	if err != nil || code != 1 {
		t.Errorf("code %d, %v", code, err)
	}
	code, err = c.Exec(deadline(t, time.Minute), Command{Args: []string{"sh", "-c", "exec <&-; exit 5"}, Stdin: io.LimitReader(rand.New(rand.NewSource(1)), 50<<20)})
	if err != nil || code != 5 {
		t.Errorf("code %d, %v", code, err)
	}
}

func testCancel(t *testing.T, g *testGuest, c *Client) {
	probe := errors.New("probe timed out")
	for _, tty := range []bool{false, true} {
		ctx, cancel := context.WithTimeoutCause(deadline(t, time.Minute), 2*time.Second, probe)
		begin := time.Now()
		_, err := c.Exec(ctx, Command{TTY: tty, Args: []string{"sh", "-c", "trap '' TERM HUP; sleep 7771 & (sleep 7772; sleep 7773) & sleep 7774"}})
		cancel()
		if !errors.Is(err, probe) || time.Since(begin) > 10*time.Second {
			t.Errorf("error %v after %s", err, time.Since(begin))
		}
		if left := g.processes(t, "sleep\x00777"); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	}
}

func testCancelRace(t *testing.T, g *testGuest, c *Client) {
	for i := range 15 {
		ctx, cancel := context.WithTimeout(deadline(t, time.Minute), time.Duration(i)*4*time.Millisecond)
		_, err := c.Exec(ctx, Command{Args: []string{"sleep", "8881"}})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		eventually(t, "the end of the command", func() bool { return len(g.processes(t, "8881")) == 0 })
	}
}

func testWriter(t *testing.T, g *testGuest, c *Client) {
	gone := errors.New("the client is gone")
	_, err := c.Exec(deadline(t, time.Minute), Command{
		Args: []string{"sh", "-c", "echo x; sleep 9991"}, Stdout: writerFunc(func([]byte) (int, error) { return 0, gone }),
	})
	if !errors.Is(err, gone) {
		t.Errorf("error %v", err)
	}
	if left := g.processes(t, "9991"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// All output comes, however slowly it is taken.
func testSlowWriter(t *testing.T, c *Client) {
	const size = 1 << 20
	n := 0
	begin := time.Now()
	_, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"head", "-c", fmt.Sprint(size), "/dev/zero"}, Stdout: writerFunc(func(p []byte) (int, error) {
		if n < 2*32<<10 {
			time.Sleep(4 * time.Second) // longer than a silence may be
		}
		n += len(p)
		return len(p), nil
	})})
	if err != nil || n != size {
		t.Errorf("%d bytes in %s, %v", n, time.Since(begin), err)
	}
}

func testBackground(t *testing.T, g *testGuest, c *Client) {
	begin := time.Now()
	stdout, _, code := execute(t, c, "", "sh", "-c", "sleep 5551 & echo started")
	if stdout != "started\n" || code != 0 || time.Since(begin) > 15*time.Second {
		t.Errorf("stdout %q, code %d after %s", stdout, code, time.Since(begin))
	}
	if left := g.processes(t, "sleep\x005551"); len(left) != 1 {
		t.Errorf("the background process: %q", left)
	}
}

// sshd allows ten sessions in one connection.
func testMany(t *testing.T, g *testGuest, c *Client) {
	ctx, cancel := context.WithCancel(deadline(t, 2*time.Minute))
	defer cancel()
	var all sync.WaitGroup
	for range 13 {
		all.Go(func() {
			if _, err := c.Exec(ctx, Command{Args: []string{"sleep", "3331"}}); !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
		})
	}
	eventually(t, "all commands run", func() bool { return len(g.processes(t, "sleep\x003331")) == 13 })
	if stdout, _, _ := execute(t, c, "", "echo", "one more"); stdout != "one more\n" {
		t.Errorf("stdout %q", stdout)
	}
	cancel()
	all.Wait()
	if left := g.processes(t, "sleep\x003331"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func testGuestDies(t *testing.T, g *testGuest, c *Client) {
	seen := newWatch()
	result := make(chan error, 1)
	go func() {
		_, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"sh", "-c", "echo x; sleep 600"}, Stdout: seen})
		result <- err
	}()
	seen.wait(t, "x")
	g.halt()
	if err := <-result; !errdefs.IsUnavailable(err) {
		t.Errorf("error %v", err)
	}
	<-c.Done()
	if _, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"true"}}); !errdefs.IsUnavailable(err) {
		t.Errorf("after that: %v", err)
	}
}
