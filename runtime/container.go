package runtime

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/runtime/state"
	"github.com/vmruntime/vmruntime/trace"
)

// container is one container of a VM pod while the daemon runs.
type container struct {
	rt  *Runtime
	pod *pod
	id  string
	rec *state.Record[containerSpec, containerStatus]
	log *slog.Logger
	// listed is what never changes of the container in lists.
	listed protoreflect.RawFields

	// life is held by whatever starts, stops or removes the container: one at a time.
	life sync.Mutex
	// exited is closed when the container has finished.
	exited   chan struct{}
	exitOnce sync.Once
	logs     logSink
	output   broadcaster
	// spoke ends the span up to the first output; nil if an earlier daemon started the container.
	spoke func(error)
	cpu   cpuSample
}

func (rt *Runtime) newContainer(p *pod, rec *state.Record[containerSpec, containerStatus]) *container {
	c := &container{
		rt: rt, pod: p, id: rec.ID(), rec: rec,
		log:    p.log.With("container", rec.ID()),
		exited: make(chan struct{}),
	}
	spec, cfg := rec.Spec(), c.config()
	c.listed = frozen(&runtimeapi.Container{
		Metadata:    cfg.GetMetadata(),
		Image:       cfg.GetImage(),
		ImageRef:    spec.ImageRef,
		ImageId:     spec.ImageID,
		CreatedAt:   spec.CreatedAt.UnixNano(),
		Labels:      cfg.GetLabels(),
		Annotations: cfg.GetAnnotations(),
	})
	if !rec.Status().FinishedAt.IsZero() {
		c.markExited()
	}
	return c
}

// isMachine tells whether the container is a whole machine.
func (c *container) isMachine() bool { return c.rec.Spec().Machine != nil }

func (c *container) config() *runtimeapi.ContainerConfig { return c.rec.Spec().Config.M }

func (c *container) ref() *agentpb.ProcessRef { return &agentpb.ProcessRef{ContainerId: c.guestID()} }

func (c *container) markExited() {
	c.exitOnce.Do(func() { close(c.exited) })
}

// runningIn returns the guest and a session with it when the container runs.
func (c *container) runningIn(ctx context.Context) (*guest, agentClient, error) {
	if s := c.rec.Status(); !s.running() {
		return nil, nil, fmt.Errorf("container %s is %s, not running: %w", c.id, stateName(s.state()), errdefs.ErrFailedPrecondition)
	}
	g := c.pod.currentGuest()
	if g == nil {
		return nil, nil, fmt.Errorf("the guest of container %s is gone: %w", c.id, errdefs.ErrUnavailable)
	}
	client, err := g.session(ctx)
	return g, client, err
}

func stateName(s runtimeapi.ContainerState) string {
	switch s {
	case runtimeapi.ContainerState_CONTAINER_CREATED:
		return "created"
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		return "running"
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		return "exited"
	default:
		return "unknown"
	}
}

