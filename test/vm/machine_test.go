package vm_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// annotated gives a pod annotations of ours.
func annotated(pairs ...string) func(*runtimeapi.PodSandboxConfig) {
	return func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Annotations = make(map[string]string)
		for i := 0; i < len(pairs); i += 2 {
			cfg.Annotations["vmruntime.io/"+pairs[i]] = pairs[i+1]
		}
	}
}

// sized gives a pod a memory limit in bytes.
func sized(memory int64) func(*runtimeapi.PodSandboxConfig) {
	return func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory}
	}
}

// machinePod is a pod that is large enough for the tiny machine.
func (b *bed) machinePod(ctx context.Context, t *testing.T, image string, change ...func(*runtimeapi.PodSandboxConfig)) *pod {
	t.Helper()
	if err := b.pull(ctx, image); err != nil {
		t.Fatal(err)
	}
	return b.vmPod(ctx, t, append([]func(*runtimeapi.PodSandboxConfig){sized(192 << 20)}, change...)...)
}

// machine runs a tiny machine in a pod of its own and returns when its guest agent answers.
func (b *bed) machine(ctx context.Context, t *testing.T, image string, change ...func(*runtimeapi.PodSandboxConfig)) *ctr {
	t.Helper()
	return b.machinePod(ctx, t, image, change...).start(of("machine", image)).up(1)
}

// up waits until the machine has booted this often and commands can be run in it.
func (c *ctr) up(boots int) *ctr {
	c.t.Helper()
	c.ready(fmt.Sprintf("tiny: up boot=%d ", boots))
	c.answers()
	return c
}

// answers waits until commands can be run in the machine.
func (c *ctr) answers() {
	c.t.Helper()
	c.until("the machine runs commands", func() bool {
		resp, err := c.execSync(5, "true")
		return err == nil && resp.GetExitCode() == 0
	})
}

// says fails unless a script prints all of the lines.
func (c *ctr) says(script string, lines ...string) string {
	c.t.Helper()
	out := c.sh(script)
	for _, want := range lines {
		if !strings.Contains("\n"+out, "\n"+want+"\n") {
			c.t.Errorf("%s says\n%swithout the line %q", script, out, want)
		}
	}
	return out
}

// A machine boots from its image's disk: as a fresh and larger overlay for each container, with the pod's size and identity.
func TestMachine(t *testing.T) {
	ctx, b := use(t)
	uid := "0f3c2c1e-8b6a-4e1f-9d35-5b1f0e6a7c42"
	p := b.machinePod(ctx, t, images.Tiny, annotated("root-disk-size", "3Gi"), func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Metadata.Uid = uid
		cfg.Linux.Resources.CpuQuota, cfg.Linux.Resources.CpuPeriod = 200000, 100000
	})
	c := p.start(of("machine", images.Tiny)).up(1)
	info := c.says("info", "firmware=bios", "boots=1", "cpus=2", "sockets=1", "cores=2", "uuid="+uid, "serial="+uid)
	if kib, _ := strconv.Atoi(regexp.MustCompile(`MemTotal=(\d+)`).FindStringSubmatch(info)[1]); kib < 160<<10 || kib > 256<<10 {
		t.Errorf("the machine has %d KiB, want those of the limit of 192 MiB and the overhead, less its kernel", kib)
	}
	c.says("blocks | cut -d ' ' -f 1-4", "disk=vda sectors=6291456 mode=rw serial=root", "disk=vdb sectors="+seedSectors(c)+" mode=ro serial=seed")
	resp, err := c.execSync(10, "sh", "-c", "echo out; echo err >&2; exit 7")
	if err != nil || resp.GetExitCode() != 7 || string(resp.GetStdout()) != "out\n" || string(resp.GetStderr()) != "err\n" {
		t.Errorf("ExecSync: %v, %v; want out, err and 7", resp, err)
	}
	if _, err := c.execSync(1, "sleep", "777"); err == nil {
		t.Error("a command outlives its timeout")
	} else {
		refused(t, err, codes.DeadlineExceeded)
	}
	c.until("the command is killed", func() bool { return !strings.Contains(c.sh("ps -o args"), "sleep 777") })
	checkMachineStats(t, c)
	c.stop(30)
	if s := c.wait(); s.GetExitCode() != 0 || s.GetReason() != "Completed" {
		t.Errorf("a machine that was asked to stop: exit code %d, %s %s; want 0, Completed", s.GetExitCode(), s.GetReason(), s.GetMessage())
	}
	again := p.start(with(of("machine", images.Tiny), func(c *runtimeapi.ContainerConfig) {
		c.Metadata.Attempt, c.LogPath = 1, "again.log"
	})).up(1)
	again.says("info", "boots=1", "uuid="+uid)
}

