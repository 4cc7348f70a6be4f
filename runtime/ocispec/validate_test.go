package ocispec

import (
	"math"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// refused fails the test unless the error is ErrInvalidArgument and says what is wanted; nothing wanted is no error.
func refused(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("error %v", err)
	case want != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want)):
		t.Errorf("error %v, want %q", err, want)
	}
}

const node = runtimeapi.NamespaceMode_NODE

func TestValidateSandbox(t *testing.T) {
	options := func(ns *runtimeapi.NamespaceOption) func(*runtimeapi.PodSandboxConfig) {
		return func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = ns }
	}
	for _, tc := range []struct {
		name   string
		change func(*runtimeapi.PodSandboxConfig)
		want   string
	}{
		{"plain", func(*runtimeapi.PodSandboxConfig) {}, ""},
		{"no linux", func(c *runtimeapi.PodSandboxConfig) { c.Linux = nil }, ""},
		{"no metadata", func(c *runtimeapi.PodSandboxConfig) { c.Metadata = nil }, "metadata.name"},
		{"windows", func(c *runtimeapi.PodSandboxConfig) { c.Windows = &runtimeapi.WindowsPodSandboxConfig{} }, "windows is set"},
		{"host network", options(&runtimeapi.NamespaceOption{Network: node}), "unset hostNetwork"},
		{"host pid", options(&runtimeapi.NamespaceOption{Pid: node}), "unset hostPID"},
		{"host ipc", options(&runtimeapi.NamespaceOption{Ipc: node}), "unset hostIPC"},
		{"pod pid", options(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}), ""},
		{"container pid", options(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}), ""},
		{"node users", options(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: node}}), ""},
		{"pod users", options(podUsers(mapping(0, 1000, 65536))), ""},
		{"pod users without mappings", options(podUsers()), "uids has 0 mappings"},
		{"pod users with two mappings", options(podUsers(mapping(0, 1000, 10), mapping(10, 2000, 10))), "uids has 2 mappings"},
		{"pod users not from 0", options(podUsers(mapping(1, 1000, 10))), "maps 10 IDs from 1 to 1000"},
		{"pod users of none", options(podUsers(mapping(0, 1000, 0))), "at least one ID"},
		{"pod users of too many", options(podUsers(mapping(0, math.MaxUint32-10, 10))), "to IDs below"},
		{"node users with mappings", options(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{
			Mode: node, Uids: []*runtimeapi.IDMapping{mapping(0, 0, 1)},
		}}), "mappings with mode NODE"},
		{"container users", options(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_CONTAINER}}), "mode is CONTAINER"},
		{"sysctls", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "net/ipv4/conf/eth0.1/forwarding": "1"}
		}, ""},
		{"sysctl that leaves", func(c *runtimeapi.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"net/../../x": "1"} }, "is not a sysctl"},
		{"apparmor of the node", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "p"}
		}, "use RuntimeDefault"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := input().Sandbox
			tc.change(cfg)
			refused(t, ValidateSandbox(cfg), tc.want)
		})
	}
	refused(t, ValidateSandbox(nil), "metadata.name")
}

