package ocispec

import (
	"encoding/json"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// podCgroup is the guest's cgroup above those of the containers.
const podCgroup = "/pod"

// defaultCapabilities are containerd's.
var defaultCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// device is a device node that every guest has.
type device struct{ major, minor int64 }

// commonDevices are in every container; a CRI device that names one of them means the guest's.
var commonDevices = map[string]device{
	"/dev/null": {1, 3}, "/dev/zero": {1, 5}, "/dev/full": {1, 7},
	"/dev/random": {1, 8}, "/dev/urandom": {1, 9}, "/dev/tty": {5, 0},
}

// privilegedDevices are what a privileged container has beyond that; it may make others itself.
var privilegedDevices = map[string]device{
	"/dev/kmsg": {1, 11}, "/dev/fuse": {10, 229}, "/dev/loop-control": {10, 237}, "/dev/net/tun": {10, 200},
}

func buildLinux(in Input) (*specs.Linux, error) {
	sc := security(in.Config)
	resources, err := Resources(in.Config.GetLinux().GetResources())
	if err != nil {
		return nil, err
	}
	linux := &specs.Linux{
		CgroupsPath: path.Join(podCgroup, in.ID),
		Resources:   resources,
		Namespaces:  []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}},
	}
	if sc.GetPrivileged() {
		linux.Devices = nodes(privilegedDevices)
		resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	} else {
		linux.Namespaces = append(linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
		linux.MaskedPaths, linux.ReadonlyPaths = sc.GetMaskedPaths(), sc.GetReadonlyPaths()
		resources.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	}
	return linux, addDevices(linux, in.Config.GetDevices(), in.BlockVolumes)
}

func nodes(devices map[string]device) []specs.LinuxDevice {
	var out []specs.LinuxDevice
	for _, p := range slices.Sorted(maps.Keys(devices)) {
		out = append(out, devices[p].node(p))
	}
	return out
}

func (d device) node(path string) specs.LinuxDevice {
	return specs.LinuxDevice{Path: path, Type: "c", Major: d.major, Minor: d.minor}
}

// addDevices gives the container the guest's device at a path of its choice.
func addDevices(linux *specs.Linux, devices []*runtimeapi.Device, volumes []string) error {
	for i, d := range devices {
		if err := validateDevice(i, d, volumes); err != nil {
			return err
		}
		if slices.Contains(volumes, d.GetHostPath()) || d.GetContainerPath() == d.GetHostPath() {
			continue // the agent makes the former, crun the latter in every container
		}
		dev := commonDevices[d.GetHostPath()]
		linux.Devices = append(linux.Devices, dev.node(d.GetContainerPath()))
		linux.Resources.Devices = append(linux.Resources.Devices, specs.LinuxDeviceCgroup{
			Allow: true, Type: "c", Major: &dev.major, Minor: &dev.minor, Access: d.GetPermissions(),
		})
	}
	return nil
}

// Resources are a container's limits as cgroup settings in the guest. Sets of CPUs and memory nodes are left
// out: they number the node's, which the guest does not have; the caller may apply them to the VM.
func Resources(r *runtimeapi.LinuxContainerResources) (*specs.LinuxResources, error) {
	out := &specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}, Unified: maps.Clone(r.GetUnified())}
	if err := validateResources(r); err != nil {
		return nil, err
	}
	if v := uint64(r.GetCpuPeriod()); v != 0 {
		out.CPU.Period = &v
	}
	if v := r.GetCpuQuota(); v != 0 {
		out.CPU.Quota = &v
	}
	if v := uint64(r.GetCpuShares()); v != 0 {
		out.CPU.Shares = &v
	}
	if v := r.GetMemoryLimitInBytes(); v != 0 {
		out.Memory.Limit = &v
		out.Memory.Swap = &v // no swap unless it is asked for
	}
	if v := r.GetMemorySwapLimitInBytes(); v != 0 {
		out.Memory.Swap = &v
	}
	for _, h := range r.GetHugepageLimits() {
		// The kubelet names every page size of the node, with 0 where none are asked for. The guest may not have
		// that size, but for 2MB, of which other containers may have some.
		if h.GetLimit() > 0 || h.GetPageSize() == "2MB" {
			out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()})
		}
	}
	return out, nil
}

