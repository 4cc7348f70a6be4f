package ocispec

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/app:/bin/sh\nmail:x:8:12::/:\n"
	group  = "root:x:0:\nmail:x:12:app\napp:x:1001:app\nwheel:x:10:root,app\ndocker:x:999:mail\n"
)

func rootFS() fstest.MapFS {
	return fstest.MapFS{"etc/passwd": {Data: []byte(passwd)}, "etc/group": {Data: []byte(group)}}
}

// input is a plain container; the table's cases change it.
func input() Input {
	return Input{
		ID: "c1", SandboxID: "p1", Hostname: "web-0", ImageName: "docker.io/library/web:1", RootFS: rootFS(),
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "web"},
			Image:    &runtimeapi.ImageSpec{Image: "docker.io/library/web:1"},
			Linux: &runtimeapi.LinuxContainerConfig{
				Resources:       &runtimeapi.LinuxContainerResources{},
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{},
			},
		},
		Sandbox: &runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{Name: "web-0", Namespace: "default", Uid: "u-1"},
			Linux:    &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}},
		},
		Image: imagespec.Image{Config: imagespec.ImageConfig{Entrypoint: []string{"/bin/web"}, Cmd: []string{"-v"}}},
	}
}

func value(v int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: v} }

func key(k, v string) *runtimeapi.KeyValue { return &runtimeapi.KeyValue{Key: k, Value: []byte(v)} }

var goldens = map[string]func(in *Input){
	"plain": func(*Input) {},
	"kubelet": func(in *Input) {
		c, sc := in.Config, in.Config.Linux.SecurityContext
		c.Command, c.Args, c.WorkingDir = []string{"/bin/sh"}, []string{"-c", "true"}, "/work"
		c.Envs = []*runtimeapi.KeyValue{key("A", "1"), key("B", "x=y"), key("PATH", "/bin")}
		c.Annotations = map[string]string{"io.kubernetes.container.hash": "abc", "run.oci.hooks.stdout": "/etc/shadow"}
		c.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/data/sub/deep", HostPath: "/srv/deep"},
			{ContainerPath: "/data", HostPath: "/srv", Readonly: true},
			{ContainerPath: "/etc/hosts", HostPath: "/var/lib/kubelet/hosts"},
			{ContainerPath: "/secret", HostPath: "/s", Readonly: true, RecursiveReadOnly: true, MountOptions: []string{"noexec", "nosuid"}},
			{ContainerPath: "/live", HostPath: "/l", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
			{ContainerPath: "/model", Image: &runtimeapi.ImageSpec{Image: "m"}, ImageSubPath: "weights"},
		}
		in.MountSources = []string{"/run/vm/shares/c1-0", "/run/vm/shares/c1-1", "/run/vm/files/c1-2/file", "/run/vm/files/c1-3", "/run/vm/shares/c1-4", "/run/vm/images/c1-5/weights"}
		in.Image.Config.Env = []string{"PATH=/opt/bin", "A=0", "LANG=C"}
		in.Image.Config.WorkingDir = "srv"
		sc.NoNewPrivs, sc.ReadonlyRootfs = true, true
		sc.MaskedPaths, sc.ReadonlyPaths = []string{"/proc/kcore"}, []string{"/proc/sys"}
		sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups = value(1000), value(2000), []int64{3000, 10}
		sc.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"MKNOD"}}
		sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{
			CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 985, CpusetCpus: "2-3",
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "1GB"}, {PageSize: "2MB", Limit: 4 << 20}},
			Unified:        map[string]string{"memory.high": "60000000"},
		}
	},
	"privileged": func(in *Input) {
		sc := in.Config.Linux.SecurityContext
		sc.Privileged = true
		sc.MaskedPaths = []string{"/proc/kcore"}
		sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		sc.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
		in.Sandbox.Linux.SecurityContext.Privileged = true
		in.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/both", HostPath: "/b", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL}}
		in.MountSources = []string{"/run/vm/shares/c1-0"}
	},
	"terminal": func(in *Input) {
		in.Config.Tty = true
		in.Image.Config.Env = []string{"TERM=vt100"}
		in.Image.Config.User = "app:wheel"
	},
	"devices": func(in *Input) {
		in.Config.Devices = []*runtimeapi.Device{
			{HostPath: "/dev/null", ContainerPath: "/dev/null", Permissions: "rwm"},
			{HostPath: "/dev/zero", ContainerPath: "/dev/nothing", Permissions: "r"},
			{HostPath: "/volume", ContainerPath: "/dev/data", Permissions: "rwm"},
		}
		in.BlockVolumes = []string{"/volume"}
		in.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev/", HostPath: "/some/dev"}}
		in.MountSources = []string{"/run/vm/shares/c1-0"}
	},
}

// TestGolden compares whole specifications with testdata; go test -update writes them.
func TestGolden(t *testing.T) {
	for name, change := range goldens {
		t.Run(name, func(t *testing.T) {
			in := input()
			change(&in)
			if err := ValidateContainer(in.Config, in.Sandbox, in.BlockVolumes); err != nil {
				t.Fatal(err)
			}
			spec, err := Build(in)
			if err != nil {
				t.Fatal(err)
			}
			if spec.Linux.Seccomp != nil {
				spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: spec.Linux.Seccomp.DefaultAction} // a long list of the library's
			}
			compareGolden(t, name, spec)
		})
	}
}

func compareGolden(t *testing.T, name string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	file := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Error(diff)
	}
}