func seedSectors(c *ctr) string {
	return strings.TrimSpace(c.sh("cat /sys/block/vdb/size"))
}

func checkMachineStats(t *testing.T, c *ctr) {
	t.Helper()
	c.sh("dd if=/dev/urandom of=/written bs=1M count=20 && sync")
	resp, err := c.rt.ContainerStats(c.ctx, &runtimeapi.ContainerStatsRequest{ContainerId: c.id})
	if err != nil {
		t.Fatal(err)
	}
	s := resp.GetStats()
	if used := s.GetWritableLayer().GetUsedBytes().GetValue(); used < 20<<20 || used > 200<<20 {
		t.Errorf("the writable layer has %d bytes, want the 20 MiB written and little more", used)
	}
	if s.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || s.GetMemory().GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("statistics %v, want processor time and memory", s)
	}
	if available := s.GetMemory().GetAvailableBytes().GetValue(); available == 0 || available > 256<<20 {
		t.Errorf("%d bytes of memory are available, want what the guest's balloon tells", available)
	}
	status, err := c.rt.ContainerStatus(c.ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
	if err != nil || !strings.Contains(status.GetInfo()["info"], `"state":"running"`) || !strings.Contains(status.GetInfo()["info"], `"fileSystems"`) {
		t.Errorf("the verbose status says %v, %v; want the machine's state and what its agent tells", status.GetInfo(), err)
	}
}

// A guest's own reboot is not the container's end, poweroff is its good end and a panic its bad one.
func TestMachineEnds(t *testing.T) {
	ctx, b := use(t)
	p := b.machinePod(ctx, t, images.Tiny)
	c := p.start(of("machine", images.Tiny)).up(1)
	before := c.sh("net >/dev/null; shownet | grep -v valid_lft")
	if !strings.Contains(before, " "+c.ip()+"/") {
		t.Errorf("by DHCP the machine has\n%s\nwithout the pod's address %s", before, c.ip())
	}
	_, _ = c.execSync(10, "reboot") // its end may not be told
	c.up(2)
	if after := c.sh("net >/dev/null; shownet | grep -v valid_lft"); after != before {
		t.Errorf("after a reboot the network is\n%s\nbefore it was\n%s", after, before)
	}
	if s := c.status(); s.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after a reboot the container is %v", s)
	}
	_, _ = c.execSync(10, "poweroff") // nor this one's
	if s := c.wait(); s.GetExitCode() != 0 || s.GetReason() != "Completed" {
		t.Errorf("after a poweroff: exit code %d, %s; want 0, Completed", s.GetExitCode(), s.GetReason())
	}
	if text := c.text(); !strings.Contains(text, "tiny: up boot=1 ") || !strings.Contains(text, "Power down") {
		t.Errorf("the log does not have the whole life of the machine:\n%s", text)
	}
	crashing := p.start(with(of("machine", images.Tiny), func(c *runtimeapi.ContainerConfig) {
		c.Metadata.Attempt, c.LogPath = 1, "crash.log"
	})).up(1)
	if got := crashing.sh("net >/dev/null; shownet | grep -v valid_lft"); got != before {
		t.Errorf("the next container has the network\n%s\nwant\n%s", got, before)
	}
	_, _ = crashing.execSync(5, "crash") // nor this one's
	if s := crashing.wait(); s.GetExitCode() == 0 || s.GetReason() != "GuestFailed" {
		t.Errorf("after a panic: exit code %d, %s; want another than 0, GuestFailed", s.GetExitCode(), s.GetReason())
	}
	killed := p.start(with(of("machine", images.Tiny), func(c *runtimeapi.ContainerConfig) {
		c.Metadata.Attempt, c.LogPath = 2, "killed.log"
	})).ready("tiny: up")
	kill(t, p.verboseInfo().Guest.QEMU.PID)
	if s := killed.wait(); s.GetExitCode() != 137 || s.GetReason() != "VMFailed" {
		t.Errorf("after QEMU's death: exit code %d, %s; want 137, VMFailed", s.GetExitCode(), s.GetReason())
	}
}

