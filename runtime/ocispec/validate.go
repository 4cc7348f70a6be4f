package ocispec

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sysctlName is a path below /proc/sys with dots or slashes, as in sysctl(8).
var sysctlName = regexp.MustCompile(`^[a-zA-Z0-9_-]+([./][a-zA-Z0-9_:@-]+)*$`)

// mountOptions are what the CRI may ask for beyond its own fields: they only take something away from a mount.
var mountOptions = []string{"noexec", "nodev", "nosuid", "noatime", "nodiratime", "relatime", "strictatime", "nosymfollow"}

// ValidateSandbox says everything that a VM pod cannot be. The error is ErrInvalidArgument.
func ValidateSandbox(cfg *runtimeapi.PodSandboxConfig) error {
	if cfg.GetMetadata().GetName() == "" {
		return invalid("metadata.name of the sandbox is empty; it must be the pod's name")
	}
	var errs []error
	if cfg.GetWindows() != nil {
		errs = append(errs, invalid("windows is set; the guest is Linux, so it must be unset"))
	}
	sc := cfg.GetLinux().GetSecurityContext()
	errs = append(errs, validateNamespaces(sc.GetNamespaceOptions())...)
	for _, name := range sortedKeys(cfg.GetLinux().GetSysctls()) {
		if !sysctlName.MatchString(name) {
			errs = append(errs, invalid("linux.sysctls %q is not a sysctl; it must be a name like net.ipv4.ip_forward", name))
		}
	}
	errs = append(errs, validateAppArmor(sc.GetApparmor(), "")...)
	return errors.Join(errs...)
}

func sortedKeys(m map[string]string) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// validateNamespaces refuses what would be the node's: a VM has a kernel of its own.
func validateNamespaces(ns *runtimeapi.NamespaceOption) []error {
	var errs []error
	for _, n := range []struct {
		field, setting string
		mode           runtimeapi.NamespaceMode
	}{
		{"network", "hostNetwork", ns.GetNetwork()}, {"pid", "hostPID", ns.GetPid()}, {"ipc", "hostIPC", ns.GetIpc()},
	} {
		switch {
		case n.mode == runtimeapi.NamespaceMode_NODE:
			errs = append(errs, invalid("namespace_options.%s is NODE: a VM has its own kernel and cannot share the node's %s namespace; unset %s or use another runtime class",
				n.field, n.field, n.setting))
		case n.mode == runtimeapi.NamespaceMode_TARGET && n.field != "pid":
			errs = append(errs, invalid("namespace_options.%s is TARGET; only pid can be that", n.field))
		}
	}
	return append(errs, validateUsers(ns.GetUsernsOptions())...)
}

// ValidateNames says whether a container has a name and an image. The error is ErrInvalidArgument.
func ValidateNames(cfg *runtimeapi.ContainerConfig) error {
	if cfg.GetMetadata().GetName() == "" {
		return invalid("metadata.name of the container is empty; it must be the container's name")
	}
	if cfg.GetImage().GetImage() == "" {
		return invalid("image.image is empty; it must name an image")
	}
	return nil
}