// StartContainer runs the container's process in the guest; it waits for a guest that still boots.
func (rt *Runtime) StartContainer(ctx context.Context, req *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	c.pod.tag(ctx)
	trace.Tag(ctx, "container.id", c.id)
	trace.Tag(ctx, "k8s.container.name", c.config().GetMetadata().GetName())
	defer rt.spares.hold()()
	c.life.Lock()
	defer c.life.Unlock()
	if s := c.rec.Status(); s.state() != runtimeapi.ContainerState_CONTAINER_CREATED {
		return nil, fmt.Errorf("container %s is %s; only a created one can be started: %w", c.id, stateName(s.state()), errdefs.ErrFailedPrecondition)
	}
	start := c.start
	switch {
	case c.isMachine() && c.rec.Spec().Restored != nil:
		start = c.startRestoredMachine
	case c.isMachine():
		start = c.startMachine
	case c.rec.Spec().Restored != nil:
		start = c.startRestored
	}
	if err := start(ctx); err != nil {
		c.log.Info("the container could not be started", "error", err)
		c.finish(containerEnd{code: 128, reason: reasonStartError, message: err.Error(), at: time.Now()})
		return nil, fmt.Errorf("start container %s: %w", c.id, err)
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

// start brings what the container needs into the guest and runs it. The caller holds life.
func (c *container) start(ctx context.Context) error {
	wait, answered := trace.Start(ctx, "wait for the guest")
	g, client, err := c.guestSession(wait)
	answered(err)
	if err != nil {
		return err
	}
	if err := c.deliver(ctx, g, client); err != nil {
		return err
	}
	if err := c.openLog(); err != nil {
		return err
	}
	started, err := c.run(ctx, g, client)
	if err != nil {
		return err
	}
	if err := c.rec.Update(func(s *containerStatus) error {
		s.Boot, s.StartedAt = g.boot, started
		return nil
	}); err != nil {
		return errors.Join(err, c.discard(client))
	}
	c.pod.watchProjections(c)
	c.rt.containerEvent(c, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	c.awaitOutput(ctx)
	c.watch(g)
	c.pod.wantTemplate(ctx)
	return nil
}

// guestSession waits for a guest that answers. One that began as a template and never answered is replaced by one that boots.
func (c *container) guestSession(ctx context.Context) (*guest, agentClient, error) {
	for {
		g, err := c.pod.runningGuest(ctx, c.shares())
		if err != nil {
			return nil, nil, err
		}
		client, err := g.session(ctx)
		if err == nil || !g.wasBadCopy() {
			return g, client, err
		}
		g.log.Warn("the template is of no use; the guest boots instead", "error", err)
	}
}

// run makes and starts the container in the guest, and leaves nothing of it there when that fails.
func (c *container) run(ctx context.Context, g *guest, client agentClient) (time.Time, error) {
	req, err := c.createRequest(g)
	if err != nil {
		return time.Time{}, err
	}
	create, made := trace.Start(ctx, "create container")
	_, err = client.CreateContainer(create, req)
	made(err)
	if errdefs.IsAlreadyExists(err) {
		// Made for a daemon that was killed before it could start it.
		if err = c.discard(client); err == nil {
			_, err = client.CreateContainer(ctx, req)
		}
	}
	if err != nil {
		return time.Time{}, errors.Join(err, c.discard(client))
	}
	start, began := trace.Start(ctx, "start container")
	resp, err := client.StartContainer(start, &agentpb.StartContainerRequest{Id: c.id})
	began(err)
	if err != nil {
		return time.Time{}, errors.Join(err, c.discard(client))
	}
	return time.Unix(0, resp.GetStartedAtUnixNano()), nil
}

// discard removes the container from the guest.
func (c *container) discard(client agentClient) error {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	_, err := client.RemoveContainer(ctx, &agentpb.RemoveContainerRequest{Id: c.guestID()})
	return err
}

// killTimeout bounds the wait for what SIGKILL must end.
const killTimeout = 30 * time.Second

// StopContainer sends the stop signal, waits the grace period (seconds) and kills. A container that does not
// run, or that nobody knows, is a stopped one.
func (rt *Runtime) StopContainer(ctx context.Context, req *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.StopContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	grace := time.Duration(max(req.GetTimeout(), 0)) * time.Second
	return &runtimeapi.StopContainerResponse{}, c.stop(ctx, grace)
}

func (c *container) stop(ctx context.Context, grace time.Duration) error {
	if !c.rec.Status().running() {
		return nil
	}
	c.pod.wake(ctx)
	if c.isMachine() {
		return c.stopMachine(ctx, grace)
	}
	if grace > 0 {
		if c.endedAfter(ctx, c.stopSignal(), false, grace) {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("container %s: the request ended before the grace period: %w", c.id, err)
		}
	}
	return c.kill(ctx)
}

// kill ends the container now. When the guest does not obey, the VM is ended: a stop never hangs on a
// guest that does not answer.
func (c *container) kill(ctx context.Context) error {
	if !c.rec.Status().running() {
		return nil
	}
	if c.isMachine() {
		return c.killMachine(ctx)
	}
	c.pod.wake(ctx)
	ctx = context.WithoutCancel(ctx)
	if c.endedAfter(ctx, sigkill, true, killTimeout) {
		return nil
	}
	c.log.Warn("the guest does not end the container; its VM is killed")
	kill, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	if g := c.pod.currentGuest(); g != nil {
		if err := g.vm.Kill(kill); err != nil {
			return err
		}
	}
	select {
	case <-c.exited:
		return nil
	case <-kill.Done():
		return fmt.Errorf("container %s outlives its VM: %w", c.id, kill.Err())
	}
}

// endedAfter sends a signal and tells whether the container ended within the time given.
func (c *container) endedAfter(ctx context.Context, signal int32, all bool, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, client, err := c.runningIn(ctx)
	if err == nil {
		_, err = client.Signal(ctx, &agentpb.SignalRequest{Process: c.ref(), Signal: signal, All: all})
	}
	if err != nil {
		c.log.Debug("signal", "signal", signal, "error", err)
	}
	select {
	case <-c.exited:
		return true
	case <-ctx.Done():
		return false
	}
}

// RemoveContainer kills the container if it runs and forgets it. An unknown one is a removed one.
func (rt *Runtime) RemoveContainer(ctx context.Context, req *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.RemoveContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.RemoveContainerResponse{}, rt.removeContainer(ctx, c)
}

func (rt *Runtime) removeContainer(ctx context.Context, c *container) error {
	if c.rec.Status().running() {
		c.pod.cutCheckpoint() // which holds the lock
	}
	// Under the lock, so that a start that runs has come to its end and is not missed.
	c.life.Lock()
	defer c.life.Unlock()
	if err := c.kill(ctx); err != nil {
		return err
	}
	if err := c.forget(ctx); err != nil {
		return err
	}
	rt.containerEvent(c, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	return nil
}

// forget takes away everything of a container, its record last.
func (c *container) forget(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
	defer cancel()
	if g := c.pod.currentGuest(); !c.isMachine() && g != nil && g.alive() && c.rec.Status().Boot == g.boot {
		if client, err := g.session(ctx); err == nil {
			if err := c.discard(client); err != nil && g.alive() {
				return fmt.Errorf("remove container %s from the guest: %w", c.id, err)
			}
		}
	}
	c.pod.dropProjections(c)
	if err := c.endUnstarted(ctx); err != nil {
		return err
	}
	if err := errors.Join(c.unshare(), c.rt.images.RemoveMachine(c.id), c.rt.images.Release(ctx, c.id), c.removeLogRecord()); err != nil {
		return err
	}
	if err := c.rt.containerStore.Remove(c.id); err != nil {
		return err
	}
	c.rt.mu.Lock()
	defer c.rt.mu.Unlock()
	delete(c.rt.containers, c.id)
	c.rt.containerNames.Release(c.name(), c.id)
	return nil
}

func (c *container) name() string {
	m := c.config().GetMetadata()
	return fmt.Sprintf("%s_%s_%d", m.GetName(), c.pod.id, m.GetAttempt())
}

// ContainerStatus reports one container; with verbose also its OCI specification.
func (rt *Runtime) ContainerStatus(ctx context.Context, req *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: c.criStatus()}
	if req.GetVerbose() {
		resp.Info, err = c.verbose(ctx)
	}
	return resp, err
}

func (c *container) criStatus() *runtimeapi.ContainerStatus {
	spec, s, cfg := c.rec.Spec(), c.rec.Status(), c.config()
	resources := cfg.GetLinux().GetResources()
	if s.Resources != nil {
		resources = s.Resources.M
	}
	out := &runtimeapi.ContainerStatus{
		Id:          c.id,
		Metadata:    cfg.GetMetadata(),
		State:       s.state(),
		CreatedAt:   spec.CreatedAt.UnixNano(),
		ExitCode:    s.ExitCode,
		Image:       &runtimeapi.ImageSpec{Image: spec.ImageName, UserSpecifiedImage: cfg.GetImage().GetUserSpecifiedImage()},
		ImageRef:    spec.ImageRef,
		ImageId:     spec.ImageID,
		Reason:      s.Reason,
		Message:     s.Message,
		Labels:      cfg.GetLabels(),
		Annotations: cfg.GetAnnotations(),
		Mounts:      cfg.GetMounts(),
		LogPath:     spec.LogPath,
		Resources:   &runtimeapi.ContainerResources{Linux: resources},
		User:        spec.User.M,
		StopSignal:  signalOf(spec.StopSignal),
	}
	if !s.StartedAt.IsZero() {
		out.StartedAt = s.StartedAt.UnixNano()
	}
	if !s.FinishedAt.IsZero() {
		out.FinishedAt = s.FinishedAt.UnixNano()
	}
	return out
}

// ListContainers reports the containers that the filter lets through.
func (rt *Runtime) ListContainers(_ context.Context, req *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	resp := &runtimeapi.ListContainersResponse{}
	f := req.GetFilter()
	for _, c := range rt.allContainers() {
		if f.GetId() != "" && !rt.containerIDMatches(f.GetId(), c.id) {
			continue
		}
		if f.GetPodSandboxId() != "" && !rt.podIDMatches(f.GetPodSandboxId(), c.pod.id) {
			continue
		}
		if !labelsMatch(f.GetLabelSelector(), c.config().GetLabels()) {
			continue
		}
		state := c.rec.Status().state()
		if f.GetState() != nil && f.GetState().GetState() != state {
			continue
		}
		item := &runtimeapi.Container{Id: c.id, PodSandboxId: c.pod.id, State: state}
		item.ProtoReflect().SetUnknown(c.listed)
		resp.Containers = append(resp.Containers, item)
	}
	return resp, nil
}
