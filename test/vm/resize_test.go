package vm_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// limitsOf are limits of so many thousandths of a processor and so many MiB.
func limitsOf(milliCPU, memory int64) *runtimeapi.LinuxContainerResources {
	return &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: milliCPU * 100, MemoryLimitInBytes: memory << 20}
}

// updatePod is what the kubelet asks for before it raises a container's limits, and after it has lowered them.
func (p *pod) updatePod(limits *runtimeapi.LinuxContainerResources) error {
	_, err := p.rt.UpdatePodSandboxResources(p.ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id, Resources: limits})
	return err
}

func (c *ctr) update(limits *runtimeapi.LinuxContainerResources) {
	c.t.Helper()
	if _, err := c.rt.UpdateContainerResources(c.ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: limits}); err != nil {
		c.t.Fatalf("UpdateContainerResources: %v", err)
	}
}

// vmSize is what the verbose status tells of a VM, as it is to be and as QEMU has it.
type vmSize struct {
	VCPUs       int   `json:"vcpus"`
	MemoryBytes int64 `json:"memoryBytes"`
	Size        struct {
		VCPUs          int   `json:"vcpus"`
		BootBytes      int64 `json:"bootBytes"`
		PluggedBytes   int64 `json:"pluggedBytes"`
		RequestedBytes int64 `json:"requestedBytes"`
		BalloonBytes   int64 `json:"balloonBytes"`
	} `json:"size"`
}

func (p *pod) vmSize() (s vmSize) {
	p.t.Helper()
	resp, err := p.rt.PodSandboxStatus(p.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err == nil {
		err = json.Unmarshal([]byte(resp.GetInfo()["info"]), &s)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

// charged is the memory that the pod takes of the node, in MiB.
func (p *pod) charged() uint64 {
	p.t.Helper()
	resp, err := p.rt.PodSandboxStats(p.ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.id})
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.GetStats().GetLinux().GetMemory().GetUsageBytes().GetValue() >> 20
}

// total is the memory of the whole guest in MiB, as a container sees it.
func (c *ctr) total() (mib int) {
	c.t.Helper()
	if _, err := fmt.Sscanf(c.sh("grep MemTotal /proc/meminfo"), "MemTotal: %d kB", &mib); err != nil {
		c.t.Fatal(err)
	}
	return mib >> 10
}

// take has a program use so many MiB at once, and tells whether it could.
func (c *ctr) take(mib int) bool {
	c.t.Helper()
	resp, err := c.execSync(120, "dd", "if=/dev/zero", "of=/dev/null", fmt.Sprintf("bs=%dM", mib), "count=1")
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetExitCode() == 0
}

// between holds that a value is in a range.
func between[N int | int64 | uint64](t *testing.T, what string, have, least, most N) {
	t.Helper()
	if have < least || have > most {
		t.Errorf("%s is %d, want %d to %d", what, have, least, most)
	}
}

// limited is a pod with these limits, and its one container, which has them too.
func (b *bed) limited(ctx context.Context, t *testing.T, milliCPU, memory int64, changes ...func(*runtimeapi.PodSandboxConfig)) (*pod, *ctr) {
	t.Helper()
	p := b.vmPod(ctx, t, append(changes, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.Resources = limitsOf(milliCPU, memory) })...)
	return p, p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = limitsOf(milliCPU, memory) })).ready("ready")
}

