package guest

import (
	"context"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// addBlockDevice gives a container a disk of the guest as a device node.
func addBlockDevice(ctx context.Context, spec *specs.Spec, d *agentpb.BlockDevice) error {
	if err := checkID("disk", d.Disk); err != nil {
		return err
	}
	disk, err := findDisk(ctx, d.Disk, plugTimeout)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(disk, &st); err != nil {
		return &os.PathError{Op: "stat", Path: disk, Err: err}
	}
	major, minor, mode := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev)), os.FileMode(d.Mode)
	spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{
		Path: d.Path, Type: "b", Major: major, Minor: minor, FileMode: &mode, UID: &d.Uid, GID: &d.Gid,
	})
	if spec.Linux.Resources == nil {
		spec.Linux.Resources = &specs.LinuxResources{}
	}
	spec.Linux.Resources.Devices = append(spec.Linux.Resources.Devices, specs.LinuxDeviceCgroup{
		Allow: true, Type: "b", Major: &major, Minor: &minor, Access: d.Access,
	})
	return nil
}
