package vm_test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

func security(c *runtimeapi.ContainerConfig) *runtimeapi.LinuxContainerSecurityContext {
	return c.Linux.SecurityContext
}

func int64Value(v int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: v} }

// Command, arguments, environment and directory, with the image's where the container says nothing.
func TestProcess(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	got := p.output(with(shell("own", `echo "$0 $1|$A|$B|$HOSTNAME|$(pwd)"`), func(c *runtimeapi.ContainerConfig) {
		c.Args = []string{"zero", "one two"}
		c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("a b")}, {Key: "B", Value: []byte("x=y")}}
		c.WorkingDir = "/tmp/made/when/missing"
	}))
	if want := "zero one two|a b|x=y|" + p.cfg.GetHostname() + "|/tmp/made/when/missing\n"; got != want {
		t.Errorf("the process saw %q, want %q", got, want)
	}
	got = p.output(with(of("image", images.Users), func(c *runtimeapi.ContainerConfig) {
		c.Command = []string{"sh", "-c", "echo $WHO; pwd; ulimit -n; cat /proc/self/oom_score_adj"}
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{OomScoreAdj: 321}
	}))
	if want := "alice\n/home/alice\n1048576\n321\n"; got != want {
		t.Errorf("the image's settings are %q, want %q", got, want)
	}
	got = p.output(with(shell("tty", "test -t 0 && test -t 1 && echo $TERM"), func(c *runtimeapi.ContainerConfig) { c.Tty, c.Stdin = true, true }))
	if strings.TrimSpace(got) != "xterm" {
		t.Errorf("a container with a terminal wrote %q, want xterm", got)
	}
}

// Users by ID and by name, out of the image's own files, and their groups.
func TestUsers(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	const script = "id -u; id -g; id -G"
	tests := []struct {
		name   string
		change func(*runtimeapi.LinuxContainerSecurityContext)
		want   string
	}{
		// The image says alice:crew (1001:2000); /etc/group has alice in crew and deck (2001).
		{"image", func(*runtimeapi.LinuxContainerSecurityContext) {}, "1001 2000 2000 2001"},
		{"name", func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "bob" }, "1002 1002 1002 2001"},
		{"id", func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = int64Value(1002) }, "1002 1002 1002 2001"},
		{"unknown id", func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = int64Value(54321) }, "54321 0 0"},
		{"group", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = int64Value(1002), int64Value(777)
		}, "1002 777 2001 777"},
		{"merge", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups = int64Value(1002), []int64{4000}
		}, "1002 1002 1002 2001 4000"},
		{"strict", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups = int64Value(1002), []int64{4000}
			s.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
		}, "1002 1002 1002 4000"},
	}
	for i, tt := range tests {
		got := p.output(with(of(fmt.Sprintf("c%d", i), images.Users), func(c *runtimeapi.ContainerConfig) {
			c.Command = []string{"sh", "-c", script}
			tt.change(security(c))
		}))
		ids := strings.Fields(got)
		if len(ids) > 2 {
			slices.Sort(ids[2:])
		}
		if got := strings.Join(ids, " "); got != tt.want {
			t.Errorf("%s: user, group, groups are %s, want %s", tt.name, got, tt.want)
		}
	}
	c := p.start(with(idle("user"), func(c *runtimeapi.ContainerConfig) {
		c.Image.Image, c.Linux.SecurityContext.RunAsUser = images.Users, int64Value(1002)
	}))
	if u := c.status().GetUser().GetLinux(); u.GetUid() != 1002 || u.GetGid() != 1002 || !slices.Contains(u.GetSupplementalGroups(), 2001) {
		t.Errorf("the status has user %v, want 1002:1002 in 2001", u)
	}
}

// capabilities reads the effective set of a shell's own process.
const capabilities = "grep CapEff /proc/self/status | cut -f2"

