package qga

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestCommands(t *testing.T) {
	t.Parallel()
	// A shutdown program that only notes its arguments.
	g := newGuest(t, `mkdir /tmp/sbin; printf '#!/bin/sh\necho "$@" >/tmp/shutdown\n' >/tmp/sbin/shutdown; chmod +x /tmp/sbin/shutdown; mount --bind /tmp/sbin /usr/sbin`)
	c := g.dial(t)
	ctx := deadline(t, time.Minute)
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	info, err := c.Info(ctx)
	if err != nil || info.Version == "" || !info.Can("guest-exec", "guest-ping") || info.Can("guest-set-time") || info.Can("guest-nothing") {
		t.Errorf("info %+v, %v", info, err)
	}
	osInfo, err := c.OSInfo(ctx)
	if err != nil || osInfo.ID == "" || osInfo.KernelRelease == "" {
		t.Errorf("operating system %+v, %v", osInfo, err)
	}
	if name, err := c.HostName(ctx); err != nil || name != "guest" {
		t.Errorf("host name %q, %v", name, err)
	}
	interfaces, err := c.Interfaces(ctx)
	if err != nil || !slices.ContainsFunc(interfaces, func(i Interface) bool {
		return i.Name == "lo" && len(i.Addresses) > 0 && i.Addresses[0].IP == "127.0.0.1" && i.Addresses[0].Prefix == 8
	}) {
		t.Errorf("interfaces %+v, %v", interfaces, err)
	}
	if _, err := c.Users(ctx); err != nil {
		t.Errorf("users: %v", err)
	}
	if _, err := c.FileSystems(ctx); err != nil {
		t.Errorf("file systems: %v", err)
	}
	if frozen, err := c.Frozen(ctx); err != nil || frozen {
		t.Errorf("frozen %v, %v", frozen, err)
	}
	if err := c.AddAuthorizedKeys(ctx, "root", []string{"ssh-ed25519 AAAA test"}); err != nil {
		t.Errorf("add keys: %v", err)
	}
	if keys, err := os.ReadFile(g.inside(t, "/root/.ssh/authorized_keys")); err != nil || !strings.Contains(string(keys), "ssh-ed25519 AAAA test") {
		t.Errorf("authorized keys %q, %v", keys, err)
	}
	var refused *Error
	if _, err := c.Freeze(ctx); !errdefs.IsNotImplemented(err) || !errors.As(err, &refused) || refused.Command != "guest-fsfreeze-freeze" {
		t.Errorf("a blocked command: %v", err)
	}
	if err := c.AddAuthorizedKeys(ctx, "nobody-of-that-name", nil); !errors.As(err, &refused) || errdefs.IsNotImplemented(err) {
		t.Errorf("a failing command: %v", err)
	}
	for mode, want := range map[Mode]string{PowerDown: "-P", Reboot: "-r", Halt: "-H"} {
		if err := c.Shutdown(ctx, mode); err != nil {
			t.Errorf("shutdown %s: %v", mode, err)
		}
		if got, err := os.ReadFile(g.inside(t, "/tmp/shutdown")); err != nil || !strings.Contains(string(got), want) {
			t.Errorf("shutdown %s gave %q, %v", mode, got, err)
		}
	}
	if err := c.Shutdown(ctx, "dance"); !errors.As(err, &refused) {
		t.Errorf("shutdown of no known kind: %v", err)
	}
	if err := c.Ping(ctx); err != nil {
		t.Errorf("after shutdown's errors: %v", err)
	}
}

func execute(t *testing.T, c *Client, args ...string) (stdout, stderr string, code int32) {
	t.Helper()
	var out, errOut bytes.Buffer
	code, err := c.Exec(deadline(t, time.Minute), Command{Args: args, Stdout: &out, Stderr: &errOut})
	if err != nil {
		t.Fatalf("exec %q: %v", args, err)
	}
	return out.String(), errOut.String(), code
}