// A VM comes to have more than it booted with, keeps that over the end of the daemon, and gives it back.
func TestResizeUpAndDown(t *testing.T) {
	ctx, b := use(t)
	p, c := b.limited(ctx, t, 500, 64)
	small := c.total()
	c.expect("nproc", "1")
	if c.take(150) {
		t.Error("150 MiB can be had with a limit of 64")
	}

	// Up, as the kubelet does it.
	if err := p.updatePod(limitsOf(2000, 256)); err != nil {
		t.Fatalf("UpdatePodSandboxResources: %v", err)
	}
	c.update(limitsOf(2000, 256))
	c.expect("nproc", "2")
	between(t, "the guest's memory in MiB", c.total(), small+192-4, small+192+4)
	c.expect("cd /sys/fs/cgroup; cat cpu.max memory.max", "200000 100000\n268435456")
	// One that has the pod's own limit, as the kubelet gives it to a container without any, adds nothing to it.
	other := p.start(with(idle("other"), func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = limitsOf(2000, 256) })).ready("ready")
	other.update(limitsOf(2000, 256))
	if s := p.vmSize(); s.Size.PluggedBytes != 192<<20 || s.Size.RequestedBytes != 192<<20 {
		t.Errorf("with two containers that have the pod's limit the VM is %+v, want 192 MiB that are plugged", s)
	}
	other.stop(5)
	before := p.charged()
	if !c.take(150) {
		t.Error("150 MiB cannot be had with a limit of 256")
	}
	between(t, "what the pod takes of the node in MiB", p.charged(), before, before+192)
	if quota, _ := cpuQuota(b.CgroupParent(), p.id); quota != "200000" {
		t.Errorf("the pod's cgroup has a CPU quota of %s, want 200000", quota)
	}

	b.crash(t)
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	if s := p.vmSize(); s.VCPUs != 2 || s.Size.VCPUs != ahead(2) || s.Size.PluggedBytes != 192<<20 {
		t.Errorf("after a restart of the daemon the VM is %+v, want 2 vCPUs and 192 MiB that are plugged", s)
	}
	c.expect("nproc", "2")

	// Beyond what there can be: nothing changes.
	refused(t, p.updatePod(limitsOf(1000, 1<<20)), codes.FailedPrecondition, "vm.max_memory")
	c.expect("nproc", "2")

	// Down, the container first.
	full := p.charged()
	c.update(limitsOf(500, 64))
	if err := p.updatePod(limitsOf(500, 64)); err != nil {
		t.Fatalf("UpdatePodSandboxResources: %v", err)
	}
	c.expect("nproc", "1")
	s := p.vmSize()
	between(t, "the memory that is still plugged", s.Size.PluggedBytes, 0, 64<<20)
	between(t, "what the pod takes of the node in MiB", p.charged(), 0, full-50)
	if s.VCPUs != 1 || s.Size.RequestedBytes != 0 {
		t.Errorf("the VM is %+v, want 1 vCPU and no more memory than at its start", s)
	}
	if quota, _ := cpuQuota(b.CgroupParent(), p.id); quota != "50000" {
		t.Errorf("the pod's cgroup has a CPU quota of %s, want 50000", quota)
	}
}

// A VM gives back of what it booted with; one that starts anew has the size that the pod has come to.
func TestResizeBelowTheFirstSize(t *testing.T) {
	ctx, b := use(t)
	p, c := b.limited(ctx, t, 1000, 256)
	large := c.total()
	if !c.take(200) {
		t.Error("200 MiB cannot be had with a limit of 256")
	}
	full := p.charged()
	c.update(limitsOf(1000, 100))
	if s := p.vmSize(); s.Size.BalloonBytes != 156<<20 || s.MemoryBytes != s.Size.BootBytes-156<<20 {
		t.Errorf("the VM is %+v, want 156 MiB less than at its start", s)
	}
	between(t, "the guest's memory in MiB", c.total(), large-156-4, large-156+4)
	between(t, "what the pod takes of the node in MiB", p.charged(), 0, full-100)

	kill(t, p.verboseInfo().Guest.QEMU.PID)
	c.wait()
	again := p.start(with(idle("again"), func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = limitsOf(1000, 100) })).ready("ready")
	if s := p.vmSize(); s.Size.BootBytes != s.MemoryBytes || s.Size.BalloonBytes != 0 {
		t.Errorf("the next guest is %+v, want it to begin with the size that it is to have", s)
	}
	again.update(limitsOf(1000, 200))
	between(t, "the guest's memory in MiB", again.total(), large-56-4, large-56+20)
}

// A machine gives memory back and gets it again by its balloon, but never has more than it booted with.
func TestMachineResize(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	full := c.vmSize().Size.BootBytes
	refused(t, c.updatePod(limitsOf(1000, 1024)), codes.FailedPrecondition, "more than it has booted with")
	refused(t, c.updatePod(limitsOf(5000, 192)), codes.FailedPrecondition, "more than it has booted with")
	if s := c.vmSize(); s.Size.BalloonBytes != 0 {
		t.Errorf("after updates that were refused the VM is %+v", s)
	}
	c.until("its balloon's driver is there", func() bool { return c.updatePod(limitsOf(500, 160)) == nil })
	if have := full - c.vmSize().Size.BalloonBytes; have != full-32<<20 {
		t.Errorf("the machine has %d bytes of %d, want 32 MiB less", have, full)
	}
	if quota, _ := cpuQuota(b.CgroupParent(), c.pod.id); quota != "50000" {
		t.Errorf("the pod's cgroup has a CPU quota of %s, want 50000", quota)
	}
	c.answers()
	if err := c.updatePod(limitsOf(1000, 192)); err != nil || c.vmSize().Size.BalloonBytes != 0 {
		t.Errorf("back to the first limit: %v, %+v", err, c.vmSize())
	}
}