// ValidateContainer says everything that a container of a VM pod cannot be; volumes are the paths on the node of its devices that are
// block volumes. The error is ErrInvalidArgument.
func ValidateContainer(cfg *runtimeapi.ContainerConfig, sandbox *runtimeapi.PodSandboxConfig, volumes []string) error {
	if cfg.GetMetadata().GetName() == "" {
		return invalid("metadata.name of the container is empty; it must be the container's name")
	}
	var errs []error
	if cfg.GetImage().GetImage() == "" {
		errs = append(errs, invalid("image.image is empty; it must name an image"))
	}
	if cfg.GetWindows() != nil {
		errs = append(errs, invalid("windows is set; the guest is Linux, so it must be unset"))
	}
	if dir := cfg.GetWorkingDir(); dir != "" && !path.IsAbs(dir) {
		errs = append(errs, invalid("working_dir %q is relative; it must begin with /", dir))
	}
	for i, e := range cfg.GetEnvs() {
		if e.GetKey() == "" || strings.ContainsAny(e.GetKey(), "=\x00") || bytes.IndexByte(e.GetValue(), 0) >= 0 {
			errs = append(errs, invalid("envs[%d] %q: a name must not be empty or have = in it, and neither part may have a zero byte", i, e.GetKey()))
		}
	}
	errs = append(errs, validateSecurity(security(cfg), sandbox)...)
	for i, m := range cfg.GetMounts() {
		errs = append(errs, validateMount(i, m, security(cfg).GetPrivileged())...)
		errs = append(errs, validateOwners(i, m, sandbox))
	}
	for i, d := range cfg.GetDevices() {
		errs = append(errs, validateDevice(i, d, volumes))
	}
	for i, d := range cfg.GetCDIDevices() {
		errs = append(errs, invalid("CDI_devices[%d] %q: a device of the node cannot be in a VM; leave it out", i, d.GetName()))
	}
	if mappings, _ := Users(sandbox); mappings != nil && len(volumes) > 0 {
		errs = append(errs, invalid("devices: block volume %q in a pod with a user namespace, in which no device can be made; leave out one of them", volumes[0]))
	}
	errs = append(errs, validateResources(cfg.GetLinux().GetResources()))
	return errors.Join(errs...)
}

func validateSecurity(sc *runtimeapi.LinuxContainerSecurityContext, sandbox *runtimeapi.PodSandboxConfig) []error {
	const prefix = "linux.security_context."
	errs := validateNamespaces(sc.GetNamespaceOptions())
	errs = append(errs, validateSameUsers(sc.GetNamespaceOptions().GetUsernsOptions(), sandbox))
	if ns := sc.GetNamespaceOptions(); ns.GetPid() == runtimeapi.NamespaceMode_TARGET && ns.GetTargetId() == "" {
		errs = append(errs, invalid("namespace_options.target_id is empty; with pid TARGET it must name a container"))
	}
	if sc.GetPrivileged() && !sandbox.GetLinux().GetSecurityContext().GetPrivileged() {
		errs = append(errs, invalid("%sprivileged is set, but the sandbox was not made for privileged containers; its security context must say privileged too", prefix))
	}
	if sc.GetRunAsUser() != nil && sc.GetRunAsUsername() != "" {
		errs = append(errs, invalid("%srun_as_user and run_as_username are both set; one of them must be unset", prefix))
	}
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil && sc.GetRunAsUsername() == "" {
		errs = append(errs, invalid("%srun_as_group %d is set without a user; set run_as_user or run_as_username too", prefix, sc.GetRunAsGroup().GetValue()))
	}
	for i, g := range sc.GetSupplementalGroups() {
		if g < 0 || g > maxID {
			errs = append(errs, invalid("%ssupplemental_groups[%d] is %d; it must be from 0 to %d", prefix, i, g, maxID))
		}
	}
	if p := sc.GetSupplementalGroupsPolicy(); runtimeapi.SupplementalGroupsPolicy_name[int32(p)] == "" {
		errs = append(errs, invalid("%ssupplemental_groups_policy %d is unknown; it must be Merge or Strict", prefix, p))
	}
	_, err := buildCapabilities(sc)
	errs = append(errs, err, validateSeccomp(sc))
	return append(errs, validateAppArmor(sc.GetApparmor(), sc.GetApparmorProfile())...) //nolint:staticcheck // older kubelets and crictl set it
}

func validateSeccomp(sc *runtimeapi.LinuxContainerSecurityContext) error {
	kind, ref := seccompProfile(sc)
	if runtimeapi.SecurityProfile_ProfileType_name[int32(kind)] == "" {
		return invalid("linux.security_context.seccomp.profile_type %d is unknown; it must be RuntimeDefault, Unconfined or Localhost", kind)
	}
	if (kind == runtimeapi.SecurityProfile_Localhost) != (ref != "") {
		return invalid("linux.security_context.seccomp.localhost_ref is %q with profile_type %s; Localhost must have one, the others must not", ref, kind)
	}
	return nil
}

