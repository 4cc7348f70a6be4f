package vm_test

import (
	"context"
	"fmt"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// exactly holds that the guest has what one has that has booted with that size: processors and memory in MiB, as its containers see it,
// and their limits. Memory comes in blocks of 2 MiB, and of what comes none is set aside for the kernel's description of it: that is 1/64.
func (c *ctr) exactly(cold, vcpus, more int, milliCPU, memory int64) {
	c.t.Helper()
	c.expect("nproc", fmt.Sprint(vcpus))
	c.expect("grep -c ^processor /proc/cpuinfo", fmt.Sprint(vcpus))
	c.expect("cat /sys/devices/system/cpu/online", map[int]string{1: "0", 2: "0-1"}[vcpus])
	between(c.t, "the guest's memory in MiB", c.total(), cold+more-more/64-1, cold+more+2)
	c.expect("cd /sys/fs/cgroup; cat cpu.max memory.max", fmt.Sprintf("%d 100000\n%d", milliCPU*100, memory<<20))
	s := c.pod.vmSize()
	between(c.t, "QEMU's memory of the guest, beyond what the pod is to have,", s.Size.BootBytes+s.Size.PluggedBytes-s.MemoryBytes, 0, 1<<20)
	if s.VCPUs != vcpus || s.Size.VCPUs != ahead(vcpus) {
		c.t.Errorf("the VM is %+v, want %d vCPUs, and %d that are plugged", s, vcpus, ahead(vcpus))
	}
	if quota, _ := cpuQuota(c.CgroupParent(), c.pod.id); quota != fmt.Sprint(milliCPU*100) {
		c.t.Errorf("the pod's cgroup has a CPU quota of %s, want %d", quota, milliCPU*100)
	}
}

// ahead is how many processors are plugged into an emulated guest that uses so many: up to four of the node's, before they are needed.
func ahead(vcpus int) int { return max(vcpus, min(goruntime.NumCPU(), 4)) }

// grown holds how a pod's guest has begun: grown from the base size or not, and waiting or not.
func (p *pod) grown(grown, spare bool) {
	p.t.Helper()
	g := p.guestInfo()
	if (g.GrownFrom != nil) != grown || g.Growing || g.Spare != spare || g.Template == "" || g.Boot != 1 {
		p.t.Errorf("the guest is %+v; want one that began as a template, grown: %v, and has waited: %v", g, grown, spare)
	}
}

// Pods of sizes of which there is no template begin as the one of the base size, or as a guest that waits, have exactly their size when
// their first container runs, and can be checkpointed.
func TestGrown(t *testing.T) {
	_, b := use(t)
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute) // two templates, a checkpoint
	t.Cleanup(cancel)
	b.withTemplates(ctx, t, "off", 0)
	base := b.vmPod(ctx, t)
	first := base.start(idle("base")).ready("ready")
	cold := first.total()
	base.remove()

	p, c := b.limited(ctx, t, 1500, 256+101, withTCPMemory)
	p.grown(true, false)
	c.expect("cat /proc/sys/net/ipv4/tcp_mem", "10000\t20000\t30000") // what the pod asks for does not grow with it
	c.exactly(cold, 2, 101, 1500, 256+101)
	if !c.take(256) {
		t.Error("256 MiB cannot be had with a limit of 357")
	}
	threads := c.threads()
	b.restoredGrown(ctx, t, c, cold)

	// Now there is one of its own.
	until(ctx, t, "the size has a template", func() bool {
		return strings.Count(readFile(b.LogFile("vmruntime")), "memory="+fmt.Sprint((256+101+64)<<20)) > 1
	})
	p.remove()
	own, oc := b.limited(ctx, t, 1500, 256+101)
	own.grown(false, false)
	oc.exactly(oc.total(), 2, 0, 1500, 256+101)
	between(t, "the memory of a guest that grew, in MiB, as against one that did not", cold+101-oc.total(), -2, 101/64+2)
	between(t, "the most threads of a guest that grew", threads, oc.threads()*19/20, oc.threads()*21/20)
	own.remove()
}

// withTCPMemory sets what the kernel derives from the memory otherwise.
func withTCPMemory(cfg *runtimeapi.PodSandboxConfig) {
	cfg.Linux.Sysctls = map[string]string{"net.ipv4.tcp_mem": "10000 20000 30000"}
}

// threads is how many threads there can be in the guest; of one user there can be as many.
func (c *ctr) threads() (n int) {
	c.t.Helper()
	c.expect("ulimit -u", "unlimited")
	if _, err := fmt.Sscan(c.sh("cat /proc/sys/kernel/threads-max"), &n); err != nil {
		c.t.Fatal(err)
	}
	return n
}

