package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/image"
	"github.com/vmruntime/vmruntime/runtime/annotation"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

// machineSpec is what is decided about a container that is a whole machine: one whose image holds a disk, that has a block
// volume for its root, or that boots a kernel out of its image. It never changes.
type machineSpec struct {
	// Disk says that the image holds a disk.
	Disk bool `json:"disk,omitempty"`
	// RootSize is the size of the root disk in bytes; 0 if it is a block volume or there is none.
	RootSize int64         `json:"rootSize,omitempty"`
	Volumes  []blockVolume `json:"volumes,omitempty"`
	VCPUs    int           `json:"vcpus"`
	// MemoryBytes is the guest's memory, HugePageBytes the size of the pages that it consists of; 0 for ordinary ones.
	MemoryBytes   int64 `json:"memoryBytes"`
	HugePageBytes int64 `json:"hugePageBytes,omitempty"`
}

// rootVolume is the block volume that the machine boots from, if any.
func (m *machineSpec) rootVolume() *blockVolume {
	for i := range m.Volumes {
		if m.Volumes[i].isRoot() {
			return &m.Volumes[i]
		}
	}
	return nil
}

// annotations are what the pod asks of its machine. They were checked when the sandbox was made.
func (p *pod) annotations() (*annotation.Machine, error) {
	return annotation.Parse(p.config().GetAnnotations())
}

// decideMachine finds out whether the container is a machine, and decides what kind. It returns nil for one that is not.
func (rt *Runtime) decideMachine(ctx context.Context, p *pod, id string, spec *containerSpec) (*machineSpec, error) {
	cfg := spec.Config.M
	asked, err := p.annotations()
	if err != nil {
		return nil, err
	}
	volumes, err := blockVolumes(cfg)
	if err != nil {
		return nil, err
	}
	m := &machineSpec{Volumes: volumes}
	disk, err := rt.images.FindDisk(ctx, spec.ImageID, id)
	switch {
	case err == nil:
		m.Disk = true
	case !errdefs.IsNotFound(err):
		return nil, err
	case m.rootVolume() == nil && asked.Kernel == "":
		return nil, nil
	}
	if err := errors.Join(ocispec.ValidateMachine(cfg), onlyVolumes(cfg, volumes), m.size(rt.cfg.VM, &runtimeapi.PodSandboxConfig{Linux: p.limits()}, cfg)); err != nil {
		return nil, err
	}
	return m, m.decideRoot(disk, asked)
}

// decideRoot decides how large the root disk is.
func (m *machineSpec) decideRoot(disk *image.Disk, asked *annotation.Machine) error {
	const name = annotation.Prefix + "root-disk-size"
	switch {
	case m.rootVolume() != nil && asked.RootDiskSize > 0:
		return fmt.Errorf("annotation %s is %d; it has to be left out where a block volume is the root disk: %w", name, asked.RootDiskSize, errdefs.ErrInvalidArgument)
	case m.rootVolume() != nil || disk == nil:
		return nil
	case asked.RootDiskSize > 0 && asked.RootDiskSize < disk.VirtualSize:
		return fmt.Errorf("annotation %s is %d; it has to be at least %d, the size of the image's disk: %w", name, asked.RootDiskSize, disk.VirtualSize, errdefs.ErrInvalidArgument)
	}
	m.RootSize = max(asked.RootDiskSize, disk.VirtualSize)
	return nil
}

// onlyVolumes refuses devices of the node that are no block devices.
func onlyVolumes(cfg *runtimeapi.ContainerConfig, volumes []blockVolume) error {
	var errs []error
	for i, d := range cfg.GetDevices() {
		if !slices.ContainsFunc(volumes, func(v blockVolume) bool { return v.HostPath == d.GetHostPath() }) {
			errs = append(errs, fmt.Errorf("devices[%d].host_path %q is no block device of the node; a machine can have no other devices: %w", i, d.GetHostPath(), errdefs.ErrInvalidArgument))
		}
	}
	return errors.Join(errs...)
}

// size gives the machine vCPUs and memory: as any VM, but without a limit what an operating system needs, and huge pages if the
// container asks for them.
func (m *machineSpec) size(vm VMConfig, sandbox *runtimeapi.PodSandboxConfig, cfg *runtimeapi.ContainerConfig) error {
	vm.DefaultMemory = vm.DefaultMachineMemory
	m.VCPUs, m.MemoryBytes = vm.size(sandbox)
	for _, l := range cfg.GetLinux().GetResources().GetHugepageLimits() {
		if l.GetLimit() == 0 {
			continue
		}
		page, err := hugePageSize(l.GetPageSize())
		if err != nil {
			return err
		}
		if m.HugePageBytes != 0 {
			return fmt.Errorf("linux.resources.hugepage_limits: a machine's memory consists of pages of one size; leave all but one out: %w", errdefs.ErrInvalidArgument)
		}
		if l.GetLimit()%uint64(page) != 0 {
			return fmt.Errorf("linux.resources.hugepage_limits %s is %d; it has to be a multiple of the page size: %w", l.GetPageSize(), l.GetLimit(), errdefs.ErrInvalidArgument)
		}
		m.HugePageBytes, m.MemoryBytes = page, int64(l.GetLimit())
	}
	return nil
}

// machineFiles are the files of a machine, which live as long as its container.
type machineFiles struct {
	dir string
	// there says that disk and variables are those of a snapshot, and only to be used; seeded says so of the seed.
	there, seeded bool
}

func (f machineFiles) root() string     { return filepath.Join(f.dir, image.RootName) }
func (f machineFiles) vars() string     { return filepath.Join(f.dir, "vars.fd") }
func (f machineFiles) seed() string     { return filepath.Join(f.dir, "seed.iso") }
func (f machineFiles) ignition() string { return filepath.Join(f.dir, "ignition") }
func (f machineFiles) tpm() string      { return filepath.Join(f.dir, "tpm") }

// makeMachineFiles makes the machine's directory anew: what a start that failed has left is of no use.
func (c *container) makeMachineFiles() (machineFiles, error) {
	if err := c.rt.images.RemoveMachine(c.id); err != nil {
		return machineFiles{}, err
	}
	dir, err := c.rt.images.CreateMachine(c.id)
	return machineFiles{dir: dir}, err
}

// copyFile copies a small file, such as a template of firmware variables.
func copyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o600)
}
