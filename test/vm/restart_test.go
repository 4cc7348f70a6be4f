package vm_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// crash kills the daemon as if it had crashed.
func (b *bed) crash(t *testing.T) {
	t.Helper()
	if err := b.KillVMRuntime(); err != nil {
		t.Fatal(err)
	}
}

// kill ends a process at once by its ID.
func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatalf("kill %d: %v", pid, err)
	}
}

// The daemon is killed three times while a container writes numbered lines and execs run: nothing is lost or doubled,
// what ended meanwhile has its exit code, and all goes on.
func TestDaemonKilled(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	writer := p.start(shell("writer", "i=0; while [ ! -e /dev/shm/stop ]; do i=$((i+1)); echo $i; done; echo $i >&2; exit 5"))
	ender := p.start(shell("ender", "while [ ! -e /dev/shm/end ]; do sleep 0.1; done; exit 6"))
	rest := p.start(idle("rest")).ready("ready")
	created := p.create(idle("created"))
	for i := range 3 {
		if i == 1 {
			rest.sh("(sleep 1; touch /dev/shm/end) >/dev/null 2>&1 &") // ends while the daemon is away
		}
		broken := make(chan error, 1)
		go func() {
			_, err := rest.execSync(60, "sh", "-c", "sleep 555")
			broken <- err
		}()
		rest.until("the exec runs", func() bool { return strings.Contains(rest.sh("ps -o args"), "sleep 555") })
		b.crash(t)
		if err := <-broken; status.Code(err) != codes.Unavailable {
			t.Errorf("the exec that the daemon was killed under: %v, want Unavailable", err)
		}
		if i == 1 {
			time.Sleep(3 * time.Second) // the daemon stays away until the container has ended
		}
		if err := b.StartVMRuntime(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if !rest.running() || created.status().GetState() != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("after the restart rest is %s and created is %s", rest.status().GetState(), created.status().GetState())
	}
	rest.sh("touch /dev/shm/stop")
	if s := writer.wait(); s.GetExitCode() != 5 || s.GetReason() != "Error" {
		t.Errorf("the writer ended with %d %s, want 5 Error", s.GetExitCode(), s.GetReason())
	}
	if s := ender.wait(); s.GetExitCode() != 6 || time.Since(time.Unix(0, s.GetFinishedAt())) > time.Minute {
		t.Errorf("what ended without a daemon has exit code %d, finished %s", s.GetExitCode(), time.Unix(0, s.GetFinishedAt()))
	}
	lines, err := strconv.Atoi(strings.TrimSpace(streamText(t, "stderr", writer.logFile())))
	if err != nil || lines < 1000 {
		t.Errorf("the writer wrote %d lines (%v), want many", lines, err)
	}
	sameLines(t, writer.text(), lines)
	rest.until("the abandoned execs are gone", func() bool { return !strings.Contains(rest.sh("ps -o args"), "sleep 555") })
	created.start()
	created.ready("ready").stop(10)
	rest.stop(10)
	if s := rest.wait(); s.GetExitCode() != 0 {
		t.Errorf("stopped after the restart with exit code %d, want 0", s.GetExitCode())
	}
	// The names are still taken.
	_, err = b.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.cfg, RuntimeHandler: handlerVM})
	refused(t, err, codes.AlreadyExists)
}

// A daemon that ends in order leaves its VMs running, too.
func TestDaemonStopped(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(idle("c")).ready("ready")
	qemu := p.verboseInfo().Guest.QEMU.PID
	if err := b.StopVMRuntime(); err != nil {
		t.Fatal(err)
	}
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	if got := p.verboseInfo().Guest.QEMU.PID; got != qemu {
		t.Errorf("QEMU has PID %d after the restart, %d before", got, qemu)
	}
	c.expect("echo works", "works")
}

