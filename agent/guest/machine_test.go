package guest_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/creack/pty"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// osMachine is the real agent as a daemon in PID, mount, network and UTS namespaces of its own, with a terminal as its
// port, which outlives it, and a socket as QEMU's.
type osMachine struct {
	dir, program string
	port, far    *os.File
	cmd          *exec.Cmd
}

func newOSMachine(t *testing.T) *osMachine {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root for namespaces: run by make test")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root for namespaces")
	}
	m := &osMachine{}
	var err error
	// Not below /tmp, which the machine has for itself.
	if m.dir, err = os.MkdirTemp("/var/tmp", "vmruntime-machine-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(m.dir) })
	m.program = filepath.Join(m.dir, "vmagent")
	output(t, ".", "go", "build", "-trimpath", "-ldflags", "-X main.version="+testVersion, "-o", m.program, "github.com/vmruntime/vmruntime/cmd/vmagent")
	m.openPort(t)
	m.boot(t)
	t.Cleanup(m.halt)
	return m
}

func (m *osMachine) socket() string { return filepath.Join(m.dir, "agent.sock") }

func (m *osMachine) openPort(t *testing.T) {
	t.Helper()
	port, far, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer port.Close()
	m.far = far
	// A file of our own, which is pollable.
	fd, err := unix.FcntlInt(port.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	m.port = os.NewFile(uintptr(fd), "port")
	termios, err := unix.IoctlGetTermios(int(m.far.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	termios.Iflag, termios.Oflag, termios.Lflag = 0, 0, 0
	if err := unix.IoctlSetTermios(int(m.far.Fd()), unix.TCSETS, termios); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", m.socket())
	if err != nil {
		t.Fatal(err)
	}
	var relay sync.WaitGroup
	relay.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			m.relay(c)
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		_ = m.port.Close()
		_ = m.far.Close()
		relay.Wait()
	})
}

// relay serves one connection at a time, as QEMU does.
func (m *osMachine) relay(c net.Conn) {
	var up sync.WaitGroup
	up.Go(func() {
		_, _ = io.Copy(c, m.port)
		_ = c.Close()
	})
	_, _ = io.Copy(m.port, c)
	_ = m.port.SetReadDeadline(time.Now())
	up.Wait()
	_ = m.port.SetReadDeadline(time.Time{})
	_ = c.Close()
}

// boot starts the system: a shell in place of init, the agent, and programs that only note that they were to shut the
// system down.
func (m *osMachine) boot(t *testing.T) {
	t.Helper()
	script := fmt.Sprintf(`ip link set lo up; hostname machine; mount -t tmpfs tmpfs /tmp; mkdir /tmp/bin
printf '#!/bin/sh\necho "$@" >>/tmp/systemctl\nexit 1\n' >/tmp/bin/systemctl
printf '#!/bin/sh\necho done >>/tmp/poweroff\n' >/tmp/bin/poweroff
chmod +x /tmp/bin/*; mount --bind /tmp/bin /usr/local/sbin
%s machine %s 2>>%s/log & wait; exec sleep 100000`, m.program, m.far.Name(), m.dir)
	m.cmd = exec.Command("unshare", "-n", "-m", "-p", "-u", "-f", "--mount-proc", "--kill-child", "/bin/bash", "-c", script)
	m.cmd.Stderr = os.Stderr
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (m *osMachine) halt() {
	if m.cmd != nil {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
		m.cmd = nil
	}
}

func (m *osMachine) dial(t *testing.T) *agent.Client {
	t.Helper()
	c, err := agent.Dial(deadline(t, time.Minute), m.socket())
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(m.dir, "log"))
		t.Fatalf("dial: %v\n%s", err, log)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// inside is the path of a file as the machine has it.
func (m *osMachine) inside(t *testing.T, path string) string {
	t.Helper()
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", m.cmd.Process.Pid))
	if err != nil || len(bytes.Fields(children)) == 0 {
		t.Fatalf("the machine does not run: %v", err)
	}
	return filepath.Join("/proc", string(bytes.Fields(children)[0]), "root", path)
}

// processes counts the machine's processes whose command lines contain text.
func (m *osMachine) processes(t *testing.T, text string) int {
	t.Helper()
	files, err := filepath.Glob(m.inside(t, "/proc/[0-9]*/cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		if line, err := os.ReadFile(f); err == nil && bytes.Contains(line, []byte(text)) {
			n++
		}
	}
	return n
}

func TestMachine(t *testing.T) {
	m := newOSMachine(t)
	c := m.dial(t)
	steps := []struct {
		name string
		run  func(*testing.T, *osMachine, *agent.Client)
	}{
		{"info", testMachineInfo},
		{"no containers", testMachineRefuses},
		{"exec", testMachineExec},
		{"exec failure", testMachineExecFailure},
		{"stdin", testMachineStdin},
		{"terminal", testMachineTerminal},
		{"signal", testMachineSignal},
		{"remove", testMachineRemove},
		{"large streams", testMachineLarge},
		{"dial", testMachineDial},
		{"stats", testMachineStats},
		{"another client", testMachineReconnect},
		{"shutdown", testMachineShutdown},
		{"stop", testMachineStop},
	}
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, m, c) }) && c.Err() != nil {
			t.Fatalf("the session is lost: %v", c.Err())
		}
	}
}

