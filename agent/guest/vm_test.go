package guest_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// machine is a guest under TCG that runs this checkout's agent on the kernel and initramfs of make guest.
type machine struct {
	t       *testing.T
	dir     string
	started time.Time
	cmd     *exec.Cmd
	console *os.File // what QEMU and virtiofsd print
}

// testVersion tells that the guest runs what this test has built.
const testVersion = "test-of-this-checkout"

// guestDir is where make guest puts its result.
func guestDir() string {
	if dir := os.Getenv("VMRUNTIME_GUEST"); dir != "" {
		return dir
	}
	return filepath.Join("..", "..", "out", "guest")
}

func needGuest(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest under TCG: run by make test")
	}
	for _, tool := range []string{"qemu-system-x86_64", "mkfs.erofs", "mkfs.ext4", "busybox"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s in PATH", tool)
		}
	}
	if _, err := os.Stat(filepath.Join(guestDir(), "manifest.json")); err != nil {
		t.Skipf("needs the guest's kernel and initramfs (make guest): %v", err)
	}
}

func output(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}

// bootMachine starts a guest with the disks "image" (EROFS with busybox), "scratch" (ext4) and "image2".
func bootMachine(t *testing.T) *machine {
	t.Helper()
	needGuest(t)
	m := &machine{t: t, dir: t.TempDir()}
	var err error
	if m.console, err = os.Create(m.path("console")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.console.Close() })
	m.buildInitramfs()
	m.buildImage()
	output(t, m.dir, "truncate", "-s", "256M", "scratch.img")
	output(t, m.dir, "mkfs.ext4", "-q", "-O", "^has_journal", "scratch.img")

	var man struct{ Kernel, Cmdline string }
	data, err := os.ReadFile(filepath.Join(guestDir(), "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &man); err != nil {
		t.Fatal(err)
	}
	args := []string{
		"-M", "q35,memory-backend=mem", "-accel", "tcg", "-cpu", "max", "-m", "512M", "-smp", "2",
		"-object", "memory-backend-memfd,id=mem,size=512M,share=on", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", filepath.Join(guestDir(), man.Kernel), "-initrd", m.path("initramfs"), "-append", man.Cmdline,
		"-qmp", "unix:" + m.path("qmp.sock") + ",server=on,wait=off",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=agent,path=" + m.path("agent.sock") + ",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name=" + agent.PortName,
		"-device", "virtio-scsi-pci,id=scsi0",
		"-drive", "if=none,id=d0,format=raw,file=" + m.path("scratch.img"), "-device", "scsi-hd,drive=d0,serial=scratch",
		"-drive", "if=none,id=d1,format=raw,readonly=on,file=" + m.path("image.erofs"), "-device", "scsi-hd,drive=d1,serial=image",
		"-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01",
		"-netdev", "hubport,id=n1,hubid=0", "-device", "virtio-net-pci,netdev=n1,mac=52:54:00:00:00:02",
	}
	m.cmd = exec.Command("qemu-system-x86_64", append(args, m.startShare()...)...)
	m.cmd.Stdout, m.cmd.Stderr = m.console, m.console
	m.started = time.Now()
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
		if t.Failed() {
			text, _ := os.ReadFile(m.path("console"))
			t.Logf("console of the guest:\n%s", text)
		}
	})
	return m
}

const virtiofsd = "/usr/lib/qemu/virtiofsd"

// startShare serves the directory "share" by virtiofs, where Debian 12's virtiofsd is, and gives QEMU's
// arguments for it.
func (m *machine) startShare() []string {
	m.t.Helper()
	if _, err := os.Stat(virtiofsd); err != nil {
		return nil
	}
	if err := os.Mkdir(m.path("share"), 0o755); err != nil {
		m.t.Fatal(err)
	}
	cmd := exec.Command(virtiofsd, "--socket-path="+m.path("fs.sock"), "-o", "source="+m.path("share"), "-o", "sandbox=chroot",
		"--rlimit-nofile=0", "-f")
	cmd.Stdout, cmd.Stderr = m.console, m.console
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for ctx := deadline(m.t, 10*time.Second); ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(m.path("fs.sock")); err == nil {
			break
		}
	}
	return []string{"-chardev", "socket,id=fs,path=" + m.path("fs.sock"), "-device", "vhost-user-fs-pci,chardev=fs,tag=shares"}
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