// What was half made when the daemon was killed is torn down at its next start; what belongs to no record is swept.
func TestHalfMade(t *testing.T) {
	ctx, b := use(t)
	half := b.vmPod(ctx, t)
	half.start(idle("c"))
	orphan := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-orphan" })
	whole := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-whole" })
	pids := []int{half.verboseInfo().Guest.QEMU.PID, orphan.verboseInfo().Guest.QEMU.PID}
	b.crash(t)

	file := filepath.Join(b.Root, "vmruntime/root/pods", half.id, "status.json")
	var record map[string]any
	if err := json.Unmarshal([]byte(readFile(file)), &record); err != nil || record["readyAt"] == nil {
		t.Fatalf("%s has no readyAt: %v, %v", file, record, err)
	}
	delete(record, "readyAt")
	text, err := json.Marshal(record)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, file, string(text))
	if err := os.RemoveAll(filepath.Join(b.Root, "vmruntime/root/pods", orphan.id)); err != nil {
		t.Fatal(err)
	}
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*pod{half, orphan} {
		_, err := b.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
		refused(t, err, codes.NotFound)
		for _, at := range []string{"run/s/pods/", "run/s/netns/", "vmruntime/root/images/scratch/"} {
			if found, _ := filepath.Glob(filepath.Join(b.Root, at+p.id+"*")); len(found) > 0 {
				t.Errorf("left of the pod: %v", found)
			}
		}
	}
	for _, pid := range pids {
		if strings.Contains(readFile(fmt.Sprintf("/proc/%d/cmdline", pid)), "qemu") {
			t.Errorf("QEMU %d is left", pid)
		}
	}
	if whole.status().GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Error("the whole pod is not ready any more")
	}
}

// QEMU is killed: the containers exit with a reason within a second, and the next container has a new guest in the same
// sandbox.
func TestQEMUKilled(t *testing.T) {
	ctx, b := use(t)
	events := b.listen(ctx, t)
	p := b.vmPod(ctx, t)
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{mount("/m", t.TempDir())} })).ready("ready")
	ip, first := p.ip(), p.verboseInfo()
	began := time.Now()
	kill(t, first.Guest.QEMU.PID)
	for {
		ev := next(t, events)
		if ev.GetContainerId() == c.id && ev.GetContainerEventType() == runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT {
			break
		}
	}
	if took := time.Since(began); took > 5*time.Second { // one, on a machine that has nothing else to do
		t.Errorf("the event of the container's end came %s after QEMU's, want it at once", took)
	}
	s := c.status()
	if s.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || s.GetExitCode() != 137 || s.GetReason() != "VMFailed" || s.GetMessage() == "" {
		t.Errorf("after QEMU's end: %v, want EXITED, 137, VMFailed and a message", s)
	}
	_, err := c.execSync(5, "true")
	refused(t, err, codes.FailedPrecondition)
	if got := p.status(); got.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY || got.GetNetwork().GetIp() != ip {
		t.Errorf("the sandbox is %v, want READY with the address %s", got, ip)
	}
	c.stop(10)

	again := with(idle("c"), func(c *runtimeapi.ContainerConfig) {
		c.Metadata.Attempt, c.LogPath = 1, "again.log"
		c.Mounts = []*runtimeapi.Mount{mount("/m", t.TempDir())}
	})
	d := p.start(again).ready("ready")
	second := p.verboseInfo()
	if second.Guest.Boot != first.Guest.Boot+1 || second.Guest.QEMU.PID == first.Guest.QEMU.PID {
		t.Errorf("the second guest is boot %d, PID %d after boot %d, PID %d", second.Guest.Boot, second.Guest.QEMU.PID, first.Guest.Boot, first.Guest.QEMU.PID)
	}
	d.expect("ip -4 addr show eth0 | grep -c "+ip+"/; touch /m/x && echo shared", "1\nshared")
	c.remove()

	// A guest that dies as StopPodSandbox comes is no obstacle.
	kill(t, second.Guest.QEMU.PID)
	p.remove()
}