// A machine that is told to stop while it boots shuts down as soon as it can, long before its time is over.
func TestMachineStopsWhileItBoots(t *testing.T) {
	ctx, b := use(t)
	c := b.machinePod(ctx, t, images.Tiny).start(of("machine", images.Tiny))
	if text := c.text(); strings.Contains(text, "tiny: up") {
		t.Fatal("the machine has booted already: the test shows nothing")
	}
	const grace = 240
	began := time.Now()
	c.stop(grace)
	if s := c.wait(); s.GetExitCode() != 0 || s.GetReason() != "Completed" {
		t.Errorf("exit code %d, %s %s; want 0, Completed", s.GetExitCode(), s.GetReason(), s.GetMessage())
	}
	if took := time.Since(began); took > grace/2*time.Second {
		t.Errorf("it took %s", took)
	}
}

// The console is the log: whole and in order, also when it floods and the daemon is killed meanwhile, over rotation.
func TestMachineConsole(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	const lines = 30000
	c.sh(fmt.Sprintf("(sleep 1; flood %d >/dev/console) >/dev/null 2>&1 &", lines))
	last := fmt.Sprintf("flood %012d end", lines)
	files := []string{c.logFile()}
	over := func() bool {
		return slices.ContainsFunc(files, func(file string) bool { return strings.Contains(readFile(file), last) })
	}
	crashes := 0
	for range 3 {
		c.until("the flood goes on, or is over", func() bool { return fileSize(c.logFile()) > 200_000 || over() })
		if over() {
			break
		}
		b.crash(t)
		crashes++
		time.Sleep(time.Second) // the guest goes on writing
		if err := b.StartVMRuntime(ctx); err != nil {
			t.Fatal(err)
		}
		rotated := fmt.Sprintf("%s.%d", c.logFile(), crashes)
		if err := os.Rename(c.logFile(), rotated); err != nil {
			t.Fatal(err)
		}
		files = append(files[:len(files)-1], rotated, c.logFile())
		if _, err := b.rt.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: c.id}); err != nil {
			t.Fatal(err)
		}
	}
	if crashes == 0 {
		t.Error("the flood was over before the daemon could be killed in it")
	}
	c.until("the flood is over", over)
	next := 1
	for line := range strings.Lines(streamText(t, "stdout", files...)) {
		if !strings.HasPrefix(line, "flood ") {
			continue
		}
		if want := fmt.Sprintf("flood %012d ", next); !strings.HasPrefix(line, want) {
			t.Fatalf("line %d of the flood is %q: lost, doubled or out of order", next, line)
		}
		next++
	}
	if next != lines+1 {
		t.Errorf("the log has %d lines of the flood, want %d", next-1, lines)
	}
}

