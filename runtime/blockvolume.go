package runtime

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
)

// blockVolume is a block device of the node that is a disk of the VM.
type blockVolume struct {
	HostPath string `json:"hostPath"`
	// Path is the volume's devicePath; / is the root disk of a machine.
	Path     string `json:"path"`
	Serial   string `json:"serial"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

const (
	rootPath           = "/"
	volumeSerialPrefix = "vol-"
)

func (v blockVolume) isRoot() bool { return v.Path == rootPath }

// device is the path of the block device itself: the kubelet gives a symbolic link to it, which QEMU's launcher would not follow.
func (v blockVolume) device() (string, error) {
	path, err := filepath.EvalSymlinks(v.HostPath)
	if err != nil {
		return "", fmt.Errorf("block volume at %s: %w", v.Path, err)
	}
	return path, nil
}

// volumeSerial is how a guest finds a block volume: a machine's follows from the devicePath, so it stays over restarts.
func volumeSerial(path string) string {
	sum := sha256.Sum256([]byte(path))
	return volumeSerialPrefix + hex.EncodeToString(sum[:8])
}

func isVolumeSerial(s string) bool { return strings.HasPrefix(s, volumeSerialPrefix) }

// blockVolumes are the container's devices that are block devices of the node.
func blockVolumes(cfg *runtimeapi.ContainerConfig) ([]blockVolume, error) {
	var out []blockVolume
	var errs []error
	seen := make(map[string]bool)
	for i, d := range cfg.GetDevices() {
		var st unix.Stat_t
		if err := unix.Stat(d.GetHostPath(), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
			continue // not a volume; what else may be a device is checked by the form
		}
		v := blockVolume{HostPath: d.GetHostPath(), Path: filepath.Clean(d.GetContainerPath()), ReadOnly: d.GetPermissions() == "r"}
		v.Serial = volumeSerial(v.Path)
		switch {
		case !filepath.IsAbs(v.Path):
			errs = append(errs, fmt.Errorf("devices[%d].container_path %q must begin with /: %w", i, d.GetContainerPath(), errdefs.ErrInvalidArgument))
		case seen[v.Path]:
			errs = append(errs, fmt.Errorf("devices[%d].container_path %q is used twice: %w", i, v.Path, errdefs.ErrInvalidArgument))
		case v.isRoot() && v.ReadOnly:
			errs = append(errs, fmt.Errorf("devices[%d].permissions %q: the root disk has to be writable: %w", i, d.GetPermissions(), errdefs.ErrInvalidArgument))
		}
		seen[v.Path] = true
		out = append(out, v)
	}
	return out, errors.Join(errs...)
}

func hostPaths(volumes []blockVolume) (out []string) {
	for _, v := range volumes {
		out = append(out, v.HostPath)
	}
	return out
}

// sharedVolumes are the block volumes of a container that is no machine. Several containers of a pod may use one, each by a path of its own; it
// is one disk then, so its serial follows from the device. Whether it is read-only is said of the pod's volume, so it is the same for all of them.
func sharedVolumes(cfg *runtimeapi.ContainerConfig) ([]blockVolume, error) {
	volumes, err := blockVolumes(cfg)
	if err != nil {
		return nil, err
	}
	for i, v := range volumes {
		device, err := v.device()
		if err != nil {
			return nil, err
		}
		volumes[i].Serial = volumeSerial(fmt.Sprintf("%s %v", device, v.ReadOnly))
	}
	return volumes, nil
}

// disk is the volume as a disk of a VM of containers.
func (v blockVolume) disk() (qemu.Disk, error) {
	device, err := v.device()
	return qemu.Disk{Serial: v.Serial, Path: device, Format: "raw", ReadOnly: v.ReadOnly}, err
}

func (g *guest) plugVolume(ctx context.Context, v blockVolume) error {
	d, err := v.disk()
	if err != nil {
		return err
	}
	return g.plugDisk(ctx, d)
}

// blockDevices are the volumes as the agent makes them in a container, with owner and permissions as on the node.
func blockDevices(volumes []blockVolume) ([]*agentpb.BlockDevice, error) {
	var out []*agentpb.BlockDevice
	for _, v := range volumes {
		d, err := v.disk()
		if err != nil {
			return nil, err
		}
		var st unix.Stat_t
		if err := unix.Stat(d.Path, &st); err != nil {
			return nil, &fs.PathError{Op: "stat", Path: d.Path, Err: err}
		}
		dev := &agentpb.BlockDevice{Disk: d.Serial, Path: v.Path, Access: "rwm", Mode: st.Mode & 0o777, Uid: st.Uid, Gid: st.Gid}
		if v.ReadOnly {
			dev.Access = "rm"
		}
		out = append(out, dev)
	}
	return out, nil
}