// testExecBasics is what every way of Exec gives; streaming tells whether signals and exit codes come from a shell.
func testExecBasics(t *testing.T, c *Client) {
	for _, test := range []struct {
		args           []string
		stdout, stderr string
		code           int32
	}{
		{[]string{"sh2", "-c", "echo out; echo err >&2; exit 3"}, "out\n", "err\n", 3},
		{[]string{"true"}, "", "", 0},
		{[]string{"printf", `%s|`, "a b", "", "'", "\n", "ü"}, "a b||'|\n|ü|", "", 0},
		{[]string{"sh2", "-c", `printf '\000\377\001'`}, "\x00\xff\x01", "", 0},
		{[]string{"sh2", "-c", "kill -TERM $$"}, "", "", 143},
		{[]string{"sh2", "-c", "kill -KILL $$"}, "", "", 137},
		{[]string{"sh2", "-c", "cat; echo end"}, "end\n", "", 0},
		{[]string{"pwd"}, "/\n", "", 0},
		{[]string{"sh2", "-c", "umask"}, "0022\n", "", 0},
	} {
		for i, a := range test.args {
			if a == "sh2" {
				test.args[i] = "/tmp/sh" // the same program also where /bin/sh is missing
			}
		}
		stdout, stderr, code := execute(t, c, test.args...)
		if stdout != test.stdout || stderr != test.stderr || code != test.code {
			t.Errorf("%q: stdout %q, stderr %q, code %d", test.args, stdout, stderr, code)
		}
	}
	for path, want := range map[string]int32{"no-such-program": 127, "/etc/passwd": 126} {
		if _, stderr, code := execute(t, c, path); code != want || !strings.Contains(stderr, path) {
			t.Errorf("%s: code %d, stderr %q", path, code, stderr)
		}
	}
}

const setupShell = "cp /bin/dash /tmp/sh; umask 022; "

func TestExec(t *testing.T) {
	t.Parallel()
	g := newGuest(t, setupShell)
	c := g.dial(t)
	t.Run("basics", func(t *testing.T) { testExecBasics(t, c) })
	g.clean(t)
	t.Run("any bytes", func(t *testing.T) {
		var all strings.Builder
		for b := 1; b < 256; b++ {
			all.WriteByte(byte(b))
		}
		if stdout, _, _ := execute(t, c, "printf", "%s", all.String()); stdout != all.String() {
			t.Errorf("got %q", stdout)
		}
	})
	t.Run("environment", func(t *testing.T) {
		var out bytes.Buffer
		_, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"env"}, Env: []string{"A=b c", "x.y=1"}, Stdout: &out})
		if err != nil || !strings.Contains(out.String(), "A=b c\nx.y=1\n") || !strings.Contains(out.String(), "PATH=") {
			t.Errorf("environment %q, %v", out.String(), err)
		}
	})
	t.Run("invalid", func(t *testing.T) {
		if _, err := c.Exec(deadline(t, time.Minute), Command{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("no program: %v", err)
		}
	})
	t.Run("streams", func(t *testing.T) { testExecStreams(t, g, c) })
	t.Run("large output", func(t *testing.T) { testExecLarge(t, g, c) })
	t.Run("blocked reader", func(t *testing.T) { testExecBlocked(t, g, c) })
	t.Run("cancel", func(t *testing.T) { testExecCancel(t, g, c) })
	t.Run("cancel at any time", func(t *testing.T) { testExecCancelRace(t, g, c) })
	t.Run("failing writer", func(t *testing.T) { testExecWriter(t, g, c) })
	t.Run("background", func(t *testing.T) { testExecBackground(t, g, c) })
	t.Run("many at once", func(t *testing.T) { testExecMany(t, c) })
	g.clean(t)
}

// writerFunc is a Writer.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Output comes before the command has ended.
func testExecStreams(t *testing.T, g *testGuest, c *Client) {
	var got bytes.Buffer
	goOn := g.inside(t, "/tmp/go")
	w := writerFunc(func(p []byte) (int, error) {
		if strings.Contains(string(p), "one") {
			if err := os.WriteFile(goOn, nil, 0o600); err != nil {
				return 0, err
			}
		}
		return got.Write(p)
	})
	script := "echo one >&2; until [ -e /tmp/go ]; do sleep 0.05; done; echo two >&2; exit 4"
	code, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"sh", "-c", script}, Stderr: w})
	if err != nil || code != 4 || got.String() != "one\ntwo\n" {
		t.Errorf("code %d, output %q, %v", code, got.String(), err)
	}
}

