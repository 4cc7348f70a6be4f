package runtime

import (
	goruntime "runtime"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/qemu"
)

func TestFollow(t *testing.T) {
	for name, c := range map[string]struct{ limit, before, after, without, want int64 }{
		"the sum grows":                        {100, 100, 150, 50, 150},
		"the sum shrinks":                      {100, 100, 60, 50, 60},
		"a limit of the sum is taken away":     {100, 100, 0, 50, 100},
		"the pod has more than the sum":        {100, 60, 80, 50, 100},
		"the sum grows over it":                {100, 60, 120, 50, 120},
		"the sum was more than the pod's":      {100, 200, 150, 50, 150},
		"the pod has no limit":                 {0, 20, 40, 50, 0},
		"nor has its container":                {0, 0, 40, 50, 0},
		"the container's is more than default": {0, 20, 60, 50, 60},
	} {
		if got := follow(c.limit, c.before, c.after, c.without); got != c.want {
			t.Errorf("%s: follow(%d, %d, %d, %d) = %d, want %d", name, c.limit, c.before, c.after, c.without, got, c.want)
		}
	}
}

func TestTold(t *testing.T) {
	old := &runtimeapi.LinuxContainerResources{CpuQuota: 50000, CpuPeriod: 100000, CpuShares: 512, MemoryLimitInBytes: 64 * mib, CpusetCpus: "0"}
	update := &runtimeapi.LinuxContainerResources{CpuQuota: -1, CpuPeriod: 100000, CpuShares: 2, MemoryLimitInBytes: 1<<63 - 4096}
	want := &runtimeapi.LinuxContainerResources{CpuQuota: 50000, CpuPeriod: 100000, CpuShares: 2, MemoryLimitInBytes: 64 * mib, CpusetCpus: "0"}
	if diff := cmp.Diff(want, told(old, update), protocmp.Transform()); diff != "" {
		t.Errorf("what is unlimited in an update does not stay as it was (-want +got):\n%s", diff)
	}
	if old.CpuShares != 512 {
		t.Error("the former limits have changed")
	}
	got := told(nil, &runtimeapi.LinuxContainerResources{CpuQuota: 10000, CpuPeriod: 20000})
	if got.GetCpuQuota() != 10000 || got.GetCpuPeriod() != 20000 {
		t.Errorf("without former limits there are %v", got)
	}
}

func TestFollowed(t *testing.T) {
	vm := VMConfig{DefaultMemory: 256 * mib, DefaultVCPUs: 1}
	sum := func(quota, memory int64) *runtimeapi.LinuxContainerResources {
		return &runtimeapi.LinuxContainerResources{CpuQuota: quota, CpuPeriod: quotaPeriod, MemoryLimitInBytes: memory}
	}
	pod := &runtimeapi.LinuxContainerResources{CpuQuota: 10000, CpuPeriod: 20000, MemoryLimitInBytes: 64 * mib}
	if got := vm.followed(pod, sum(50000, 64*mib), sum(50000, 96*mib)); got.GetCpuQuota() != 10000 || got.GetCpuPeriod() != 20000 || got.GetMemoryLimitInBytes() != 96*mib {
		t.Errorf("with more memory the pod has %v, want its own quota and period and the memory", got)
	}
	if got := vm.followed(pod, sum(50000, 64*mib), sum(25000, 64*mib)); got.GetCpuQuota() != 25000 || got.GetCpuPeriod() != quotaPeriod {
		t.Errorf("with less CPU the pod has %v, want 25000 of 100000", got)
	}
	if got := vm.followed(nil, sum(0, 0), sum(0, 64*mib)); got.GetMemoryLimitInBytes() != 0 {
		t.Errorf("a pod without limits has got %v", got)
	}
}

func TestResized(t *testing.T) {
	vm := VMConfig{DefaultMemory: 256 * mib, GuestOverhead: 64 * mib, MinMemory: 128 * mib, MaxMemory: 1024 * mib, DefaultVCPUs: 1, MaxVCPUs: 4}
	limits := func(memory int64) *runtimeapi.LinuxPodSandboxConfig {
		return &runtimeapi.LinuxPodSandboxConfig{Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory}}
	}
	if got, err := vm.resized(limits(100*mib), limits(200*mib)); err != nil || got != (vmSize{1, 264 * mib}) {
		t.Errorf("200 MiB give %v, %v", got, err)
	}
	if _, err := vm.resized(limits(100*mib), limits(1000*mib)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("more than vm.max_memory: %v", err)
	}
	if got, err := vm.resized(limits(3000*mib), limits(2000*mib)); err != nil || got.MemoryBytes != 1024*mib {
		t.Errorf("less than before, but more than vm.max_memory: %v, %v", got, err)
	}
}

func TestWithin(t *testing.T) {
	have := qemu.Size{BootVCPUs: 1, MaxVCPUs: goruntime.NumCPU(), BootBytes: 128 * mib, MaxMemoryBytes: 512 * mib}
	if got, err := (vmSize{goruntime.NumCPU() + 1, 512 * mib}).within(have); err != nil || got.VCPUs != goruntime.NumCPU() {
		t.Errorf("more vCPUs than the node has processors: %v, %v", got, err)
	}
	if _, err := (vmSize{1, 513 * mib}).within(have); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("more memory than the VM was started for: %v", err)
	}
	if goruntime.NumCPU() > 1 {
		have.MaxVCPUs = 1
		if _, err := (vmSize{2, 128 * mib}).within(have); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("more vCPUs than the VM was started for: %v", err)
		}
	}
}

func TestRoom(t *testing.T) {
	vm := VMConfig{MaxMemory: 1 << 50, MaxVCPUs: 255}
	vcpus, memory := vm.room(300, 64*mib)
	if vcpus != 300 || memory != nodeMemory() {
		t.Errorf("there is room for %d vCPUs and %d bytes, want no less vCPUs than at the start and all of the node's memory", vcpus, memory)
	}
	vm = VMConfig{MaxMemory: 256*mib + 1, MaxVCPUs: 1}
	if vcpus, memory = vm.room(1, 64*mib); vcpus != 1 || memory != 256*mib {
		t.Errorf("there is room for %d vCPUs and %d bytes, want what is configured", vcpus, memory)
	}
}

func TestExceeded(t *testing.T) {
	s := vmSize{1, 130 * mib}
	for name, c := range map[string]struct {
		have qemu.Size
		want bool
	}{
		"as it is":            {qemu.Size{BootBytes: 130 * mib}, false},
		"rounded to a block":  {qemu.Size{BootBytes: 129 * mib, PluggedBytes: 2 * mib, RequestedBytes: 2 * mib}, false},
		"with more plugged":   {qemu.Size{BootBytes: 128 * mib, PluggedBytes: 4 * mib}, true},
		"with more requested": {qemu.Size{BootBytes: 128 * mib, RequestedBytes: 4 * mib}, true},
		"less what is given":  {qemu.Size{BootBytes: 140 * mib, BalloonBytes: 10 * mib}, false},
	} {
		if got := s.exceeded(c.have); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