// Attach is the serial console: all see it, one types.
func TestMachineAttach(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	watcher, typist := c.crictl("attach", c.id), c.crictl("attach", "-i", c.id)
	keys, err := typist.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	for i, cmd := range []*exec.Cmd{watcher, typist} {
		out, err := os.Create(filepath.Join(t.TempDir(), strconv.Itoa(i)))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		seen, cmd.Stdout = append(seen, out.Name()), out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = cmd.Process.Kill() // by its ID
			_ = cmd.Wait()
		}()
	}
	// Who attaches late sees only what is typed from then on.
	c.until("the console answers what is typed, and both see it", func() bool {
		if _, err := io.WriteString(keys, "echo typed $((40+2))\n"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond)
		for _, file := range append(seen, c.logFile()) {
			if data, err := os.ReadFile(file); err != nil || !bytes.Contains(data, []byte("typed 42")) {
				return false
			}
		}
		return true
	})
	second := c.crictl("attach", "-i", c.id)
	second.Stdin = strings.NewReader("echo stolen\n")
	if out, err := second.CombinedOutput(); !strings.Contains(string(out), "somebody else types") {
		t.Errorf("a second one that types: %v, %s; want to be told that somebody else does", err, out)
	}
	if strings.Contains(c.text(), "stolen") {
		t.Error("two have typed on one console")
	}
	// The console is silent now: nothing but the end of its input tells that the typist has gone.
	_ = typist.Process.Kill() // by its ID
	_ = typist.Wait()
	c.until("another one may type", func() bool {
		next := c.crictl("attach", "-i", c.id)
		next.Stdin = strings.NewReader("echo next $((40+3))\n")
		out, err := next.CombinedOutput()
		return err == nil && !bytes.Contains(out, []byte("somebody else types")) && strings.Contains(c.text(), "next 43")
	})
}

// typed types a command on the machine's console until its answer is in the log.
func (c *ctr) typed(line, answer string) {
	c.t.Helper()
	cmd := c.crictl("attach", "-i", c.id)
	keys, err := cmd.StdinPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill() // by its ID
		_ = cmd.Wait()
	}()
	if _, err := io.WriteString(keys, line+"\n"); err != nil {
		c.t.Fatal(err)
	}
	c.ready(answer)
}

// Port-forward reaches what listens on the machine's addresses.
func TestMachinePortForward(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	c.sh("net >/dev/null; serve 8080 >/dev/null 2>&1")
	cmd := c.crictl("port-forward", c.pod.id, "18081:8080")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill() // by its ID
		_ = cmd.Wait()
	}()
	c.until("the forwarded port answers", func() bool {
		out, err := b.fetch(ctx, "http://127.0.0.1:18081/")
		return err == nil && out == "tiny\n"
	})
}

// What needs input has no way into a machine with qemu-guest-agent alone, and that is said in time, with what would help: our agent,
// by which loopback ports are reached too.
func TestMachineWaysIn(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny, annotated("guest-agent-install", "true"))
	c.sh("net >/dev/null; serve 8080 >/dev/null 2>&1")
	cat := func() (string, error) {
		cmd := c.crictl("exec", "-i", c.id, "cat")
		cmd.Stdin = strings.NewReader("input")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	out, err := cat()
	for _, want := range []string{"no way into the machine", "install qemu-guest-agent", "vmruntime.io/guest-agent-install"} {
		if err == nil || !strings.Contains(out, want) {
			t.Errorf("exec with input, without a way in: %v, %s; want to be told %q", err, out, want)
		}
	}
	c.sh("modprobe virtiofs; mount -t virtiofs shares /mnt; /mnt/agent/vmagent machine </dev/null >/dev/null 2>&1 &")
	c.until("our agent runs commands with input", func() bool {
		out, err := cat()
		return err == nil && out == "input"
	})
	cmd := c.crictl("port-forward", c.pod.id, "18082:8081")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill() // by its ID
		_ = cmd.Wait()
	}()
	c.until("the port of the loopback answers", func() bool {
		out, err := b.fetch(ctx, "http://127.0.0.1:18082/")
		return err == nil && out == "tiny\n"
	})
}

