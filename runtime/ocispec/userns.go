package ocispec

import (
	"fmt"
	"math"
	"slices"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Users are the mappings of the pod's user namespace, one for user and one for group IDs; nil if it has none. The
// configuration must have passed validation.
func Users(sandbox *runtimeapi.PodSandboxConfig) (uids, gids *runtimeapi.IDMapping) {
	u := usersOf(sandbox)
	if !ofPod(u) {
		return nil, nil
	}
	return u.GetUids()[0], u.GetGids()[0]
}

// ofPod tells whether there is a user namespace: unset, the mode reads as POD.
func ofPod(u *runtimeapi.UserNamespace) bool {
	return u != nil && u.GetMode() == runtimeapi.NamespaceMode_POD
}

func usersOf(sandbox *runtimeapi.PodSandboxConfig) *runtimeapi.UserNamespace {
	return sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
}

// validateUsers takes what containerd takes: no user namespace, or one of the pod's with a single mapping from 0.
func validateUsers(u *runtimeapi.UserNamespace) []error {
	const field = "namespace_options.userns_options"
	if u == nil {
		return nil
	}
	switch u.GetMode() {
	case runtimeapi.NamespaceMode_NODE:
		if len(u.GetUids())+len(u.GetGids()) > 0 {
			return []error{invalid("%s has mappings with mode NODE; it must have none", field)}
		}
		return nil
	case runtimeapi.NamespaceMode_POD:
		return []error{validateMapping(field+".uids", u.GetUids()), validateMapping(field+".gids", u.GetGids())}
	}
	return []error{invalid("%s.mode is %s; it must be NODE, or POD for hostUsers: false", field, u.GetMode())}
}

func validateMapping(field string, maps []*runtimeapi.IDMapping) error {
	if len(maps) != 1 {
		return invalid("%s has %d mappings; it must have one", field, len(maps))
	}
	m := maps[0]
	if m.GetContainerId() != 0 || m.GetLength() == 0 || uint64(m.GetHostId())+uint64(m.GetLength()) >= math.MaxUint32 {
		return invalid("%s maps %s; it must map at least one ID from 0 on, to IDs below %d", field, textOf(m), uint32(math.MaxUint32-1))
	}
	return nil
}

func textOf(m *runtimeapi.IDMapping) string {
	return fmt.Sprintf("%d IDs from %d to %d", m.GetLength(), m.GetContainerId(), m.GetHostId())
}

// validateSameUsers refuses a container whose users are not the pod's: all its containers share them.
func validateSameUsers(u *runtimeapi.UserNamespace, sandbox *runtimeapi.PodSandboxConfig) error {
	pod := usersOf(sandbox)
	if ofPod(u) == ofPod(pod) && sameMappings(u.GetUids(), pod.GetUids()) && sameMappings(u.GetGids(), pod.GetGids()) {
		return nil
	}
	return invalid("namespace_options.userns_options of the container is {%v}, that of the sandbox {%v}; they must be the same", u, pod)
}

// validateOwners refuses a mount whose owners are not mapped as the pod's users are: what reaches the guest reaches it with the
// pod's mapping.
func validateOwners(i int, m *runtimeapi.Mount, sandbox *runtimeapi.PodSandboxConfig) error {
	pod := usersOf(sandbox)
	if sameMappings(m.GetUidMappings(), pod.GetUids()) && sameMappings(m.GetGidMappings(), pod.GetGids()) {
		return nil
	}
	return invalid("mounts[%d] to %q: uid_mappings are %v and gid_mappings %v; they must be those of the pod's user namespace, %v and %v",
		i, m.GetContainerPath(), m.GetUidMappings(), m.GetGidMappings(), pod.GetUids(), pod.GetGids())
}

func sameMappings(a, b []*runtimeapi.IDMapping) bool {
	return slices.EqualFunc(a, b, func(x, y *runtimeapi.IDMapping) bool { return proto.Equal(x, y) })
}