func build(t *testing.T, change func(*Input)) *specs.Spec {
	t.Helper()
	in := input()
	change(&in)
	spec, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func TestProcessArgs(t *testing.T) {
	for _, tc := range []struct {
		name                           string
		entrypoint, cmd, command, args []string
		want                           []string
	}{
		{"image alone", []string{"/e"}, []string{"a"}, nil, nil, []string{"/e", "a"}},
		{"command alone", []string{"/e"}, []string{"a"}, []string{"/c"}, nil, []string{"/c"}},
		{"args alone", []string{"/e"}, []string{"a"}, nil, []string{"b"}, []string{"/e", "b"}},
		{"both", []string{"/e"}, []string{"a"}, []string{"/c"}, []string{"b"}, []string{"/c", "b"}},
		{"image without entrypoint", nil, []string{"sh"}, nil, nil, []string{"sh"}},
		{"reset entrypoint", []string{""}, []string{"sh"}, nil, nil, []string{"sh"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := build(t, func(in *Input) {
				in.Image.Config.Entrypoint, in.Image.Config.Cmd = tc.entrypoint, tc.cmd
				in.Config.Command, in.Config.Args = tc.command, tc.args
			})
			if !slices.Equal(spec.Process.Args, tc.want) {
				t.Errorf("args %q, want %q", spec.Process.Args, tc.want)
			}
		})
	}
}

// TestBuildKeepsItsInput: the CRI messages and the image belong to the caller.
func TestBuildKeepsItsInput(t *testing.T) {
	in := input()
	in.Image.Config.Entrypoint = append(make([]string, 0, 8), "/bin/web")
	first, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	in.Config.Args = []string{"other"}
	if _, err := Build(in); err != nil {
		t.Fatal(err)
	}
	if want := []string{"/bin/web", "-v"}; !slices.Equal(first.Process.Args, want) {
		t.Errorf("a second Build changed the first: %q", first.Process.Args)
	}
}

func TestCapabilities(t *testing.T) {
	all := allCapabilities()
	for _, tc := range []struct {
		name               string
		add, drop, ambient []string
		want, wantAmbient  []string
	}{
		{"default", nil, nil, nil, defaultCapabilities, nil},
		{"all", []string{"all"}, nil, nil, all, nil},
		{"none", nil, []string{"ALL"}, nil, nil, nil},
		{"one only", []string{"net_raw"}, []string{"ALL"}, nil, []string{"CAP_NET_RAW"}, nil},
		{"all but one", []string{"ALL"}, []string{"CAP_CHOWN"}, nil, all[1:], nil},
		{"drop wins", []string{"NET_RAW"}, []string{"ALL", "NET_RAW"}, nil, nil, nil},
		{"ambient", nil, []string{"ALL"}, []string{"SYS_TIME"}, []string{"CAP_SYS_TIME"}, []string{"CAP_SYS_TIME"}},
		{"all ambient but one", nil, []string{"CHOWN"}, []string{"ALL"}, all[1:], all[1:]},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := build(t, func(in *Input) {
				in.Config.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{
					AddCapabilities: tc.add, DropCapabilities: tc.drop, AddAmbientCapabilities: tc.ambient,
				}
			})
			c := spec.Process.Capabilities
			for set, got := range map[string][]string{"bounding": c.Bounding, "effective": c.Effective, "permitted": c.Permitted} {
				if !slices.Equal(got, tc.want) {
					t.Errorf("%s %v, want %v", set, got, tc.want)
				}
			}
			if !slices.Equal(c.Ambient, tc.wantAmbient) || !slices.Equal(c.Inheritable, tc.wantAmbient) {
				t.Errorf("ambient %v, inheritable %v, want %v", c.Ambient, c.Inheritable, tc.wantAmbient)
			}
		})
	}
}

func TestSeccomp(t *testing.T) {
	local := `{"defaultAction":"SCMP_ACT_LOG"}`
	for _, tc := range []struct {
		name    string
		profile *runtimeapi.SecurityProfile
		older   string
		want    specs.LinuxSeccompAction
		path    string
	}{
		{"unset", nil, "", "", ""},
		{"unconfined", &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, "", "", ""},
		{"default", &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, "", specs.ActErrno, ""},
		{"localhost", &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "/p.json"}, "", "SCMP_ACT_LOG", "/p.json"},
		{"older default", nil, "runtime/default", specs.ActErrno, ""},
		{"older localhost", nil, "localhost//p.json", "SCMP_ACT_LOG", "/p.json"},
		{"older unconfined", nil, "unconfined", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var cfg *runtimeapi.ContainerConfig
			spec := build(t, func(in *Input) {
				in.Config.Linux.SecurityContext.Seccomp = tc.profile
				in.Config.Linux.SecurityContext.SeccompProfilePath = tc.older
				in.SeccompProfile = []byte(local)
				cfg = in.Config
			})
			var got specs.LinuxSeccompAction
			if spec.Linux.Seccomp != nil {
				got = spec.Linux.Seccomp.DefaultAction
			}
			if got != tc.want {
				t.Errorf("default action %q, want %q", got, tc.want)
			}
			if p := LocalhostSeccomp(cfg); p != tc.path {
				t.Errorf("path %q, want %q", p, tc.path)
			}
		})
	}
}

func TestResources(t *testing.T) {
	r, err := Resources(nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}}, r); diff != "" {
		t.Error(diff)
	}
	r, err = Resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 10, MemorySwapLimitInBytes: 15})
	if err != nil {
		t.Fatal(err)
	}
	if *r.Memory.Limit != 10 || *r.Memory.Swap != 15 {
		t.Errorf("limit %d, swap %d", *r.Memory.Limit, *r.Memory.Swap)
	}
}