// The node's kernel kills a QEMU that has no memory left in the pod's cgroup; that is told apart from other ends, also when no
// daemon watches. The pod goes on when it has memory again.
func TestQEMUOutOfMemory(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	dir := t.TempDir()
	for attempt, watched := range []bool{true, false} {
		c := p.start(with(shell("c", "echo ready; until [ -e /m/go ]; do sleep 0.1; done; dd if=/dev/zero of=/dev/null bs=150M count=1; sleep 1000"),
			func(c *runtimeapi.ContainerConfig) {
				c.Metadata.Attempt, c.LogPath = uint32(attempt), fmt.Sprintf("c-%d.log", attempt)
				c.Mounts = []*runtimeapi.Mount{mount("/m", dir)}
			})).ready("ready")
		pid, unlimited := p.verboseInfo().Guest.QEMU.PID, limitMemory(t, b.CgroupParent(), p.id)
		if !watched {
			b.crash(t)
		}
		trigger := filepath.Join(dir, "go")
		if err := os.WriteFile(trigger, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		awaitEnd(t, pid)
		if !watched {
			if err := b.StartVMRuntime(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if s := c.wait(); s.GetExitCode() != 137 || s.GetReason() != "OOMKilled" || !strings.Contains(s.GetMessage(), "RuntimeClass") {
			t.Errorf("watched %t: the container ended with %d, %s, %q, want 137, OOMKilled and what to do", watched, s.GetExitCode(), s.GetReason(), s.GetMessage())
		}
		unlimited()
		if err := os.Remove(trigger); err != nil {
			t.Fatal(err)
		}
	}
	// What the kernel has killed before is not the reason of a later end.
	c := p.start(idle("d")).ready("ready")
	kill(t, p.verboseInfo().Guest.QEMU.PID)
	if s := c.wait(); s.GetReason() != "VMFailed" {
		t.Errorf("a VM that was killed by a signal ended with %s, want VMFailed", s.GetReason())
	}
}

// limitMemory leaves a pod's cgroup a few more MiB than it has, until the function that it returns is called.
func limitMemory(t *testing.T, parent, id string) (unlimited func()) {
	t.Helper()
	dir, usage, limit, none := "/sys/fs/cgroup/memory"+parent+"/vmruntime-"+id+"/", "memory.usage_in_bytes", "memory.limit_in_bytes", "-1"
	if _, err := os.Stat(dir); err != nil {
		dir, usage, limit, none = "/sys/fs/cgroup"+parent+"/vmruntime-"+id+"/", "memory.current", "memory.max", "max"
	}
	write := func(value string) {
		if err := os.WriteFile(dir+limit, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	n, err := strconv.Atoi(strings.TrimSpace(readFile(dir + usage)))
	if err != nil {
		t.Fatal(err)
	}
	write(strconv.Itoa(n + 8<<20))
	return func() { write(none) }
}

// awaitEnd waits until a process is gone, but for its status.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		stat := readFile(fmt.Sprintf("/proc/%d/stat", pid))
		if stat == "" || strings.Contains(stat, ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d still runs: %s", pid, stat)
		}
	}
}

// A guest whose kernel fails is told apart from a QEMU that fails.
func TestGuestPanics(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) { security(c).Privileged = true })).ready("ready")
	if _, err := c.execSync(10, "sh", "-c", "echo c > /proc/sysrq-trigger"); err == nil {
		t.Error("an exec that ended the guest's kernel succeeds")
	}
	s := c.wait()
	if s.GetExitCode() != 137 || s.GetReason() != "GuestFailed" || !strings.Contains(s.GetMessage(), "sysrq") {
		t.Errorf("after the kernel's end: exit code %d, reason %s, message %q, want 137, GuestFailed and what the console said", s.GetExitCode(), s.GetReason(), s.GetMessage())
	}
	if p.status().GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Error("the sandbox is not ready any more")
	}
}

// QEMU is killed while no daemon watches.
func TestQEMUKilledUnwatched(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(idle("c")).ready("ready")
	pid := p.verboseInfo().Guest.QEMU.PID
	b.crash(t)
	kill(t, pid)
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	if s := c.wait(); s.GetExitCode() != 137 || s.GetReason() != "VMFailed" || s.GetFinishedAt() == 0 {
		t.Errorf("after the restart: %v, want 137 and VMFailed", s)
	}
	p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) { c.Metadata.Attempt, c.LogPath = 1, "again.log" })).expect("echo works", "works")
}