// Many files follow one another, and nothing is lost or doubled.
func testExecLarge(t *testing.T, g *testGuest, c *Client) {
	const lines = 1_000_000
	var n int
	pipe, w := io.Pipe()
	scan := bufio.NewScanner(pipe)
	var reader sync.WaitGroup
	reader.Go(func() {
		for scan.Scan() {
			if scan.Text() != strconv.Itoa(n+1) {
				_ = pipe.CloseWithError(fmt.Errorf("%q follows %d", scan.Text(), n))
				return
			}
			n++
		}
	})
	begin := time.Now()
	execute(t, c, "true")
	t.Logf("one command takes %s", time.Since(begin).Round(time.Millisecond))
	begin = time.Now()
	var errOut bytes.Buffer
	code, err := c.Exec(deadline(t, 2*time.Minute), Command{
		Args: []string{"sh", "-c", fmt.Sprintf("seq 100000 >&2; seq %d", lines)}, Stdout: w, Stderr: &errOut,
	})
	_ = w.Close()
	reader.Wait()
	if err != nil || code != 0 || n != lines || strings.Count(errOut.String(), "\n") != 100000 {
		t.Errorf("code %d, %d lines, %v", code, n, err)
	}
	t.Logf("%d lines in %s", n, time.Since(begin).Round(time.Millisecond))
	g.clean(t)
}

// What nobody reads does not fill the guest's disk.
func testExecBlocked(t *testing.T, g *testGuest, c *Client) {
	blocked, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	ctx, cancel := context.WithCancel(deadline(t, time.Minute))
	var exec sync.WaitGroup
	exec.Go(func() {
		_, err := c.Exec(ctx, Command{Args: []string{"yes"}, Stdout: writerFunc(func(p []byte) (int, error) {
			once.Do(func() { close(blocked) })
			<-release
			return len(p), nil
		})})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("exec: %v", err)
		}
	})
	<-blocked
	used := func() (total int64) {
		files, _ := filepath.Glob(g.inside(t, "/tmp/vmruntime-exec-*/1.*"))
		for _, f := range files {
			if info, err := os.Stat(f); err == nil {
				total += info.Size()
			}
		}
		return total
	}
	eventually(t, "four files are full", func() bool { return used() >= 4<<20 })
	for range 20 {
		if n := used(); n > 10<<20 {
			t.Errorf("%d bytes of output wait in the guest", n)
		}
		time.Sleep(20 * time.Millisecond)
	}
	// Others are not held up by it.
	if stdout, _, _ := execute(t, c, "echo", "other"); stdout != "other\n" {
		t.Errorf("another command printed %q", stdout)
	}
	cancel()
	close(release)
	exec.Wait()
	g.clean(t)
	if left := g.processes(t, "yes"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func testExecCancel(t *testing.T, g *testGuest, c *Client) {
	probe := errors.New("probe timed out")
	ctx, cancel := context.WithTimeoutCause(deadline(t, time.Minute), 2*time.Second, probe)
	defer cancel()
	_, err := c.Exec(ctx, Command{Args: []string{"sh", "-c", "trap '' TERM HUP; sleep 7771 & (sleep 7772; sleep 7773) & sleep 7774"}})
	if !errors.Is(err, probe) {
		t.Errorf("error %v", err)
	}
	if left := g.processes(t, "sleep\x00777"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	g.clean(t)
}

// Whatever the command has come to, nothing of it is left.
func testExecCancelRace(t *testing.T, g *testGuest, c *Client) {
	for i := range 15 {
		ctx, cancel := context.WithTimeout(deadline(t, time.Minute), time.Duration(i)*3*time.Millisecond)
		_, err := c.Exec(ctx, Command{Args: []string{"sleep", "8881"}})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		if left := g.processes(t, "8881"); len(left) > 0 {
			t.Errorf("cancelled after %d ms, left: %q", i*3, left)
		}
	}
	g.clean(t)
}

func testExecWriter(t *testing.T, g *testGuest, c *Client) {
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
	g.clean(t)
}

// What a command leaves running goes on, and does not hold up its end.
func testExecBackground(t *testing.T, g *testGuest, c *Client) {
	begin := time.Now()
	stdout, _, code := execute(t, c, "sh", "-c", "sleep 5551 & echo started")
	if stdout != "started\n" || code != 0 || time.Since(begin) > 15*time.Second {
		t.Errorf("stdout %q, code %d after %s", stdout, code, time.Since(begin))
	}
	if left := g.processes(t, "sleep\x005551"); len(left) != 1 {
		t.Errorf("the background process: %q", left)
	}
	g.clean(t)
}

func testExecMany(t *testing.T, c *Client) {
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			want := fmt.Sprint(i, "\n")
			var out bytes.Buffer
			code, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"echo", fmt.Sprint(i)}, Stdout: &out})
			if err != nil || code != 0 || out.String() != want {
				t.Errorf("exec %d: %q, code %d, %v", i, out.String(), code, err)
			}
		})
	}
	all.Wait()
}

