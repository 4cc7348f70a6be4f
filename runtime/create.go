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

	"github.com/vmruntime/vmruntime/image"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

// CreateContainer decides everything about a container and records it. The guest hears of it when it is
// started.
func (rt *Runtime) CreateContainer(ctx context.Context, req *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	p, err := rt.podByID(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if p.state() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return nil, fmt.Errorf("sandbox %s is not ready; a container needs one that is: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	if err := ocispec.ValidateContainer(req.GetConfig(), p.config()); err != nil {
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
	mounts, err := resolveMounts(id, cfg)
	if err != nil {
		return nil, err
	}
	spec := containerSpec{
		PodID:     p.id,
		Config:    message[*runtimeapi.ContainerConfig]{cfg},
		CreatedAt: time.Now(),
		Mounts:    mounts,
	}
	if dir, path := p.config().GetLogDirectory(), cfg.GetLogPath(); dir != "" && path != "" {
		spec.LogPath = filepath.Join(dir, path)
	}
	img, err := rt.resolveImage(ctx, id, cfg.GetImage().GetImage(), &spec)
	if err != nil {
		return nil, err
	}
	if spec.Volumes, err = rt.resolveVolumes(ctx, id, cfg, mounts); err != nil {
		return nil, err
	}
	if err := buildOCI(p, id, img, &spec); err != nil {
		return nil, err
	}
	rec, err := rt.containerStore.Create(id, spec, containerStatus{})
	if err != nil {
		return nil, err
	}
	c := rt.newContainer(p, rec)
	if !rt.addContainer(c) {
		return nil, errors.Join(fmt.Errorf("sandbox %s was stopped meanwhile: %w", p.id, errdefs.ErrFailedPrecondition), rt.containerStore.Remove(id))
	}
	return c, nil
}

// addContainer makes a container known, unless its sandbox was stopped: whoever removes a stopped sandbox has seen all of
// its containers.
func (rt *Runtime) addContainer(c *container) bool {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if !c.pod.rec.Status().StoppedAt.IsZero() {
		return false
	}
	rt.containers[c.id] = c
	return true
}

// resolveImage finds the image as containerd's CRI knows it, and pins its root filesystem for the container.
func (rt *Runtime) resolveImage(ctx context.Context, id, ref string, spec *containerSpec) (*image.Image, error) {
	resp, err := rt.imageService.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	known := resp.GetImage()
	if known == nil {
		return nil, fmt.Errorf("image %q is not on this node; pull it first: %w", ref, errdefs.ErrNotFound)
	}
	img, err := rt.images.Ensure(ctx, known.GetId(), id)
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", ref, err)
	}
	spec.ImageID, spec.ImageRef, spec.ImageName = known.GetId(), known.GetId(), ref
	if tags := known.GetRepoTags(); len(tags) > 0 {
		spec.ImageName = tags[0]
	}
	if digests := known.GetRepoDigests(); len(digests) > 0 {
		spec.ImageRef = digests[0]
	}
	spec.Disk = imageDisk{Serial: img.Serial, Path: img.RootFS}
	spec.StopSignal = img.Config.Config.StopSignal
	if s := spec.Config.M.GetStopSignal(); s != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		spec.StopSignal = signalName(s)
	}
	return img, nil
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