// restoredGrown holds that a pod that has grown goes on where a checkpoint has it, and that what is restored has the size and grows further.
func (b *bed) restoredGrown(ctx context.Context, t *testing.T, c *ctr, cold int) {
	t.Helper()
	p := c.pod
	count := p.start(counter("count")).ready(" 20\n")
	dir := p.checkpoint(c, count)
	r, ctrs := b.restore(ctx, t, dir, b.podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Metadata.Name, cfg.Linux.Resources = "restored", limitsOf(1500, 256+101)
		withTCPMemory(cfg)
	}), proto.CloneOf(c.cfg), proto.CloneOf(count.cfg))
	main, again := ctrs[0], ctrs[1]
	main.start()
	again.start()
	r.until("the restored counter goes on", func() bool { return len(again.numbers()) > 20 })
	consecutive(t, "restored", again.numbers())
	main.exactly(cold, 2, 101, 1500, 256+101)
	if !main.take(256) {
		t.Error("256 MiB cannot be had in the restored pod")
	}
	if err := r.updatePod(limitsOf(2000, 256+201)); err != nil {
		t.Errorf("UpdatePodSandboxResources of the restored pod: %v", err)
	}
	main.update(limitsOf(2000, 256+201))
	main.exactly(cold, 2, 201, 2000, 256+201)
	r.remove()
}

// A guest that waits is grown like one that has not. Sizes that cannot be reached by growing begin as before.
func TestGrownSpare(t *testing.T) {
	ctx, b := use(t)
	from := fileSize(b.LogFile("vmruntime"))
	b.withTemplates(ctx, t, "off", 1)
	id := b.awaitSpare(ctx, t, from)
	p, c := b.limited(ctx, t, 2000, 512)
	p.grown(true, true)
	if p.id != id {
		t.Errorf("the pod is %s; want the guest that waited, %s", p.id, id)
	}
	cold := c.total() - 256
	c.exactly(cold, 2, 256, 2000, 512)
	p.memoryIsCounted()
	p.sharesADirectory(t)
	p.remove()

	for _, size := range []struct{ milliCPU, memory int64 }{{1000, 200}, {int64(goruntime.NumCPU()+1) * 1000, 300}} {
		p, c := b.limited(ctx, t, size.milliCPU, size.memory)
		if g := p.guestInfo(); g.GrownFrom != nil || g.Spare || g.Template != "" {
			t.Errorf("with %+v the guest is %+v; want one that has booted", size, g)
		}
		c.expect("nproc", fmt.Sprint(size.milliCPU/1000))
		p.remove()
	}
}

// A VM that has grown and shrunk, with a processor that is offline and a balloon, is restored as it was.
func TestCheckpointResized(t *testing.T) {
	ctx, b := use(t)
	p, c := b.limited(ctx, t, 1000, 128)
	first := c.total()
	for _, limits := range []*runtimeapi.LinuxContainerResources{limitsOf(2000, 300), limitsOf(500, 100)} {
		if err := p.updatePod(limits); err != nil {
			t.Fatalf("UpdatePodSandboxResources: %v", err)
		}
		c.update(limits)
	}
	before := p.vmSize()
	if before.Size.VCPUs != 2 || before.Size.BalloonBytes == 0 {
		t.Fatalf("the VM is %+v; want two processors and a balloon", before)
	}
	dir := p.checkpoint(c)
	r, ctrs := b.restore(ctx, t, dir, b.podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Metadata.Name, cfg.Linux.Resources = "restored", limitsOf(500, 100)
	}), proto.CloneOf(c.cfg))
	p.remove()
	again := ctrs[0]
	again.start()
	if after := r.vmSize(); after != before {
		t.Errorf("restored the VM is %+v, want %+v", after, before)
	}
	again.expect("nproc", "1")
	limits := limitsOf(2000, 300)
	if err := r.updatePod(limits); err != nil {
		t.Fatalf("UpdatePodSandboxResources of the restored pod: %v", err)
	}
	again.update(limits)
	again.expect("nproc", "2")
	between(t, "the guest's memory in MiB", again.total(), first+300-128-4, first+300-128+4)
	if !again.take(200) {
		t.Error("200 MiB cannot be had with a limit of 300")
	}
	r.remove()

	// With other limits it has what they say from the start.
	cfg := b.podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Metadata.Name, cfg.Linux.Resources = "resized", limits
	})
	r, ctrs = b.restore(ctx, t, dir, cfg, with(proto.CloneOf(c.cfg), func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = limits }))
	again = ctrs[0]
	again.start()
	again.expect("nproc", "2")
	between(t, "the guest's memory in MiB", again.total(), first+300-128-4, first+300-128+4)
	r.remove()
}
