package guest_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// TestGuest boots one real guest and runs everything in it, in order.
func TestGuest(t *testing.T) {
	m := bootMachine(t)
	c := m.dial(t)
	t.Logf("boot to hello: %s", time.Since(m.started).Round(time.Millisecond))
	// As in a template: the first container's crun waits already.
	if _, err := c.Prepare(context.Background(), &agentpb.PrepareRequest{}); err != nil {
		t.Fatal(err)
	}
	configure(t, c)
	runContainer(t, c, "main", containerSpec("sleep", "1000"), nil)
	steps := []struct {
		name string
		run  func(*testing.T, *machine, *agent.Client)
	}{
		{"info", testInfo},
		{"output and exit code", testOutput},
		{"exec", testExec},
		{"exec failure", testExecFailure},
		{"exec orphans", testExecOrphans},
		{"next exec", testNextExec},
		{"stdin", testStdin},
		{"terminal", testTerminal},
		{"backpressure", testBackpressure},
		{"start failure", testStartFailure},
		{"signals", testSignals},
		{"out of memory", testOOM},
		{"pid namespaces", testPIDNamespaces},
		{"network", testNetwork},
		{"dial", testDial},
		{"stats and update", testStats},
		{"files kept live", testFiles},
		{"share", testShare},
		{"kernel modules", testModules},
		{"firewall rules", testFirewalls},
		{"hot-plugged disk", testHotplug},
		{"reconnect", testReconnect},
		{"reconnect in mid-stream", testReconnectStream},
		{"shutdown", testShutdown},
	}
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, m, c) }) && t.Failed() && c.Err() != nil {
			t.Fatalf("the session is lost: %v", c.Err())
		}
	}
}

func configure(t *testing.T, c *agent.Client) {
	t.Helper()
	req := &agentpb.ConfigureSandboxRequest{
		TimeUnixNano: time.Now().UnixNano(), Entropy: []byte("0123456789abcdef0123456789abcdef"), Hostname: "pod-1",
		// The names are the other way round than the kernel's.
		Interfaces: []*agentpb.Interface{
			{Name: "eth0", Mac: "52:54:00:00:00:02", Mtu: 1400, Addresses: []string{"10.1.0.2/24", "fd00:1::2/64"}},
			{Name: "eth1", Mac: "52:54:00:00:00:01", Addresses: []string{"10.2.0.2/24"}},
		},
		Routes: []*agentpb.Route{
			{Destination: "10.1.0.0/24", Interface: "eth0", Source: "10.1.0.2", Scope: 253},
			{Destination: "fd00:1::/64", Interface: "eth0"},
			{Destination: "0.0.0.0/0", Gateway: "10.1.0.1", Interface: "eth0"},
			{Destination: "::/0", Gateway: "fd00:1::1", Interface: "eth0"},
			{Destination: "10.3.0.0/16", Interface: "eth1", Scope: 253, Mtu: 1300},
		},
		ResolvConf: "nameserver 10.1.0.1\n", Hosts: "127.0.0.1 localhost\n",
		Sysctls:     map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"},
		ScratchDisk: "scratch", ShmSizeBytes: 64 << 20, PodPidNamespace: true,
	}
	for range 2 {
		if _, err := c.ConfigureSandbox(deadline(t, time.Minute), req); err != nil {
			t.Fatalf("configure: %v", err)
		}
	}
}

