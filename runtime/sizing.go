package runtime

import (
	"math"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
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
	const mib = 1 << 20
	return vcpus, (memory + mib - 1) / mib * mib
}