// validateAppArmor refuses a profile of the node: the guest's kernel has none. The default confinement is the VM's, and
// what SELinux labels say is left aside as on a node without SELinux.
func validateAppArmor(profile *runtimeapi.SecurityProfile, older string) []error {
	kind, ref := profile.GetProfileType(), profile.GetLocalhostRef()
	if profile == nil {
		kind, ref = profileOf(older)
	}
	if kind == runtimeapi.SecurityProfile_Localhost {
		return []error{invalid("linux.security_context.apparmor names the node's profile %q: the guest's kernel does not have it; use RuntimeDefault or Unconfined", ref)}
	}
	return nil
}

// validateMount lets image_sub_path be without an image: beside a volume that is an image, the kubelet also sets it for the
// other mounts of a container that have a subPath, whose host_path it is part of already.
func validateMount(i int, m *runtimeapi.Mount, privileged bool) []error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, invalid("mounts[%d] to %q: %w", i, m.GetContainerPath(), fmt.Errorf(format, args...)))
	}
	if p := m.GetContainerPath(); !path.IsAbs(p) || path.Clean(p) == "/" {
		bad("container_path must begin with / and must not be the root")
	}
	if (m.GetHostPath() != "") == isImage(m) {
		bad("host_path is %q and image is %q; one of them must be set", m.GetHostPath(), m.GetImage().GetImage())
	}
	if m.GetRecursiveReadOnly() && !m.GetReadonly() {
		bad("recursive_read_only is set without readonly; set both")
	}
	if m.GetRecursiveReadOnly() && m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
		bad("recursive_read_only is set with propagation %s; it must be PROPAGATION_PRIVATE", m.GetPropagation())
	}
	switch p := m.GetPropagation(); {
	case runtimeapi.MountPropagation_name[int32(p)] == "":
		bad("propagation %d is unknown", p)
	case p == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL && !privileged:
		bad("propagation is PROPAGATION_BIDIRECTIONAL; only a privileged container can have that")
	}
	for _, o := range m.GetMountOptions() {
		if !slices.Contains(mountOptions, o) {
			bad("mount_options %q is not known; it must be one of %s", o, strings.Join(mountOptions, ", "))
		}
	}
	return errs
}

func validateDevice(i int, d *runtimeapi.Device, volumes []string) error {
	if _, common := commonDevices[d.GetHostPath()]; !common && !slices.Contains(volumes, d.GetHostPath()) {
		return invalid("devices[%d].host_path %q is a device of the node, which cannot be in a VM; only block devices can, and %s exist there too",
			i, d.GetHostPath(), strings.Join(commonDeviceNames(), ", "))
	}
	if !path.IsAbs(d.GetContainerPath()) {
		return invalid("devices[%d].container_path %q must begin with /", i, d.GetContainerPath())
	}
	if p := d.GetPermissions(); p == "" || strings.Trim(p, "rwm") != "" {
		return invalid("devices[%d].permissions %q must be some of r, w and m", i, p)
	}
	return nil
}

func commonDeviceNames() []string {
	var out []string
	for p := range commonDevices {
		out = append(out, p)
	}
	slices.Sort(out)
	return out
}

func validateResources(r *runtimeapi.LinuxContainerResources) error {
	var errs []error
	const prefix = "linux.resources."
	if r.GetCpuPeriod() < 0 || r.GetCpuShares() < 0 {
		errs = append(errs, invalid("%scpu_period is %d and cpu_shares %d; neither may be negative", prefix, r.GetCpuPeriod(), r.GetCpuShares()))
	}
	if v := r.GetOomScoreAdj(); v < -1000 || v > 1000 {
		errs = append(errs, invalid("%soom_score_adj is %d; it must be from -1000 to 1000", prefix, v))
	}
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	if limit > 0 && swap > 0 && swap < limit {
		errs = append(errs, invalid("%smemory_swap_limit_in_bytes is %d, less than the memory limit of %d; it counts memory and swap together", prefix, swap, limit))
	}
	for _, k := range sortedKeys(r.GetUnified()) {
		if k == "" || strings.Contains(k, "/") {
			errs = append(errs, invalid("%sunified %q is not a file of a cgroup; it must be a name like memory.high", prefix, k))
		}
	}
	return errors.Join(errs...)
}