func testMachineInfo(t *testing.T, _ *osMachine, c *agent.Client) {
	info, err := c.Info(deadline(t, time.Minute), &agentpb.InfoRequest{})
	if err != nil || !info.Machine || info.AgentVersion != testVersion || info.BootId == "" || info.MemoryTotalBytes == 0 {
		t.Errorf("info %v, %v", info, err)
	}
	list, err := c.List(deadline(t, time.Minute), &agentpb.ListRequest{})
	if err != nil || len(list.Processes) != 1 || list.Processes[0].ContainerId != agent.MachineID || !list.Processes[0].Started || list.Processes[0].Exited {
		t.Errorf("list %v, %v", list, err)
	}
}

func testMachineRefuses(t *testing.T, _ *osMachine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	for name, call := range map[string]func() error{
		"ConfigureSandbox": func() error { _, err := c.ConfigureSandbox(ctx, &agentpb.ConfigureSandboxRequest{}); return err },
		"PutFiles":         func() error { _, err := c.PutFiles(ctx, &agentpb.PutFilesRequest{Name: "x"}); return err },
		"GetFile":          func() error { _, err := c.GetFile(ctx, &agentpb.GetFileRequest{}); return err },
		"Prepare":          func() error { _, err := c.Prepare(ctx, &agentpb.PrepareRequest{}); return err },
		"Standby":          func() error { _, err := c.Standby(ctx, &agentpb.StandbyRequest{}); return err },
		"MountShare":       func() error { _, err := c.MountShare(ctx, &agentpb.MountShareRequest{}); return err },
		"CreateContainer":  func() error { _, err := c.CreateContainer(ctx, &agentpb.CreateContainerRequest{}); return err },
		"StartContainer": func() error {
			_, err := c.StartContainer(ctx, &agentpb.StartContainerRequest{Id: agent.MachineID})
			return err
		},
		"UpdateContainer": func() error {
			_, err := c.UpdateContainer(ctx, &agentpb.UpdateContainerRequest{Id: agent.MachineID})
			return err
		},
		"RemoveContainer": func() error {
			_, err := c.RemoveContainer(ctx, &agentpb.RemoveContainerRequest{Id: agent.MachineID})
			return err
		},
		"Signal": func() error {
			_, err := c.Signal(ctx, &agentpb.SignalRequest{Process: &agentpb.ProcessRef{ContainerId: agent.MachineID}, Signal: 9})
			return err
		},
	} {
		if err := call(); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v, want not implemented", name, err)
		}
	}
	if _, err := c.Exec(ctx, &agentpb.ExecRequest{ContainerId: "other", ExecId: "x", Process: encode(t, sh("true"))}); !errdefs.IsNotFound(err) {
		t.Errorf("exec in a container: %v", err)
	}
}

