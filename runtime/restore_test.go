package runtime

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What was saved on another kind of node is refused, and the sentence says in what they differ.
func TestPlatformFits(t *testing.T) {
	here := platform{Arch: "amd64", Accel: "kvm", QEMU: "7.2", CPU: "fast", Kernel: "k", Initramfs: "i", Cmdline: "quiet"}
	guest := []string{"guest kernel's SHA-256", "guest initramfs' SHA-256", "guest kernel's command line"}
	for what, change := range map[string]func(*platform){
		"":                            func(*platform) {},
		"architecture":                func(p *platform) { p.Arch = "arm64" },
		"acceleration":                func(p *platform) { p.Accel = "tcg" },
		"version of QEMU":             func(p *platform) { p.QEMU = "8.0" },
		"processor":                   func(p *platform) { p.CPU = "slow" },
		"guest kernel's SHA-256":      func(p *platform) { p.Kernel = "other" },
		"guest initramfs' SHA-256":    func(p *platform) { p.Initramfs = "other" },
		"guest kernel's command line": func(p *platform) { p.Cmdline = "debug" },
	} {
		was := here
		change(&was)
		for _, machine := range []bool{false, true} {
			err := was.fits(here, machine)
			fits := what == "" || machine && slices.Contains(guest, what)
			if fits != (err == nil) || err != nil && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the checkpoint's "+what+" is")) {
				t.Errorf("another %q, a machine: %v: %v; want that it fits: %v", what, machine, err, fits)
			}
		}
	}
}

// A manifest that no checkpoint has is refused.
func TestManifestIsWhole(t *testing.T) {
	oci := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
	cfg := message[*runtimeapi.ContainerConfig]{&runtimeapi.ContainerConfig{}}
	container := checkpointContainer{Spec: containerSpec{Config: cfg, OCI: oci}}
	machine := checkpointContainer{Spec: containerSpec{Config: cfg, Machine: &machineSpec{}}}
	for _, m := range []checkpointManifest{
		{Containers: []checkpointContainer{container, container}},
		{Machine: &checkpointMachine{}, Containers: []checkpointContainer{machine}},
	} {
		if err := m.whole(); err != nil {
			t.Error(err)
		}
	}
	for name, m := range map[string]checkpointManifest{
		"no configuration":        {Containers: []checkpointContainer{{Spec: containerSpec{OCI: oci}}}},
		"no specification":        {Containers: []checkpointContainer{container, {Spec: containerSpec{Config: cfg}}}},
		"no process":              {Containers: []checkpointContainer{{Spec: containerSpec{Config: cfg, OCI: &specs.Spec{Linux: &specs.Linux{}}}}}},
		"no Linux":                {Containers: []checkpointContainer{{Spec: containerSpec{Config: cfg, OCI: &specs.Spec{Process: &specs.Process{}}}}}},
		"a machine as container":  {Containers: []checkpointContainer{machine}},
		"a container as machine":  {Machine: &checkpointMachine{}, Containers: []checkpointContainer{container}},
		"a machine of two":        {Machine: &checkpointMachine{}, Containers: []checkpointContainer{machine, machine}},
		"a machine of none":       {Machine: &checkpointMachine{}},
		"a machine and container": {Containers: []checkpointContainer{container, machine}},
	} {
		if err := m.whole(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A VM that is larger than the node's may be is refused, and the sentence says by what.
func TestSizeFits(t *testing.T) {
	c := VMConfig{MaxVCPUs: 4, MaxMemory: 1 << 30, ScratchSize: 10 << 30}
	for want, m := range map[string]checkpointManifest{
		"":                {VCPUs: 4, MemoryBytes: 1 << 30, Size: vmSize{4, 1 << 30}, ScratchSize: 10 << 30},
		"vm.max_vcpus":    {VCPUs: 1, Size: vmSize{VCPUs: 5}},
		"vm.max_memory":   {MemoryBytes: 2 << 30, Size: vmSize{MemoryBytes: 1 << 30}},
		"vm.scratch_size": {ScratchSize: 10<<30 + 1},
	} {
		err := c.fits(&m)
		if (want == "") != (err == nil) || err != nil && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// A guest that has booted keeps what the sandbox was made with.
func TestManifestFitsPod(t *testing.T) {
	config := func(sysctls map[string]string, pid runtimeapi.NamespaceMode) *runtimeapi.PodSandboxConfig {
		return &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
			Sysctls:         sysctls,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: pid}},
		}}
	}
	m := &checkpointManifest{Pod: message[*runtimeapi.PodSandboxConfig]{config(map[string]string{"net.a": "1"}, runtimeapi.NamespaceMode_POD)}}
	for want, cfg := range map[string]*runtimeapi.PodSandboxConfig{
		"":                  config(map[string]string{"net.a": "1"}, runtimeapi.NamespaceMode_POD),
		"linux.sysctls":     config(map[string]string{"net.a": "2"}, runtimeapi.NamespaceMode_POD),
		"namespace_options": config(map[string]string{"net.a": "1"}, runtimeapi.NamespaceMode_CONTAINER),
	} {
		err := m.fitsPod(cfg)
		if (want == "") != (err == nil) || err != nil && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want)) {
			t.Errorf("fitsPod: %v, want %q", err, want)
		}
	}
}
