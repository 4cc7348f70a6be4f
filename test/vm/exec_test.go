package vm_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

func TestExecSync(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(idle("c"))
	resp, err := c.execSync(30, "sh", "-c", "echo out; echo err >&2; exit 7")
	if err != nil || string(resp.GetStdout()) != "out\n" || string(resp.GetStderr()) != "err\n" || resp.GetExitCode() != 7 {
		t.Errorf("ExecSync: %v, %v, want out, err and 7", resp, err)
	}
	if _, err := c.execSync(30, "/no/such/program"); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("ExecSync of a missing program: %v, want an error that names it", err)
	}
	if out := c.sh("head -c 3000000 /dev/zero | tr '\\0' x"); len(out) != 3000000 || strings.Trim(out, "x") != "" {
		t.Errorf("3000000 bytes of output are %d", len(out))
	}

	// What a command leaves in the background stays.
	c.sh("sleep 6666 >/dev/null 2>&1 &")
	if !strings.Contains(c.sh("ps -o args"), "sleep 6666") {
		t.Error("a process in the background ended with its exec")
	}

	// A command that does not end in time is killed with all that it started.
	began := time.Now()
	_, err = c.execSync(2, "sh", "-c", "sleep 7777 & sleep 8888")
	refused(t, err, codes.DeadlineExceeded, "timeout of 2 s")
	if took := time.Since(began); took < 2*time.Second || took > time.Minute {
		t.Errorf("the timeout of 2 s took %s", took)
	}
	c.until("the guest has ended what was timed out", func() bool {
		return !strings.Contains(c.sh("ps -o args"), "sleep 7777") && !strings.Contains(c.sh("ps -o args"), "sleep 8888")
	})

	// A client that goes away leaves nothing either.
	gone, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err = b.rt.ExecSync(gone, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"sleep", "9999"}})
	refused(t, err, codes.DeadlineExceeded)
	c.until("the guest has ended what was given up", func() bool { return !strings.Contains(c.sh("ps -o args"), "sleep 9999") })
	if !c.running() {
		t.Error("the container did not outlive its execs")
	}
}

// crictl is a command of crictl that speaks to the node; exec, attach and port-forward are its own clients.
func (p *pod) crictl(args ...string) *exec.Cmd {
	return p.Command(p.ctx, p.Tool("cri-tools", "crictl"), append(p.CrictlFlags(), args...)...)
}

func TestExecStreams(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(idle("c"))
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	cmd := p.crictl("exec", "-i", c.id, "sh", "-c", "sha256sum; echo problem >&2")
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(data), &stdout, &stderr
	err := cmd.Run()
	sum := sha256.Sum256(data)
	if err != nil || stdout.String() != hex.EncodeToString(sum[:])+"  -\n" || stderr.String() != "problem\n" {
		t.Errorf("1 MiB of standard input: %v, stdout %q, stderr %q", err, &stdout, &stderr)
	}
	out, err := p.crictl("exec", c.id, "cat", "/bin/busybox").Output()
	if want := c.sh("sha256sum /bin/busybox"); err != nil || fmt.Sprintf("%x  /bin/busybox\n", sha256.Sum256(out)) != want {
		t.Errorf("%d bytes of standard output: %v, they differ", len(out), err)
	}
	if out, err := p.crictl("exec", c.id, "sh", "-c", "exit 9").CombinedOutput(); err == nil || !strings.Contains(string(out), "exit code 9") {
		t.Errorf("exit code 9: %v, %q", err, out)
	}
}

// A terminal has the client's size, follows it, and ends with the shell.
func TestExecTerminal(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(idle("c"))
	cmd := p.crictl("exec", "-i", "-t", c.id, "sh")
	master, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 101})
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	screen := newScreen(master)
	defer screen.close()
	say := func(line, want string) {
		t.Helper()
		if _, err := io.WriteString(master, line+"\n"); err != nil {
			t.Fatal(err)
		}
		until(ctx, t, fmt.Sprintf("the terminal shows %q after %q", want, line), func() bool { return strings.Contains(screen.text(), want) })
	}
	say("echo size $(stty size)", "size 33 101")
	say("test -t 0 && test -t 1 && echo all $((6*7)) terminals", "all 42 terminals")
	if err := pty.Setsize(master, &pty.Winsize{Rows: 44, Cols: 77}); err != nil {
		t.Fatal(err)
	}
	until(ctx, t, "the terminal has the new size", func() bool {
		if _, err := io.WriteString(master, "echo now $(stty size)\n"); err != nil {
			t.Fatal(err)
		}
		return strings.Contains(screen.text(), "now 44 77")
	})
	if _, err := io.WriteString(master, "exit\n"); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("crictl exec -it: %v\n%s", err, screen.text())
	}
}

