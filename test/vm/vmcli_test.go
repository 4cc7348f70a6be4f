package vm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image/png"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// vmCommand is `vmruntime vm` of the node.
func (b *bed) vmCommand(ctx context.Context, args ...string) *exec.Cmd {
	flags := []string{"--config", filepath.Join(b.Root, "vmruntime", "vmruntime.toml"), "vm"}
	return exec.CommandContext(ctx, b.program, append(flags, args...)...)
}

// tryVM runs a vm command to its end and returns what it printed.
func (p *pod) tryVM(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(p.ctx, 60*time.Second)
	defer cancel()
	var stderr bytes.Buffer
	cmd := p.vmCommand(ctx, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("vmruntime vm %s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return string(out), err
}

// vm is tryVM for what has to succeed.
func (p *pod) vm(args ...string) string {
	p.t.Helper()
	out, err := p.tryVM(args...)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

// vmRefused fails unless a vm command is refused with these words.
func (p *pod) vmRefused(words string, args ...string) {
	p.t.Helper()
	if out, err := p.tryVM(args...); err == nil || !strings.Contains(err.Error(), words) {
		p.t.Errorf("vmruntime vm %s: %v, printed %q; want an error with %q", strings.Join(args, " "), err, out, words)
	}
}

func (p *pod) ref() string {
	return p.cfg.GetMetadata().GetNamespace() + "/" + p.cfg.GetMetadata().GetName()
}

// vmState is what the list says of the pod.
func (p *pod) vmState() string {
	p.t.Helper()
	var list struct {
		VMs []struct{ PodID, State string } `json:"vms"`
	}
	if err := json.Unmarshal([]byte(p.vm("list", "-o", "json")), &list); err != nil {
		p.t.Fatal(err)
	}
	for _, vm := range list.VMs {
		if vm.PodID == p.id {
			return vm.State
		}
	}
	p.t.Fatalf("the list has no pod %s: %v", p.id, list)
	return ""
}

// What an administrator sees of a machine, and does to it.
func TestVMCommands(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	checkVMList(t, c)
	checkVMShow(t, c)
	checkVMScreenshot(t, c)
	checkVMPause(t, c)
	c.vm("nmi", c.id)
	c.until("the kernel tells of the NMI", func() bool { return strings.Contains(c.sh("dmesg"), "NMI received") })
	// A paused machine is asked to end as any other.
	c.vm("pause", c.pod.id)
	c.stop(60)
	if s := c.wait(); s.GetExitCode() != 0 || s.GetReason() != "Completed" {
		t.Errorf("a paused machine that was stopped: exit code %d, %s %s; want 0, Completed", s.GetExitCode(), s.GetReason(), s.GetMessage())
	}
	c.until("the list says that it is stopped", func() bool { return c.vmState() == "stopped" })
	c.vmRefused("has no VM at the moment", "pause", c.pod.id)
	if out := c.vm("show", c.pod.id); !strings.Contains(out, "exited, exit code 0, Completed") {
		t.Errorf("show says of a machine that has ended\n%s", out)
	}
}

func checkVMList(t *testing.T, c *ctr) {
	t.Helper()
	want := regexp.MustCompile(c.pod.id[:13] + ` +default +testvmcommands +machine +running +1 +256 MiB +` + regexp.QuoteMeta(c.ip()) + ` +(\d+m)?\d+s\n`)
	if out := c.vm("list"); !want.MatchString(out) {
		t.Errorf("list says\n%swant a line like %s", out, want)
	}
	c.vmRefused("there is no VM pod default/other", "show", "default/other")
	c.vmRefused(`begins with "zzz"`, "show", "zzz")
	c.vmRefused(`--output is "yaml"`, "list", "-o", "yaml")
}

func checkVMShow(t *testing.T, c *ctr) {
	t.Helper()
	for _, ref := range []string{c.pod.id, c.pod.id[:20], c.id, c.id[:20], c.ref()} {
		out := c.vm("show", ref)
		for _, want := range []string{
			`state +running\n`, `QEMU +process \d+, acceleration tcg\n`, `disk +root: read [1-9]\d* MiB`, `disk +seed: `, `network +eth0: .*` + regexp.QuoteMeta(c.ip()),
			`container +machine ` + c.id + `, running\n`, `guest agent +qemu-guest-agent answers\n`, ` file system +/: ext4`,
		} {
			if !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("show %s says\n%swithout %s", ref, out, want)
			}
		}
	}
	var show struct {
		QemuPID int
		Info    map[string]struct{ VM struct{ State string } }
	}
	if err := json.Unmarshal([]byte(c.vm("show", "-o", "json", c.id)), &show); err != nil || show.Info[c.id].VM.State != "running" {
		t.Errorf("show as JSON: %v, %+v; want the verbose status of the container in it", err, show)
	}
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", show.QemuPID)); err != nil || !strings.HasPrefix(string(name), "qemu") {
		t.Errorf("process %d is %q, %v; want QEMU", show.QemuPID, name, err)
	}
}

func checkVMScreenshot(t *testing.T, c *ctr) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "screen.png")
	c.vm("screenshot", c.pod.id, file)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{data, []byte(c.vm("screenshot", c.pod.id, "-"))} {
		img, err := png.Decode(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if size := img.Bounds().Size(); size.X < 640 || size.X > 4096 || size.Y < 350 || size.Y > 4096 {
			t.Errorf("the screen is %s", size)
		}
	}
}

