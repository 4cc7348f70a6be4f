package runtime

import (
	"fmt"
	"math"
	goruntime "runtime"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/qemu"
)

const (
	mib = 1 << 20
	gib = 1 << 30
	// quotaPeriod is the period of CPU quotas that are computed here, in microseconds.
	quotaPeriod = 100000
	// unlimited is more than any limit: cgroup v1 tells nearly 2^63 where there is none.
	unlimited = 1 << 60
)

// overhead is what the guest's own kernel and agent get, but never more than the pod's overhead: Kubernetes counts on no
// more.
func (c VMConfig) overhead(cfg *runtimeapi.PodSandboxConfig) int64 {
	guest := int64(c.GuestOverhead)
	if pod := cfg.GetLinux().GetOverhead().GetMemoryLimitInBytes(); pod > 0 {
		return min(guest, pod)
	}
	return guest
}

// size gives a pod's VM its vCPUs and memory: what the pod's containers may use together, by the limits
// that the kubelet sums up in the sandbox's resources, or the configured default where there is no limit;
// then what guest kernel and agent need themselves, within the configured bounds.
func (c VMConfig) size(cfg *runtimeapi.PodSandboxConfig) (vcpus int, memoryBytes int64) {
	res := cfg.GetLinux().GetResources()
	vcpus = c.DefaultVCPUs
	if quota, period := res.GetCpuQuota(), res.GetCpuPeriod(); quota > 0 && period > 0 {
		vcpus = int(math.Ceil(float64(quota) / float64(period)))
	}
	vcpus = min(max(vcpus, 1), c.MaxVCPUs)
	memory := min(max(c.wantedMemory(cfg), int64(c.MinMemory)), int64(c.MaxMemory))
	return vcpus, roundUp(memory, mib)
}

// withHugePages is the memory of a VM that has huge pages beside it: so much more as the guest's kernel needs to describe them, and
// whole pages, so that the huge ones of guest and node lie on one another.
func withHugePages(memory, huge int64) int64 {
	if huge == 0 {
		return memory
	}
	return roundUp(memory+huge/hugePageCost, qemu.HugeNodePage)
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// wantedMemory is the memory without the configured bounds.
func (c VMConfig) wantedMemory(cfg *runtimeapi.PodSandboxConfig) int64 {
	memory := int64(c.DefaultMemory)
	if limit := cfg.GetLinux().GetResources().GetMemoryLimitInBytes(); limit > 0 {
		memory = min(limit, unlimited)
	}
	return memory + c.overhead(cfg)
}

// room is what a VM that starts with so much can come to have while it runs: all that the node has, within the configured bounds.
func (c VMConfig) room(vcpus int, memoryBytes int64) (maxVCPUs int, maxMemoryBytes int64) {
	return max(vcpus, min(c.MaxVCPUs, goruntime.NumCPU())), max(memoryBytes, min(int64(c.MaxMemory), nodeMemory())/mib*mib)
}

// nodeMemory is rounded up, so that it stays the same from boot to boot.
func nodeMemory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return math.MaxInt64 // the configured bound is left
	}
	return (int64(info.Totalram)*int64(info.Unit) + gib - 1) / gib * gib
}

// giveRoom has a machine able to come to so much. QEMU cannot plug processors into its machine for arm64.
func giveRoom(m *qemu.Machine, vcpus int, memoryBytes int64) {
	m.MaxMemoryBytes = memoryBytes
	if m.Arch == qemu.ArchX86 {
		m.MaxVCPUs = vcpus
	}
}

// vmSize is what a VM has or is to have.
type vmSize struct {
	VCPUs       int   `json:"vcpus"`
	MemoryBytes int64 `json:"memoryBytes"`
}

func (s vmSize) String() string {
	return fmt.Sprintf("%d vCPUs and %d bytes of memory", s.VCPUs, s.MemoryBytes)
}

// exceeded tells whether a VM has more memory than that, or was asked to have more. Memory comes in blocks.
func (s vmSize) exceeded(have qemu.Size) bool {
	return max(have.MemoryBytes(), have.BootBytes+have.RequestedBytes-have.BalloonBytes) >= s.MemoryBytes+qemu.MemoryBlock
}