func TestValidateContainer(t *testing.T) {
	type config = runtimeapi.ContainerConfig
	secure := func(change func(*runtimeapi.LinuxContainerSecurityContext)) func(*config) {
		return func(c *config) { change(c.Linux.SecurityContext) }
	}
	mount := func(m *runtimeapi.Mount) func(*config) {
		return func(c *config) { c.Mounts = []*runtimeapi.Mount{m} }
	}
	limits := func(r *runtimeapi.LinuxContainerResources) func(*config) {
		return func(c *config) { c.Linux.Resources = r }
	}
	local := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "p"}
	for _, tc := range []struct {
		name   string
		change func(*config)
		want   string
	}{
		{"plain", func(*config) {}, ""},
		{"no linux", func(c *config) { c.Linux = nil }, ""},
		{"no metadata", func(c *config) { c.Metadata = nil }, "metadata.name"},
		{"no image", func(c *config) { c.Image = nil }, "image.image is empty"},
		{"windows", func(c *config) { c.Windows = &runtimeapi.WindowsContainerConfig{} }, "windows is set"},
		{"relative working dir", func(c *config) { c.WorkingDir = "x" }, `working_dir "x" is relative`},
		{"env without name", func(c *config) { c.Envs = []*runtimeapi.KeyValue{key("", "x")} }, "envs[0]"},
		{"env with zero byte", func(c *config) { c.Envs = []*runtimeapi.KeyValue{key("A", "x\x00")} }, "envs[0]"},
		{"host pid", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: node}
		}), "unset hostPID"},
		{"target without id", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET}
		}), "target_id"},
		{"target", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "c0"}
		}), ""},
		{"network target", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions = &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_TARGET}
		}), "only pid"},
		{"privileged in plain sandbox", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Privileged = true }), "security context must say privileged too"},
		{"user twice", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUser, sc.RunAsUsername = value(1), "x" }), "are both set"},
		{"group alone", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsGroup = value(1) }), "without a user"},
		{"negative group", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.SupplementalGroups = []int64{1, -2} }), "supplemental_groups[1] is -2"},
		{"unknown policy", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.SupplementalGroupsPolicy = 9 }), "must be Merge or Strict"},
		{"unknown capability", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"FLY"}}
		}), `add_capabilities "FLY" is not a capability`},
		{"seccomp without path", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost}
		}), "localhost_ref"},
		{"seccomp with a path too many", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Seccomp = &runtimeapi.SecurityProfile{LocalhostRef: "p"}
		}), "localhost_ref"},
		{"seccomp unknown", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: 7}
		}), "profile_type 7 is unknown"},
		{"apparmor default", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.ApparmorProfile = "runtime/default" }), ""},
		{"apparmor of the node", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Apparmor = local }), "use RuntimeDefault"},
		{"apparmor of the node, older", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.ApparmorProfile = "localhost/p" }), `profile "p"`},
		{"selinux", secure(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0"}
		}), ""},
		{"relative mount", mount(&runtimeapi.Mount{ContainerPath: "x", HostPath: "/h"}), `mounts[0] to "x"`},
		{"mount of the root", mount(&runtimeapi.Mount{ContainerPath: "/x/..", HostPath: "/h"}), "must not be the root"},
		{"mount of nothing", mount(&runtimeapi.Mount{ContainerPath: "/x"}), "one of them must be set"},
		{"mount of two", mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/h", Image: &runtimeapi.ImageSpec{Image: "i"}}), "one of them must be set"},
		{"sub path without image", mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/h", ImageSubPath: "s"}), ""},
		{"rro of rw", mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/h", RecursiveReadOnly: true}), "without readonly"},
		{"rro that propagates", mount(&runtimeapi.Mount{
			ContainerPath: "/x", HostPath: "/h", Readonly: true, RecursiveReadOnly: true,
			Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
		}), "must be PROPAGATION_PRIVATE"},
		{"bidirectional", mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/h", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL}), "only a privileged container"},
		{"unknown propagation", mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/h", Propagation: 5}), "propagation 5 is unknown"},
		{"mount option", mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/h", MountOptions: []string{"noexec"}}), ""},
		{"unknown mount option", mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/h", MountOptions: []string{"idmap"}}), `mount_options "idmap"`},
		{"device of the node", func(c *config) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/sda", ContainerPath: "/dev/sda", Permissions: "r"}}
		}, `devices[0].host_path "/dev/sda" is a device of the node`},
		{"device permissions", func(c *config) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "rx"}}
		}, "some of r, w and m"},
		{"device at relative path", func(c *config) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/null", ContainerPath: "x", Permissions: "r"}}
		}, "must begin with /"},
		{"CDI", func(c *config) { c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "v/c=d"}} }, `CDI_devices[0] "v/c=d"`},
		{"negative shares", limits(&runtimeapi.LinuxContainerResources{CpuShares: -1}), "neither may be negative"},
		{"oom score", limits(&runtimeapi.LinuxContainerResources{OomScoreAdj: 1001}), "oom_score_adj is 1001"},
		{"swap below limit", limits(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 2, MemorySwapLimitInBytes: 1}), "less than the memory limit"},
		{"unified path", limits(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"../memory.max": "1"}}), "not a file of a cgroup"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := input()
			tc.change(in.Config)
			refused(t, ValidateContainer(in.Config, in.Sandbox, in.BlockVolumes), tc.want)
		})
	}
}

func TestEveryFaultIsReported(t *testing.T) {
	in := input()
	in.Config.WorkingDir = "x"
	in.Config.Linux.SecurityContext.RunAsGroup = value(1)
	in.Config.Linux.Resources.OomScoreAdj = 2000
	err := ValidateContainer(in.Config, in.Sandbox, in.BlockVolumes)
	for _, want := range []string{"working_dir", "run_as_group", "oom_score_adj"} {
		refused(t, err, want)
	}
}

func TestBuildRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Input)
		want   string
	}{
		"no program":       {func(in *Input) { in.Image.Config.Entrypoint, in.Image.Config.Cmd = nil, nil }, "command and args are empty"},
		"sources missing":  {func(in *Input) { in.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/x"}} }, "0 mount sources for 1 mounts"},
		"device":           {func(in *Input) { in.Config.Devices = []*runtimeapi.Device{{HostPath: "/dev/sda"}} }, "device of the node"},
		"broken seccomp":   {func(in *Input) { in.Config.Linux.SecurityContext.SeccompProfilePath = "localhost/p" }, "not an OCI seccomp profile"},
		"negative numbers": {func(in *Input) { in.Config.Linux.Resources.CpuPeriod = -1 }, "neither may be negative"},
	} {
		t.Run(name, func(t *testing.T) {
			in := input()
			tc.change(&in)
			_, err := Build(in)
			refused(t, err, tc.want)
		})
	}
}