// While a machine is paused, its time stands still.
func checkVMPause(t *testing.T, c *ctr) {
	t.Helper()
	c.sh("(while [ ! -e /run/quiet ]; do echo tick; sleep 0.1; done) >/dev/console 2>/dev/null &")
	c.ready("tick")
	uptime := func() time.Duration {
		seconds, err := strconv.ParseFloat(strings.Fields(c.sh("cat /proc/uptime"))[0], 64)
		if err != nil {
			t.Fatal(err)
		}
		return time.Duration(seconds * float64(time.Second))
	}
	began, before := time.Now(), uptime()
	for range 2 { // the second one changes nothing
		c.vm("pause", c.ref())
	}
	paused := time.Now()
	if state := c.vmState(); state != "paused" {
		t.Errorf("a paused machine is %s", state)
	}
	if out := c.vm("show", c.id); !regexp.MustCompile(`state +paused\n`).MatchString(out) {
		t.Errorf("show says of a paused machine\n%s", out)
	}
	c.vmRefused("the machine is paused", "reboot", c.id)
	size := fileSize(c.logFile())
	time.Sleep(3 * time.Second) // in which nothing may come
	if now := fileSize(c.logFile()); now != size {
		t.Errorf("a paused machine has written %d bytes to its console", now-size)
	}
	stood := time.Since(paused) // at least: the machine goes on before the command has ended
	c.vm("resume", c.id)
	c.until("the console goes on", func() bool { return fileSize(c.logFile()) > size })
	if grown, passed := uptime()-before, time.Since(began); grown > passed-stood+500*time.Millisecond {
		t.Errorf("the machine's clock went on by %s in %s, of which it was paused for %s", grown, passed, stood)
	}
	if state := c.vmState(); state != "running" {
		t.Errorf("a resumed machine is %s", state)
	}
	c.sh("touch /run/quiet")
}

// A machine is booted again by the button, by its agent and by its keyboard.
func TestVMReboots(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	if by := c.vm("reboot", c.id); by != "asked qemu-guest-agent\n" {
		t.Errorf("reboot says %q", by)
	}
	c.up(2)
	c.sh("sync")
	c.vm("pause", c.id)
	c.vm("reset", c.id)
	c.up(3)
	if state := c.vmState(); state != "running" {
		t.Errorf("a machine that was paused is %s after a reset", state)
	}
	c.sh("sync; setsid sh -c 'sleep 1; kill $(cat /run/qemu-ga.pid)' </dev/null >/dev/null 2>&1 &") // the agent that runs this
	c.until("the guest agent has ended", func() bool { return !strings.Contains(c.vm("show", c.id), "guest agent") })
	if by := c.vm("reboot", c.id); !strings.Contains(by, "Ctrl-Alt-Del") {
		t.Errorf("reboot says %q", by)
	}
	c.up(4)
	if s := c.status(); s.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after all reboots the container is %v", s)
	}
}

