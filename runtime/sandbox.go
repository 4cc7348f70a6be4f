package runtime

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/runtime/annotation"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

// RunPodSandbox makes a sandbox whose network is ready when it answers; the guest boots meanwhile.
func (rt *Runtime) RunPodSandbox(ctx context.Context, req *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	cfg := req.GetConfig()
	if err := ocispec.ValidateSandbox(cfg); err != nil {
		return nil, err
	}
	if _, err := annotation.Parse(cfg.GetAnnotations()); err != nil {
		return nil, err
	}
	defer rt.spares.hold()()
	spec, err := rt.podSpec(req)
	if err != nil {
		return nil, err
	}
	id, sp := newID(), rt.spares.take(ctx, spec)
	if sp != nil {
		id, spec.UID = sp.id, sp.uid
	}
	p, err := rt.createPod(id, spec)
	if err != nil {
		if sp != nil {
			rt.spares.giveBack(sp)
		}
		return nil, err
	}
	p.tag(ctx)
	if err := p.start(ctx, sp); err != nil {
		p.log.Warn("the sandbox could not be made", "error", err)
		return nil, errors.Join(err, rt.forgetPod(ctx, p))
	}
	rt.podEvent(p, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	rt.podEvent(p, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func podName(m *runtimeapi.PodSandboxMetadata) string {
	return fmt.Sprintf("%s_%s_%s_%d", m.GetName(), m.GetNamespace(), m.GetUid(), m.GetAttempt())
}

// createPod takes the sandbox's name and writes the record of one that has nothing yet.
func (rt *Runtime) createPod(id string, spec podSpec) (*pod, error) {
	name := podName(spec.Config.M.GetMetadata())
	if err := rt.podNames.Reserve(name, id); err != nil {
		return nil, fmt.Errorf("sandbox name %q: %w", name, err)
	}
	p, err := rt.recordPod(id, spec)
	if err != nil {
		rt.podNames.Release(name, id)
	}
	return p, err
}

// podSpec decides what the sandbox's VM is.
func (rt *Runtime) podSpec(req *runtimeapi.RunPodSandboxRequest) (podSpec, error) {
	cfg := req.GetConfig()
	spec := podSpec{
		Handler:   req.GetRuntimeHandler(),
		Config:    message[*runtimeapi.PodSandboxConfig]{cfg},
		CreatedAt: time.Now(),
	}
	var err error
	if spec.HugeBytes, err = hugeBytes(cfg); err != nil {
		return spec, err
	}
	spec.VCPUs, spec.MemoryBytes = rt.cfg.VM.size(cfg)
	spec.MemoryBytes = withHugePages(spec.MemoryBytes, spec.HugeBytes)
	if spec.HugeBytes == 0 {
		spec.MaxVCPUs, spec.MaxMemoryBytes = rt.cfg.VM.room(spec.VCPUs, spec.MemoryBytes)
	}
	return spec, nil
}

// recordPod gives the pod a user ID, unless it has that of a spare, and writes its record.
func (rt *Runtime) recordPod(id string, spec podSpec) (*pod, error) {
	var err error
	taken := spec.UID == 0
	if taken {
		if spec.UID, err = rt.takeUID(); errdefs.IsResourceExhausted(err) && rt.spares.yield() {
			spec.UID, err = rt.takeUID()
		}
		if err != nil {
			return nil, err
		}
	}
	rec, err := rt.podStore.Create(id, spec, podStatus{})
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if taken || err == nil { // a spare that gets no pod keeps its own
		delete(rt.takenUIDs, spec.UID)
	}
	if err != nil {
		return nil, err
	}
	p := rt.newPod(rec)
	rt.pods[id] = p
	return p, nil
}

// takeUID finds a user ID that no other VM has, and keeps it until the pod's record does.
func (rt *Runtime) takeUID() (uint32, error) {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	used := maps.Clone(rt.takenUIDs)
	for _, p := range rt.pods {
		used[p.rec.Spec().UID] = true
	}
	for i := range rt.cfg.QEMU.UIDCount {
		if uid := rt.cfg.QEMU.UIDBase + i; !used[uid] {
			rt.takenUIDs[uid] = true
			return uid, nil
		}
	}
	return 0, fmt.Errorf("qemu.uid_count: all %d user IDs are in use: %w", rt.cfg.QEMU.UIDCount, errdefs.ErrResourceExhausted)
}

// start makes the sandbox and lets its guest boot, unless that is a spare.
func (p *pod) start(ctx context.Context, sp *spare) error {
	p.life.Lock()
	defer p.life.Unlock()
	if err := p.startGuest(ctx, sp); err != nil {
		return err
	}
	return p.update(func(s *podStatus) error { s.ReadyAt = time.Now(); return nil })
}

func (p *pod) startGuest(ctx context.Context, sp *spare) error {
	if sp != nil {
		return p.startAs(ctx, sp)
	}
	if err := p.prepare(ctx); err != nil {
		return err
	}
	_, err := p.boot(ctx, false)
	return err
}

// StopPodSandbox ends all containers and the guest and gives the network back. An unknown sandbox is a
// stopped one.
func (rt *Runtime) StopPodSandbox(ctx context.Context, req *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	p, err := rt.podByID(req.GetPodSandboxId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.StopPodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.StopPodSandboxResponse{}, rt.stopPod(ctx, p)
}

func (rt *Runtime) stopPod(ctx context.Context, p *pod) error {
	stopped := !p.rec.Status().StoppedAt.IsZero()
	if stopped {
		return nil
	}
	var errs []error
	for _, c := range rt.containersOf(p.id) {
		errs = append(errs, c.kill(ctx))
	}
	rt.populations.stop(p) // a start that waits for one holds life
	p.life.Lock()
	defer p.life.Unlock()
	if g := p.currentGuest(); g != nil && g.machine == nil && g.alive() {
		g.shutdown(ctx)
	}
	if err := p.teardown(ctx); err != nil {
		return errors.Join(append(errs, err)...)
	}
	if err := p.update(func(s *podStatus) error {
		if s.StoppedAt.IsZero() {
			s.StoppedAt = time.Now()
		}
		return nil
	}); err != nil {
		return err
	}
	rt.podEvent(p, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	return nil
}

// RemovePodSandbox stops the sandbox if need be and forgets it with its containers.
func (rt *Runtime) RemovePodSandbox(ctx context.Context, req *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	p, err := rt.podByID(req.GetPodSandboxId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := rt.stopPod(ctx, p); err != nil {
		return nil, err
	}
	for _, c := range rt.containersOf(p.id) {
		if err := rt.removeContainer(ctx, c); err != nil {
			return nil, err
		}
	}
	if err := rt.forgetPod(ctx, p); err != nil {
		return nil, err
	}
	rt.podEvent(p, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

// forgetPod takes away everything of a pod, its record last, so that a crash between leaves a record from
// which recovery can go on.
func (rt *Runtime) forgetPod(ctx context.Context, p *pod) error {
	p.life.Lock()
	defer p.life.Unlock()
	if err := p.teardown(ctx); err != nil {
		return err
	}
	if err := rt.podStore.Remove(p.id); err != nil {
		return err
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	delete(rt.pods, p.id)
	rt.podNames.Release(podName(p.config().GetMetadata()), p.id)
	return nil
}

// PodSandboxStatus reports one sandbox; with verbose also what it is made of.
func (rt *Runtime) PodSandboxStatus(ctx context.Context, req *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	p, err := rt.podByID(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.PodSandboxStatusResponse{Status: p.criStatus(), Timestamp: time.Now().UnixNano()}
	resp.ContainersStatuses = p.containerStatuses()
	if req.GetVerbose() {
		resp.Info, err = p.verbose(ctx)
	}
	return resp, err
}

// containerStatuses are those of the pod's containers, the newest first: a kubelet with the feature EventedPLEG does not sort them, and takes
// the first of a name for the one that counts.
func (p *pod) containerStatuses() []*runtimeapi.ContainerStatus {
	var out []*runtimeapi.ContainerStatus
	for _, c := range p.rt.containersOf(p.id) {
		out = append(out, c.criStatus())
	}
	slices.SortFunc(out, func(a, b *runtimeapi.ContainerStatus) int { return cmp.Compare(b.GetCreatedAt(), a.GetCreatedAt()) })
	return out
}

func (p *pod) criStatus() *runtimeapi.PodSandboxStatus {
	spec, cfg := p.rec.Spec(), p.config()
	out := &runtimeapi.PodSandboxStatus{
		Id:             p.id,
		Metadata:       cfg.GetMetadata(),
		State:          p.state(),
		CreatedAt:      spec.CreatedAt.UnixNano(),
		Network:        &runtimeapi.PodSandboxNetworkStatus{},
		Labels:         cfg.GetLabels(),
		Annotations:    cfg.GetAnnotations(),
		RuntimeHandler: spec.Handler,
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{
			Options: cfg.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		}},
	}
	if out.State == runtimeapi.PodSandboxState_SANDBOX_READY {
		out.Network = networkStatus(p.rec.Status().Network)
	}
	return out
}

// ListPodSandbox reports the sandboxes that the filter lets through.
func (rt *Runtime) ListPodSandbox(_ context.Context, req *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	resp := &runtimeapi.ListPodSandboxResponse{}
	f := req.GetFilter()
	for _, p := range rt.allPods() {
		if f.GetId() != "" && !rt.podIDMatches(f.GetId(), p.id) {
			continue
		}
		if !labelsMatch(f.GetLabelSelector(), p.config().GetLabels()) {
			continue
		}
		state := p.state()
		if f.GetState() != nil && f.GetState().GetState() != state {
			continue
		}
		item := &runtimeapi.PodSandbox{Id: p.id, State: state}
		item.ProtoReflect().SetUnknown(p.listed)
		resp.Items = append(resp.Items, item)
	}
	return resp, nil
}

func labelsMatch(selector, labels map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return true
}
