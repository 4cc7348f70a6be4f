package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/image"
	"github.com/vmruntime/vmruntime/runtime/annotation"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

// What a checkpoint, and a request to restore it, have to be: everything is refused before anything is made.

func (rt *Runtime) checkRestore(ctx context.Context, req *runtimeapi.RestorePodRequest) error {
	if err := errors.Join(checkOptions(req.GetOptions()), checkDeadline(ctx), ocispec.ValidateSandbox(req.GetConfig())); err != nil {
		return err
	}
	if !rt.Handles(req.GetRuntimeHandler()) {
		return fmt.Errorf("runtime_handler %q is none of VM pods' (%s): %w", req.GetRuntimeHandler(), strings.Join(rt.cfg.VM.Handlers, ", "), errdefs.ErrInvalidArgument)
	}
	if _, err := annotation.Parse(req.GetConfig().GetAnnotations()); err != nil {
		return err
	}
	if len(req.GetContainerConfigs()) == 0 {
		return fmt.Errorf("container_configs is empty; it must have the containers of the checkpoint: %w", errdefs.ErrInvalidArgument)
	}
	for _, cfg := range req.GetContainerConfigs() {
		if err := ocispec.ValidateNames(cfg); err != nil {
			return err
		}
	}
	return nil
}

// fits refuses a checkpoint that this node, or this request, cannot restore.
func (rt *Runtime) fits(ctx context.Context, m *checkpointManifest, req *runtimeapi.RestorePodRequest) error {
	if err := m.whole(); err != nil {
		return err
	}
	if m.Machine != nil {
		return errors.Join(rt.fitsNode(ctx, m), m.fitsMachine(req.GetConfig()), m.fitsNames(req.GetContainerConfigs()))
	}
	return errors.Join(rt.fitsNode(ctx, m), rt.cfg.VM.fits(m), m.fitsPod(req.GetConfig()), m.fitsNames(req.GetContainerConfigs()))
}

// whole refuses a manifest that no checkpoint has.
func (m *checkpointManifest) whole() error {
	if m.Machine != nil && len(m.Containers) != 1 {
		return fmt.Errorf("the checkpoint has %d containers; that of a machine has one: %w", len(m.Containers), errdefs.ErrInvalidArgument)
	}
	for i, c := range m.Containers {
		oci := c.Spec.OCI
		machine := c.Spec.Machine != nil
		if c.Spec.Config.M == nil || machine != (m.Machine != nil) || !machine && (oci == nil || oci.Process == nil || oci.Linux == nil) {
			return fmt.Errorf("the checkpoint's containers[%d] is not complete: %w", i, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// fits refuses a VM that is larger than this node's may be.
func (c VMConfig) fits(m *checkpointManifest) error {
	var errs []error
	for _, f := range []struct {
		what, bound string
		was, most   int64
	}{
		{"vCPUs", "vm.max_vcpus", int64(max(m.VCPUs, m.Size.VCPUs)), int64(c.MaxVCPUs)},
		{"memory", "vm.max_memory", max(m.MemoryBytes, m.Size.MemoryBytes), roundUp(int64(c.MaxMemory), mib)},
		{"scratch disk", "vm.scratch_size", m.ScratchSize, int64(c.ScratchSize)},
	} {
		if f.was > f.most {
			errs = append(errs, fmt.Errorf("the checkpoint's %s is %d; it has to be at most %d, which is %s: %w", f.what, f.was, f.most, f.bound, errdefs.ErrFailedPrecondition))
		}
	}
	return errors.Join(errs...)
}

// fitsNode refuses a checkpoint that this node cannot restore.
func (rt *Runtime) fitsNode(ctx context.Context, m *checkpointManifest) error {
	accel, err := rt.accel.verdict(ctx)
	if err != nil {
		return err
	}
	here, err := rt.platform(accel.Accel)
	if err != nil {
		return err
	}
	if here.QEMU, err = rt.installedQEMU(ctx); err != nil {
		return err
	}
	return m.Platform.fits(here, m.Machine != nil)
}

// fitsPod refuses settings of the sandbox that a guest which has booted already does not change.
func (m *checkpointManifest) fitsPod(cfg *runtimeapi.PodSandboxConfig) error {
	was, is := m.Pod.M.GetLinux(), cfg.GetLinux()
	if !proto.Equal(was.GetSecurityContext().GetNamespaceOptions(), is.GetSecurityContext().GetNamespaceOptions()) {
		return fmt.Errorf("config.linux.security_context.namespace_options are not those of the checkpoint: %w", errdefs.ErrInvalidArgument)
	}
	if !reflect.DeepEqual(was.GetSysctls(), is.GetSysctls()) && len(was.GetSysctls())+len(is.GetSysctls()) > 0 {
		return fmt.Errorf("config.linux.sysctls are %v, the checkpoint's are %v: %w", is.GetSysctls(), was.GetSysctls(), errdefs.ErrInvalidArgument)
	}
	return nil
}

// fitsNames wants exactly the containers of the checkpoint, each once.
func (m *checkpointManifest) fitsNames(configs []*runtimeapi.ContainerConfig) error {
	var was, is []string
	for _, c := range m.Containers {
		was = append(was, c.Spec.Config.M.GetMetadata().GetName())
	}
	for _, c := range configs {
		is = append(is, c.GetMetadata().GetName())
	}
	slices.Sort(was)
	slices.Sort(is)
	if !slices.Equal(was, is) {
		return fmt.Errorf("container_configs has the names %q; it must have exactly those of the checkpoint, %q: %w", is, was, errdefs.ErrInvalidArgument)
	}
	return nil
}

// sameDisk wants the bytes that the guest has seen: the serial follows from the image's content and from how it was converted.
func sameDisk(img *image.Image, serial string) error {
	if img.Serial != serial {
		return fmt.Errorf("the disk made of image %s is %s here, the checkpoint's is %s; another version has made it: %w", img.Digest, img.Serial, serial, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// sameProcess compares what a container is to be with what the frozen one is. Limits, annotations and names that the runtime
// sets itself may differ.
func sameProcess(was, is *specs.Spec) error {
	a, b := settled(was), settled(is)
	for _, f := range []struct {
		name    string
		was, is any
	}{
		{"command and args", a.Process.Args, b.Process.Args},
		{"envs", a.Process.Env, b.Process.Env},
		{"working_dir", a.Process.Cwd, b.Process.Cwd},
		{"user", a.Process.User, b.Process.User},
		{"tty", a.Process.Terminal, b.Process.Terminal},
		{"process", a.Process, b.Process},
		{"root", a.Root, b.Root},
		{"mounts", a.Mounts, b.Mounts},
		{"linux settings", a.Linux, b.Linux},
	} {
		x, err := json.Marshal(f.was)
		if err != nil {
			return err
		}
		y, err := json.Marshal(f.is)
		if err != nil {
			return err
		}
		if string(x) != string(y) {
			return fmt.Errorf("%s of the container are %s, those of the checkpoint %s: %w", f.name, y, x, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// settled is the part of a specification that a running container does not change.
func settled(s *specs.Spec) specs.Spec {
	process, linux := *s.Process, *s.Linux
	process.OOMScoreAdj = nil
	process.Env = slices.DeleteFunc(slices.Clone(process.Env), func(e string) bool { return strings.HasPrefix(e, "HOSTNAME=") })
	slices.Sort(process.Env)
	linux.CgroupsPath, linux.Resources = "", nil
	return specs.Spec{Process: &process, Mounts: s.Mounts, Root: s.Root, Linux: &linux}
}
