// Package ocispec turns what the CRI says about a container into the OCI runtime specification that crun runs in the
// guest.
//
// It is pure: everything comes from its input, nothing is looked up on the node. Paths of mounts are the guest's.
// What the CRI leaves open is decided as containerd decides it, so that a pod behaves the same with either handler.
// What a VM cannot have is refused by ValidateSandbox and ValidateContainer, with a sentence, as ErrInvalidArgument.
//
// Left to the agent: root.path, block volumes, the PID namespace that is asked for, the cgroup's parent, and sysctls, which belong
// to the pod. Network, IPC and UTS namespaces are the guest's own and so have no entry here.
package ocispec

import (
	"fmt"
	"io/fs"
	"maps"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// specVersion is the version of the OCI runtime specification. Debian 12's crun 1.8.1 takes no later one ("unknown version
	// specified").
	specVersion = "1.0.2"
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// openFiles is RLIMIT_NOFILE of containers, what they have under a usual containerd.
	openFiles = 1 << 20
	// crunAnnotations begin the annotations by which crun can be told to do other things; a pod may not.
	crunAnnotations = "run.oci."
)

// Input is all that a specification is made of. Config and Sandbox must have passed validation.
type Input struct {
	// ID is the container's.
	ID        string
	SandboxID string
	Config    *runtimeapi.ContainerConfig
	Sandbox   *runtimeapi.PodSandboxConfig
	// Image is the configuration of the container's image, ImageName the name it was asked for by.
	Image     imagespec.Image
	ImageName string
	// RootFS is the image's root filesystem, to look up users and groups.
	RootFS fs.FS
	// Hostname is the pod's.
	Hostname string
	// MountSources are the guest paths of Config.Mounts, in the same order; an image's sub path is part of it.
	MountSources []string
	// BlockVolumes are the paths on the node of those of Config.Devices that are block volumes. The agent adds them: it knows their
	// numbers.
	BlockVolumes []string
	// SeccompProfile is the content of the file that LocalhostSeccomp names.
	SeccompProfile []byte
}

// Build makes the specification. Errors that the caller's settings caused are ErrInvalidArgument.
func Build(in Input) (*specs.Spec, error) {
	process, err := buildProcess(in)
	if err != nil {
		return nil, err
	}
	linux, err := buildLinux(in)
	if err != nil {
		return nil, err
	}
	mounts, propagation, err := buildMounts(in)
	if err != nil {
		return nil, err
	}
	linux.RootfsPropagation = propagation
	spec := &specs.Spec{
		Version:     specVersion,
		Process:     process,
		Root:        &specs.Root{Path: "rootfs", Readonly: security(in.Config).GetReadonlyRootfs()},
		Mounts:      mounts,
		Annotations: annotations(in),
		Linux:       linux,
	}
	spec.Linux.Seccomp, err = buildSeccomp(in, spec)
	return spec, err
}

func security(cfg *runtimeapi.ContainerConfig) *runtimeapi.LinuxContainerSecurityContext {
	return cfg.GetLinux().GetSecurityContext()
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), errdefs.ErrInvalidArgument)
}

func buildProcess(in Input) (*specs.Process, error) {
	args, err := processArgs(in)
	if err != nil {
		return nil, err
	}
	user, err := buildUser(in)
	if err != nil {
		return nil, err
	}
	caps, err := buildCapabilities(security(in.Config))
	if err != nil {
		return nil, err
	}
	oom := int(in.Config.GetLinux().GetResources().GetOomScoreAdj())
	return &specs.Process{
		Terminal:        in.Config.GetTty(),
		User:            user,
		Args:            args,
		Env:             environment(in),
		Cwd:             workingDir(in),
		Capabilities:    caps,
		Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: openFiles, Soft: openFiles}},
		NoNewPrivileges: security(in.Config).GetNoNewPrivs(),
		OOMScoreAdj:     &oom,
	}, nil
}

// processArgs joins command and arguments: the CRI's command replaces the image's entrypoint and default arguments,
// the CRI's arguments replace the default arguments.
func processArgs(in Input) ([]string, error) {
	command, args := in.Config.GetCommand(), in.Config.GetArgs()
	if len(command) == 0 {
		if len(args) == 0 {
			args = in.Image.Config.Cmd
		}
		command = in.Image.Config.Entrypoint
		if len(command) == 1 && command[0] == "" {
			command = nil
		}
	}
	out := append(append([]string{}, command...), args...)
	if len(out) == 0 {
		return nil, invalid("command and args are empty and image %q has no entrypoint; one of them must name a program", in.ImageName)
	}
	return out, nil
}

// environment has each name once: the image's values over the defaults, the CRI's over the image's.
func environment(in Input) []string {
	env := []string{defaultPath}
	if in.Config.GetTty() {
		env = append(env, "TERM=xterm")
	}
	env = append(env, "HOSTNAME="+in.Hostname)
	env = append(env, in.Image.Config.Env...)
	for _, e := range in.Config.GetEnvs() {
		env = append(env, e.GetKey()+"="+string(e.GetValue()))
	}
	place := make(map[string]int)
	var out []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if i, seen := place[name]; seen {
			out[i] = e
			continue
		}
		place[name] = len(out)
		out = append(out, e)
	}
	return out
}

func workingDir(in Input) string {
	if dir := in.Config.GetWorkingDir(); dir != "" {
		return dir
	}
	return path.Join("/", in.Image.Config.WorkingDir)
}

// annotations are the container's, and those by which containerd tells a runtime what it runs.
func annotations(in Input) map[string]string {
	out := make(map[string]string)
	for k, v := range in.Config.GetAnnotations() {
		if !strings.HasPrefix(k, crunAnnotations) {
			out[k] = v
		}
	}
	pod := in.Sandbox.GetMetadata()
	maps.Copy(out, map[string]string{
		"io.kubernetes.cri.container-type":    "container",
		"io.kubernetes.cri.container-name":    in.Config.GetMetadata().GetName(),
		"io.kubernetes.cri.image-name":        in.ImageName,
		"io.kubernetes.cri.sandbox-id":        in.SandboxID,
		"io.kubernetes.cri.sandbox-name":      pod.GetName(),
		"io.kubernetes.cri.sandbox-namespace": pod.GetNamespace(),
		"io.kubernetes.cri.sandbox-uid":       pod.GetUid(),
	})
	return out
}