func testMachineExec(t *testing.T, _ *osMachine, c *agent.Client) {
	for i, test := range []struct {
		process        *specs.Process
		stdout, stderr string
		code           int32
	}{
		{sh("echo out; echo err >&2; exit 3"), "out\n", "err\n", 3},
		{sh("pwd; id -u; echo $HOME $USER; hostname"), "/\n0\n/root root\nmachine\n", "", 0},
		{&specs.Process{Args: []string{"sh", "-c", "pwd; id -u; id -g; id -G; echo $A $PATH"}, Cwd: "/tmp", Env: []string{"A=b c", "PATH=/bin:/usr/bin"}, User: specs.User{UID: 5, GID: 6, AdditionalGids: []uint32{7}}}, "/tmp\n5\n6\n6 7\nb c /bin:/usr/bin\n", "", 0},
		{&specs.Process{Args: []string{"bin/poweroff"}, Cwd: "/tmp"}, "", "", 0},
		{sh("kill -TERM $$"), "", "", 143},
		{sh("cat; test -t 0 || echo none"), "none\n", "", 0},
		{sh(`test "$(ps -o sid= -p $$ | tr -d ' ')" = $$ && echo leader`), "leader\n", "", 0},
	} {
		ref := startExec(t, c, agent.MachineID, fmt.Sprint("e", i), test.process, false)
		stdout, stderr, st := readAll(t, c, ref)
		if stdout != test.stdout || stderr != test.stderr || st.ExitCode != test.code {
			t.Errorf("%q: stdout %q, stderr %q, code %d", test.process.Args, stdout, stderr, st.ExitCode)
		}
		if _, err := c.RemoveExec(deadline(t, time.Minute), ref); err != nil {
			t.Error(err)
		}
	}
	if list, err := c.List(deadline(t, time.Minute), &agentpb.ListRequest{}); err != nil || len(list.Processes) != 1 {
		t.Errorf("list %v, %v", list, err)
	}
}

func testMachineExecFailure(t *testing.T, _ *osMachine, c *agent.Client) {
	for name, test := range map[string]struct {
		process *specs.Process
		text    string
		invalid bool
	}{
		"missing program": {&specs.Process{Args: []string{"no-such-program"}}, "no-such-program", false},
		"missing file":    {&specs.Process{Args: []string{"/no/such"}}, "no such file", false},
		"no program":      {&specs.Process{Args: []string{"/etc/passwd"}}, "permission denied", false},
		"missing cwd":     {&specs.Process{Args: []string{"true"}, Cwd: "/no/such"}, "/no/such", false},
		"no arguments":    {&specs.Process{}, "process.args", true},
		"capabilities":    {&specs.Process{Args: []string{"true"}, Capabilities: &specs.LinuxCapabilities{}}, "process.capabilities", true},
		"NUL":             {&specs.Process{Args: []string{"a\x00"}}, "NUL", true},
	} {
		_, err := c.Exec(deadline(t, time.Minute), &agentpb.ExecRequest{ContainerId: agent.MachineID, ExecId: "bad", Process: encode(t, test.process)})
		if err == nil || !strings.Contains(err.Error(), test.text) || errdefs.IsInvalidArgument(err) != test.invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	startExec(t, c, agent.MachineID, "twice", sh("sleep 100"), false)
	_, err := c.Exec(deadline(t, time.Minute), &agentpb.ExecRequest{ContainerId: agent.MachineID, ExecId: "twice", Process: encode(t, sh("true"))})
	if !errdefs.IsAlreadyExists(err) {
		t.Errorf("an exec ID in use: %v", err)
	}
}

func testMachineStdin(t *testing.T, _ *osMachine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	ref := startExec(t, c, agent.MachineID, "stdin", sh("cat; echo end"), true)
	if _, err := c.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: ref, Data: []byte("a\x00b\n")}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CloseStdin(ctx, ref); err != nil {
		t.Fatal(err)
	}
	if stdout, _, st := readAll(t, c, ref); stdout != "a\x00b\nend\n" || st.ExitCode != 0 {
		t.Errorf("stdout %q, state %v", stdout, st)
	}
}