func TestSecurity(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
	const netAdmin, chown, netRaw = 1 << 12, 1 << 0, 1 << 13
	tests := []struct {
		name   string
		change func(*runtimeapi.LinuxContainerSecurityContext)
		script string
		want   string
	}{
		{"defaults", func(*runtimeapi.LinuxContainerSecurityContext) {}, capabilities, "00000000a80425fb"},
		{"add and drop", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"CHOWN"}}
		}, capabilities, fmt.Sprintf("%016x", (0xa80425fb|netAdmin)&^chown)},
		{"drop all", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_RAW"}, DropCapabilities: []string{"ALL"}}
		}, capabilities, fmt.Sprintf("%016x", netRaw)},
		{
			"no new privileges", func(s *runtimeapi.LinuxContainerSecurityContext) { s.NoNewPrivs = true },
			"grep NoNewPrivs /proc/self/status | cut -f2", "1",
		},
		{"new privileges", func(*runtimeapi.LinuxContainerSecurityContext) {}, "grep NoNewPrivs /proc/self/status | cut -f2", "0"},
		{"seccomp default", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		}, "grep Seccomp: /proc/self/status | cut -f2; unshare -U true 2>/dev/null || echo denied", "2\ndenied"},
		{"seccomp unconfined", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
		}, "grep Seccomp: /proc/self/status | cut -f2", "0"},
		{
			"privileged", func(s *runtimeapi.LinuxContainerSecurityContext) { s.Privileged = true },
			"mkdir /m && mount -t tmpfs none /m && test -c /dev/kmsg && echo may mount", "may mount",
		},
		{
			"not privileged", func(*runtimeapi.LinuxContainerSecurityContext) {},
			"mkdir /m && mount -t tmpfs none /m 2>/dev/null || test -c /dev/kmsg || echo may not", "may not",
		},
		{
			"read-only root", func(s *runtimeapi.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true },
			"touch /file 2>&1; touch /dev/shm/file && echo shm", "touch: /file: Read-only file system\nshm",
		},
		{"masked paths", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.MaskedPaths, s.ReadonlyPaths = []string{"/proc/meminfo", "/proc/scsi"}, []string{"/proc/sys"}
		}, "wc -c < /proc/meminfo; ls /proc/scsi; (echo x > /proc/sys/kernel/hostname) 2>&1 | grep -o Read-only", "0\nRead-only"},
	}
	for i, tt := range tests {
		got := p.output(with(shell(fmt.Sprintf("c%d", i), tt.script), func(c *runtimeapi.ContainerConfig) { tt.change(security(c)) }))
		if strings.TrimSuffix(got, "\n") != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// A device of the guest is at the path that the container asks for.
func TestDevices(t *testing.T) {
	ctx, b := use(t)
	c := b.vmPod(ctx, t).start(with(idle("c"), func(c *runtimeapi.ContainerConfig) {
		c.Devices = []*runtimeapi.Device{
			{HostPath: "/dev/zero", ContainerPath: "/dev/other", Permissions: "rwm"},
			{HostPath: "/dev/null", ContainerPath: "/dev/sink", Permissions: "rw"},
		}
	}))
	c.expect("head -c 2 /dev/other | od -An -tx1; echo x >/dev/sink && stat -c '%t:%T' /dev/sink", " 00 00\n1:3")
}

// A profile of the node's bounds a container's system calls: what it forbids fails, the rest works. One that cannot be used is refused.
func TestSeccompLocalhost(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	profile := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		writeFile(t, path, text)
		return path
	}
	confined := func(name, ref string) *runtimeapi.ContainerConfig {
		return with(idle(name), func(c *runtimeapi.ContainerConfig) {
			security(c).Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
		})
	}
	c := p.start(confined("c", profile("no-mkdir.json", `{"defaultAction": "SCMP_ACT_ALLOW",
		"syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}`)))
	c.expect("touch /file && echo made; mkdir /dir 2>&1; true", "made\nmkdir: can't create directory '/dir': Function not implemented")
	c.expect("grep Seccomp: /proc/self/status | cut -f2", "2")
	p.start(idle("other")).expect("mkdir /dir && echo made", "made")
	for name, tt := range map[string]struct{ ref, words string }{
		"missing":    {filepath.Join(t.TempDir(), "missing.json"), "missing.json"},
		"relative":   {"profile.json", "absolute"},
		"no profile": {profile("words.json", "words"), "not an OCI seccomp profile"},
	} {
		_, err := p.tryCreate(confined("refused", tt.ref))
		t.Run(name, func(t *testing.T) { refused(t, err, codes.InvalidArgument, "localhost_ref", tt.words) })
	}
}

// A container sees its own processes, or the pod's, or those of the container it names.
func TestPidNamespaces(t *testing.T) {
	ctx, b := use(t)
	mode := func(m runtimeapi.NamespaceMode, target string) *runtimeapi.NamespaceOption {
		return &runtimeapi.NamespaceOption{Pid: m, TargetId: target}
	}
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.SecurityContext.NamespaceOptions = mode(runtimeapi.NamespaceMode_POD, "")
	})
	in := func(name string, o *runtimeapi.NamespaceOption) *ctr {
		return p.start(with(idle(name), func(c *runtimeapi.ContainerConfig) { security(c).NamespaceOptions = o })).ready("ready")
	}
	const namespace = "readlink /proc/self/ns/pid"
	a, other := in("a", mode(runtimeapi.NamespaceMode_POD, "")), in("b", mode(runtimeapi.NamespaceMode_POD, ""))
	alone := in("alone", mode(runtimeapi.NamespaceMode_CONTAINER, ""))
	guest := in("target", mode(runtimeapi.NamespaceMode_TARGET, alone.id))
	if a.sh(namespace) != other.sh(namespace) {
		t.Error("two containers with mode POD have two PID namespaces, want one")
	}
	if a.sh(namespace) == alone.sh(namespace) {
		t.Error("a container with mode CONTAINER has the pod's PID namespace")
	}
	if guest.sh(namespace) != alone.sh(namespace) {
		t.Error("a container with mode TARGET has not its target's PID namespace")
	}
	alone.expect("cat /proc/1/comm", "sh")
	// The pod's first process is none of the containers': ending one leaves the others.
	a.stop(0)
	a.wait()
	other.expect("cat /proc/1/comm >/dev/null && echo lives", "lives")
}