// A machine is taken back to a snapshot: memory, processes and disk are what they were, container, log and network go on. So is the
// next machine of the sandbox, when the first one has powered off.
func TestVMSnapshot(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	c.sh("echo kept > /kept; sync; echo dirty > /dirty; mkdir -p /run/m; echo memory > /run/m/file")
	c.sh("setsid sh -c 'echo $$ > /run/m/pid; i=0; while :; do i=$((i+1)); echo tick $i > /dev/console; echo $i > /run/m/tick; sleep 0.3; done' </dev/null >/dev/null 2>&1 &")
	c.ready("tick 3\r\n")
	dir := t.TempDir()
	c.vm("snapshot", c.id, dir)
	at := c.sh("cat /run/m/tick")
	c.until("the machine goes on", func() bool { return c.sh("cat /run/m/tick") != at })
	c.vmRefused("must be empty", "snapshot", c.id, dir)
	address := c.sh("ip -o -4 addr show dev eth0")
	c.sh("rm /kept /dirty; echo later > /later; echo other > /run/m/file; sync; kill -9 $(cat /run/m/pid)")
	check := func(c *ctr, what string) {
		t.Helper()
		c.answers()
		if got := c.sh("cat /kept /dirty /run/m/file; ls /later 2>&1 || true"); !strings.HasPrefix(got, "kept\ndirty\nmemory\n") || !strings.Contains(got, "No such file") {
			t.Errorf("%s the machine has %q", what, got)
		}
		tick := c.sh("cat /run/m/tick")
		c.until(what+" the process goes on", func() bool { return c.sh("cat /run/m/tick") != tick })
		c.says("info", "boots=1")
		if got := c.sh("ip -o -4 addr show dev eth0"); got != address {
			t.Errorf("%s the address is %q, it was %q", what, got, address)
		}
		if now, err := strconv.ParseInt(strings.TrimSpace(c.sh("date +%s")), 10, 64); err != nil || time.Since(time.Unix(now, 0)).Abs() > 30*time.Second {
			t.Errorf("%s the clock is %d (%v)", what, now, err)
		}
		if s := c.status(); s.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("%s the container is %v", what, s)
		}
	}
	c.vm("restore", c.id, dir)
	check(c, "restored")
	b.crash(t)
	b.again(ctx, t)
	check(c, "after the daemon")
	c.stop(30)
	if s := c.wait(); s.GetExitCode() != 0 || s.GetReason() != "Completed" {
		t.Errorf("a restored machine that was asked to stop: %v", s)
	}
	c.vmRefused("has no VM", "restore", c.id, dir)
	next := c.pod.start(with(of("machine", images.Tiny), func(c *runtimeapi.ContainerConfig) { c.Metadata.Attempt, c.LogPath = 1, "next.log" })).up(1)
	damaged := filepath.Join(dir, "overlay.qcow2.zst")
	data := []byte(readFile(damaged))
	if err := os.WriteFile(damaged, data[:len(data)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	next.vmRefused("damaged", "restore", next.id, dir)
	next.says("info", "boots=1") // it goes on
	if err := os.WriteFile(damaged, data, 0o600); err != nil {
		t.Fatal(err)
	}
	next.vm("restore", next.id, dir)
	check(next, "in the next container")
}

// A machine's disk is copied while it runs, and another machine boots from the copy.
func TestVMClone(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	c.sh("echo cloned > /cloned") // not synced: freezing is what writes it
	file := filepath.Join(t.TempDir(), "disk.qcow2")
	if said := c.vm("clone", c.id, file); said != "copied with frozen file systems\n" {
		t.Errorf("clone says %q", said)
	}
	c.vmRefused("exists", "clone", c.id, file)
	c.vmRefused("must be in a directory", "clone", c.id, filepath.Join(filepath.Dir(file), "gone", "disk.qcow2"))
	c.sh("echo later > /later; sync")                                                         // the file systems are thawed
	c.sh("setsid sh -c 'sleep 1; kill $(cat /run/qemu-ga.pid)' </dev/null >/dev/null 2>&1 &") // the agent that runs this
	c.until("the guest agent has ended", func() bool { return !strings.Contains(c.vm("show", c.id), "guest agent") })
	if said := c.vm("clone", c.id, filepath.Join(filepath.Dir(file), "other.qcow2")); !strings.Contains(said, "as after a power cut") {
		t.Errorf("without an agent clone says %q", said)
	}
	c.pod.remove()
	const name = "vmruntime.test/clone:1"
	cmd := exec.CommandContext(ctx, b.program, "--config", filepath.Join(b.Root, "vmruntime", "vmruntime.toml"), "image", "import", file, name)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("image import: %v\n%s", err, out)
	}
	clone := b.vmPod(ctx, t, sized(192<<20)).start(of("machine", name)).up(2)
	if got := clone.sh("cat /cloned; ls /later 2>&1 || true"); !strings.HasPrefix(got, "cloned\n") || !strings.Contains(got, "No such file") {
		t.Errorf("the clone has %q", got)
	}
}