func testMachineTerminal(t *testing.T, _ *osMachine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	script := `test -t 0 && test -t 1 && test -t 2 && tty | cut -c1-9; stty size; echo $TERM; read x; stty size; echo "got $x" >/dev/tty; kill -INT $$`
	p := &specs.Process{Args: []string{"sh", "-c", script}, Terminal: true, ConsoleSize: &specs.Box{Height: 43, Width: 132}}
	ref := startExec(t, c, agent.MachineID, "terminal", p, true)
	if _, err := c.ResizeTerminal(ctx, &agentpb.ResizeTerminalRequest{Process: ref, Width: 100, Height: 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: ref, Data: []byte("hello\r")}); err != nil {
		t.Fatal(err)
	}
	stdout, _, st := readAll(t, c, ref)
	for _, want := range []string{"/dev/pts/\r\n", "xterm\r\n", "20 100\r\n", "got hello\r\n"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("the terminal lacks %q: %q", want, stdout)
		}
	}
	if st.ExitCode != 130 {
		t.Errorf("exit code %d, want 130", st.ExitCode)
	}
	// As another user, who may open its terminal; control keys reach the program.
	ref = startExec(t, c, agent.MachineID, "keys", &specs.Process{
		Args: []string{"sh", "-c", "trap 'echo int; exit 1' INT; echo ready >/dev/tty; while :; do sleep 0.1; done"}, Terminal: true, User: specs.User{UID: 5, GID: 5},
	}, true)
	if _, err := c.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: ref, Data: []byte{3}}); err != nil {
		t.Fatal(err)
	}
	if stdout, _, st := readAll(t, c, ref); st.ExitCode == 0 {
		t.Errorf("output %q, state %v", stdout, st)
	}
}

func testMachineSignal(t *testing.T, _ *osMachine, c *agent.Client) {
	ref := startExec(t, c, agent.MachineID, "signal", sh("trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done"), false)
	resp, err := c.ReadOutput(deadline(t, time.Minute), &agentpb.ReadOutputRequest{Process: ref})
	if err != nil || len(resp.Chunks) != 1 {
		t.Fatalf("output %v, %v", resp, err)
	}
	if _, err := c.Signal(deadline(t, time.Minute), &agentpb.SignalRequest{Process: ref, Signal: int32(unix.SIGUSR1)}); err != nil {
		t.Fatal(err)
	}
	if st, err := c.Wait(deadline(t, time.Minute), ref); err != nil || !st.Exited || st.ExitCode != 9 {
		t.Errorf("state %v, %v", st, err)
	}
}

func testMachineRemove(t *testing.T, m *osMachine, c *agent.Client) {
	// What an exec that has ended leaves running stays; one that runs is killed with its session.
	stdout, _, st := readAll(t, c, startExec(t, c, agent.MachineID, "orphan", sh("sleep 500.1 & echo started"), false))
	if stdout != "started\n" || st.ExitCode != 0 {
		t.Errorf("stdout %q, state %v", stdout, st)
	}
	ref := startExec(t, c, agent.MachineID, "tree", &specs.Process{Args: []string{"bash", "-c", "set -m; sleep 501.1 & (sleep 501.1; true) & trap '' TERM; echo x; sleep 501.1"}}, false)
	if _, err := c.ReadOutput(deadline(t, time.Minute), &agentpb.ReadOutputRequest{Process: ref}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"tree", "orphan", "unknown"} {
		if _, err := c.RemoveExec(deadline(t, time.Minute), &agentpb.ProcessRef{ContainerId: agent.MachineID, ExecId: id}); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := m.processes(t, "sleep\x00500.1"), m.processes(t, "sleep\x00501.1"); a != 1 || b != 0 {
		t.Errorf("%d background processes are left, want 1; of the killed session %d", a, b)
	}
}

func testMachineLarge(t *testing.T, _ *osMachine, c *agent.Client) {
	const size = 8 << 20
	ref := startExec(t, c, agent.MachineID, "large", sh("cat"), true)
	data := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	var writer sync.WaitGroup
	writer.Go(func() {
		for rest := data; len(rest) > 0; {
			resp, err := c.WriteStdin(deadline(t, time.Minute), &agentpb.WriteStdinRequest{Process: ref, Data: rest[:min(len(rest), 256<<10)]})
			if err != nil {
				t.Error(err)
				return
			}
			rest = rest[resp.Written:]
		}
		if _, err := c.CloseStdin(deadline(t, time.Minute), ref); err != nil {
			t.Error(err)
		}
	})
	stdout, _, st := readAll(t, c, ref)
	writer.Wait()
	if stdout != string(data) || st.ExitCode != 0 {
		t.Errorf("%d bytes came back, state %v", len(stdout), st)
	}
}

func testMachineDial(t *testing.T, _ *osMachine, c *agent.Client) {
	// A server on the machine's loopback, which the machine alone reaches.
	ref := startExec(t, c, agent.MachineID, "server", &specs.Process{Args: []string{"busybox", "nc", "-l", "-p", "8080", "-e", "cat"}}, false)
	var conn net.Conn
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		var err error
		if conn, err = c.DialGuest(deadline(t, time.Minute), "tcp", "localhost:8080"); err == nil {
			break
		}
		if time.Now().After(end) || c.Err() != nil {
			_, stderr, st := readAll(t, c, ref)
			t.Skipf("needs a busybox with nc -l: %v, %s, %v", err, stderr, st)
		}
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("hello\n")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 6)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello\n" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := c.DialGuest(deadline(t, time.Minute), "tcp", "127.0.0.1:9"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a port that nobody listens on: %v", err)
	}
}

