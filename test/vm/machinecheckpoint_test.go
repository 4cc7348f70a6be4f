package vm_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// busyMachine is a tiny machine with something in memory, on its disk, in the cache of its disk, on its console and on its network.
func (b *bed) busyMachine(ctx context.Context, t *testing.T, change ...func(*runtimeapi.PodSandboxConfig)) *ctr {
	t.Helper()
	c := b.machine(ctx, t, images.Tiny, change...)
	c.sh("echo kept > /kept; sync; echo dirty > /dirty; mkdir -p /run/m; head -c 16 /dev/urandom | md5sum > /run/m/secret")
	c.sh("setsid sh -c 'i=0; while :; do i=$((i+1)); echo tick $i > /dev/console; echo $i > /run/m/tick; sleep 0.3; done' </dev/null >/dev/null 2>&1 &")
	c.sh("net 4; serve")
	c.ready("tick 3\r\n")
	return c
}

// ticks are the numbers of the ticks on the console that are there whole.
func (c *ctr) ticks() (out []int) {
	for line := range strings.Lines(c.text()) {
		var n int
		if _, err := fmt.Sscanf(line, "tick %d\r\n", &n); err == nil && strings.HasSuffix(line, "\n") {
			out = append(out, n)
		}
	}
	return out
}

// goesOn holds that a restored machine is what was saved, as the pod that it is now.
func (c *ctr) goesOn(what, secret string, sinceTick int) {
	c.t.Helper()
	c.answers()
	c.expect("cat /kept /dirty /run/m/secret", "kept\ndirty\n"+secret)
	c.says("info", "boots=1")
	c.until(what+" the process goes on", func() bool { return len(c.ticks()) > 3 })
	ticks := c.ticks()
	consecutive(c.t, what, ticks)
	if ticks[0] <= 3 || ticks[0] > sinceTick {
		c.t.Errorf("%s the console begins with tick %d, want one after 3 and up to %d", what, ticks[0], sinceTick)
	}
	c.until(what+" the machine has the pod's address", func() bool {
		got := c.sh("ip -o -4 addr show dev eth0")
		return strings.Count(got, " inet ") == 1 && strings.Contains(got, " "+c.pod.ip()+"/")
	})
	c.until(what+" the machine serves at it", func() bool {
		out, err := c.fetch(c.ctx, "http://"+hostPort(c.pod.ip(), 8080)+"/")
		return err == nil && out == "tiny\n"
	})
}

// A machine is checkpointed and restored beside itself: memory, processes and disk are as they were, from the moment at which the
// restored one is started, with the address of its own pod. The checkpointed one goes on.
func TestCheckpointMachine(t *testing.T) {
	ctx, b := use(t)
	c := b.busyMachine(ctx, t)
	secret := strings.TrimSuffix(c.sh("cat /run/m/secret"), "\n")
	dir := c.pod.checkpoint(c)
	at := len(c.ticks())
	c.until("the checkpointed machine goes on", func() bool { return len(c.ticks()) > at+3 })
	since := c.ticks()[at] + 1
	renamed := func(cfg *runtimeapi.PodSandboxConfig) {
		sized(192 << 20)(cfg)
		cfg.Metadata.Name, cfg.Hostname = "restored", "restored"
	}
	r, ctrs := b.restore(ctx, t, dir, b.podConfig(t, renamed), proto.CloneOf(c.cfg))
	restored := ctrs[0]
	b.crash(t)
	b.again(ctx, t)
	if s := restored.status().GetState(); s != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("restored, and after the daemon, the container is %s", s)
	}
	if state := r.vmState(); state != "paused" {
		t.Errorf("before its start the restored machine is %s", state)
	}
	if data, err := os.ReadFile(restored.logFile()); err == nil && len(data) > 0 {
		t.Errorf("before its start the restored machine has written %q", data)
	}
	restored.start()
	restored.goesOn("restored", secret, since)
	restored.expect("cat /proc/sys/kernel/hostname", "restored")
	if now := strings.TrimSpace(restored.sh("date +%s")); now < fmt.Sprint(time.Now().Add(-30*time.Second).Unix()) {
		t.Errorf("the restored machine's clock is %s", now)
	}
	if a, z := c.sh("cat /sys/class/net/eth0/address"), restored.sh("cat /sys/class/net/eth0/address"); a == z {
		t.Errorf("both machines have the hardware address %s", a)
	}
	for _, of := range []*ctr{c, restored} {
		if out, err := b.fetch(ctx, "http://"+hostPort(of.pod.ip(), 8080)+"/"); err != nil || out != "tiny\n" {
			t.Errorf("the machine of pod %s serves %q, %v", of.pod.cfg.GetMetadata().GetName(), out, err)
		}
	}
	restored.stop(30)
	if s := restored.wait(); s.GetExitCode() != 0 || s.GetReason() != "Completed" {
		t.Errorf("a restored machine that was asked to stop: %v", s)
	}
}