// resized is the size for new limits. Memory beyond the node's bound is refused, unless there is not more wanted than before.
func (c VMConfig) resized(before, after *runtimeapi.LinuxPodSandboxConfig) (vmSize, error) {
	cfg := &runtimeapi.PodSandboxConfig{Linux: after}
	wanted := c.wantedMemory(cfg)
	if wanted > int64(c.MaxMemory) && wanted > c.wantedMemory(&runtimeapi.PodSandboxConfig{Linux: before}) {
		return vmSize{}, fmt.Errorf("memory of the VM would be %d; it has to be at most %s, which is vm.max_memory: %w", wanted, c.MaxMemory, errdefs.ErrFailedPrecondition)
	}
	var s vmSize
	s.VCPUs, s.MemoryBytes = c.size(cfg)
	return s, nil
}

// within holds that a VM that runs can come to have the size. More processors than the node has are of no use, and left out.
func (s vmSize) within(have qemu.Size) (vmSize, error) {
	switch {
	case s.VCPUs > have.MaxVCPUs && have.MaxVCPUs < goruntime.NumCPU():
		return s, fmt.Errorf("vCPUs of the VM would be %d; it can have at most %d until it starts anew: %w", s.VCPUs, have.MaxVCPUs, errdefs.ErrFailedPrecondition)
	case s.MemoryBytes > have.MaxMemoryBytes:
		return s, fmt.Errorf("memory of the VM would be %d; it can have at most %d until it starts anew: %w", s.MemoryBytes, have.MaxMemoryBytes, errdefs.ErrFailedPrecondition)
	}
	s.VCPUs = min(s.VCPUs, have.MaxVCPUs)
	return s, nil
}

// told are limits with those that an update gives in place of the former ones. What it leaves out or calls unlimited stays.
func told(limits, update *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	out := &runtimeapi.LinuxContainerResources{}
	if limits != nil {
		out = proto.CloneOf(limits)
	}
	if update.GetCpuQuota() > 0 && update.GetCpuPeriod() > 0 {
		out.CpuQuota, out.CpuPeriod = update.GetCpuQuota(), update.GetCpuPeriod()
	}
	if update.GetCpuShares() > 0 {
		out.CpuShares = update.GetCpuShares()
	}
	if memory := update.GetMemoryLimitInBytes(); memory > 0 && memory < unlimited {
		out.MemoryLimitInBytes = memory
	}
	return out
}

// cpuTime is the limit in microseconds of each quotaPeriod; 0 if there is none.
func cpuTime(r *runtimeapi.LinuxContainerResources) int64 {
	if r.GetCpuQuota() <= 0 || r.GetCpuPeriod() <= 0 {
		return 0
	}
	return r.GetCpuQuota() * quotaPeriod / r.GetCpuPeriod()
}

// follow is a pod's limit after the sum of its containers' limits has changed: it follows a sum that it was, which the kubelet lets it
// be but for init containers, and is never less than what the containers may use. Without a limit there is still none as long as the
// containers' limits fit into what such a pod gets.
func follow(limit, before, after, without int64) int64 {
	switch {
	case limit > 0 && limit == before && after > 0:
		return after
	case limit > 0:
		return max(limit, after)
	case after > without:
		return after
	default:
		return 0
	}
}

// followed are a pod's limits after the sums of its containers' limits have changed.
func (c VMConfig) followed(limits, before, after *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	update := &runtimeapi.LinuxContainerResources{
		MemoryLimitInBytes: follow(limits.GetMemoryLimitInBytes(), before.GetMemoryLimitInBytes(), after.GetMemoryLimitInBytes(), int64(c.DefaultMemory)),
	}
	if was, is := cpuTime(limits), follow(cpuTime(limits), cpuTime(before), cpuTime(after), int64(c.DefaultVCPUs)*quotaPeriod); is != was {
		update.CpuQuota, update.CpuPeriod = is, quotaPeriod
	}
	return told(limits, update)
}
