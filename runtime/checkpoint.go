package runtime

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/archive"
	"github.com/vmruntime/vmruntime/runtime/crilog"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

const (
	// releaseTimeout bounds how long a pod may take to go on after a checkpoint.
	releaseTimeout = 30 * time.Second
	// releaseRetry is how long after a failure it is tried again.
	releaseRetry = time.Second
	// drainPoll is how often it is looked whether the output of frozen containers has arrived.
	drainPoll = 2 * time.Millisecond

	// containerTimeout bounds the checkpoint of a container whose request has no timeout.
	containerTimeout = 2 * time.Minute

	// Streams of a checkpoint.
	memoryStream  = "memory"
	scratchStream = "scratch"
)

// checkpointManifest is what a checkpoint tells of its pod, beside the streams.
type checkpointManifest struct {
	Platform platform `json:"platform"`

	// VCPUs and MemoryBytes are what the VM has begun with, Plugged what it has had beside that, Size what it is to have.
	VCPUs       int          `json:"vcpus"`
	MemoryBytes int64        `json:"memoryBytes"`
	Plugged     qemu.Plugged `json:"plugged,omitzero"`
	Size        vmSize       `json:"size"`
	// MaxVCPUs and MaxMemoryBytes are what the VM can come to have.
	MaxVCPUs       int   `json:"maxVCPUs,omitempty"`
	MaxMemoryBytes int64 `json:"maxMemoryBytes,omitempty"`
	ScratchSize    int64 `json:"scratchSize"`
	// Interfaces in the order of the VM's devices.
	Interfaces []checkpointInterface `json:"interfaces"`
	// Disks are the image disks in the order in which they were plugged.
	Disks      []checkpointDisk                      `json:"disks"`
	Pod        message[*runtimeapi.PodSandboxConfig] `json:"pod"`
	Containers []checkpointContainer                 `json:"containers,omitempty"`
	// Machine is there if the VM is one; then there are no Disks.
	Machine *checkpointMachine `json:"machine,omitempty"`
}

type checkpointInterface struct {
	MAC string `json:"mac"`
	MTU int    `json:"mtu"`
}

type checkpointDisk struct {
	Serial string `json:"serial"`
	// Image is what the disk was made from: a config digest or a reference.
	Image string `json:"image"`
}

type checkpointContainer struct {
	// GuestID is the container's name in the guest.
	GuestID   string                                        `json:"guestID"`
	Spec      containerSpec                                 `json:"spec"`
	Resources *message[*runtimeapi.LinuxContainerResources] `json:"resources,omitempty"`
	// Output is how much of the streams is in the log of the pod that was checkpointed.
	Output crilog.Offsets `json:"output"`
}

// guestID is the container's name in the guest.
func (c *container) guestID() string {
	if r := c.rec.Spec().Restored; r != nil {
		return r.GuestID
	}
	return c.id
}

// guestIDOf is what the guest calls a container.
func (rt *Runtime) guestIDOf(id string) string {
	if c, err := rt.containerByID(id); err == nil {
		return c.guestID()
	}
	return id
}