// The hardware that annotations ask for.
func TestMachineHardware(t *testing.T) {
	for name, tc := range map[string]struct {
		image string
		ask   []string
		info  []string
		disk  string
		more  func(*testing.T, *ctr)
	}{
		"efi-scsi-tpm": {images.Tiny, []string{"firmware", "efi", "disk-bus", "scsi", "tpm", "true", "video", "none"}, []string{"firmware=efi", "secureboot=off", "tpm=2"}, "disk=sda ", outlivesTPM},
		"raw-sata":     {images.TinyImg, []string{"disk-bus", "sata", "video", "virtio", "datasource", "ignition", "ignition", ignition}, []string{"firmware=bios", "tpm="}, "disk=sda ", hasIgnition},
		"root":         {images.TinyAtRoot, []string{"cpu-model", "Nehalem", "datasource", "none"}, []string{"cpumodel=Intel Core i7 9xx (Nehalem Class Core i7)"}, "disk=vda ", nil},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, b := use(t)
			c := b.machine(ctx, t, tc.image, annotated(tc.ask...))
			c.says("info", tc.info...)
			if out := c.sh("blocks"); !strings.Contains(out, tc.disk) {
				t.Errorf("blocks says\n%swithout %q", out, tc.disk)
			}
			if tc.more != nil {
				tc.more(t, c)
			}
		})
	}
}

// outlivesTPM holds that a machine goes on whose TPM dies, without it, and ends in order.
func outlivesTPM(t *testing.T, c *ctr) {
	t.Helper()
	const measure = "timeout -s KILL 20 cat /sys/class/tpm/tpm0/pcr-sha256/0 2>/dev/null | wc -c"
	if got := strings.TrimSpace(c.sh(measure)); got != "65" {
		t.Errorf("the TPM gives %s bytes of a register's 64 digits", got)
	}
	kill(t, c.pod.verboseInfo().Guest.TPM.PID)
	if got := strings.TrimSpace(c.sh(measure)); got != "0" {
		t.Errorf("without swtpm the TPM gives %s bytes", got)
	}
	c.stop(30)
	if s := c.wait(); s.GetExitCode() != 0 || s.GetReason() != "Completed" {
		t.Errorf("without its TPM the machine ends with exit code %d, %s; want 0, Completed", s.GetExitCode(), s.GetReason())
	}
}

const ignition = `{"ignition": {"version": "3.4.0"}, "storage": {"files": [{"path": "/etc/given", "contents": {"source": "data:,given"}}]}}`

// hasIgnition holds that Ignition finds what the pod gives, as a configuration to merge, and our own, where it looks.
func hasIgnition(t *testing.T, c *ctr) {
	t.Helper()
	got := c.sh("modprobe qemu_fw_cfg; cat /sys/firmware/qemu_fw_cfg/by_name/opt/com.coreos/config/raw")
	for _, want := range []string{base64.StdEncoding.EncodeToString([]byte(ignition)), "vmruntime-exec"} {
		if !strings.Contains(got, want) {
			t.Errorf("the guest finds no %s in its Ignition:\n%s", want, got)
		}
	}
}

// A kernel and an initrd out of the image, without boot loader or disk.
func TestMachineKernelBoot(t *testing.T) {
	ctx, b := use(t)
	p := b.machinePod(ctx, t, images.KernelBoot, annotated("kernel", "/boot/vmlinuz", "initrd", "/boot/initrd", "kernel-args", "console=ttyS0 quiet no_timer_check made=here"))
	c := p.start(of("machine", images.KernelBoot)).ready("tiny: up")
	c.typed("info | grep cmdline", "cmdline=console=ttyS0 quiet no_timer_check made=here")
}

