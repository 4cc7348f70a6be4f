package runtime

import (
	"context"
	"fmt"
	"runtime/debug"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Version is the daemon's version, from the tag or commit that it was built of.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return "v0.0.0"
	}
	return info.Main.Version
}

// Version tells name and version; the API's is that of the CRI which is served.
func (rt *Runtime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version:           "0.1.0", // the kubelet's own, fixed since the CRI began
		RuntimeName:       "vmruntime",
		RuntimeVersion:    Version(),
		RuntimeApiVersion: "v1",
	}, nil
}

// RuntimeConfig is asked for only where containerd, before 2.0, cannot tell its cgroup driver.
func (rt *Runtime) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	var driver runtimeapi.CgroupDriver
	switch rt.cfg.Cgroup.Driver {
	case "systemd":
		driver = runtimeapi.CgroupDriver_SYSTEMD
	case "cgroupfs":
		driver = runtimeapi.CgroupDriver_CGROUPFS
	default:
		return nil, fmt.Errorf("cgroup.driver is %q and this containerd does not tell its own; set cgroup.driver to systemd or cgroupfs: %w",
			rt.cfg.Cgroup.Driver, errdefs.ErrNotImplemented)
	}
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}
