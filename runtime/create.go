package runtime

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/runtime/ocispec"
	"github.com/vmruntime/vmruntime/trace"
)

// CreateContainer decides everything about a container and records it. The guest hears of it when it is
// started.
func (rt *Runtime) CreateContainer(ctx context.Context, req *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	p, err := rt.podByID(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	p.tag(ctx)
	trace.Tag(ctx, "k8s.container.name", req.GetConfig().GetMetadata().GetName())
	if p.state() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return nil, fmt.Errorf("sandbox %s is not ready; a container needs one that is: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	if err := ocispec.ValidateNames(req.GetConfig()); err != nil {
		return nil, err
	}
	id := newID()
	name := fmt.Sprintf("%s_%s_%d", req.GetConfig().GetMetadata().GetName(), p.id, req.GetConfig().GetMetadata().GetAttempt())
	if err := rt.containerNames.Reserve(name, id); err != nil {
		return nil, fmt.Errorf("container name %q: %w", name, err)
	}
	c, err := rt.createContainer(ctx, p, id, req.GetConfig())
	if err != nil {
		rt.containerNames.Release(name, id)
		release, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
		defer cancel()
		return nil, errors.Join(err, rt.images.Release(release, id))
	}
	rt.containerEvent(c, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

func (rt *Runtime) createContainer(ctx context.Context, p *pod, id string, cfg *runtimeapi.ContainerConfig) (*container, error) {
	spec := containerSpec{
		PodID:     p.id,
		Config:    message[*runtimeapi.ContainerConfig]{cfg},
		CreatedAt: time.Now(),
	}
	if dir, path := p.config().GetLogDirectory(), cfg.GetLogPath(); dir != "" && path != "" {
		spec.LogPath = filepath.Join(dir, path)
	}
	if err := rt.knownImage(ctx, cfg.GetImage().GetImage(), &spec); err != nil {
		return nil, err
	}
	var err error
	if spec.Machine, err = rt.decideMachine(ctx, p, id, &spec); err != nil {
		return nil, err
	}
	if spec.Machine != nil {
		spec.Mounts, err = machineMounts(id, cfg)
	} else {
		err = rt.decideContainer(ctx, p, id, &spec)
	}
	if err != nil {
		return nil, err
	}
	rec, err := rt.containerStore.Create(id, spec, containerStatus{})
	if err != nil {
		return nil, err
	}
	c := rt.newContainer(p, rec)
	if err := rt.addContainer(c); err != nil {
		return nil, errors.Join(err, rt.containerStore.Remove(id))
	}
	return c, nil
}

// addContainer makes a container known, unless its sandbox was stopped: whoever removes a stopped sandbox has seen all of
// its containers. A machine is alone in its pod: while it is there no other container can be, nor it beside others.
func (rt *Runtime) addContainer(c *container) error {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if !c.pod.rec.Status().StoppedAt.IsZero() {
		return fmt.Errorf("sandbox %s was stopped meanwhile: %w", c.pod.id, errdefs.ErrFailedPrecondition)
	}
	for _, other := range rt.containers {
		if other.pod != c.pod || !other.rec.Status().FinishedAt.IsZero() || !other.isMachine() && !c.isMachine() || c.supersedes(other) {
			continue
		}
		return fmt.Errorf("a container whose image is a machine is the whole VM: %q cannot be beside %q; only init containers that have ended can be in its pod: %w",
			c.config().GetMetadata().GetName(), other.config().GetMetadata().GetName(), errdefs.ErrFailedPrecondition)
	}
	rt.containers[c.id] = c
	return nil
}

// supersedes tells whether another is an earlier attempt of this container that was never started: the kubelet leaves such a one
// where it is when it, or the daemon, was restarted in between.
func (c *container) supersedes(other *container) bool {
	return other.rec.Status().StartedAt.IsZero() && other.config().GetMetadata().GetName() == c.config().GetMetadata().GetName()
}

// knownImage finds the image as containerd's CRI knows it.
func (rt *Runtime) knownImage(ctx context.Context, ref string, spec *containerSpec) error {
	resp, err := rt.imageService.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	known := resp.GetImage()
	if known == nil {
		return fmt.Errorf("image %q is not on this node; pull it first: %w", ref, errdefs.ErrNotFound)
	}
	spec.ImageID, spec.ImageRef, spec.ImageName = known.GetId(), known.GetId(), ref
	if tags := known.GetRepoTags(); len(tags) > 0 {
		spec.ImageName = tags[0]
	}
	if digests := known.GetRepoDigests(); len(digests) > 0 {
		spec.ImageRef = digests[0]
	}
	return nil
}

// decideContainer decides everything about an ordinary container, and pins its images.
func (rt *Runtime) decideContainer(ctx context.Context, p *pod, id string, spec *containerSpec) error {
	cfg := spec.Config.M
	var err error
	if spec.BlockVolumes, err = sharedVolumes(cfg); err != nil {
		return err
	}
	if err := ocispec.ValidateContainer(cfg, p.config(), hostPaths(spec.BlockVolumes)); err != nil {
		return err
	}
	if err := p.checkHugeLimits(cfg.GetLinux().GetResources().GetHugepageLimits()); err != nil {
		return err
	}
	find, found := trace.Start(ctx, "image disk")
	img, err := rt.images.Ensure(find, spec.ImageID, id)
	found(err)
	if err != nil {
		return fmt.Errorf("image %q: %w", cfg.GetImage().GetImage(), err)
	}
	spec.Disk = imageDisk{Serial: img.Serial, Path: img.RootFS}
	spec.StopSignal = img.Config.Config.StopSignal
	if s := cfg.GetStopSignal(); s != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		spec.StopSignal = signalName(s)
	}
	if spec.Mounts, err = resolveMounts(id, cfg); err != nil {
		return err
	}
	if err := p.checkHugeVolumes(spec.Mounts); err != nil {
		return err
	}
	if spec.Volumes, err = rt.resolveVolumes(ctx, id, cfg, spec.Mounts); err != nil {
		return err
	}
	return buildOCI(p, id, img, spec)
}

// resolveVolumes pins the images of image volumes.
func (rt *Runtime) resolveVolumes(ctx context.Context, id string, cfg *runtimeapi.ContainerConfig, mounts []resolvedMount) ([]imageDisk, error) {
	var out []imageDisk
	for i, m := range mounts {
		if m.Via != viaImage {
			continue
		}
		ref := cfg.GetMounts()[i].GetImage().GetImage()
		img, err := rt.images.Ensure(ctx, ref, id)
		if err != nil {
			return nil, fmt.Errorf("mounts[%d].image %q: %w", i, ref, err)
		}
		out = append(out, imageDisk{Name: m.Name, Serial: img.Serial, Path: img.RootFS})
	}
	return out, nil
}