// screen collects what a terminal shows.
type screen struct {
	file *os.File
	out  chan []byte
	seen []byte
}

func newScreen(f *os.File) *screen {
	s := &screen{file: f, out: make(chan []byte)}
	go func() {
		defer close(s.out)
		for {
			buf := make([]byte, 4096)
			n, err := f.Read(buf)
			if err != nil {
				return // EIO: the other end is closed
			}
			s.out <- buf[:n]
		}
	}()
	return s
}

func (s *screen) text() string {
	for {
		select {
		case b, ok := <-s.out:
			if !ok {
				return string(s.seen)
			}
			s.seen = append(s.seen, b...)
		default:
			return string(s.seen)
		}
	}
}

func (s *screen) close() {
	_ = s.file.Close()
	for range s.out {
	}
}

// Attach joins the container's own streams; with stdin once, their end is the container's.
func TestAttach(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(with(shell("c", "echo ready; while read line; do echo \"heard $line\"; echo \"warned $line\" >&2; done; echo end"), func(c *runtimeapi.ContainerConfig) {
		c.Stdin, c.StdinOnce = true, true
	})).ready("ready")
	cmd := p.crictl("attach", "-i", c.id)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "one\ntwo\n"); err != nil {
		t.Fatal(err)
	}
	c.ready("heard two")
	if err := stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || stdout.String() != "heard one\nheard two\nend\n" || stderr.String() != "warned one\nwarned two\n" {
		t.Errorf("crictl attach: %v, stdout %q, stderr %q", err, &stdout, &stderr)
	}
	if s := c.wait(); s.GetExitCode() != 0 {
		t.Errorf("exit code %d when standard input has ended, want 0", s.GetExitCode())
	}
	if got := c.text(); got != "ready\nheard one\nheard two\nend\n" {
		t.Errorf("the log has %q beside the attached client", got)
	}
}

// Without stdin once the container's standard input outlives its client: another goes on with it.
func TestAttachTwice(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(with(shell("c", "echo ready; while read line; do echo \"heard $line\"; done; echo end"), func(c *runtimeapi.ContainerConfig) {
		c.Stdin = true
	})).ready("ready")
	for _, line := range []string{"one", "two"} {
		cmd := p.crictl("attach", "-i", c.id)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(stdin, line+"\n"); err != nil {
			t.Fatal(err)
		}
		c.ready("heard " + line)
		_ = cmd.Process.Kill() // by its ID: the client goes away
		_ = cmd.Wait()
		if !c.running() {
			t.Fatal("the container ended with its client")
		}
	}
	if got := c.text(); got != "ready\nheard one\nheard two\n" {
		t.Errorf("the log has %q", got)
	}
	silent := p.crictl("attach", "-i", c.id)
	silent.Stdin = strings.NewReader("")
	if out, err := silent.CombinedOutput(); err != nil || !c.running() {
		t.Errorf("attached with input that has ended: %v, %s; want an end, and the container to go on", err, out)
	}
}

