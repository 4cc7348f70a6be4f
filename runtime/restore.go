package runtime

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/archive"
	"github.com/vmruntime/vmruntime/runtime/crilog"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

// restoredBoot is the guest that a restored container is in: the first of its sandbox.
const restoredBoot = 1

// restoredSpec is what a container has from its checkpoint.
type restoredSpec struct {
	// GuestID is what the guest calls the container.
	GuestID string `json:"guestID"`
	// Output is where the log of this container begins.
	Output crilog.Offsets `json:"output"`
	// Resources are the limits that the guest has.
	Resources message[*runtimeapi.LinuxContainerResources] `json:"resources"`
}

// incoming is what a guest is restored from.
type incoming struct {
	state    io.Reader
	plugged  qemu.Plugged
	hardware []*agentpb.HardwareAddress
}

// give adds what a guest is restored from; nothing if it is not.
func (in *incoming) give(s *qemu.Spec) {
	if in != nil {
		s.State, s.Plugged = in.state, in.plugged
	}
}

// RestorePod makes a pod from a checkpoint. Its containers stand still until each is started.
func (rt *Runtime) RestorePod(ctx context.Context, req *runtimeapi.RestorePodRequest) (_ *runtimeapi.RestorePodResponse, err error) {
	if err := rt.checkRestore(ctx, req); err != nil {
		return nil, err
	}
	m := &checkpointManifest{}
	r, err := archive.Open(ctx, "checkpoint_path", req.GetCheckpointPath(), m)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if err := rt.fits(ctx, m, req); err != nil {
		return nil, err
	}
	id := newID()
	name := podName(req.GetConfig().GetMetadata())
	if err := rt.podNames.Reserve(name, id); err != nil {
		return nil, fmt.Errorf("sandbox name %q: %w", name, err)
	}
	p, err := rt.recordRestoredPod(id, m, req)
	if err != nil {
		rt.podNames.Release(name, id)
		return nil, err
	}
	containers, err := p.restore(ctx, m, req.GetContainerConfigs(), r)
	if err != nil {
		p.log.Warn("the checkpoint could not be restored", "error", err)
		return nil, errors.Join(err, rt.forgetRestored(ctx, p))
	}
	return rt.tellRestored(p, containers), nil
}

// recordRestoredPod makes the record of a pod whose VM has the size of the one that was saved. That of a machine is the container's.
func (rt *Runtime) recordRestoredPod(id string, m *checkpointManifest, req *runtimeapi.RestorePodRequest) (*pod, error) {
	if m.Machine != nil {
		spec, err := rt.podSpec(&runtimeapi.RunPodSandboxRequest{Config: req.GetConfig(), RuntimeHandler: req.GetRuntimeHandler()})
		if err != nil {
			return nil, err
		}
		return rt.recordPod(id, spec)
	}
	return rt.recordPod(id, podSpec{
		Handler:     req.GetRuntimeHandler(),
		Config:      message[*runtimeapi.PodSandboxConfig]{req.GetConfig()},
		CreatedAt:   time.Now(),
		VCPUs:       m.Size.VCPUs,
		MemoryBytes: m.Size.MemoryBytes,
		MaxVCPUs:    m.MaxVCPUs, MaxMemoryBytes: m.MaxMemoryBytes,
	})
}