func testInfo(t *testing.T, _ *machine, c *agent.Client) {
	info, err := c.Info(deadline(t, time.Minute), &agentpb.InfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if !info.Configured || info.CpusOnline != 2 || info.BootId == "" || info.KernelRelease == "" || info.MemoryTotalBytes < 256<<20 || info.AgentVersion != testVersion {
		t.Errorf("info %v", info)
	}
}

func testOutput(t *testing.T, _ *machine, c *agent.Client) {
	spec := containerSpec("sh", "-c", "echo out; echo err >&2; echo written > /file; cat /file /etc/resolv.conf; exit 7")
	runContainer(t, c, "output", spec, nil)
	defer removeContainer(t, c, "output")
	stdout, stderr, st := readAll(t, c, &agentpb.ProcessRef{ContainerId: "output"})
	if stdout != "out\nwritten\nnameserver 10.1.0.1\n" || stderr != "err\n" || st.ExitCode != 7 || st.OomKilled {
		t.Errorf("stdout %q, stderr %q, state %v", stdout, stderr, st)
	}
	// Acknowledged bytes are gone, and a wrong offset is told.
	_, err := c.ReadOutput(deadline(t, time.Minute), &agentpb.ReadOutputRequest{Process: &agentpb.ProcessRef{ContainerId: "output"}})
	if !errdefs.IsOutOfRange(err) {
		t.Errorf("read of acknowledged output: %v, want out of range", err)
	}
	if _, err := c.CreateContainer(deadline(t, time.Minute), &agentpb.CreateContainerRequest{Id: "output", RootfsDisk: "image", OciSpec: encode(t, spec)}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second create: %v, want already exists", err)
	}
}

func testExec(t *testing.T, _ *machine, c *agent.Client) {
	ref := startExec(t, c, "main", "e1", sh("echo $PATH $0; id -u; exit 3"), false)
	stdout, _, st := readAll(t, c, ref)
	if stdout != "/bin sh\n0\n" || st.ExitCode != 3 {
		t.Errorf("stdout %q, state %v", stdout, st)
	}
	ref = startExec(t, c, "main", "e2", &specs.Process{Args: []string{"id"}, User: specs.User{UID: 5, GID: 6}, Cwd: "/tmp"}, false)
	if stdout, _, _ := readAll(t, c, ref); !strings.Contains(stdout, "uid=5 gid=6") {
		t.Errorf("id %q", stdout)
	}
	var took time.Duration
	const rounds = 5
	for i := range rounds {
		begin := time.Now()
		readAll(t, c, startExec(t, c, "main", fmt.Sprint("lat", i), &specs.Process{Args: []string{"/bin/true"}}, false))
		took += time.Since(begin)
	}
	t.Logf("exec of /bin/true: %s", (took / rounds).Round(time.Millisecond))
	for _, id := range []string{"e1", "e2"} {
		if _, err := c.RemoveExec(deadline(t, time.Minute), &agentpb.ProcessRef{ContainerId: "main", ExecId: id}); err != nil {
			t.Error(err)
		}
	}
}

func testExecFailure(t *testing.T, _ *machine, c *agent.Client) {
	_, err := c.Exec(deadline(t, time.Minute), &agentpb.ExecRequest{
		ContainerId: "main", ExecId: "bad", Process: encode(t, &specs.Process{Args: []string{"no-such-program"}}),
	})
	if err == nil || !strings.Contains(err.Error(), "no-such-program") || errdefs.IsUnavailable(err) {
		t.Errorf("exec of a missing program: %v", err)
	}
	_, err = c.Exec(deadline(t, time.Minute), &agentpb.ExecRequest{
		ContainerId: "gone", ExecId: "bad", Process: encode(t, sh("true")),
	})
	if !errdefs.IsNotFound(err) {
		t.Errorf("exec in a missing container: %v", err)
	}
}

func testExecOrphans(t *testing.T, _ *machine, c *agent.Client) {
	// A child that keeps the pipe does not hold back the end.
	begin := time.Now()
	stdout, _, st := readAll(t, c, startExec(t, c, "main", "orphan", sh("sleep 500 & echo started"), false))
	if stdout != "started\n" || st.ExitCode != 0 || time.Since(begin) > 20*time.Second {
		t.Errorf("stdout %q, state %v after %s", stdout, st, time.Since(begin))
	}
	// RemoveExec kills the process with its children, but not what an exec that has ended left in the background.
	startExec(t, c, "main", "tree", sh("sleep 501 & sleep 502"), false)
	for _, id := range []string{"tree", "orphan"} {
		if _, err := c.RemoveExec(deadline(t, time.Minute), &agentpb.ProcessRef{ContainerId: "main", ExecId: id}); err != nil {
			t.Fatal(err)
		}
	}
	stdout, _, _ = readAll(t, c, startExec(t, c, "main", "ps", sh("ps"), false))
	if !strings.Contains(stdout, "sleep 500") || strings.Contains(stdout, "sleep 501") || strings.Contains(stdout, "sleep 502") {
		t.Errorf("of 500, 501 and 502 only the first was to stay:\n%s", stdout)
	}
}

func testStdin(t *testing.T, _ *machine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	runContainer(t, c, "stdin", containerSpec("cat"), func(r *agentpb.CreateContainerRequest) { r.Stdin, r.StdinOnce = true, true })
	defer removeContainer(t, c, "stdin")
	ref := &agentpb.ProcessRef{ContainerId: "stdin"}
	for _, part := range []string{"one\n", "two\n"} {
		if _, err := c.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: ref, Data: []byte(part)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.CloseStdin(ctx, ref); err != nil {
		t.Fatal(err)
	}
	if stdout, _, st := readAll(t, c, ref); stdout != "one\ntwo\n" || st.ExitCode != 0 {
		t.Errorf("stdout %q, state %v", stdout, st)
	}
	if _, err := c.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: ref, Data: []byte("x")}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("write after the end: %v", err)
	}
	// A process that does not read makes the write wait; then the answer tells what went into the pipe.
	ref = startExec(t, c, "main", "unread", sh("sleep 1000"), true)
	short, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	resp, err := c.WriteStdin(short, &agentpb.WriteStdinRequest{Process: ref, Data: make([]byte, 1<<20)})
	if err != nil || resp.GetWritten() < 4096 || resp.GetWritten() >= 1<<20 {
		t.Errorf("write to a full pipe: %v, %v; want a part of it written", resp, err)
	}
	if _, err := c.RemoveExec(ctx, ref); err != nil {
		t.Error(err)
	}
}