// A client that does not take what a container writes loses the rest, and is told; the container's log has all, and the
// container's input ends with the client's (stdin_once).
func TestAttachLags(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(with(shell("c", "echo ready; read line; yes $(printf 'x%.0s' $(seq 1000)) | head -c 12582912; echo written; cat; echo end"), func(c *runtimeapi.ContainerConfig) {
		c.Stdin, c.StdinOnce = true, true
	})).ready("ready")
	cmd := p.crictl("attach", "-i", c.id)
	keys, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(keys, "go\n"); err != nil {
		t.Fatal(err)
	}
	c.ready("xxx")
	signal := func(s syscall.Signal) {
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	signal(syscall.SIGSTOP)
	c.ready("written")
	signal(syscall.SIGCONT)
	if err := cmd.Wait(); err == nil || !strings.Contains(said.String(), "writes faster than the attached client takes") {
		t.Errorf("the attached client: %v, %s; want to be told that it was too slow", err, &said)
	}
	if s := c.wait(); s.GetExitCode() != 0 {
		t.Errorf("exit code %d when standard input has ended, want 0", s.GetExitCode())
	}
}

// Port-forward reaches what listens on the guest's loopback address alone.
func TestPortForward(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	server := p.start(with(of("server", images.Server), func(c *runtimeapi.ContainerConfig) { c.Args = []string{"127.0.0.1:8080"} }))
	p.until("the server listens", func() bool {
		data, _ := os.ReadFile(server.logFile())
		return strings.Contains(string(data), "listening")
	})
	if out, err := b.fetch(ctx, "http://"+hostPort(p.ip(), 8080)+"/"); err == nil {
		t.Errorf("the pod's address answers %q on a port of its loopback address", out)
	}
	p.forward("18080:8080")
	want := "hello from " + p.cfg.GetHostname() + "\n"
	p.until("the forwarded port answers", func() bool {
		out, err := b.fetch(ctx, "http://127.0.0.1:18080/")
		return err == nil && out == want
	})
	body := strings.Repeat("forwarded ", 50000)
	if got, err := b.post(ctx, "http://127.0.0.1:18080/echo", body); err != nil || got != body {
		t.Errorf("%d bytes to /echo come back as %d, %v", len(body), len(got), err)
	}
}

// forward has crictl forward a port of the node's loopback address until the test ends.
func (p *pod) forward(ports string) {
	p.t.Helper()
	cmd := p.crictl("port-forward", p.id, ports)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		_ = cmd.Process.Kill() // by its ID: it serves until then
		_ = cmd.Wait()
		if p.t.Failed() {
			p.t.Logf("crictl port-forward says:\n%s", &said)
		}
	})
}

// Clients that speak WebSockets get the same as those that speak SPDY: all of the input to its end, both outputs, the exit code, a
// terminal's size; a client that goes away leaves nothing.
func TestWebSockets(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(idle("c"))
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	cmd := p.crictl("exec", "--transport", "websocket", "-i", c.id, "sh", "-c", "tee /tmp/in | sha256sum; echo problem >&2; exit 7")
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(data), &stdout, &stderr
	err := cmd.Run()
	sum := sha256.Sum256(data)
	if err == nil || stdout.String() != hex.EncodeToString(sum[:])+"  -\n" || !strings.HasPrefix(stderr.String(), "problem\n") || !strings.Contains(stderr.String(), "exit code 7") {
		t.Errorf("1 MiB of standard input: %v, stdout %q, stderr %q", err, &stdout, &stderr)
	}
	if out, err := p.crictl("exec", "--transport", "websocket", c.id, "cat", "/tmp/in").Output(); err != nil || !bytes.Equal(out, data) {
		t.Errorf("1 MiB of standard output comes back as %d bytes, %v", len(out), err)
	}

	reader := p.start(with(shell("reader", "read line; echo got $line"), func(c *runtimeapi.ContainerConfig) {
		c.Stdin, c.StdinOnce = true, true // otherwise the end of the client's input is the end of attach, before the answer perhaps
	}))
	attach := p.crictl("attach", "--transport", "websocket", "-i", reader.id)
	attach.Stdin = strings.NewReader("a line\n")
	if out, err := attach.Output(); err != nil || string(out) != "got a line\n" {
		t.Errorf("attached, the container says %q, %v, want what it read", out, err)
	}

	terminal := p.crictl("exec", "--transport", "websocket", "-i", "-t", c.id, "sh", "-c", "until [ \"$(stty size)\" = '33 101' ]; do sleep 0.1; done; stty size; sleep 1234")
	master, err := pty.StartWithSize(terminal, &pty.Winsize{Rows: 33, Cols: 101})
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	screen := newScreen(master)
	defer screen.close()
	until(ctx, t, "the terminal has the client's size", func() bool { return strings.Contains(screen.text(), "33 101") })
	c.until("the command runs", func() bool { return c.sh("pgrep -f '^sleep 1234' || true") != "" })
	if err := terminal.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = terminal.Wait()
	c.until("the command of a client that is gone has ended", func() bool { return c.sh("pgrep -f '^sleep 1234' || true") == "" })
}