// The console on a terminal: raw, with what was before, ended by the escape.
func TestVMConsole(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	cmd := b.vmCommand(ctx, "console", "--replay", "20", c.id)
	master, err := pty.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	screen := newScreen(master)
	defer screen.close()
	shows := func(want string) {
		t.Helper()
		until(ctx, t, fmt.Sprintf("the terminal shows %q", want), func() bool { return strings.Contains(screen.text(), want) })
	}
	typed := func(text string) {
		t.Helper()
		if _, err := io.WriteString(master, text); err != nil {
			t.Fatal(err)
		}
	}
	shows("Ctrl-] ends the console.")
	shows("tiny: up boot=1") // of before
	typed("echo sum $((40+2))\r")
	shows("sum 42")
	typed("sleep 1000\r")
	shows("sleep 1000")
	typed("\x03echo broken $((1+1))\r") // Ctrl-C is the guest's
	shows("broken 2")
	c.vmRefused("somebody else types", "console", c.id)
	watcher := b.vmCommand(ctx, "console", "--read-only", "--replay", "3", c.id)
	var watched, failure bytes.Buffer
	watcher.Stderr = &failure
	out, err := watcher.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := watcher.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	for !strings.Contains(watched.String(), "broken 2") {
		n, err := out.Read(buf)
		watched.Write(buf[:n])
		if err != nil {
			t.Fatalf("the watcher has seen %q: %v", &watched, err)
		}
	}
	typed("\x1d")
	if err := cmd.Wait(); err != nil {
		t.Errorf("the escape ends the console with %v", err)
	}
	// Watching ends with the daemon; the machine goes on.
	if err := b.StopVMRuntime(); err != nil {
		t.Fatal(err)
	}
	if err := watcher.Wait(); err == nil || !strings.Contains(failure.String(), "vmruntime is stopping") {
		t.Errorf("with the daemon the watcher ends with %v, %q", err, &failure)
	}
	c.vmRefused("the daemon does not answer", "list")
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	c.expect("echo goes on", "goes on")
	if state := c.vmState(); state != "running" {
		t.Errorf("after the daemon's restart the machine is %s", state)
	}
}

// The screen through a local port and a local socket, one viewer after the other.
func TestVMVNC(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	socket := filepath.Join(t.TempDir(), "vnc.sock")
	for name, args := range map[string][]string{"port": nil, "socket": {"--socket", socket}} {
		cmd := b.vmCommand(ctx, append([]string{"vnc", c.pod.id}, args...)...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 4096)
		n, err := out.Read(buf)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		network, address := "unix", socket
		if args == nil {
			network = "tcp"
			address = regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(string(buf[:n]))
		}
		if !strings.Contains(string(buf[:n]), address) || !strings.Contains(string(buf[:n]), "vncviewer") {
			t.Errorf("%s: the command says %q", name, buf[:n])
		}
		for range 2 {
			checkRFB(t, network, address)
		}
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: Ctrl-C ends the command with %v", name, err)
		}
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the viewer's socket is left: %v", err)
	}
	none := b.machine(ctx, t, images.Tiny, annotated("video", "none"), func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-none" })
	none.vmRefused("the machine has no video", "vnc", none.pod.id)
	none.vmRefused("the machine has no video", "screenshot", none.pod.id, "-")
}

