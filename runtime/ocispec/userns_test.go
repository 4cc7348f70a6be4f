package ocispec

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func mapping(container, host, length uint32) *runtimeapi.IDMapping {
	return &runtimeapi.IDMapping{ContainerId: container, HostId: host, Length: length}
}

func podUsers(maps ...*runtimeapi.IDMapping) *runtimeapi.NamespaceOption {
	return &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: maps, Gids: maps}}
}

// The containers of a pod have its users, and so have their mounts.
func TestValidateContainerUsers(t *testing.T) {
	of := func(host uint32) *runtimeapi.NamespaceOption { return podUsers(mapping(0, host, 65536)) }
	mapped := func(host uint32) *runtimeapi.Mount {
		maps := []*runtimeapi.IDMapping{mapping(0, host, 65536)}
		return &runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", UidMappings: maps, GidMappings: maps}
	}
	plain := &runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x"}
	none := &runtimeapi.NamespaceOption{}
	node := &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE}}
	for _, tc := range []struct {
		name           string
		pod, container *runtimeapi.NamespaceOption
		mount          *runtimeapi.Mount
		want           string
	}{
		{"none", none, node, plain, ""},
		{"the same", of(1000), of(1000), mapped(1000), ""},
		{"container without", of(1000), node, mapped(1000), "they must be the same"},
		{"container with its own", node, of(1000), plain, "they must be the same"},
		{"other mapping", of(1000), of(2000), mapped(1000), "they must be the same"},
		{"mount without", of(1000), of(1000), plain, `mounts[0] to "/x": uid_mappings`},
		{"mount with another", of(1000), of(1000), mapped(2000), `mounts[0] to "/x": uid_mappings`},
		{"mapped mount of a pod without", none, none, mapped(1000), `mounts[0] to "/x": uid_mappings`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := input()
			in.Sandbox.Linux.SecurityContext.NamespaceOptions = tc.pod
			in.Config.Linux.SecurityContext.NamespaceOptions = tc.container
			in.Config.Mounts = []*runtimeapi.Mount{tc.mount}
			refused(t, ValidateContainer(in.Config, in.Sandbox, in.BlockVolumes), tc.want)
		})
	}
}

func TestNoBlockVolumeInUserNamespace(t *testing.T) {
	in := input()
	in.Config.Devices = []*runtimeapi.Device{{HostPath: "/volume", ContainerPath: "/dev/data", Permissions: "rwm"}}
	in.BlockVolumes = []string{"/volume"}
	refused(t, ValidateContainer(in.Config, in.Sandbox, in.BlockVolumes), "")
	in.Sandbox.Linux.SecurityContext.NamespaceOptions = podUsers(mapping(0, 1000, 65536))
	in.Config.Linux.SecurityContext.NamespaceOptions = in.Sandbox.Linux.SecurityContext.NamespaceOptions
	refused(t, ValidateContainer(in.Config, in.Sandbox, in.BlockVolumes), `block volume "/volume" in a pod with a user namespace`)
}

// A machine has users of its own: the setting only takes rights away, and policies of clusters ask it of every pod.
func TestMachineTakesPodUsers(t *testing.T) {
	maps := []*runtimeapi.IDMapping{mapping(0, 1000, 65536)}
	cfg := input().Config
	cfg.Command, cfg.Args, cfg.WorkingDir = nil, nil, ""
	cfg.Linux.SecurityContext.NamespaceOptions = podUsers(maps...)
	cfg.Mounts = []*runtimeapi.Mount{{ContainerPath: "/x", HostPath: "/x", UidMappings: maps, GidMappings: maps}}
	refused(t, ValidateMachine(cfg), "")
}
