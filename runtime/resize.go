package runtime

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
)

// A VM is resized in this order, so that nobody may use what is not there:
//
//	the VM grows, the container's limits in the guest, the record, the VM shrinks, QEMU's CPU quota
//
// Until the record everything is undone if a step fails. A daemon that is killed before the record leaves a VM that is larger than
// recorded; recovery has it shrink.

const (
	// resizeTimeout bounds a whole resize, growTimeout the time that a guest may take to make use of memory.
	resizeTimeout = 90 * time.Second
	growTimeout   = 45 * time.Second
)

// UpdatePodSandboxResources changes what the pod may use, and with that the size of its VM.
func (rt *Runtime) UpdatePodSandboxResources(ctx context.Context, req *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	p, err := rt.podByID(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	p.life.Lock()
	defer p.life.Unlock()
	if p.state() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return nil, fmt.Errorf("sandbox %s is not ready; its resources cannot change: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	now := p.limits()
	next := &runtimeapi.LinuxPodSandboxConfig{
		Resources: told(now.GetResources(), req.GetResources()), Overhead: told(now.GetOverhead(), req.GetOverhead()),
	}
	if err := p.resize(ctx, next, nil); err != nil {
		return nil, err
	}
	update := told(nil, req.GetResources())
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, p.update(func(s *podStatus) error {
		s.Resized.ToldCPU = s.Resized.ToldCPU || update.GetCpuQuota() > 0
		s.Resized.ToldMemory = s.Resized.ToldMemory || update.GetMemoryLimitInBytes() > 0
		return nil
	})
}

// limits are what the pod may use.
func (p *pod) limits() *runtimeapi.LinuxPodSandboxConfig {
	if r := p.rec.Status().Resized; r != nil {
		return &runtimeapi.LinuxPodSandboxConfig{Resources: r.Resources.M, Overhead: r.Overhead.M}
	}
	return p.config().GetLinux()
}

// size is what the VM has, and begins with when it starts anew.
func (p *pod) size() vmSize {
	if r := p.rec.Status().Resized; r != nil {
		return r.Size
	}
	return vmSize{p.rec.Spec().VCPUs, p.rec.Spec().MemoryBytes}
}

// resizeFor changes a container's limits in the guest by change, and those of the pod with them where they are the sum of its containers'
// and nobody tells them apart.
// The caller holds the container's life.
func (c *container) resizeFor(ctx context.Context, limits *runtimeapi.LinuxContainerResources, change func(context.Context) error) error {
	p := c.pod
	p.life.Lock()
	defer p.life.Unlock()
	now := p.limits()
	next := &runtimeapi.LinuxPodSandboxConfig{
		Resources: p.vmConfig().followed(now.GetResources(), p.sumOfLimits(c, c.resources()), p.sumOfLimits(c, limits)), Overhead: now.GetOverhead(),
	}
	if r := p.rec.Status().Resized; r != nil && r.ToldCPU {
		next.Resources.CpuQuota, next.Resources.CpuPeriod = now.GetResources().GetCpuQuota(), now.GetResources().GetCpuPeriod()
	}
	if r := p.rec.Status().Resized; r != nil && r.ToldMemory {
		next.Resources.MemoryLimitInBytes = now.GetResources().GetMemoryLimitInBytes()
	}
	if proto.Equal(next.GetResources(), told(now.GetResources(), nil)) {
		return change(ctx)
	}
	return p.resize(ctx, next, change)
}

// vmConfig is the configuration of the pod's VM.
func (p *pod) vmConfig() VMConfig {
	vm := p.rt.cfg.VM
	if p.latestMachine() != nil {
		vm.DefaultMemory = vm.DefaultMachineMemory
	}
	return vm
}

// sumOfLimits adds up the limits of the containers that run, and those that the given one has or would have.
func (p *pod) sumOfLimits(c *container, limits *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	sum := &runtimeapi.LinuxContainerResources{CpuPeriod: quotaPeriod}
	for _, other := range p.rt.containersOf(p.id) {
		r := limits
		switch {
		case other.id == c.id:
		case other.rec.Status().running():
			r = other.resources()
		default:
			continue
		}
		sum.CpuQuota += cpuTime(r)
		sum.MemoryLimitInBytes += max(0, r.GetMemoryLimitInBytes())
	}
	return sum
}

// resize has the VM come to the size for the limits, and in between, if there is one, does the change. The caller holds life.
func (p *pod) resize(ctx context.Context, next *runtimeapi.LinuxPodSandboxConfig, change func(context.Context) error) error {
	if change == nil {
		change = func(context.Context) error { return nil }
	}
	after, err := p.vmConfig().resized(p.limits(), next)
	if err != nil {
		return err
	}
	return p.resizeTo(ctx, next, after, change)
}

// resizeTo is resize to a size.
func (p *pod) resizeTo(ctx context.Context, next *runtimeapi.LinuxPodSandboxConfig, after vmSize, change func(context.Context) error) (err error) {
	ctx, cancel := context.WithTimeout(ctx, resizeTimeout)
	defer cancel()
	before := p.size()
	g := p.currentGuest()
	if g == nil || !g.alive() {
		return errors.Join(change(ctx), p.recordSize(next, after))
	}
	if g.machine != nil {
		return g.resizeMachine(ctx, next, after, change)
	}
	if p.rec.Spec().HugeBytes > 0 {
		return p.resizeHuge(ctx, next, after, change)
	}
	// One that still grows to its first size comes to that before anything else.
	if p.rec.Status().Guest.Growing {
		if _, err := g.session(ctx); err != nil {
			return err
		}
	}
	if after, err = g.grow(ctx, before, after); err != nil {
		return err
	}
	err = change(ctx)
	if err == nil {
		err = p.recordSize(next, after)
	}
	if err != nil {
		return errors.Join(err, g.undo(ctx, before))
	}
	return errors.Join(g.shrink(ctx, after), p.applyCPUQuota())
}

// resizeHuge changes the time of processors of a VM that has huge pages. All else it keeps.
func (p *pod) resizeHuge(ctx context.Context, next *runtimeapi.LinuxPodSandboxConfig, after vmSize, change func(context.Context) error) error {
	now, err := p.vmConfig().resized(p.limits(), p.limits())
	if err == nil && now != after {
		err = fmt.Errorf("a VM with huge pages keeps its size while it runs; for %v instead of %v let it start anew: %w", after, now, errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		err = change(ctx)
	}
	if err == nil {
		err = p.recordSize(next, p.size())
	}
	if err != nil {
		return err
	}
	return p.applyCPUQuota()
}

func (p *pod) recordSize(limits *runtimeapi.LinuxPodSandboxConfig, size vmSize) error {
	return p.update(func(s *podStatus) error {
		now := resized{
			Resources: message[*runtimeapi.LinuxContainerResources]{told(limits.GetResources(), nil)},
			Overhead:  message[*runtimeapi.LinuxContainerResources]{told(limits.GetOverhead(), nil)},
			Size:      size,
		}
		if s.Resized != nil {
			now.ToldCPU, now.ToldMemory = s.Resized.ToldCPU, s.Resized.ToldMemory
		}
		s.Resized = &now
		return nil
	})
}

// grow has the guest use at least what it is to have, and tells what that is. What cannot be is undone.
func (g *guest) grow(ctx context.Context, before, after vmSize) (vmSize, error) {
	have, err := g.vm.Size(ctx)
	if err != nil {
		return after, err
	}
	if after, err = after.within(have); err != nil {
		return after, err
	}
	client, err := g.session(ctx)
	if err == nil && after.MemoryBytes > have.MemoryBytes() {
		grow, cancel := context.WithTimeout(ctx, growTimeout)
		defer cancel()
		err = g.growMemory(grow, client, after.MemoryBytes)
	}
	if err == nil && after.VCPUs > before.VCPUs {
		err = g.growProcessors(ctx, client, after.VCPUs)
	}
	if err != nil {
		return after, errors.Join(fmt.Errorf("grow the VM to %v: %w", after, err), g.undo(ctx, before))
	}
	return after, nil
}

func (g *guest) growMemory(ctx context.Context, client agentClient, bytes int64) error {
	if err := readyForMemory(ctx, client); err != nil {
		return err
	}
	if err := g.vm.RequestMemory(ctx, bytes); err != nil {
		return err
	}
	s, err := g.vm.AwaitMemory(ctx, bytes)
	if err != nil {
		return fmt.Errorf("the guest uses %d bytes: %w", s.MemoryBytes(), err)
	}
	return memoryChanged(ctx, client, s)
}

func (g *guest) growProcessors(ctx context.Context, client agentClient, n int) error {
	if err := g.vm.AddVCPUs(ctx, n); err != nil {
		return err
	}
	return useProcessors(ctx, client, n)
}

func readyForMemory(ctx context.Context, client agentClient) error {
	_, err := client.Resize(ctx, &agentpb.ResizeRequest{Memory: true})
	return err
}

// memoryChanged has the guest's kernel take note.
func memoryChanged(ctx context.Context, client agentClient, now qemu.Size) error {
	_, err := client.Resize(ctx, &agentpb.ResizeRequest{MoreMemoryBytes: now.PluggedBytes - now.BalloonBytes})
	return err
}

func useProcessors(ctx context.Context, client agentClient, n int) error {
	_, err := client.Resize(ctx, &agentpb.ResizeRequest{Processors: int32(n)})
	return err
}

// shrink has the guest let go of what is more than it is to have, as far as it can.
func (g *guest) shrink(ctx context.Context, to vmSize) error {
	have, err := g.vm.Size(ctx)
	if err != nil {
		return err
	}
	if have.VCPUs <= to.VCPUs && !to.exceeded(have) {
		return nil
	}
	client, err := g.session(ctx)
	if err == nil && have.VCPUs > to.VCPUs {
		err = useProcessors(ctx, client, to.VCPUs)
	}
	if client != nil && to.exceeded(have) {
		err = errors.Join(err, g.shrinkMemory(ctx, client, to.MemoryBytes))
	}
	if err != nil {
		return fmt.Errorf("shrink the VM to %v: %w", to, err)
	}
	return nil
}

func (g *guest) shrinkMemory(ctx context.Context, client agentClient, bytes int64) error {
	if err := readyForMemory(ctx, client); err != nil {
		return err
	}
	if err := g.vm.RequestMemory(ctx, bytes); err != nil {
		return err
	}
	s, err := g.vm.AwaitMemory(ctx, bytes)
	if err != nil {
		return err
	}
	if s.MemoryBytes() > bytes {
		g.log.Info("the guest keeps more memory than it is to have; what it frees later it gives back", "has", s.MemoryBytes(), "wanted", bytes)
	}
	return memoryChanged(ctx, client, s)
}

// undo goes back to a size, also if the context has ended.
func (g *guest) undo(ctx context.Context, to vmSize) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
	defer cancel()
	return g.shrink(ctx, to)
}

// settle has a guest that an earlier daemon was about to resize come to the recorded size.
func (g *guest) settle() {
	p := g.pod
	ctx, cancel := context.WithTimeout(p.rt.ctx, resizeTimeout)
	defer cancel()
	if _, err := g.session(ctx); err != nil { // nobody is to wait for the lock until the guest answers
		g.log.Warn("bringing the VM to the size that it is to have", "error", err)
		return
	}
	p.life.Lock()
	defer p.life.Unlock()
	if p.currentGuest() != g || !g.alive() {
		return
	}
	if err := g.shrink(ctx, p.size()); err != nil {
		g.log.Warn("bringing the VM to the size that it is to have", "error", err)
	}
}

// resizeMachine changes what a machine has: less memory by its balloon, as far as its driver is there, and less time of processors. What
// it booted with it cannot exceed.
func (g *guest) resizeMachine(ctx context.Context, next *runtimeapi.LinuxPodSandboxConfig, after vmSize, change func(context.Context) error) error {
	p := g.pod
	spec := p.latestMachine().rec.Spec().Machine
	boot := vmSize{spec.VCPUs, spec.MemoryBytes}
	if after.VCPUs > boot.VCPUs || spec.HugePageBytes == 0 && after.MemoryBytes > boot.MemoryBytes {
		return fmt.Errorf("a machine cannot have more than it has booted with, %v, while it runs; for %v let it start anew: %w", boot, after, errdefs.ErrFailedPrecondition)
	}
	have, err := g.vm.Size(ctx)
	if err != nil {
		return err
	}
	if spec.HugePageBytes == 0 {
		err = g.balloon(ctx, have, after.MemoryBytes)
	}
	if err == nil {
		err = change(ctx)
	}
	if err == nil {
		err = p.recordSize(next, after)
	}
	if err != nil {
		return errors.Join(err, g.undoBalloon(ctx, have, after.MemoryBytes))
	}
	return p.applyCPUQuota()
}

// undoBalloon asks for the memory that the machine had, also if the context has ended. A driver that did not answer may do so later.
func (g *guest) undoBalloon(ctx context.Context, had qemu.Size, asked int64) error {
	if asked == had.MemoryBytes() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
	defer cancel()
	return g.vm.RequestMemory(ctx, had.MemoryBytes())
}

// balloon has the machine's driver leave it so much memory.
func (g *guest) balloon(ctx context.Context, have qemu.Size, bytes int64) error {
	if have.MemoryBytes() == bytes {
		return nil
	}
	stats, err := g.vm.MemoryStats(ctx)
	if err != nil {
		return err
	}
	if stats.Updated.IsZero() {
		return fmt.Errorf("the machine has no driver for its balloon, or has not loaded it yet; its memory cannot change: %w", errdefs.ErrFailedPrecondition)
	}
	if err := g.vm.RequestMemory(ctx, bytes); err != nil {
		return err
	}
	_, err = g.vm.AwaitMemory(ctx, bytes)
	return err
}
