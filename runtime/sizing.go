package runtime

import (
	"math"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/qemu"
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

	memory := int64(c.DefaultMemory)
	if limit := res.GetMemoryLimitInBytes(); limit > 0 {
		memory = limit
	}
	memory = min(max(memory+c.overhead(cfg), int64(c.MinMemory)), int64(c.MaxMemory))
	return vcpus, roundUp(memory, 1<<20)
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