func testTerminal(t *testing.T, _ *machine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	p := sh("read line; stty size; echo got $line; test -t 1; exit $?")
	p.Terminal = true
	ref := startExec(t, c, "main", "tty", p, true)
	if _, err := c.ResizeTerminal(ctx, &agentpb.ResizeTerminalRequest{Process: ref, Width: 123, Height: 45}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: ref, Data: []byte("hello\n")}); err != nil {
		t.Fatal(err)
	}
	stdout, _, st := readAll(t, c, ref)
	if !strings.Contains(stdout, "45 123") || !strings.Contains(stdout, "got hello") || st.ExitCode != 0 {
		t.Errorf("stdout %q, state %v", stdout, st)
	}
}

func testBackpressure(t *testing.T, _ *machine, c *agent.Client) {
	// 3 MB with a bound of 64 KiB: the writer waits for the reader, and nothing is lost.
	spec := containerSpec("sh", "-c", "seq 1 400000")
	runContainer(t, c, "much", spec, func(r *agentpb.CreateContainerRequest) { r.OutputBufferBytes = 64 << 10 })
	defer removeContainer(t, c, "much")
	begin := time.Now()
	stdout, _, st := readAll(t, c, &agentpb.ProcessRef{ContainerId: "much"})
	t.Logf("%d bytes of output in %s", len(stdout), time.Since(begin).Round(time.Millisecond))
	var want strings.Builder
	for i := 1; i <= 400000; i++ {
		fmt.Fprintln(&want, i)
	}
	if stdout != want.String() || st.ExitCode != 0 {
		t.Errorf("%d bytes, want %d, state %v", len(stdout), want.Len(), st)
	}
}