// A restored machine that reboots is the pod that it is now, also by its firmware and its seed.
func TestRestoredMachineReboots(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Uid = "0f3c2c1e-8b6a-4e1f-9d35-5b1f0e6a7c42" })
	dir := c.pod.checkpoint(c)
	c.pod.remove()
	uid := "5d1c2c1e-8b6a-4e1f-9d35-5b1f0e6a7c43"
	r, ctrs := b.restore(ctx, t, dir, b.podConfig(t, sized(192<<20), func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Uid = uid }), proto.CloneOf(c.cfg))
	restored := ctrs[0]
	restored.start()
	restored.answers()
	restored.until("the machine has the pod's address", func() bool { return strings.Contains(restored.sh("ip -o -4 addr show dev eth0"), " "+r.ip()+"/") })
	restored.vm("reboot", restored.id)
	restored.up(2)
	restored.says("info", "uuid="+uid, "serial="+uid)
	restored.sh("net 4")
	if got := restored.sh("ip -o -4 addr show dev eth0"); !strings.Contains(got, " "+r.ip()+"/") {
		t.Errorf("after its reboot the restored machine has %q, want %s", got, r.ip())
	}
	if seed := restored.sh("seed"); !strings.Contains(seed, uid) {
		t.Errorf("after its reboot the restored machine finds the seed\n%s", seed)
	}
}