// What a watchdog that nobody feeds does is what was asked.
func TestMachineWatchdog(t *testing.T) {
	for action, check := range map[string]func(*testing.T, *ctr){
		"poweroff": endedByWatchdog,
		"reset":    func(_ *testing.T, c *ctr) { c.up(2) },
		"pause":    stoodByWatchdog,
		"inject-nmi": func(_ *testing.T, c *ctr) {
			c.until("the kernel tells of the NMI", func() bool { return strings.Contains(c.sh("dmesg"), "NMI received") })
			c.says("info", "boots=1")
		},
	} {
		t.Run(action, func(t *testing.T) {
			ctx, b := use(t)
			c := b.machine(ctx, t, images.Tiny, annotated("watchdog", action))
			c.says("starve", "watchdog armed")
			check(t, c)
			if running := c.status().GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING; running != (action != "poweroff") {
				t.Errorf("the container's state is %s", c.status().GetState())
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		ctx, b := use(t)
		b.machine(ctx, t, images.Tiny, annotated("watchdog", "none")).says("starve || true", "no watchdog")
	})
}

func endedByWatchdog(t *testing.T, c *ctr) {
	t.Helper()
	if s := c.wait(); s.GetExitCode() == 0 || s.GetReason() != "GuestFailed" || !strings.Contains(s.GetMessage(), "watchdog") {
		t.Errorf("after the watchdog: exit code %d, %s %s; want another than 0, GuestFailed, the watchdog", s.GetExitCode(), s.GetReason(), s.GetMessage())
	}
}

// stoodByWatchdog holds that the machine stands still, says why, and is brought back by a reset.
func stoodByWatchdog(t *testing.T, c *ctr) {
	t.Helper()
	c.until("the machine stands still", func() bool { return c.vmState() == "watchdog" })
	if out := c.vm("show", c.pod.id); !regexp.MustCompile(`state +watchdog\n`).MatchString(out) {
		t.Errorf("show says of a machine that its watchdog has stopped\n%s", out)
	}
	c.vm("reset", c.pod.id)
	c.up(2)
	c.says("starve", "watchdog armed")
	c.until("the machine stands still again", func() bool { return c.vmState() == "watchdog" })
}

// What cannot be is refused in words, and leaves nothing.
func TestMachineRefused(t *testing.T) {
	ctx, b := use(t)
	cfg := b.podConfig(t, annotated("video-card", "std", "video", "vga"))
	_, err := b.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handlerVM})
	refused(t, err, codes.InvalidArgument, "vmruntime.io/video-card", "unknown", `vmruntime.io/video is "vga"`)
	p := b.vmPod(ctx, t, annotated("root-disk-size", "1Mi"))
	for image, words := range map[string][]string{
		images.TwoDisks: {"a.qcow2", "b.qcow2"},
		images.Backing:  {"backing"},
		images.Corrupt:  {"corrupt.qcow2"},
		images.Tiny:     {"vmruntime.io/root-disk-size", "at least"},
	} {
		if err := b.pull(ctx, image); err != nil {
			t.Fatal(err)
		}
		_, err := p.tryCreate(of("machine", image))
		refused(t, err, codes.InvalidArgument, words...)
	}
	q := b.machinePod(ctx, t, images.Tiny)
	_, err = q.tryCreate(with(of("machine", images.Tiny), func(c *runtimeapi.ContainerConfig) { c.Command = []string{"sh"} }))
	refused(t, err, codes.InvalidArgument, "command", "cloud-init")
	// An ordinary init container may come first; while the machine is there nothing else may be.
	q.output(shell("init", "echo prepared"))
	left := q.create(of("machine", images.Tiny)) // by a kubelet that was restarted before it could start it
	c := q.start(with(of("machine", images.Tiny), func(c *runtimeapi.ContainerConfig) { c.Metadata.Attempt = 1 })).up(1)
	refused(t, left.tryStart(), codes.FailedPrecondition, "one at a time")
	_, err = q.tryCreate(idle("sidecar"))
	refused(t, err, codes.FailedPrecondition, "sidecar", "machine")
	c.expect("echo still here", "still here")
}