func testMachineStats(t *testing.T, _ *osMachine, c *agent.Client) {
	st, err := c.Stats(deadline(t, time.Minute), &agentpb.StatsRequest{})
	if err != nil || st.TimeUnixNano == 0 || len(st.Containers) != 0 {
		t.Fatalf("stats %v, %v", st, err)
	}
	g := st.Guest
	if g.CpuUsageNano == 0 || g.MemoryUsageBytes == 0 || g.MemoryWorkingSetBytes == 0 || g.ProcessCount < 2 || g.ProcessCount > 1000 {
		t.Errorf("figures of the guest: %v", g)
	}
	for _, d := range g.Disks {
		if d.Device == "" || d.ReadBytes > 0 && d.Reads == 0 {
			t.Errorf("disk %v", d)
		}
	}
}

// Another client finds what the first one has started.
func testMachineReconnect(t *testing.T, m *osMachine, c *agent.Client) {
	ref := startExec(t, c, agent.MachineID, "kept", sh("echo kept; exit 8"), false)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if stdout, _, st := readAll(t, m.dial(t), ref); stdout != "kept\n" || st.ExitCode != 8 {
		t.Errorf("stdout %q, state %v", stdout, st)
	}
}

func testMachineShutdown(t *testing.T, m *osMachine, _ *agent.Client) {
	c := m.dial(t)
	if _, err := c.Shutdown(deadline(t, time.Minute), &agentpb.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		tried, _ := os.ReadFile(m.inside(t, "/tmp/systemctl"))
		done, _ := os.ReadFile(m.inside(t, "/tmp/poweroff"))
		// systemctl fails here, and the next way is taken.
		if string(tried) == "poweroff\n" && strings.Contains(string(done), "done\n") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("systemctl %q, poweroff %q", tried, done)
		}
	}
}

// The agent's end, by its service manager, ends what it has started; a session to an agent that is gone ends when it is
// used with the next agent.
func testMachineStop(t *testing.T, m *osMachine, _ *agent.Client) {
	c := m.dial(t)
	startExec(t, c, agent.MachineID, "last", sh("sleep 600.1"), false)
	ref := startExec(t, c, agent.MachineID, "stop", sh("kill -TERM $PPID; sleep 600.1"), false)
	for end := time.Now().Add(30 * time.Second); m.processes(t, "sleep\x00600.1")+m.processes(t, "machine\x00/dev/pts") > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			log, _ := os.ReadFile(filepath.Join(m.dir, "log"))
			t.Fatalf("the agent or its processes are left\n%s", log)
		}
	}
	m.halt()
	m.boot(t)
	if _, err := c.Wait(deadline(t, time.Minute), ref); !errdefs.IsUnavailable(err) {
		t.Errorf("a call to the agent of another boot: %v", err)
	}
	if list, err := m.dial(t).List(deadline(t, time.Minute), &agentpb.ListRequest{}); err != nil || len(list.Processes) != 1 {
		t.Errorf("list of the next boot: %v, %v", list, err)
	}
}