// buildCapabilities applies additions to containerd's defaults, then removals. ALL is applied before single names.
// Ambient capabilities are in all sets.
func buildCapabilities(sc *runtimeapi.LinuxContainerSecurityContext) (*specs.LinuxCapabilities, error) {
	if sc.GetPrivileged() {
		return capabilitySets(allCapabilities(), nil), nil
	}
	requested := sc.GetCapabilities()
	ambient, err := capabilityNames("add_ambient_capabilities", requested.GetAddAmbientCapabilities())
	if err != nil {
		return nil, err
	}
	add, err := capabilityNames("add_capabilities", requested.GetAddCapabilities())
	if err != nil {
		return nil, err
	}
	drop, err := capabilityNames("drop_capabilities", requested.GetDropCapabilities())
	if err != nil {
		return nil, err
	}
	caps := slices.Clone(defaultCapabilities)
	if hasAll(requested.GetAddCapabilities()) || hasAll(requested.GetAddAmbientCapabilities()) {
		caps = allCapabilities()
	}
	if hasAll(requested.GetDropCapabilities()) {
		caps = nil
	}
	if hasAll(requested.GetAddAmbientCapabilities()) {
		ambient = slices.Clone(caps)
	}
	for _, c := range slices.Concat(add, ambient) {
		if !slices.Contains(caps, c) {
			caps = append(caps, c)
		}
	}
	dropped := func(c string) bool { return slices.Contains(drop, c) }
	return capabilitySets(slices.DeleteFunc(caps, dropped), slices.DeleteFunc(ambient, dropped)), nil
}

// capabilitySets leaves the inheritable set empty but for the ambient ones, which must be in it.
func capabilitySets(caps, ambient []string) *specs.LinuxCapabilities {
	return &specs.LinuxCapabilities{
		Bounding: caps, Effective: caps, Permitted: caps, Inheritable: ambient, Ambient: ambient,
	}
}

func allCapabilities() []string {
	var out []string
	for _, c := range capability.ListKnown() {
		out = append(out, "CAP_"+strings.ToUpper(c.String()))
	}
	return out
}

func hasAll(names []string) bool {
	return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, "ALL") })
}

// capabilityNames brings the CRI's names, without CAP_, to the kernel's; ALL is left out.
func capabilityNames(field string, names []string) ([]string, error) {
	known := allCapabilities()
	var out []string
	for _, n := range names {
		if strings.EqualFold(n, "ALL") {
			continue
		}
		c := "CAP_" + strings.TrimPrefix(strings.ToUpper(n), "CAP_")
		if !slices.Contains(known, c) {
			return nil, invalid("linux.security_context.capabilities.%s %q is not a capability; it must be ALL or a name as in capabilities(7), without CAP_", field, n)
		}
		out = append(out, c)
	}
	return out, nil
}

// LocalhostSeccomp is the path of the seccomp profile on the node that the container asks for, or empty. Its content goes
// into Input.SeccompProfile.
func LocalhostSeccomp(cfg *runtimeapi.ContainerConfig) string {
	if security(cfg).GetPrivileged() {
		return ""
	}
	kind, ref := seccompProfile(security(cfg))
	if kind != runtimeapi.SecurityProfile_Localhost {
		return ""
	}
	return ref
}

// seccompProfile reads the profile from the field or, where that is unset, from the older one.
func seccompProfile(sc *runtimeapi.LinuxContainerSecurityContext) (runtimeapi.SecurityProfile_ProfileType, string) {
	if p := sc.GetSeccomp(); p != nil {
		return p.GetProfileType(), strings.TrimPrefix(p.GetLocalhostRef(), "localhost/")
	}
	return profileOf(sc.GetSeccompProfilePath()) //nolint:staticcheck // older kubelets and crictl set it
}

// profileOf reads the older form of a profile; empty is unconfined.
func profileOf(s string) (runtimeapi.SecurityProfile_ProfileType, string) {
	if ref, local := strings.CutPrefix(s, "localhost/"); local {
		return runtimeapi.SecurityProfile_Localhost, ref
	}
	if s == "runtime/default" || s == "docker/default" {
		return runtimeapi.SecurityProfile_RuntimeDefault, ""
	}
	return runtimeapi.SecurityProfile_Unconfined, ""
}

func buildSeccomp(in Input, spec *specs.Spec) (*specs.LinuxSeccomp, error) {
	if security(in.Config).GetPrivileged() {
		return nil, nil
	}
	kind, ref := seccompProfile(security(in.Config))
	switch kind {
	case runtimeapi.SecurityProfile_RuntimeDefault:
		return seccomp.DefaultProfile(spec), nil
	case runtimeapi.SecurityProfile_Localhost:
		var profile specs.LinuxSeccomp
		if err := json.Unmarshal(in.SeccompProfile, &profile); err != nil {
			return nil, invalid("linux.security_context.seccomp.localhost_ref %q is not an OCI seccomp profile in JSON: %w", ref, err)
		}
		return &profile, nil
	}
	return nil, nil
}
