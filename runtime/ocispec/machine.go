package ocispec

import (
	"bytes"
	"errors"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ValidateMachine says everything that a container cannot ask whose image is the disk of a machine: what runs there, as
// whom and with which rights is the business of the operating system on the disk. What only takes rights away is let
// pass, since policies of clusters ask it of every pod. The error is ErrInvalidArgument.
func ValidateMachine(cfg *runtimeapi.ContainerConfig) error {
	const instead = "a machine runs what is on its disk; leave it out, and use cloud-init"
	var errs []error
	if cfg.GetMetadata().GetName() == "" {
		errs = append(errs, invalid("metadata.name of the container is empty; it must be the container's name"))
	}
	if len(cfg.GetCommand()) > 0 {
		errs = append(errs, invalid("command is %q: %s", cfg.GetCommand(), instead))
	}
	if len(cfg.GetArgs()) > 0 {
		errs = append(errs, invalid("args is %q: %s", cfg.GetArgs(), instead))
	}
	if cfg.GetWorkingDir() != "" {
		errs = append(errs, invalid("working_dir is %q: %s", cfg.GetWorkingDir(), instead))
	}
	if security(cfg).GetReadonlyRootfs() {
		errs = append(errs, invalid("linux.security_context.readonly_rootfs is set: an operating system writes to its disk; unset it"))
	}
	for i, e := range cfg.GetEnvs() {
		if e.GetKey() == "" || strings.ContainsAny(e.GetKey(), "=\x00") || bytes.IndexByte(e.GetValue(), 0) >= 0 {
			errs = append(errs, invalid("envs[%d] %q: a name must not be empty or have = in it, and neither part may have a zero byte", i, e.GetKey()))
		}
	}
	for i, m := range cfg.GetMounts() {
		errs = append(errs, validateMount(i, m, security(cfg).GetPrivileged())...)
		if isImage(m) {
			errs = append(errs, invalid("mounts[%d] to %q is an image volume, which a machine cannot have; use another kind of volume", i, m.GetContainerPath()))
		}
	}
	for i, d := range cfg.GetCDIDevices() {
		errs = append(errs, invalid("CDI_devices[%d] %q: a device of the node cannot be in a VM; leave it out", i, d.GetName()))
	}
	return errors.Join(errs...)
}