// What a checkpoint of a machine cannot have is refused before anything stands still, an end in the middle lets the machine go on, and
// a pod that would be another machine is none of it.
func TestCheckpointMachineRefused(t *testing.T) {
	ctx, b := use(t)
	c := b.busyMachine(ctx, t)
	short, cancel := context.WithTimeout(ctx, time.Minute)
	dir := t.TempDir()
	broken := make(chan error, 1)
	go func() {
		_, err := b.rt.CheckpointPod(short, &runtimeapi.CheckpointPodRequest{PodSandboxId: c.pod.id, OutputPath: dir, ContainerIds: []string{c.id}})
		broken <- err
	}()
	c.until("the machine's memory is being written", func() bool { return fileSize(filepath.Join(dir, "memory.zst")) > 0 })
	cancel()
	refused(t, <-broken, codes.Canceled)
	c.until("nothing is left of a checkpoint that was cut off", func() bool {
		entries, err := os.ReadDir(dir)
		return err == nil && len(entries) == 0
	})
	at := len(c.ticks())
	c.until("the machine goes on after that", func() bool { return c.pod.vmState() == "running" && len(c.ticks()) > at+3 })

	dir = c.pod.checkpoint(c)
	same := func() *runtimeapi.ContainerConfig { return proto.CloneOf(c.cfg) }
	for _, tc := range []struct {
		name   string
		pod    []func(*runtimeapi.PodSandboxConfig)
		config *runtimeapi.ContainerConfig
		word   string
	}{
		{"another machine", []func(*runtimeapi.PodSandboxConfig){sized(192 << 20), annotated("disk-bus", "scsi")}, same(), "ask for another machine"},
		{"another size", []func(*runtimeapi.PodSandboxConfig){sized(256 << 20)}, same(), "the machine would be"},
		{"another name", []func(*runtimeapi.PodSandboxConfig){sized(192 << 20)}, with(same(), func(c *runtimeapi.ContainerConfig) { c.Metadata.Name = "other" }), "exactly those"},
		{"an ordinary image", []func(*runtimeapi.PodSandboxConfig){sized(192 << 20)}, with(same(), func(c *runtimeapi.ContainerConfig) { c.Image.Image = images.Busybox }), "the checkpoint's is"},
		{"a volume", []func(*runtimeapi.PodSandboxConfig){sized(192 << 20)}, with(same(), func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/shared"}}
		}), "virtiofs"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := b.tryRestore(ctx, dir, b.podConfig(t, tc.pod...), tc.config)
			refused(t, err, codes.InvalidArgument, tc.word)
		})
	}
	unstarted, ctrs := b.restore(ctx, t, dir, b.podConfig(t, sized(192<<20), func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name = "unstarted" }), same())
	ctrs[0].vmRefused("it goes on when it is started", "resume", ctrs[0].id)
	ctrs[0].remove()
	unstarted.remove()
	c.sh("setsid sh -c 'sleep 1; kill $(cat /run/qemu-ga.pid)' </dev/null >/dev/null 2>&1 &") // the agent that runs this
	c.until("the guest agent has ended", func() bool { return !strings.Contains(c.vm("show", c.id), "guest agent") })
	empty := t.TempDir()
	refused(t, c.pod.tryCheckpoint(empty, c), codes.FailedPrecondition, "qemu-guest-agent", "vmruntime vm snapshot")
	c.vm("snapshot", c.id, empty)
	_, err := b.tryRestore(ctx, empty, b.podConfig(t, sized(192<<20)), same())
	refused(t, err, codes.FailedPrecondition, "qemu-guest-agent")
}

// The variables of EFI and what a TPM has measured are part of a checkpoint, on disks on SCSI.
func TestCheckpointMachineFirmware(t *testing.T) {
	_, b := use(t)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute) // firmware takes its time where it is emulated
	t.Cleanup(cancel)
	ask := annotated("firmware", "efi", "disk-bus", "scsi", "tpm", "true")
	c := b.machine(ctx, t, images.Tiny, ask)
	c.sh("echo $$ > /run/memory")
	const state = "cat /run/memory /sys/class/tpm/tpm0/pcr-sha256/0; info | grep -c '^firmware=efi$'; blocks"
	want := c.sh(state)
	if !strings.Contains(want, "serial=root") || strings.Contains(want, strings.Repeat("0", 64)) {
		t.Fatalf("the machine has %q, want a disk and a register that the firmware has written to", want)
	}
	vars := c.sh("cd /sys/firmware/efi/efivars; cat BootOrder-* Boot0000-* | md5sum")
	dir := c.pod.checkpoint(c)
	c.pod.remove()
	_, ctrs := b.restore(ctx, t, dir, b.podConfig(t, sized(192<<20), ask), proto.CloneOf(c.cfg))
	restored := ctrs[0]
	restored.start()
	restored.answers()
	restored.expect(state, strings.TrimSuffix(want, "\n"))
	if got := restored.sh("cd /sys/firmware/efi/efivars; cat BootOrder-* Boot0000-* | md5sum"); got != vars {
		t.Errorf("the variables of EFI are %s, they were %s", got, vars)
	}
	snapshot := t.TempDir()
	restored.vm("snapshot", restored.id, snapshot)
	restored.sh("echo later > /run/memory")
	restored.vm("restore", restored.id, snapshot)
	restored.answers()
	restored.expect(state, strings.TrimSuffix(want, "\n"))
}