// The pod's sysctls are the guest's; its size is what its limits ask for; containers have cgroups of their own in it.
func TestResources(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "123", "kernel.shmmax": "12345678"}
		cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 150000, MemoryLimitInBytes: 300 << 20}
	})
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{
			CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 64 << 20, Unified: map[string]string{"pids.max": "77"},
		}
	}))
	c.expect("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmax", "123\n12345678")
	c.expect("grep -c ^processor /proc/cpuinfo", "2") // 1.5 CPUs
	c.expect("cd /sys/fs/cgroup; cat cpu.max memory.max memory.swap.max pids.max", "50000 100000\n67108864\n0\n77")
	var total int
	if _, err := fmt.Sscanf(c.sh("grep MemTotal /proc/meminfo"), "MemTotal: %d kB", &total); err != nil || total < 300<<10 || total > 600<<10 {
		t.Errorf("the guest has %d KiB of memory (%v), want the pod's 300 MiB and room for the guest itself", total, err)
	}
	if _, err := b.rt.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: c.id, Linux: &runtimeapi.LinuxContainerResources{CpuQuota: 25000, MemoryLimitInBytes: 96 << 20},
	}); err != nil {
		t.Fatalf("UpdateContainerResources: %v", err)
	}
	c.expect("cd /sys/fs/cgroup; cat cpu.max memory.max", "25000 100000\n100663296")
	if r := c.status().GetResources().GetLinux(); r.GetCpuQuota() != 25000 || r.GetCpuPeriod() != 100000 || r.GetMemoryLimitInBytes() != 96<<20 {
		t.Errorf("the status has resources %v, want those of the update", r)
	}

	// The node bounds the VM, once the guest is up.
	if quota, period := cpuQuota(b.CgroupParent(), p.id); quota != "150000" || period != "100000" {
		t.Errorf("the pod's cgroup has a CPU quota of %q in %q, want 150000 in 100000", quota, period)
	}
	info := p.verboseInfo()
	if info.VCPUs != 2 || info.MemoryBytes < 300<<20 {
		t.Errorf("inspectp tells %d vCPUs and %d bytes, want 2 and more than the limit", info.VCPUs, info.MemoryBytes)
	}
}

// cpuQuota is the quota and period of a pod's cgroup on the node, v1 or v2.
func cpuQuota(parent, id string) (quota, period string) {
	dir := parent + "/vmruntime-" + id + "/"
	if fields := strings.Fields(readFile("/sys/fs/cgroup" + dir + "cpu.max")); len(fields) == 2 {
		return fields[0], fields[1]
	}
	read := func(name string) string { return strings.TrimSpace(readFile("/sys/fs/cgroup/cpu" + dir + name)) }
	return read("cpu.cfs_quota_us"), read("cpu.cfs_period_us")
}

// podInfo is what the verbose status of a sandbox tells.
type podInfo struct {
	UID         uint32 `json:"uid"`
	VCPUs       int    `json:"vcpus"`
	MemoryBytes int64  `json:"memoryBytes"`
	Guest       struct {
		Boot int `json:"boot"`
		QEMU struct {
			PID int `json:"pid"`
		} `json:"qemu"`
		Share *struct {
			PID int `json:"pid"`
		} `json:"share"`
		TPM *struct {
			PID int `json:"pid"`
		} `json:"tpm"`
		Disks []string `json:"disks"`
	} `json:"guest"`
}

func (p *pod) verboseInfo() podInfo {
	p.t.Helper()
	resp, err := p.rt.PodSandboxStatus(p.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		p.t.Fatal(err)
	}
	var info podInfo
	if err := json.Unmarshal([]byte(resp.GetInfo()["info"]), &info); err != nil || info.Guest.QEMU.PID == 0 {
		p.t.Fatalf("the verbose status %v names no QEMU process: %v", resp.GetInfo(), err)
	}
	return info
}