func testStartFailure(t *testing.T, _ *machine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	spec := containerSpec("/no/such/program")
	if _, err := c.CreateContainer(ctx, &agentpb.CreateContainerRequest{Id: "bad", RootfsDisk: "image", OciSpec: encode(t, spec)}); err != nil {
		t.Fatal(err)
	}
	defer removeContainer(t, c, "bad")
	_, err := c.StartContainer(ctx, &agentpb.StartContainerRequest{Id: "bad"})
	t.Logf("start of a missing program: %v", err)
	if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("start of a missing program: %v", err)
	}
	_, err = c.CreateContainer(ctx, &agentpb.CreateContainerRequest{Id: "nodisk", RootfsDisk: "nosuchdisk", OciSpec: encode(t, spec)})
	if !errdefs.IsNotFound(err) {
		t.Errorf("create with a missing disk: %v", err)
	}
}

func testSignals(t *testing.T, _ *machine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	runContainer(t, c, "sig", containerSpec("sh", "-c", "trap 'echo term; exit 9' TERM; echo ready; while :; do sleep 0.1; done"), nil)
	defer removeContainer(t, c, "sig")
	ref := &agentpb.ProcessRef{ContainerId: "sig"}
	if resp, err := c.ReadOutput(ctx, &agentpb.ReadOutputRequest{Process: ref}); err != nil || len(resp.Chunks) == 0 {
		t.Fatalf("first output %v, %v", resp, err)
	}
	if _, err := c.Signal(ctx, &agentpb.SignalRequest{Process: ref, Signal: 15}); err != nil {
		t.Fatal(err)
	}
	if stdout, _, st := readAll(t, c, ref); stdout != "ready\nterm\n" || st.ExitCode != 9 {
		t.Errorf("stdout %q, state %v", stdout, st)
	}
	if _, err := c.Signal(ctx, &agentpb.SignalRequest{Process: ref, Signal: 9}); err != nil {
		t.Errorf("signal after the end: %v", err)
	}
	runContainer(t, c, "kill", containerSpec("sh", "-c", "sleep 1000 & sleep 1000"), nil)
	defer removeContainer(t, c, "kill")
	ref = &agentpb.ProcessRef{ContainerId: "kill"}
	if _, err := c.Signal(ctx, &agentpb.SignalRequest{Process: ref, Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	if st := waitExit(t, c, ref); st.ExitCode != 137 || st.OomKilled {
		t.Errorf("state %v, want exit code 137", st)
	}
}

func testOOM(t *testing.T, _ *machine, c *agent.Client) {
	limit := int64(32 << 20)
	spec := containerSpec("sh", "-c", "tail /dev/zero")
	spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}, Unified: map[string]string{"memory.oom.group": "1"}}
	runContainer(t, c, "oom", spec, nil)
	defer removeContainer(t, c, "oom")
	if st := waitExit(t, c, &agentpb.ProcessRef{ContainerId: "oom"}); !st.OomKilled || st.ExitCode != 137 {
		t.Errorf("state %v, want an OOM kill", st)
	}
}

func testPIDNamespaces(t *testing.T, _ *machine, c *agent.Client) {
	for _, mode := range []struct {
		ns     agentpb.PidNamespace
		want   string
		target string
	}{
		{agentpb.PidNamespace_PID_NAMESPACE_CONTAINER, "sh", ""},
		{agentpb.PidNamespace_PID_NAMESPACE_POD, "exe", ""},
		{agentpb.PidNamespace_PID_NAMESPACE_TARGET, "sleep", "main"},
		{agentpb.PidNamespace_PID_NAMESPACE_GUEST, "init", ""},
	} {
		id := "pidns-" + mode.want
		runContainer(t, c, id, containerSpec("sh", "-c", "cat /proc/1/comm; exit 0"), func(r *agentpb.CreateContainerRequest) {
			r.PidNamespace, r.PidTargetContainer = mode.ns, mode.target
		})
		stdout, stderr, st := readAll(t, c, &agentpb.ProcessRef{ContainerId: id})
		if strings.TrimSpace(stdout) != mode.want || st.ExitCode != 0 {
			t.Errorf("%s: PID 1 is %q, want %q; stderr %q, state %v", mode.ns, stdout, mode.want, stderr, st)
		}
		removeContainer(t, c, id)
	}
}