func (rt *Runtime) tellRestored(p *pod, containers []*container) *runtimeapi.RestorePodResponse {
	rt.podEvent(p, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	rt.podEvent(p, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	resp := &runtimeapi.RestorePodResponse{PodSandboxId: p.id}
	for _, c := range containers {
		rt.containerEvent(c, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
		resp.RestoredContainers = append(resp.RestoredContainers, &runtimeapi.RestoredContainer{
			Name: c.config().GetMetadata().GetName(), ContainerId: c.id,
		})
	}
	return resp
}

// forgetRestored takes away what a restore that failed has made.
func (rt *Runtime) forgetRestored(ctx context.Context, p *pod) error {
	var errs []error
	for _, c := range rt.containersOf(p.id) {
		errs = append(errs, c.forget(ctx))
	}
	return errors.Join(append(errs, rt.forgetPod(ctx, p))...)
}

func (m *checkpointManifest) container(name string) *checkpointContainer {
	for i := range m.Containers {
		if m.Containers[i].Spec.Config.M.GetMetadata().GetName() == name {
			return &m.Containers[i]
		}
	}
	return nil
}

// restore makes the pod's containers, network and disk, and then the VM with what was saved of it.
func (p *pod) restore(ctx context.Context, m *checkpointManifest, configs []*runtimeapi.ContainerConfig, r *archive.Reader) ([]*container, error) {
	var containers []*container
	for _, cfg := range configs {
		c, err := p.restoreContainer(ctx, m.container(cfg.GetMetadata().GetName()), cfg)
		if err != nil {
			return nil, fmt.Errorf("container %q: %w", cfg.GetMetadata().GetName(), err)
		}
		containers = append(containers, c)
	}
	if m.Machine != nil {
		return containers, p.restoreMachine(ctx, m, containers[0], r)
	}
	disks, err := p.restoreDisks(ctx, m, containers)
	if err != nil {
		return nil, err
	}
	p.life.Lock()
	defer p.life.Unlock()
	if err := p.prepareRestored(ctx, m, r); err != nil {
		return nil, err
	}
	if err := r.Stream(memoryStream, func(state io.Reader) error { return p.restoreVM(ctx, m, disks, state) }); err != nil {
		return nil, err
	}
	if err := p.resizeRestored(ctx); err != nil {
		return nil, err
	}
	return containers, p.update(func(s *podStatus) error { s.ReadyAt = time.Now(); return nil })
}

// restoreContainer decides about a container as CreateContainer does, and refuses what the frozen process is not.
func (p *pod) restoreContainer(ctx context.Context, from *checkpointContainer, cfg *runtimeapi.ContainerConfig) (*container, error) {
	rt, id := p.rt, newID()
	name := fmt.Sprintf("%s_%s_%d", cfg.GetMetadata().GetName(), p.id, cfg.GetMetadata().GetAttempt())
	if err := rt.containerNames.Reserve(name, id); err != nil {
		return nil, fmt.Errorf("container name %q: %w", name, err)
	}
	c, err := p.recordRestored(ctx, id, from, cfg)
	if err != nil {
		rt.containerNames.Release(name, id)
		release, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
		defer cancel()
		return nil, errors.Join(err, rt.images.Release(release, id))
	}
	return c, nil
}

func (p *pod) recordRestored(ctx context.Context, id string, from *checkpointContainer, cfg *runtimeapi.ContainerConfig) (*container, error) {
	spec := containerSpec{
		PodID:     p.id,
		Config:    message[*runtimeapi.ContainerConfig]{cfg},
		CreatedAt: time.Now(),
		Restored:  &restoredSpec{GuestID: from.GuestID, Output: from.Output},
	}
	if dir, path := p.config().GetLogDirectory(), cfg.GetLogPath(); dir != "" && path != "" {
		spec.LogPath = filepath.Join(dir, path)
	}
	limits := from.Spec.Config.M.GetLinux().GetResources()
	if from.Resources != nil {
		limits = from.Resources.M
	}
	if limits == nil {
		limits = &runtimeapi.LinuxContainerResources{}
	}
	spec.Restored.Resources.M = limits
	if err := p.decideRestored(ctx, id, from, &spec); err != nil {
		return nil, err
	}
	rec, err := p.rt.containerStore.Create(id, spec, containerStatus{Boot: restoredBoot})
	if err != nil {
		return nil, err
	}
	c := p.rt.newContainer(p, rec)
	if err := p.rt.addContainer(c); err != nil {
		return nil, errors.Join(err, p.rt.containerStore.Remove(id))
	}
	return c, nil
}

// decideRestored is decideContainer with the names that the guest knows.
func (p *pod) decideRestored(ctx context.Context, id string, from *checkpointContainer, spec *containerSpec) error {
	cfg := spec.Config.M
	if err := p.rt.knownImage(ctx, cfg.GetImage().GetImage(), spec); err != nil {
		return err
	}
	if spec.ImageID != from.Spec.ImageID {
		return fmt.Errorf("image %q is %s, the checkpoint's is %s: %w", cfg.GetImage().GetImage(), spec.ImageID, from.Spec.ImageID, errdefs.ErrInvalidArgument)
	}
	if from.Spec.Machine != nil {
		return p.decideRestoredMachine(ctx, id, from.Spec.Machine, spec)
	}
	volumes, err := blockVolumes(cfg)
	if err != nil {
		return err
	}
	if len(volumes) > 0 {
		return fmt.Errorf("devices: block volume %s is in no checkpoint: %w", volumes[0].Path, errdefs.ErrInvalidArgument)
	}
	if err := ocispec.ValidateContainer(cfg, p.config(), nil); err != nil {
		return err
	}
	img, err := p.rt.images.Ensure(ctx, spec.ImageID, id)
	if err != nil {
		return fmt.Errorf("image %q: %w", cfg.GetImage().GetImage(), err)
	}
	if err := sameDisk(img, from.Spec.Disk.Serial); err != nil {
		return err
	}
	spec.Disk = imageDisk{Serial: img.Serial, Path: img.RootFS}
	spec.StopSignal = img.Config.Config.StopSignal
	if s := cfg.GetStopSignal(); s != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		spec.StopSignal = signalName(s)
	}
	if spec.Mounts, err = resolveMounts(from.GuestID, cfg); err != nil {
		return err
	}
	if slices.ContainsFunc(spec.Mounts, func(m resolvedMount) bool { return m.Via == viaShare }) {
		return fmt.Errorf("mounts: a volume that is shared with the node by virtiofs is in no checkpoint: %w", errdefs.ErrInvalidArgument)
	}
	if spec.Volumes, err = p.rt.resolveVolumes(ctx, id, cfg, spec.Mounts); err != nil {
		return err
	}
	if err := buildOCI(p, id, img, spec); err != nil {
		return err
	}
	if cfg.GetStdin() != from.Spec.Config.M.GetStdin() || cfg.GetStdinOnce() != from.Spec.Config.M.GetStdinOnce() {
		return fmt.Errorf("stdin and stdin_once are not those of the checkpoint: %w", errdefs.ErrInvalidArgument)
	}
	return sameProcess(from.Spec.OCI, spec.OCI)
}

// restoreDisks finds the image disks of the guest in their order. The first container owns those of containers that have ended.
func (p *pod) restoreDisks(ctx context.Context, m *checkpointManifest, containers []*container) ([]qemu.Disk, error) {
	var out []qemu.Disk
	for _, d := range m.Disks {
		img, err := p.rt.images.Ensure(ctx, d.Image, containers[0].id)
		if err != nil {
			return nil, fmt.Errorf("image %q, which is a disk of the checkpoint: %w", d.Image, err)
		}
		if err := sameDisk(img, d.Serial); err != nil {
			return nil, err
		}
		out = append(out, qemu.Disk{Serial: d.Serial, Path: img.RootFS, Format: "raw", ReadOnly: true})
	}
	return out, nil
}

// restoreNetwork makes the network, whose interfaces have to be as many and as wide as those of the checkpoint. The caller holds life.
func (p *pod) restoreNetwork(ctx context.Context, m *checkpointManifest) error {
	if err := p.setupNetwork(ctx, false); err != nil {
		return err
	}
	nics := p.rec.Status().Network.Interfaces
	if len(nics) != len(m.Interfaces) {
		return fmt.Errorf("the pod has %d network interfaces, the checkpoint %d: %w", len(nics), len(m.Interfaces), errdefs.ErrFailedPrecondition)
	}
	for i, nic := range nics {
		if nic.MTU != m.Interfaces[i].MTU {
			return fmt.Errorf("interface %s has an MTU of %d, the checkpoint's has %d: %w", nic.Name, nic.MTU, m.Interfaces[i].MTU, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// prepareRestored makes network and scratch disk. The caller holds life.
func (p *pod) prepareRestored(ctx context.Context, m *checkpointManifest, r *archive.Reader) error {
	if err := p.restoreNetwork(ctx, m); err != nil {
		return err
	}
	path, err := p.rt.images.CreateScratch(ctx, p.id, m.ScratchSize)
	if err != nil {
		return err
	}
	p.scratch = path
	disk, err := p.rt.images.OpenScratch(p.id)
	if err != nil {
		return err
	}
	err = r.Stream(scratchStream, func(from io.Reader) error { return archive.ReadSparse(disk, from, m.ScratchSize) })
	return errors.Join(err, disk.Close())
}

// restoreVM starts QEMU with the saved state and makes the guest this pod. The caller holds life.
func (p *pod) restoreVM(ctx context.Context, m *checkpointManifest, disks []qemu.Disk, state io.Reader) error {
	in := &incoming{state: state, plugged: m.Plugged}
	for i, nic := range p.rec.Status().Network.Interfaces {
		in.hardware = append(in.hardware, &agentpb.HardwareAddress{Old: m.Interfaces[i].MAC, New: nic.MAC})
	}
	p.incoming.Store(in)
	defer p.incoming.Store(nil)
	// Until it is this pod it believes to have the addresses of the one that was saved, which may run beside it.
	if err := p.holdNetwork(m.Interfaces); err != nil {
		return err
	}
	g, err := p.bootRestored(ctx, vmSize{m.VCPUs, m.MemoryBytes}, disks)
	if err != nil {
		return err
	}
	if err := g.vm.Resume(ctx); err != nil {
		return err
	}
	client, err := g.session(ctx)
	if err != nil {
		return err
	}
	if err := p.letNetworkGo(); err != nil {
		return err
	}
	return p.checkRestored(ctx, g, client, m)
}

// resizeRestored has a restored VM come to the size of its pod's limits, as they may be others than those that it was saved with. Of what is
// not limited it keeps what it had. The caller holds life.
func (p *pod) resizeRestored(ctx context.Context) error {
	limits := p.config().GetLinux()
	size, err := p.vmConfig().resized(limits, limits)
	if err != nil {
		return err
	}
	if cpuTime(limits.GetResources()) == 0 {
		size.VCPUs = p.size().VCPUs
	}
	if limits.GetResources().GetMemoryLimitInBytes() <= 0 {
		size.MemoryBytes = p.size().MemoryBytes
	}
	if size == p.size() {
		return nil
	}
	return p.resizeTo(ctx, limits, size, func(context.Context) error { return nil })
}

// bootRestored starts QEMU with the size that the saved VM has begun with.
func (p *pod) bootRestored(ctx context.Context, begin vmSize, disks []qemu.Disk) (*guest, error) {
	if err := p.makeRunDir(); err != nil {
		return nil, err
	}
	machine, err := p.machine(ctx, begin)
	if err != nil {
		return nil, err
	}
	machine.Incoming = true
	machine.Disks = append(machine.Disks, disks...)
	g, err := p.launch(ctx, machine, nil, nil)
	if err != nil {
		return nil, err
	}
	return g, p.update(func(s *podStatus) error {
		for _, d := range disks {
			s.Guest.Disks = append(s.Guest.Disks, d.Serial)
		}
		return nil
	})
}

// checkRestored makes sure that the guest has all containers, and drops the execs, whose clients are gone.
func (p *pod) checkRestored(ctx context.Context, g *guest, client agentClient, m *checkpointManifest) error {
	list, err := client.List(ctx, &agentpb.ListRequest{})
	if err != nil {
		return err
	}
	there := make(map[string]bool)
	for _, s := range list.GetProcesses() {
		if s.GetExecId() == "" {
			there[s.GetContainerId()] = s.GetStarted() && !s.GetExited()
			continue
		}
		dropRestored(ctx, g, client, &agentpb.ProcessRef{ContainerId: s.GetContainerId(), ExecId: s.GetExecId()})
	}
	for _, c := range m.Containers {
		if !there[c.GuestID] {
			return fmt.Errorf("container %s does not run in the restored guest: %w", c.GuestID, errdefs.ErrInternal)
		}
	}
	g.log.Info("restored", "containers", len(m.Containers))
	return nil
}

// dropTimeout bounds the removal of an exec from a restored guest.
const dropTimeout = 10 * time.Second

// dropRestored removes an exec, or leaves it: its client is gone, and the containers are as good as without it.
func dropRestored(ctx context.Context, g *guest, client agentClient, exec *agentpb.ProcessRef) {
	ctx, cancel := context.WithTimeout(ctx, dropTimeout)
	defer cancel()
	if _, err := client.RemoveExec(ctx, exec); err != nil {
		g.log.Warn("a command of the checkpoint stays in the restored guest", "container", exec.GetContainerId(), "exec", exec.GetExecId(), "error", err)
	}
}

// adopt makes a guest that was just restored this pod. It tells whether there was anything to adopt.
func (p *pod) adopt(ctx context.Context, client agentClient) (bool, error) {
	in := p.incoming.Load()
	if in == nil {
		return false, nil
	}
	sandbox, err := p.sandboxRequest()
	if err != nil {
		return true, err
	}
	sandbox.Entropy = make([]byte, 64)
	if _, err := rand.Read(sandbox.Entropy); err != nil {
		return true, err
	}
	sandbox.TimeUnixNano = time.Now().UnixNano()
	if _, err := client.Adopt(ctx, &agentpb.AdoptRequest{Sandbox: sandbox, Hardware: in.hardware}); err != nil {
		return true, fmt.Errorf("adopt the restored guest: %w", err)
	}
	return true, p.applyCPUQuota()
}

// startRestored lets a container of a checkpoint go on where it was. The caller holds life.
func (c *container) startRestored(ctx context.Context) error {
	g := c.pod.currentGuest()
	if g == nil || !g.alive() || g.boot != restoredBoot {
		return fmt.Errorf("the VM with the restored process has ended: %w", errdefs.ErrFailedPrecondition)
	}
	client, err := g.session(ctx)
	if err != nil {
		return err
	}
	if err := c.refresh(ctx, client); err != nil {
		return err
	}
	if err := c.beginRestoredLog(); err != nil {
		return err
	}
	if _, err := client.Thaw(ctx, &agentpb.ThawRequest{ContainerIds: []string{c.guestID()}}); err != nil {
		return err
	}
	if err := c.rec.Update(func(s *containerStatus) error { s.StartedAt = time.Now(); return nil }); err != nil {
		return errors.Join(err, c.discard(client))
	}
	c.pod.watchProjections(c)
	c.rt.containerEvent(c, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	c.awaitOutput(ctx)
	c.watch(g)
	return nil
}

// refresh gives the frozen container what the new pod sets from outside: limits, and the files of its node. What it wrote to
// files that are read back stays.
func (c *container) refresh(ctx context.Context, client agentClient) error {
	for _, m := range c.rec.Spec().Mounts {
		if m.Via != viaFile && m.Via != viaFiles || m.WriteBack {
			continue
		}
		if err := pushFiles(ctx, client, m); err != nil {
			return fmt.Errorf("push %q to the guest: %w", m.HostPath, err)
		}
	}
	limits := c.resources()
	if proto.Equal(limits, c.rec.Spec().Restored.Resources.M) {
		return nil
	}
	return c.updateGuest(ctx, client, limits)
}

// beginRestoredLog opens the log, whose first byte is the one after the last that the checkpointed pod has logged.
func (c *container) beginRestoredLog() error {
	at := c.rec.Spec().Restored.Output
	if c.rec.Spec().LogPath == "" {
		c.logs.begin(offsets{at.Stdout, at.Stderr})
		return nil
	}
	if err := crilog.Begin(c.logRecord(), at); err != nil {
		return fmt.Errorf("begin the container's log: %w", err)
	}
	return c.openLog()
}