// Guests that lack something still run commands, or say what to do.
func TestExecWithout(t *testing.T) {
	t.Parallel()
	t.Run("exec", func(t *testing.T) {
		c := newGuest(t, "", "guest-exec").dial(t)
		if _, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"true"}}); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "SSH") {
			t.Errorf("error %v", err)
		}
	})
	for name, boot := range map[string]func(*testing.T) *testGuest{
		"file commands": func(t *testing.T) *testGuest { return newGuest(t, setupShell, "guest-file-open") },
		"writable tmp":  func(t *testing.T) *testGuest { return newGuest(t, setupShell+"mount -o remount,ro /tmp;") },
		"shell":         func(t *testing.T) *testGuest { return newGuest(t, setupShell+"mount --bind /dev/null /bin/sh;") },
		"mkfifo command": func(t *testing.T) *testGuest {
			return newGuest(t, setupShell+"mount --bind /dev/null /usr/bin/mkfifo;")
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := boot(t)
			c := g.dial(t)
			testExecBasics(t, c)
			ctx, cancel := context.WithTimeout(deadline(t, time.Minute), time.Second)
			defer cancel()
			if _, err := c.Exec(ctx, Command{Args: []string{"sleep", "6661"}}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v", err)
			}
			if left := g.processes(t, "6661"); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			if _, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"head", "-c", "20000000", "/dev/zero"}}); !errdefs.IsResourceExhausted(err) {
				t.Errorf("more output than the agent keeps: %v", err)
			}
			g.clean(t)
		})
	}
}

// An agent that stands still costs the caller its patience, and what it says later is not taken for something else.
func TestStandstill(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "")
	c := g.dial(t)
	if err := c.Ping(deadline(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	g.signal(t, syscall.SIGSTOP)
	for range 3 {
		if _, err := c.HostName(deadline(t, 300*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an agent that stands still: %v", err)
		}
	}
	g.signal(t, syscall.SIGCONT)
	if name, err := c.HostName(deadline(t, time.Minute)); err != nil || name != "guest" {
		t.Errorf("host name %q, %v", name, err)
	}
}

// The connection outlives the guest's boot, and what an earlier client has left behind.
func TestReboot(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "")
	c := g.dial(t)
	ctx := deadline(t, 2*time.Minute)
	var exec sync.WaitGroup
	started := make(chan struct{})
	exec.Go(func() {
		_, err := c.Exec(ctx, Command{Args: []string{"sh", "-c", "echo x; sleep 600"}, Stdout: writerFunc(func(p []byte) (int, error) {
			close(started)
			return len(p), nil
		})})
		if !errdefs.IsUnavailable(err) {
			t.Errorf("exec over a reboot: %v", err)
		}
	})
	<-started
	g.halt()
	g.boot(t, "")
	exec.Wait()
	if err := c.Ping(ctx); err != nil {
		t.Fatalf("after the reboot: %v", err)
	}
	// A client that dies in the middle of a command, and leaves answers unread.
	if _, err := c.conn.Write([]byte(`{"execute": "guest-info"}` + "\n" + `{"execute": "guest-info"}` + "\n" + `{"execute": "guest-file-op`)); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if err := c.Ping(ctx); !errdefs.IsUnavailable(err) {
		t.Errorf("a closed client: %v", err)
	}
	c = g.dial(t)
	if name, err := c.HostName(ctx); err != nil || name != "guest" {
		t.Errorf("after another client: %q, %v", name, err)
	}
}

// A command ends with the host's daemon, which cannot say so.
func TestHostGone(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "")
	c := g.dial(t)
	started := make(chan struct{})
	var exec sync.WaitGroup
	exec.Go(func() {
		_, err := c.Exec(deadline(t, time.Minute), Command{Args: []string{"sh", "-c", "echo x; sleep 4441"}, Stdout: writerFunc(func(p []byte) (int, error) {
			close(started)
			return len(p), nil
		})})
		if !errdefs.IsUnavailable(err) {
			t.Errorf("exec: %v", err)
		}
	})
	<-started
	begin := time.Now()
	_ = c.Close()
	exec.Wait()
	for len(g.processes(t, "4441")) > 0 {
		if time.Since(begin) > 3*time.Minute {
			t.Fatal("the command still runs")
		}
		time.Sleep(time.Second)
	}
	t.Logf("ended after %s", time.Since(begin).Round(time.Second))
	eventually(t, "nothing is left", func() bool {
		left, _ := filepath.Glob(g.inside(t, "/tmp/vmruntime-*"))
		return len(left) == 0 && len(g.processes(t, "vmruntime-exec-")) == 0
	})
}