// After a reboot there are records and images, no processes and an empty run directory.
func TestReboot(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.PortMappings = []*runtimeapi.PortMapping{{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 28081}}
	})
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{mount("/m", t.TempDir())} })).ready("ready")
	ended := p.start(shell("ended", "exit 4"))
	ended.wait()
	info := p.verboseInfo()
	b.crash(t)
	kill(t, info.Guest.QEMU.PID)
	if info.Guest.Share != nil {
		kill(t, info.Guest.Share.PID)
	}
	state := filepath.Join(b.Root, "run", "s")
	emptyState(t, state)
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	if s := p.status(); s.GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("the sandbox is %s after a reboot, want NOTREADY", s.GetState())
	}
	if s := c.wait(); s.GetExitCode() != 137 || s.GetReason() != "VMLost" {
		t.Errorf("the container is %v, want exited with VMLost", s)
	}
	if s := ended.status(); s.GetExitCode() != 4 {
		t.Errorf("what had ended before has exit code %d now, want 4", s.GetExitCode())
	}
	_, err := p.tryCreate(idle("new"))
	refused(t, err, codes.FailedPrecondition, "not ready")
	p.remove()
}

// emptyState does to the run directory what a reboot does.
func emptyState(t *testing.T, dir string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, mount := range slices.Backward(mounts) {
		if err := unix.Unmount(mount.Mountpoint, unix.MNT_DETACH); err != nil {
			t.Fatalf("unmount %s: %v", mount.Mountpoint, err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
}

// While containerd is away its calls are Unavailable and lists fail whole; VM pods go on, and all is well when it is back.
func TestContainerdDown(t *testing.T) {
	ctx, b := use(t)
	vm := b.vmPod(ctx, t)
	c := vm.start(idle("c")).ready("ready")
	plain := b.runPod(ctx, t, "", b.podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-plain" }))
	inPlain := plain.start(idle("c")).ready("ready")
	if err := b.StopContainerd(); err != nil {
		t.Fatal(err)
	}
	down := true
	defer func() {
		if down {
			if err := b.StartContainerd(ctx); err != nil {
				t.Error(err)
			}
		}
	}()
	calls := map[string]func() error{
		"ListPodSandbox": func() error {
			_, err := b.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			return err
		},
		"ListContainers": func() error {
			_, err := b.rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
			return err
		},
		"ListContainerStats": func() error {
			_, err := b.rt.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
			return err
		},
		"ListPodSandboxStats": func() error {
			_, err := b.rt.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
			return err
		},
		"ListImages": func() error {
			_, err := b.image.ListImages(ctx, &runtimeapi.ListImagesRequest{})
			return err
		},
		"PodSandboxStatus of a container pod": func() error {
			_, err := b.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: plain.id})
			return err
		},
		"ExecSync in a container pod": func() error {
			_, err := inPlain.execSync(5, "true")
			return err
		},
		"RunPodSandbox": func() error {
			_, err := b.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: b.podConfig(t)})
			return err
		},
	}
	for name, call := range calls {
		began := time.Now()
		if err := call(); status.Code(err) != codes.Unavailable {
			t.Errorf("%s without containerd: %v, want Unavailable", name, err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s without containerd took %s", name, took)
		}
	}
	c.expect("echo goes on", "goes on")
	if !c.running() || vm.status().GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Error("the VM pod is not as before")
	}
	c.stop(10)
	if s := c.wait(); s.GetExitCode() != 0 {
		t.Errorf("stopping a container of a VM without containerd: exit code %d", s.GetExitCode())
	}

	if err := b.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	down = false
	until(ctx, t, "lists are whole again", func() bool {
		resp, err := b.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		return err == nil && len(resp.GetItems()) == 2
	})
	inPlain.expect("echo lives", "lives")
	vm.start(idle("new")).expect("echo works", "works")
}