func testNetwork(t *testing.T, _ *machine, c *agent.Client) {
	stdout, _, _ := readAll(t, c, startExec(t, c, "main", "net", sh("hostname; ip addr; ip route; ip -6 route"), false))
	for _, want := range []string{
		"pod-1", "52:54:00:00:00:02", "mtu 1400", "inet 10.1.0.2/24", "inet6 fd00:1::2/64", "inet 10.2.0.2/24",
		"default via 10.1.0.1 dev eth0", "10.3.0.0/16 dev eth1", "default via fd00:1::1 dev eth0", "inet 127.0.0.1/8",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is missing in:\n%s", want, stdout)
		}
	}
	if strings.Contains(stdout, "tentative") {
		t.Errorf("an address is tentative:\n%s", stdout)
	}
}

func testDial(t *testing.T, _ *machine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	startExec(t, c, "main", "echo", sh("nc -l -p 7 -e cat"), false)
	var conn interface {
		Write([]byte) (int, error)
		Read([]byte) (int, error)
		Close() error
	}
	for {
		var err error
		if conn, err = c.DialGuest(ctx, "tcp", "localhost:7"); err == nil {
			break
		}
		if !errdefs.IsFailedPrecondition(err) || ctx.Err() != nil {
			t.Fatalf("dial: %v", err)
		}
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	if n, err := conn.Read(buf); err != nil || string(buf[:n]) != "ping" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	if err := conn.(*agent.GuestConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(buf); n != 0 || err == nil || err.Error() != "EOF" {
		t.Errorf("read %d bytes, %v after the end, want EOF", n, err)
	}
}

func testStats(t *testing.T, _ *machine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	readAll(t, c, startExec(t, c, "main", "write", sh("dd if=/dev/zero of=/big bs=1M count=5; sync"), false))
	limit := int64(100 << 20)
	res := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	if _, err := c.UpdateContainer(ctx, &agentpb.UpdateContainerRequest{Id: "main", Resources: encode(t, res)}); err != nil {
		t.Fatal(err)
	}
	resp, err := c.Stats(ctx, &agentpb.StatsRequest{ContainerIds: []string{"main", "unknown"}, Descriptors: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Containers) != 1 {
		t.Fatalf("%d containers, want 1", len(resp.Containers))
	}
	st := resp.Containers[0]
	cg := st.Cgroup
	if st.WritableBytes < 5<<20 || st.WritableInodes < 2 || cg.CpuUsageNano == 0 || cg.MemoryUsageBytes == 0 || cg.ProcessCount == 0 ||
		cg.MemoryAvailableBytes == 0 || cg.MemoryAvailableBytes > uint64(limit) || cg.CpuPressure == nil {
		t.Errorf("stats %v", st)
	}
	for name, v := range map[string]uint64{
		"CPU time in user mode": cg.CpuUserNano, "CPU time in the kernel": cg.CpuSystemNano, "cached": cg.MemoryCacheBytes, "kernel memory": cg.MemoryKernelBytes,
		"most memory": cg.MemoryMaxUsageBytes, "threads": cg.ThreadCount, "open files": st.FileDescriptors, "inodes": st.WritableInodesTotal,
	} {
		if v == 0 {
			t.Errorf("%s is 0: %v", name, st)
		}
	}
	if st.WritableSizeBytes < st.WritableBytes || st.WritableInodesFree >= st.WritableInodesTotal {
		t.Errorf("the file system of the writable layer: %v", st)
	}
	written := slices.ContainsFunc(cg.Disks, func(d *agentpb.DiskIO) bool { return d.WriteBytes >= 5<<20 && d.Writes > 0 && d.Device != "" })
	if !written {
		t.Errorf("5 MiB were written, disks %v", cg.Disks)
	}
	if g := resp.Guest; g.ProcessCount == 0 || g.IoPressure == nil {
		t.Errorf("guest %v", g)
	}
}

func testFiles(t *testing.T, _ *machine, c *agent.Client) {
	ctx := deadline(t, time.Minute)
	put := func(name, version, text string) {
		t.Helper()
		_, err := c.PutFiles(ctx, &agentpb.PutFilesRequest{Name: name, Entries: []*agentpb.FileEntry{
			{Path: ".", Mode: unix.S_IFDIR | 0o755},
			{Path: version, Mode: unix.S_IFDIR | 0o755},
			{Path: "..data", Mode: unix.S_IFLNK, SymlinkTarget: version},
			{Path: version + "/key", Mode: unix.S_IFREG | 0o644, Data: []byte(text)},
			{Path: "key", Mode: unix.S_IFLNK, SymlinkTarget: "..data/key"},
		}})
		if err != nil {
			t.Fatal(err)
		}
	}
	put("pod/config", "..1", "old")
	_, err := c.PutFiles(ctx, &agentpb.PutFilesRequest{Name: "pod/term", InPlace: true, Entries: []*agentpb.FileEntry{{Path: ".", Mode: unix.S_IFREG | 0o666}}})
	if err != nil {
		t.Fatal(err)
	}
	spec := containerSpec("sh", "-c", "cat /cfg/key; read x; cat /cfg/key; echo bye > /dev/termination-log")
	spec.Mounts = append(spec.Mounts,
		specs.Mount{Destination: "/cfg", Type: "bind", Source: "/run/vm/files/pod/config", Options: []string{"rbind", "ro"}},
		specs.Mount{Destination: "/dev/termination-log", Type: "bind", Source: "/run/vm/files/pod/term", Options: []string{"bind", "rw"}})
	runContainer(t, c, "files", spec, func(r *agentpb.CreateContainerRequest) { r.Stdin = true })
	defer removeContainer(t, c, "files")
	ref := &agentpb.ProcessRef{ContainerId: "files"}
	if resp, err := c.ReadOutput(ctx, &agentpb.ReadOutputRequest{Process: ref}); err != nil || len(resp.Chunks) != 1 || string(resp.Chunks[0].Data) != "old" {
		t.Fatalf("%v, %v", resp, err)
	}
	put("pod/config", "..2", "new")
	if _, err := c.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: ref, Data: []byte("\n")}); err != nil {
		t.Fatal(err)
	}
	if stdout, stderr, _ := readAll(t, c, ref); stdout != "oldnew" {
		t.Errorf("stdout %q, stderr %q", stdout, stderr)
	}
	resp, err := c.GetFile(ctx, &agentpb.GetFileRequest{Path: "pod/term", MaxBytes: 100})
	if err != nil || string(resp.Data) != "bye\n" {
		t.Errorf("termination message %v, %v", resp, err)
	}
}

func testShare(t *testing.T, m *machine, c *agent.Client) {
	if _, err := os.Stat(m.path("share")); err != nil {
		t.Skip("needs " + virtiofsd)
	}
	if err := os.WriteFile(m.path("share/hello"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := c.MountShare(deadline(t, time.Minute), &agentpb.MountShareRequest{Tag: "shares"}); err != nil {
			t.Fatal(err)
		}
	}
	spec := containerSpec("sh", "-c", "cat /share/hello; echo back > /share/answer")
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/share", Type: "bind", Source: "/run/vm/shares", Options: []string{"rbind", "rw"}})
	runContainer(t, c, "share", spec, nil)
	defer removeContainer(t, c, "share")
	if stdout, stderr, st := readAll(t, c, &agentpb.ProcessRef{ContainerId: "share"}); stdout != "from the host" || st.ExitCode != 0 {
		t.Errorf("stdout %q, stderr %q", stdout, stderr)
	}
	if data, err := os.ReadFile(m.path("share/answer")); string(data) != "back\n" {
		t.Errorf("%q, %v", data, err)
	}
}

func testHotplug(t *testing.T, m *machine, c *agent.Client) {
	add := func() {
		m.qmp(t,
			`{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"hot","read-only":true,"file":{"driver":"file","filename":"`+m.path("image.erofs")+`","read-only":true}}}`,
			`{"execute":"device_add","arguments":{"driver":"scsi-hd","drive":"hot","id":"hot0","serial":"hot","bus":"scsi0.0"}}`)
	}
	begin := time.Now()
	add()
	runContainer(t, c, "hot", containerSpec("cat", "/img/etc/passwd"), func(r *agentpb.CreateContainerRequest) {
		r.RootfsDisk = "hot"
		r.Images = []*agentpb.ImageMount{{Name: "img", Disk: "image"}}
		r.RootfsReadonly = true
	})
	t.Logf("plug, create and start: %s", time.Since(begin).Round(time.Millisecond))
	removeContainer(t, c, "hot")
}

func testReconnect(t *testing.T, m *machine, c *agent.Client) {
	runContainer(t, c, "lasting", containerSpec("sh", "-c", "echo before; read x; echo after $x"), func(r *agentpb.CreateContainerRequest) { r.Stdin = true })
	ref := &agentpb.ProcessRef{ContainerId: "lasting"}
	ctx := deadline(t, time.Minute)
	// Calls under way when the daemon dies.
	for range 4 {
		go func() { _, _ = c.Wait(ctx, ref) }()
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.List(ctx, &agentpb.ListRequest{}); !errdefs.IsUnavailable(err) {
		t.Errorf("call after close: %v, want unavailable", err)
	}
	var c2 *agent.Client
	for i := range 5 {
		begin := time.Now()
		c2 = m.dial(t)
		t.Logf("session %d in %s", i, time.Since(begin).Round(time.Millisecond))
		if i < 4 {
			_ = c2.Close()
		}
	}
	list, err := c2.List(ctx, &agentpb.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	running := 0
	for _, st := range list.Processes {
		if st.ContainerId == "lasting" && st.Started && !st.Exited {
			running++
		}
	}
	if running != 1 {
		t.Errorf("list %v", list)
	}
	if _, err := c2.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: ref, Data: []byte("all\n")}); err != nil {
		t.Fatal(err)
	}
	if stdout, _, st := readAll(t, c2, ref); stdout != "before\nafter all\n" || st.ExitCode != 0 {
		t.Errorf("stdout %q, state %v", stdout, st)
	}
}

// Sessions that end in the middle of answers lose and double nothing of a process's output.
func testReconnectStream(t *testing.T, m *machine, _ *agent.Client) {
	ctx := deadline(t, 2*time.Minute)
	c := m.dial(t)
	runContainer(t, c, "stream", containerSpec("seq", "1", "100000"), func(r *agentpb.CreateContainerRequest) { r.OutputBufferBytes = 128 << 10 })
	ref := &agentpb.ProcessRef{ContainerId: "stream"}
	var got strings.Builder
	sessions := 1
	for eof := false; !eof; {
		request := &agentpb.ReadOutputRequest{Process: ref, StdoutOffset: uint64(got.Len()), StdoutAcknowledged: uint64(got.Len()), MaxBytes: 20 << 10}
		// Another answer is under way while the session ends.
		doomed := make(chan struct{})
		go func() {
			defer close(doomed)
			_, _ = c.ReadOutput(ctx, request)
		}()
		resp, err := c.ReadOutput(ctx, request)
		if err != nil {
			t.Fatal(err)
		}
		for _, chunk := range resp.Chunks {
			got.Write(chunk.Data)
		}
		eof = resp.Eof
		if got.Len()/(50<<10) >= sessions {
			sessions++
			_ = c.Close()
			c = m.dial(t)
		}
		<-doomed
	}
	var want strings.Builder
	for i := 1; i <= 100000; i++ {
		fmt.Fprintln(&want, i)
	}
	if got.String() != want.String() {
		t.Errorf("%d bytes over %d sessions, want %d", got.Len(), sessions, want.Len())
	}
	t.Logf("%d bytes over %d sessions", got.Len(), sessions)
}

func testShutdown(t *testing.T, m *machine, _ *agent.Client) {
	c := m.dial(t)
	if _, err := c.Shutdown(deadline(t, time.Minute), &agentpb.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- m.cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("qemu: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the guest has not powered off")
	}
}