func checkOptions(options map[string]string) error {
	for key := range options {
		return fmt.Errorf("options[%q]: there are no options for VM pods; leave it out: %w", key, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkDeadline(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		return fmt.Errorf("the call has no deadline; the CRI asks for one: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// CheckpointPod writes a running pod into a directory. The pod stands still meanwhile, and goes on before the answer.
func (rt *Runtime) CheckpointPod(ctx context.Context, req *runtimeapi.CheckpointPodRequest) (_ *runtimeapi.CheckpointPodResponse, err error) {
	if err := errors.Join(checkOptions(req.GetOptions()), checkDeadline(ctx)); err != nil {
		return nil, err
	}
	p, err := rt.podByID(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	selected, err := p.selected(req.GetContainerIds())
	if err != nil {
		return nil, err
	}
	w, err := archive.Create("output_path", req.GetOutputPath())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	return &runtimeapi.CheckpointPodResponse{}, p.checkpoint(ctx, selected, w, (*checkpointMachine).movable)
}

// CheckpointContainer writes the pod of a container that is the only one running in it into one file, as CheckpointPod does into a
// directory.
func (rt *Runtime) CheckpointContainer(ctx context.Context, req *runtimeapi.CheckpointContainerRequest) (_ *runtimeapi.CheckpointContainerResponse, err error) {
	c, err := rt.containerByID(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	limit := containerTimeout
	if req.GetTimeout() < 0 || req.GetTimeout() > int64(24*time.Hour/time.Second) {
		return nil, fmt.Errorf("timeout is %d; it has to be in seconds, up to a day, or 0 for %s: %w", req.GetTimeout(), containerTimeout, errdefs.ErrInvalidArgument)
	} else if req.GetTimeout() > 0 {
		limit = time.Duration(req.GetTimeout()) * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := errors.Join(c.alone(), c.pod.checkSelected([]*container{c})); err != nil {
		return nil, err
	}
	w, err := archive.CreateTar("location", req.GetLocation())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	return &runtimeapi.CheckpointContainerResponse{}, c.pod.checkpoint(ctx, []*container{c}, w, (*checkpointMachine).movable)
}

// alone refuses a container beside which others run: what is saved is the VM.
func (c *container) alone() error {
	for _, other := range c.rt.containersOf(c.pod.id) {
		if other != c && other.rec.Status().running() {
			return fmt.Errorf("container %s runs in the same VM, and a VM is saved with all that runs in it; checkpoint the pod %s, with CheckpointPod: %w", other.id, c.pod.id, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// selected are the containers of the request, which have to be all that run.
func (p *pod) selected(ids []string) ([]*container, error) {
	if len(ids) == 0 {
		return nil, fmt.Errorf("container_ids is empty; it must have the running containers of the pod: %w", errdefs.ErrInvalidArgument)
	}
	var out []*container
	for _, id := range ids {
		c, err := p.rt.containerByID(id)
		switch {
		case err != nil:
			return nil, fmt.Errorf("container_ids: %w", err)
		case c.pod != p:
			return nil, fmt.Errorf("container_ids: container %s belongs to sandbox %s, not to %s: %w", c.id, c.pod.id, p.id, errdefs.ErrInvalidArgument)
		case slices.Contains(out, c):
			return nil, fmt.Errorf("container_ids: container %s is there twice: %w", c.id, errdefs.ErrInvalidArgument)
		}
		out = append(out, c)
	}
	return out, p.checkSelected(out)
}

// checkSelected refuses what cannot be checkpointed. A VM is captured whole: what runs in it has to be selected.
func (p *pod) checkSelected(selected []*container) error {
	for _, c := range p.rt.containersOf(p.id) {
		running, listed := c.rec.Status().running(), slices.Contains(selected, c)
		switch {
		case c.rec.Spec().Restored != nil && c.rec.Status().state() == runtimeapi.ContainerState_CONTAINER_CREATED:
			return fmt.Errorf("container %s was restored and has not been started, and would go on with the others; start it first, or remove it: %w", c.id, errdefs.ErrFailedPrecondition)
		case listed && !running:
			return fmt.Errorf("container %s is %s, not running: %w", c.id, stateName(c.rec.Status().state()), errdefs.ErrFailedPrecondition)
		case running && !listed:
			return fmt.Errorf("container %s runs too and is not in container_ids; a VM is checkpointed with all that runs in it: %w", c.id, errdefs.ErrFailedPrecondition)
		case listed && c.isMachine():
			return c.checkMachine()
		case running && c.shares():
			return fmt.Errorf("container %s has volumes that are shared with the node by virtiofs, which holds state outside of the VM; it cannot be checkpointed: %w", c.id, errdefs.ErrFailedPrecondition)
		}
	}
	if users, _ := ocispec.Users(p.config()); users != nil {
		return fmt.Errorf("the pod has a user namespace, whose IDs are this node's; it cannot be checkpointed: %w", errdefs.ErrFailedPrecondition)
	}
	if p.rec.Spec().HugeBytes > 0 {
		return fmt.Errorf("the pod has huge pages, which a node that restores it may not have; it cannot be checkpointed: %w", errdefs.ErrFailedPrecondition)
	}
	if slices.ContainsFunc(p.rec.Status().Guest.Disks, isVolumeSerial) {
		return fmt.Errorf("the pod has, or had, block volumes, whose content is the node's; it cannot be checkpointed: %w", errdefs.ErrFailedPrecondition)
	}
	if p.rec.Status().Guest.Share != nil {
		return fmt.Errorf("the pod had volumes that are shared with the node by virtiofs; it cannot be checkpointed: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// still keeps the pod's containers from being started, removed or changed. The order is that of start: containers, then pod.
func (p *pod) still() (release func()) {
	for {
		all := p.rt.containersOf(p.id)
		release := p.holdLives(all)
		// One that was created meanwhile may be about to run. From here on none comes that far: its start needs the pod's life.
		if !slices.ContainsFunc(p.rt.containersOf(p.id), func(c *container) bool { return !slices.Contains(all, c) }) {
			return release
		}
		release()
	}
}

func (p *pod) holdLives(all []*container) (release func()) {
	slices.SortFunc(all, func(a, b *container) int { return strings.Compare(a.id, b.id) })
	for _, c := range all {
		c.life.Lock()
	}
	p.life.Lock()
	return func() {
		p.life.Unlock()
		for _, c := range all {
			c.life.Unlock()
		}
	}
}

// checkpoint writes the pod, if it is no machine, or one that passes.
func (p *pod) checkpoint(ctx context.Context, selected []*container, w *archive.Writer, passes func(*checkpointMachine) error) error {
	defer p.still()()
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	p.cut.Store(&cut)
	defer p.cut.Store(nil)
	err := p.checkpointStill(ctx, selected, w, passes)
	if err != nil && errors.Is(context.Cause(ctx), errCut) {
		err = errors.Join(errCut, err)
	}
	return err
}

// checkpointStill is checkpoint while nobody else changes the pod.
func (p *pod) checkpointStill(ctx context.Context, selected []*container, w *archive.Writer, passes func(*checkpointMachine) error) error {
	if err := errors.Join(ctx.Err(), p.checkSelected(selected)); err != nil {
		return err
	}
	if p.rec.Status().Capturing {
		return fmt.Errorf("sandbox %s is still being let go on after an earlier checkpoint: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	g := p.currentGuest()
	if p.state() != runtimeapi.PodSandboxState_SANDBOX_READY || g == nil || !g.alive() {
		return fmt.Errorf("sandbox %s does not run: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	if s, err := g.vm.State(ctx); err != nil || s != stateRunning {
		return errors.Join(err, fmt.Errorf("the VM of sandbox %s is %q; it must run: %w", p.id, s, errdefs.ErrFailedPrecondition))
	}
	m, err := p.describeCheckpoint(ctx, g, selected)
	if err == nil && m.Machine != nil {
		err = passes(m.Machine)
	}
	if err != nil {
		return err
	}
	if err := p.update(func(s *podStatus) error { s.Capturing = true; return nil }); err != nil {
		return err
	}
	err = p.captureWhole(ctx, g, selected, m, w)
	if released := g.release(ctx); released != nil {
		err = errors.Join(err, released)
		g.releaseLeft()
	}
	if err != nil {
		return fmt.Errorf("checkpoint sandbox %s: %w", p.id, err)
	}
	return w.Finish(m)
}

// errCut is the cause of the end of a checkpoint's context.
var errCut = fmt.Errorf("given up, to end what runs in the pod: %w", errdefs.ErrAborted)

// captureWhole writes all that a VM is at one moment.
func (p *pod) captureWhole(ctx context.Context, g *guest, selected []*container, m *checkpointManifest, w *archive.Writer) error {
	var err error
	if g.machine != nil {
		err = selected[0].captureMachine(ctx, g, m, w)
	} else {
		err = p.capture(ctx, g, selected, m, w)
	}
	if err != nil {
		return err
	}
	return g.stoodStill(ctx)
}

// stoodStill refuses what was saved if the VM has gone on meanwhile, whoever let it: its disks are then of another moment than its memory.
func (g *guest) stoodStill(ctx context.Context) error {
	s, err := g.vm.State(ctx)
	if err != nil || s == stateSaved || s == stateSaving {
		return err
	}
	return fmt.Errorf("the VM is %q when all of it is saved; it must be %q ever since its memory was: %w", s, stateSaved, errdefs.ErrAborted)
}

// uncaptured refuses what would let a VM go on that is being saved, or would be lost in its going on.
func (g *guest) uncaptured() error {
	if g.pod.cut.Load() == nil {
		return nil
	}
	return fmt.Errorf("a checkpoint of the pod is being taken, after which it goes on by itself: %w", errdefs.ErrFailedPrecondition)
}

// cutCheckpoint gives up the checkpoint that is being taken, if one is; the pod then goes on.
func (p *pod) cutCheckpoint() bool {
	cut := p.cut.Load()
	if cut != nil {
		(*cut)(errCut)
	}
	return cut != nil
}

// describeCheckpoint fills in what does not need the pod to stand still.
func (p *pod) describeCheckpoint(ctx context.Context, g *guest, selected []*container) (*checkpointManifest, error) {
	spec, s := p.rec.Spec(), p.rec.Status()
	accel, err := g.vm.Accel(ctx)
	if err != nil {
		return nil, err
	}
	size, err := g.vm.Size(ctx)
	if err != nil {
		return nil, err
	}
	if g.machine != nil && size.MemoryBytes() != size.BootBytes {
		return nil, fmt.Errorf("the machine of sandbox %s has less memory than it has booted with, so it cannot be checkpointed; it can when it has all of it: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	m := &checkpointManifest{
		VCPUs: size.BootVCPUs, MemoryBytes: size.BootBytes, MaxVCPUs: size.MaxVCPUs, MaxMemoryBytes: size.MaxMemoryBytes, Pod: spec.Config,
		Size: p.size(),
	}
	if g.machine == nil {
		if m.Plugged, err = g.vm.Plugged(ctx); err != nil {
			return nil, err
		}
	}
	if m.Platform, err = p.rt.platform(accel); err != nil {
		return nil, err
	}
	if m.Platform.QEMU, err = runningQEMU(ctx, g.vm); err != nil {
		return nil, err
	}
	for _, nic := range s.Network.Interfaces {
		m.Interfaces = append(m.Interfaces, checkpointInterface{MAC: nic.MAC, MTU: nic.MTU})
	}
	if g.machine != nil {
		m.Machine = selected[0].describeMachine(ctx, g)
		m.Containers = []checkpointContainer{{Spec: selected[0].rec.Spec()}}
		return m, ctx.Err()
	}
	for _, serial := range s.Guest.Disks {
		ref := p.imageOf(serial)
		if ref == "" {
			return nil, fmt.Errorf("image disk %s is that of a container that was removed; what it was is not known any more: %w", serial, errdefs.ErrFailedPrecondition)
		}
		m.Disks = append(m.Disks, checkpointDisk{Serial: serial, Image: ref})
	}
	for _, c := range selected {
		m.Containers = append(m.Containers, checkpointContainer{
			GuestID: c.guestID(), Spec: c.rec.Spec(), Resources: c.rec.Status().Resources,
		})
	}
	return m, nil
}

// imageOf finds the image that a disk was made from.
func (p *pod) imageOf(serial string) string {
	for _, c := range p.rt.containersOf(p.id) {
		spec := c.rec.Spec()
		if spec.Disk.Serial == serial {
			return spec.ImageID
		}
		for _, v := range spec.Volumes {
			for i, m := range spec.Mounts {
				if v.Serial == serial && m.Via == viaImage && m.Name == v.Name {
					return spec.Config.M.GetMounts()[i].GetImage().GetImage()
				}
			}
		}
	}
	return ""
}

// capture freezes the containers, stops the VM, and writes its memory and disk. It leaves both as they are then.
func (p *pod) capture(ctx context.Context, g *guest, selected []*container, m *checkpointManifest, w *archive.Writer) error {
	if err := g.freeze(ctx, selected, m); err != nil {
		return err
	}
	if err := g.saveMemory(ctx, w); err != nil {
		return err
	}
	disk, err := p.rt.images.OpenScratch(p.id)
	if err != nil {
		return err
	}
	defer disk.Close()
	info, err := disk.Stat()
	if err != nil {
		return err
	}
	m.ScratchSize = info.Size()
	if err := w.Stream(ctx, scratchStream, func(to io.Writer) error { return archive.WriteSparse(to, disk) }); err != nil {
		return err
	}
	return ctx.Err()
}

// saveMemory stops the VM and writes its memory and devices.
func (g *guest) saveMemory(ctx context.Context, w *archive.Writer) error {
	return w.Stream(ctx, memoryStream, func(to io.Writer) error {
		buffered := bufio.NewWriterSize(to, 1<<20)
		return errors.Join(g.vm.SaveState(ctx, buffered), buffered.Flush())
	})
}

// freeze stops the containers in the guest, which the saved state has so, and waits until all that they have written
// has arrived: what is in the log is in no restored pod's again, and what is not is.
func (g *guest) freeze(ctx context.Context, selected []*container, m *checkpointManifest) error {
	client, err := g.session(ctx)
	if err != nil {
		return err
	}
	req := &agentpb.FreezeRequest{}
	for _, c := range selected {
		req.ContainerIds = append(req.ContainerIds, c.guestID())
	}
	resp, err := client.Freeze(ctx, req)
	if err != nil {
		return err
	}
	if len(resp.GetEnds()) != len(selected) {
		return fmt.Errorf("the guest's agent tells the ends of %d containers' output, want %d: %w", len(resp.GetEnds()), len(selected), errdefs.ErrInternal)
	}
	for i, c := range selected {
		end := resp.GetEnds()[i]
		if m.Containers[i].Output, err = c.drained(ctx, offsets{end.GetStdout(), end.GetStderr()}); err != nil {
			return fmt.Errorf("container %s: its output does not arrive: %w", c.id, err)
		}
	}
	return nil
}

// drained waits until the streams have come to their ends, and tells how much of them is in the log.
func (c *container) drained(ctx context.Context, end offsets) (crilog.Offsets, error) {
	for {
		at := c.logs.cursor()
		if at.next == end {
			return crilog.Offsets{Stdout: at.safe.stdout, Stderr: at.safe.stderr}, nil
		}
		select {
		case <-time.After(drainPoll):
		case <-ctx.Done():
			return crilog.Offsets{}, ctx.Err()
		}
	}
}

// release lets a VM that was stopped for a checkpoint and its containers go on, also after the call's deadline.
func (g *guest) release(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	if !g.alive() {
		return nil
	}
	if err := g.vm.Resume(ctx); err != nil {
		return fmt.Errorf("let the VM go on: %w", err)
	}
	if g.machine == nil {
		if err := g.thaw(ctx); err != nil {
			return fmt.Errorf("let the containers go on: %w", err)
		}
	}
	return g.pod.update(func(s *podStatus) error { s.Capturing = false; return nil })
}

func (g *guest) thaw(ctx context.Context) error {
	client, err := g.session(ctx)
	if err != nil {
		return err
	}
	_, err = client.Thaw(ctx, &agentpb.ThawRequest{})
	return err
}

// releaseLeft lets go on what a daemon that was killed during a checkpoint has left stopped. QEMU may not have noticed yet that
// nobody takes the state any more, and the guest may be slow: it is tried until it succeeds, or the guest ends.
func (g *guest) releaseLeft() {
	if !g.pod.rec.Status().Capturing {
		return
	}
	g.owned.Go(func() {
		for {
			err := g.release(g.ctx)
			if err == nil {
				return
			}
			g.log.Warn("letting a pod go on whose checkpoint was cut off; it is tried again", "error", err)
			select {
			case <-time.After(releaseRetry):
			case <-g.ctx.Done():
				return
			}
		}
	})
}
