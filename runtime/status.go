package runtime

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Status tells whether VM pods can be run; with verbose also with what.
func (rt *Runtime) Status(ctx context.Context, req *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			condition(runtimeapi.RuntimeReady, "VMRuntimeNotReady", rt.runnable()),
			condition(runtimeapi.NetworkReady, "NetworkPluginNotReady", rt.net.Ready(ctx)),
		}},
		// A node has a feature only if both its runtimes do. User namespaces with the host network are told as had, so
		// that containerd's word decides: a VM pod is refused either by itself.
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true, UserNamespacesHostNetwork: true},
	}
	for _, h := range rt.cfg.VM.Handlers {
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, &runtimeapi.RuntimeHandler{
			Name: h, Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true, UserNamespaces: true},
		})
	}
	if !req.GetVerbose() {
		return resp, nil
	}
	info := map[string]any{"guestKernel": rt.guestImage.KernelRelease, "pods": len(rt.allPods())}
	if v, err := RememberedAccel(rt.accel.path); err == nil {
		info["acceleration"] = v
	} else if rt.cfg.QEMU.Accel != accelAuto {
		info["acceleration"] = accelVerdict{Accel: rt.cfg.QEMU.Accel, Reason: "configured"}
	}
	var err error
	resp.Info, err = infoOf("vm", info)
	return resp, err
}

// runnable tells why no VM could be started, as far as can be told without starting one.
func (rt *Runtime) runnable() error {
	if _, err := exec.LookPath(rt.cfg.QEMU.Binary); err != nil {
		return fmt.Errorf("qemu.binary: %w", err)
	}
	_, err := loadGuestImage(rt.cfg.Guest.Dir)
	return err
}

func condition(kind, reason string, err error) *runtimeapi.RuntimeCondition {
	if err != nil {
		return &runtimeapi.RuntimeCondition{Type: kind, Reason: reason, Message: err.Error()}
	}
	return &runtimeapi.RuntimeCondition{Type: kind, Status: true}
}

func infoOf(name string, v any) (map[string]string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return map[string]string{name: string(b)}, nil
}

// verbose tells what a sandbox is made of, for crictl inspectp.
func (p *pod) verbose(ctx context.Context) (map[string]string, error) {
	s, size := p.rec.Status(), p.size()
	info := map[string]any{"uid": p.rec.Spec().UID, "vcpus": size.VCPUs, "memoryBytes": size.MemoryBytes, "hugeBytes": p.rec.Spec().HugeBytes, "guest": s.Guest, "network": s.Network}
	if g := p.currentGuest(); g != nil && g.alive() {
		if have, err := g.vm.Size(ctx); err == nil {
			info["size"] = have
		}
	}
	return infoOf("info", info)
}

func (c *container) verbose(ctx context.Context) (map[string]string, error) {
	spec, s := c.rec.Spec(), c.rec.Status()
	if c.isMachine() {
		info := map[string]any{"sandboxID": c.pod.id, "machine": spec.Machine, "mounts": spec.Mounts, "boot": s.Boot}
		if g := c.machineGuest(); g != nil && g.alive() {
			info["vm"] = g.machineInfo(ctx)
		}
		return infoOf("info", info)
	}
	info := map[string]any{"sandboxID": c.pod.id, "runtimeSpec": spec.OCI, "mounts": spec.Mounts, "disk": spec.Disk, "boot": s.Boot}
	return infoOf("info", info)
}

// UpdateRuntimeConfig has nothing to change for VM pods: the pod CIDR is the CNI configuration's business.
func (rt *Runtime) UpdateRuntimeConfig(context.Context, *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}