// checkRFB begins a session as RFC 6143 says, up to the size and name of the screen.
func checkRFB(t *testing.T, network, address string) {
	t.Helper()
	conn, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	read := func(n int) []byte {
		t.Helper()
		b := make([]byte, n)
		if _, err := io.ReadFull(conn, b); err != nil {
			t.Fatal(err)
		}
		return b
	}
	write := func(b string) {
		t.Helper()
		if _, err := io.WriteString(conn, b); err != nil {
			t.Fatal(err)
		}
	}
	if version := read(12); string(version) != "RFB 003.008\n" {
		t.Fatalf("the server says %q", version)
	}
	write("RFB 003.008\n")
	if types := read(int(read(1)[0])); !bytes.Contains(types, []byte{1}) {
		t.Fatalf("security types %v, want 1, none", types)
	}
	write("\x01")
	if result := read(4); !bytes.Equal(result, make([]byte, 4)) {
		t.Fatalf("security result %v", result)
	}
	write("\x01") // shared
	init := read(24)
	if width, height := int(init[0])<<8|int(init[1]), int(init[2])<<8|int(init[3]); width < 640 || height < 350 {
		t.Errorf("the screen is %dx%d", width, height)
	}
	if name := read(int(init[23])); !strings.Contains(string(name), "vmruntime-") {
		t.Errorf("the screen's name is %q", name)
	}
}

// The guest of a pod of containers can be seen, paused and resumed; what only a machine can be is refused.
func TestVMCommandsOfContainers(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(idle("c")).ready("ready")
	if out := p.vm("list"); !regexp.MustCompile(p.id[:13] + ` .* containers +running `).MatchString(out) {
		t.Errorf("list says\n%s", out)
	}
	if out := p.vm("show", c.id); !regexp.MustCompile(`agent +vmagent answers\n`).MatchString(out) || !regexp.MustCompile(`container +c `+c.id+`, running\n`).MatchString(out) {
		t.Errorf("show says\n%s", out)
	}
	if out := p.vm("console", "--read-only", p.id); !strings.Contains(out, "session with the host begins") {
		t.Errorf("the console has %q", out)
	}
	if out := p.vm("console", "--read-only", "--replay", "2", p.id); strings.Count(out, "\n") > 2 || out == "" {
		t.Errorf("the last two lines of the console are %q", out)
	}
	p.vmRefused("can only be read", "console", p.id)
	for _, args := range [][]string{{"reset", p.id}, {"reboot", p.id}, {"screenshot", p.id, "-"}, {"vnc", p.id}} {
		p.vmRefused("is one of containers, and no machine", args...)
	}
	p.vm("nmi", p.id)
	p.vm("pause", p.id)
	if state := p.vmState(); state != "paused" {
		t.Errorf("the paused guest is %s", state)
	}
	if _, err := c.execSync(2, "true"); err == nil {
		t.Error("a command runs in a paused guest")
	}
	p.vm("resume", p.id)
	c.expect("echo on", "on")
	// A container in a paused guest is stopped as any other: by its signal, in its time.
	p.vm("pause", p.id)
	c.stop(60)
	if s := c.wait(); s.GetExitCode() != 0 {
		t.Errorf("in a paused guest a container ends with %d %s; want its own end", s.GetExitCode(), s.GetReason())
	}
	p.vm("pause", p.id) // the sandbox's end does not wait for it either
	began := time.Now()
	p.remove()
	if took := time.Since(began); took > 45*time.Second {
		t.Errorf("a paused sandbox takes %s to end", took)
	}
}
