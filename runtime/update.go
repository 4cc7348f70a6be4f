package runtime

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

// UpdateContainerResources changes a container's limits in the guest, and the size of the VM as far as that is needed.
func (rt *Runtime) UpdateContainerResources(ctx context.Context, req *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	c.life.Lock()
	defer c.life.Unlock()
	s := c.rec.Status()
	if !s.FinishedAt.IsZero() {
		return nil, fmt.Errorf("container %s has exited; its resources cannot change: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if c.isMachine() && !s.running() {
		return nil, fmt.Errorf("container %s is a machine that has not started; its resources cannot change until it has: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err := c.pod.checkHugeLimits(req.GetLinux().GetHugepageLimits()); err != nil {
		return nil, err
	}
	limits := c.resources()
	if len(req.GetLinux().GetHugepageLimits()) > 0 {
		limits.HugepageLimits = nil // Merge would append
	}
	proto.Merge(limits, req.GetLinux())
	err = c.resizeFor(ctx, limits, func(ctx context.Context) error {
		if c.isMachine() || !s.running() {
			return nil
		}
		return c.applyResources(ctx, limits)
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.UpdateContainerResourcesResponse{}, c.rec.Update(func(s *containerStatus) error {
		s.Resources = &message[*runtimeapi.LinuxContainerResources]{limits}
		return nil
	})
}

// resources are a copy of the limits in force.
func (c *container) resources() *runtimeapi.LinuxContainerResources {
	limits := c.config().GetLinux().GetResources()
	if s := c.rec.Status(); s.Resources != nil {
		limits = s.Resources.M
	}
	if limits == nil {
		return &runtimeapi.LinuxContainerResources{}
	}
	return proto.CloneOf(limits)
}

func (c *container) applyResources(ctx context.Context, limits *runtimeapi.LinuxContainerResources) error {
	_, client, err := c.runningIn(ctx)
	if err != nil {
		return err
	}
	return c.updateGuest(ctx, client, limits)
}

func (c *container) updateGuest(ctx context.Context, client agentClient, limits *runtimeapi.LinuxContainerResources) error {
	oci, err := ocispec.Resources(limits)
	if err != nil {
		return err
	}
	b, err := json.Marshal(oci)
	if err != nil {
		return err
	}
	_, err = client.UpdateContainer(ctx, &agentpb.UpdateContainerRequest{Id: c.guestID(), Resources: b})
	return err
}

// ReopenContainerLog goes on with a new log file after the kubelet has renamed the old one.
func (rt *Runtime) ReopenContainerLog(_ context.Context, req *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if s := c.rec.Status(); !s.running() {
		return nil, fmt.Errorf("container %s is %s, not running: %w", c.id, stateName(s.state()), errdefs.ErrFailedPrecondition)
	}
	return &runtimeapi.ReopenContainerLogResponse{}, c.logs.reopen()
}