// lz4Magic begins an archive in the kernel's LZ4 format.
const lz4Magic = 0x184c2102

// buildInitramfs puts this checkout's agent over the one in the built initramfs: the kernel unpacks
// archives one after the other.
func (m *machine) buildInitramfs() {
	m.t.Helper()
	output(m.t, "../..", "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+testVersion, "-o", m.path("vmagent"), "./cmd/vmagent")
	data, err := os.ReadFile(filepath.Join(guestDir(), "initramfs"))
	if err != nil {
		m.t.Fatal(err)
	}
	initProgram, err := os.ReadFile(m.path("vmagent"))
	if err != nil {
		m.t.Fatal(err)
	}
	var extra bytes.Buffer
	w := cpio.Newc.Writer(&extra)
	if err := w.WriteRecord(cpio.StaticFile("init", string(initProgram), 0o755)); err != nil {
		m.t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		m.t.Fatal(err)
	}
	// Nothing may follow an LZ4 archive, so it is unpacked here.
	if binary.LittleEndian.Uint32(data) == lz4Magic {
		if data, err = io.ReadAll(lz4.NewReader(bytes.NewReader(data))); err != nil {
			m.t.Fatalf("unpack the initramfs: %v", err)
		}
	}
	// The next archive begins at a multiple of four.
	data = append(data, make([]byte, (4-len(data)%4)%4)...)
	if err := os.WriteFile(m.path("initramfs"), append(data, extra.Bytes()...), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// buildImage makes image.erofs: busybox with hard links for its applets.
func (m *machine) buildImage() {
	m.t.Helper()
	root := m.path("image")
	for _, dir := range []string{"bin", "etc", "tmp", "proc", "sys", "dev"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		m.t.Fatal(err)
	}
	m.addProgram(root, busybox, "busybox")
	for applet := range strings.FieldsSeq("sh cat echo sleep true false head dd yes id stat ls grep kill ps tail wc seq stty mkdir nc ip hostname date printf env test sync tr df brctl cut") {
		if err := os.Link(filepath.Join(root, "bin/busybox"), filepath.Join(root, "bin", applet)); err != nil {
			m.t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0::/:/bin/sh\n"), 0o644); err != nil {
		m.t.Fatal(err)
	}
	m.addFirewalls(root)
	output(m.t, m.dir, "mkfs.erofs", "--quiet", "-T0", "image.erofs", "image")
}

func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// dial begins a session, as a daemon that has just started would.
func (m *machine) dial(t *testing.T) *agent.Client {
	t.Helper()
	ctx := deadline(t, time.Minute)
	for {
		c, err := agent.Dial(ctx, m.path("agent.sock"))
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
			return c
		}
		if ctx.Err() != nil {
			t.Fatalf("dial: %v", err)
		}
		time.Sleep(10 * time.Millisecond) // until QEMU has made the socket
	}
}

// qmp runs QMP commands, given as JSON, on a connection of their own.
func (m *machine) qmp(t *testing.T, commands ...string) {
	t.Helper()
	c, err := net.Dial("unix", m.path("qmp.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	dec := json.NewDecoder(c)
	next := func() map[string]json.RawMessage {
		for {
			msg := map[string]json.RawMessage{}
			if err := dec.Decode(&msg); err != nil {
				t.Fatal(err)
			}
			if msg["event"] == nil {
				return msg
			}
		}
	}
	next()
	for _, command := range append([]string{`{"execute":"qmp_capabilities"}`}, commands...) {
		if _, err := fmt.Fprintln(c, command); err != nil {
			t.Fatal(err)
		}
		if msg := next(); msg["error"] != nil {
			t.Fatalf("%s: %s", command, msg["error"])
		}
	}
}

// containerSpec is what the host would make for a plain container.
func containerSpec(args ...string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_RAW"}
	return &specs.Spec{
		Version: "1.0.2",
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/bin", "HOME=/"},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Root: &specs.Root{Path: "rootfs"},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
			{Destination: "/etc/resolv.conf", Type: "bind", Source: "/run/vm/sandbox/resolv.conf", Options: []string{"rbind", "rprivate", "rw"}},
		},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace},
			{Type: specs.MountNamespace},
			{Type: specs.IPCNamespace},
			{Type: specs.UTSNamespace},
			{Type: specs.NetworkNamespace},
			{Type: specs.CgroupNamespace},
		}},
	}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// runContainer creates and starts a container; change may alter the request and the spec.
func runContainer(t *testing.T, c *agent.Client, id string, spec *specs.Spec, change func(*agentpb.CreateContainerRequest)) {
	t.Helper()
	ctx := deadline(t, time.Minute)
	req := &agentpb.CreateContainerRequest{Id: id, RootfsDisk: "image"}
	if change != nil {
		change(req)
	}
	req.OciSpec = encode(t, spec)
	if _, err := c.CreateContainer(ctx, req); err != nil {
		t.Fatalf("create %s: %v", id, err)
	}
	if _, err := c.StartContainer(ctx, &agentpb.StartContainerRequest{Id: id}); err != nil {
		t.Fatalf("start %s: %v", id, err)
	}
}

func removeContainer(t *testing.T, c *agent.Client, id string) {
	t.Helper()
	if _, err := c.RemoveContainer(deadline(t, time.Minute), &agentpb.RemoveContainerRequest{Id: id}); err != nil {
		t.Errorf("remove %s: %v", id, err)
	}
}

// readAll reads a process's output to its end and gives both streams and the state.
func readAll(t *testing.T, c *agent.Client, ref *agentpb.ProcessRef) (stdout, stderr string, st *agentpb.ProcessState) {
	t.Helper()
	ctx := deadline(t, time.Minute)
	var bufs [2]bytes.Buffer
	for {
		resp, err := c.ReadOutput(ctx, &agentpb.ReadOutputRequest{
			Process: ref, StdoutOffset: uint64(bufs[0].Len()), StderrOffset: uint64(bufs[1].Len()),
			StdoutAcknowledged: uint64(bufs[0].Len()), StderrAcknowledged: uint64(bufs[1].Len()),
		})
		if err != nil {
			t.Fatalf("read output of %v: %v", ref, err)
		}
		for _, chunk := range resp.Chunks {
			buf := &bufs[chunk.Stream]
			if chunk.Offset != uint64(buf.Len()) {
				t.Fatalf("chunk of %s at %d, want %d", chunk.Stream, chunk.Offset, buf.Len())
			}
			buf.Write(chunk.Data)
		}
		if resp.Eof {
			st = resp.State
			break
		}
	}
	if st == nil {
		st = waitExit(t, c, ref)
	}
	return bufs[0].String(), bufs[1].String(), st
}

func waitExit(t *testing.T, c *agent.Client, ref *agentpb.ProcessRef) *agentpb.ProcessState {
	t.Helper()
	ctx := deadline(t, time.Minute)
	for {
		st, err := c.Wait(ctx, ref)
		if err != nil {
			t.Fatalf("wait for %v: %v", ref, err)
		}
		if st.Exited {
			return st
		}
	}
}

func startExec(t *testing.T, c *agent.Client, container, id string, p *specs.Process, stdin bool) *agentpb.ProcessRef {
	t.Helper()
	_, err := c.Exec(deadline(t, time.Minute), &agentpb.ExecRequest{ContainerId: container, ExecId: id, Process: encode(t, p), Stdin: stdin})
	if err != nil {
		t.Fatalf("exec %v: %v", p.Args, err)
	}
	return &agentpb.ProcessRef{ContainerId: container, ExecId: id}
}

func sh(script string) *specs.Process { return &specs.Process{Args: []string{"sh", "-c", script}} }
