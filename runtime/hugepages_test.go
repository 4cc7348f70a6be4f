package runtime

import (
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/qemu"
)

func TestHugeBytes(t *testing.T) {
	limit := func(page string, bytes uint64) *runtimeapi.HugepageLimit {
		return &runtimeapi.HugepageLimit{PageSize: page, Limit: bytes}
	}
	for name, tc := range map[string]struct {
		limits []*runtimeapi.HugepageLimit
		want   int64
		wrong  bool
	}{
		"none":            {nil, 0, false},
		"as the kubelet":  {[]*runtimeapi.HugepageLimit{limit("1GB", 0), limit("2MB", 6<<20)}, 6 << 20, false},
		"of a machine":    {[]*runtimeapi.HugepageLimit{limit("1GB", 1<<30)}, 0, false},
		"half a page":     {[]*runtimeapi.HugepageLimit{limit("2MB", 3<<20)}, 0, true},
		"no size":         {[]*runtimeapi.HugepageLimit{limit("large", 2<<20)}, 0, true},
		"size of nothing": {[]*runtimeapi.HugepageLimit{limit("0MB", 2<<20)}, 0, true},
		"beyond counting": {[]*runtimeapi.HugepageLimit{limit("2MB", 1<<63)}, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{Resources: &runtimeapi.LinuxContainerResources{HugepageLimits: tc.limits}}}
			got, err := hugeBytes(cfg)
			if got != tc.want || errdefs.IsInvalidArgument(err) != tc.wrong || err != nil != tc.wrong {
				t.Errorf("%v: %d, %v; want %d, refused %t", tc.limits, got, err, tc.want, tc.wrong)
			}
		})
	}
}

// The guest's kernel describes huge pages in ordinary memory, which the pod does not pay for.
func TestMemoryBesideHugePages(t *testing.T) {
	const mib = 1 << 20
	for _, tc := range []struct{ memory, huge, want int64 }{
		{129 * mib, 0, 129 * mib}, {129 * mib, 2 * mib, 130 * mib}, {128 * mib, 1024 * mib, 144 * mib},
	} {
		if got := withHugePages(tc.memory, tc.huge); got != tc.want {
			t.Errorf("%d with %d of huge pages is %d, want %d", tc.memory, tc.huge, got, tc.want)
		}
	}
}

// Memory of huge pages is never a template's copy.
func TestHugePagesTakeNoTemplate(t *testing.T) {
	ts := &templates{cfg: TemplateConfig{Enabled: true}}
	if got := ts.take(qemu.Machine{HugeNodeBytes: 2 << 20}, "default"); got != nil {
		t.Errorf("a template %v", got)
	}
}
