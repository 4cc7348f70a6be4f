package vm_test

import (
	"context"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// annotated gives a pod annotations of ours.
func annotated(pairs ...string) func(*runtimeapi.PodSandboxConfig) {
	return func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Annotations = make(map[string]string)
		for i := 0; i < len(pairs); i += 2 {
			cfg.Annotations["vmruntime.io/"+pairs[i]] = pairs[i+1]
		}
	}
}

// sized gives a pod a memory limit in bytes.
func sized(memory int64) func(*runtimeapi.PodSandboxConfig) {
	return func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory}
	}
}

// machine runs a machine in a pod of its own and returns when its console has a prompt.
func (b *bed) machine(ctx context.Context, t *testing.T, image string, change ...func(*runtimeapi.PodSandboxConfig)) *ctr {
	t.Helper()
	if err := b.pull(ctx, image); err != nil {
		t.Fatal(err)
	}
	p := b.vmPod(ctx, t, append([]func(*runtimeapi.PodSandboxConfig){sized(192 << 20)}, change...)...)
	c := p.start(of("machine", image))
	c.ready("tiny: up")
	return c
}

func TestMachineBoots(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	info := c.sh("info; blocks")
	t.Log(info)
	for _, want := range []string{"firmware=bios", "boots=1", "serial=root"} {
		if !strings.Contains(info, want) {
			t.Errorf("the machine says\n%s\nwithout %q", info, want)
		}
	}
}
