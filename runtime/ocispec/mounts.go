package ocispec

import (
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sandboxDir is where the guest keeps what all containers of the pod share.
const sandboxDir = "/run/vm/sandbox/"

// buildMounts gives the container's mounts, those above before those below, and the propagation that the root needs for
// them.
func buildMounts(in Input) ([]specs.Mount, string, error) {
	if len(in.MountSources) != len(in.Config.GetMounts()) {
		return nil, "", invalid("%d mount sources for %d mounts", len(in.MountSources), len(in.Config.GetMounts()))
	}
	var given []specs.Mount
	taken := make(map[string]bool)
	for i, m := range in.Config.GetMounts() {
		given = append(given, bind(m, in.MountSources[i]))
		taken[path.Clean(m.GetContainerPath())] = true
	}
	mounts := slices.DeleteFunc(defaultMounts(security(in.Config)), func(m specs.Mount) bool {
		return taken[m.Destination] || taken["/dev"] && strings.HasPrefix(m.Destination, "/dev/")
	})
	for _, m := range podMounts(security(in.Config)) {
		if !taken[m.Destination] {
			given = append(given, m)
		}
	}
	slices.SortStableFunc(given, func(a, b specs.Mount) int { return depth(a.Destination) - depth(b.Destination) })
	return append(mounts, given...), rootPropagation(in.Config.GetMounts()), nil
}

func depth(p string) int { return strings.Count(path.Clean(p), "/") }

// defaultMounts are what every container has; a privileged one may write below /sys.
func defaultMounts(sc *runtimeapi.LinuxContainerSecurityContext) []specs.Mount {
	mode := "ro"
	if sc.GetPrivileged() {
		mode = "rw"
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", mode}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", mode}},
	}
}

// podMounts are the pod's files; with a read-only root they cannot be written either.
func podMounts(sc *runtimeapi.LinuxContainerSecurityContext) []specs.Mount {
	mode := "rw"
	if sc.GetReadonlyRootfs() {
		mode = "ro"
	}
	file := func(name string) specs.Mount {
		return specs.Mount{Destination: "/etc/" + name, Type: "bind", Source: sandboxDir + name, Options: []string{"rbind", "rprivate", mode}}
	}
	return []specs.Mount{
		file("hostname"), file("hosts"), file("resolv.conf"),
		{Destination: "/dev/shm", Type: "bind", Source: sandboxDir + "shm", Options: []string{"rbind", "rprivate", "rw"}},
	}
}

// bind is one mount of the CRI. Images are read-only.
func bind(m *runtimeapi.Mount, source string) specs.Mount {
	options := []string{"rbind", propagation(m.GetPropagation())}
	switch {
	case m.GetRecursiveReadOnly():
		options = append(options, "rro")
	case m.GetReadonly() || isImage(m):
		options = append(options, "ro")
	default:
		options = append(options, "rw")
	}
	return specs.Mount{
		Destination: m.GetContainerPath(), Type: "bind", Source: source,
		Options: append(options, m.GetMountOptions()...),
	}
}

func isImage(m *runtimeapi.Mount) bool { return m.GetImage().GetImage() != "" }

func propagation(p runtimeapi.MountPropagation) string {
	switch p {
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		return "rslave"
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		return "rshared"
	default:
		return "rprivate"
	}
}

// rootPropagation is the strongest of the mounts': a private root would cut them off.
func rootPropagation(mounts []*runtimeapi.Mount) string {
	out := ""
	for _, m := range mounts {
		switch p := propagation(m.GetPropagation()); p {
		case "rshared":
			return p
		case "rslave":
			out = p
		}
	}
	return out
}
