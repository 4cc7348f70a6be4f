package qga

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/test/tools"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testGuest is a real agent in namespaces of its own, behind a terminal as its serial port and a socket as QEMU's.
// The port outlives the agent, as it outlives a reboot.
type testGuest struct {
	program, dir, socket string
	port, far            *os.File // our end of the terminal, and the agent's
	cmd                  *exec.Cmd
}

// newGuest starts an agent after the given lines of shell script, which run in its namespaces.
func newGuest(t *testing.T, setup string, flags ...string) *testGuest {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root and Debian's qemu-guest-agent: run by make test")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root for mount and PID namespaces")
	}
	root, err := tools.Debs("qemu-guest-agent")
	if err != nil {
		t.Skipf("needs Debian's qemu-guest-agent: %v", err)
	}
	g := &testGuest{program: filepath.Join(root, "usr/sbin/qemu-ga")}
	if out, err := exec.Command(g.program, "--version").CombinedOutput(); err != nil {
		t.Skipf("needs the libraries of qemu-guest-agent: %v, %s", err, out)
	}
	// Not below /tmp, which the guest has for itself.
	if g.dir, err = os.MkdirTemp("/var/tmp", "vmruntime-qga-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(g.dir) })
	g.openPort(t)
	g.boot(t, setup, flags...)
	return g
}

func (g *testGuest) openPort(t *testing.T) {
	t.Helper()
	port, far, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer port.Close()
	g.far = far
	// A file of our own, which is pollable.
	fd, err := unix.FcntlInt(port.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	g.port = os.NewFile(uintptr(fd), "port")
	termios, err := unix.IoctlGetTermios(int(g.far.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	termios.Iflag, termios.Oflag, termios.Lflag = 0, 0, 0
	if err := unix.IoctlSetTermios(int(g.far.Fd()), unix.TCSETS, termios); err != nil {
		t.Fatal(err)
	}
	g.socket = filepath.Join(g.dir, "qga.sock")
	l, err := net.Listen("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	var relay sync.WaitGroup
	relay.Go(func() { g.relay(l) })
	t.Cleanup(func() {
		_ = l.Close()
		_ = g.port.Close()
		_ = g.far.Close()
		relay.Wait()
	})
}

// relay serves one connection at a time, as QEMU does.
func (g *testGuest) relay(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		var up sync.WaitGroup
		up.Go(func() {
			_, _ = io.Copy(c, g.port)
			_ = c.Close()
		})
		_, _ = io.Copy(g.port, c)
		_ = g.port.SetReadDeadline(time.Now())
		up.Wait()
		_ = g.port.SetReadDeadline(time.Time{})
		_ = c.Close()
	}
}

// boot starts the agent. What harms the host is blocked.
func (g *testGuest) boot(t *testing.T, setup string, flags ...string) {
	t.Helper()
	state := filepath.Join(g.dir, "state")
	if err := os.MkdirAll(state, 0o700); err != nil {
		t.Fatal(err)
	}
	blocked := "guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-fstrim,guest-set-time,guest-suspend-disk,guest-suspend-ram," +
		"guest-suspend-hybrid,guest-set-vcpus,guest-set-memory-blocks,guest-set-user-password"
	for _, f := range flags {
		blocked += "," + f
	}
	script := fmt.Sprintf("mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /root; hostname guest; cd /; %s\n%s -m isa-serial -p %s -t %s -f %s/pid -b %s & wait",
		setup, g.program, g.far.Name(), state, g.dir, blocked)
	g.cmd = exec.Command("unshare", "-m", "-p", "-u", "-f", "--mount-proc", "--kill-child", "/bin/bash", "-c", script)
	g.cmd.Stderr = os.Stderr
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.halt)
	eventually(t, "the guest runs", func() bool {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", g.cmd.Process.Pid))
		return err == nil && len(bytes.Fields(children)) > 0
	})
}

// halt ends everything in the guest.
func (g *testGuest) halt() {
	if g.cmd != nil {
		_ = g.cmd.Process.Kill()
		_ = g.cmd.Wait()
		g.cmd = nil
	}
}

// inside is the path of a file as the guest has it.
func (g *testGuest) inside(t *testing.T, path string) string {
	t.Helper()
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", g.cmd.Process.Pid, g.cmd.Process.Pid))
	if err != nil || len(bytes.Fields(children)) == 0 {
		t.Fatalf("the guest does not run: %v", err)
	}
	return filepath.Join("/proc", string(bytes.Fields(children)[0]), "root", path)
}

// processes are the command lines of the guest's living processes that contain text.
func (g *testGuest) processes(t *testing.T, text string) []string {
	t.Helper()
	files, err := filepath.Glob(g.inside(t, "/proc/[0-9]*/cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range files {
		if line, err := os.ReadFile(f); err == nil && bytes.Contains(line, []byte(text)) {
			found = append(found, strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return found
}

// clean fails when Exec has left something in the guest.
func (g *testGuest) clean(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob(g.inside(t, "/tmp/vmruntime-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("files are left: %v %v", left, err)
	}
	if left := g.processes(t, "vmruntime-exec-"); len(left) > 0 {
		t.Errorf("processes are left: %q", left)
	}
}

func (g *testGuest) dial(t *testing.T) *Client {
	t.Helper()
	c, err := Dial(deadline(t, time.Minute), g.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}

// signal stops or continues the agent.
func (g *testGuest) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	shell := filepath.Base(filepath.Dir(filepath.Dir(g.inside(t, "/x"))))
	list, err := os.ReadFile(fmt.Sprintf("/proc/%s/task/%s/children", shell, shell))
	if err != nil {
		t.Fatal(err)
	}
	for f := range bytes.FieldsSeq(list) {
		var pid int
		if _, err := fmt.Sscan(string(f), &pid); err != nil {
			t.Fatal(err)
		}
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if exe != g.program {
			continue
		}
		if err := unix.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("the agent does not run")
}
