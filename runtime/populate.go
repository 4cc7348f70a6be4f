package runtime

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// populateTimeout bounds one population: a device that takes longer hangs.
	populateTimeout = 24 * time.Hour
	// populateReport is how often a population that goes on is told of in the log.
	populateReport = 10 * time.Second
)

// populations are the block volumes that images are being written to, by device number. Each goes on when the request that began it
// has ended, for the kubelet waits two minutes only; the next container of the pod waits for it again. It ends with its pod or with
// the daemon, and is begun anew by the next container: the store tells a device that is not whole from one that is.
type populations struct {
	mu       sync.Mutex
	byDevice map[uint64]*population
}

// population is one image being written to one device.
type population struct {
	pod    *pod
	image  string
	cancel context.CancelFunc
	done   chan struct{} // closed when err is set
	err    error
	// written and total are bytes of the disk.
	written, total atomic.Int64
}

func (w *population) percent() int64 {
	return w.written.Load() * 100 / max(w.total.Load(), 1)
}

// populate writes the image's disk to the block volume that is to be the root disk, once. Without a disk in the image the volume boots
// as it is. device is the volume's.
func (c *container) populate(ctx context.Context, root *blockVolume, device string) error {
	if !c.rec.Spec().Machine.Disk {
		return nil
	}
	w, err := c.population(root, device)
	if err != nil {
		return err
	}
	select {
	case <-w.done:
		err = w.err
	case <-ctx.Done():
		err = fmt.Errorf("it goes on at %d %%, and the next container of this pod waits for it: %w", w.percent(), context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("write the image's disk to the block volume at %s: %w", root.Path, err)
	}
	return nil
}

// population returns the one that writes to the volume, or begins it. The caller holds the pod's life.
func (c *container) population(root *blockVolume, device string) (*population, error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return nil, fmt.Errorf("block volume at %s: %w", root.Path, err)
	}
	all, image := &c.rt.populations, c.rec.Spec().ImageID
	all.mu.Lock()
	defer all.mu.Unlock()
	if c.pod.stopping {
		return nil, fmt.Errorf("sandbox %s is being stopped: %w", c.pod.id, errdefs.ErrFailedPrecondition)
	}
	if w := all.byDevice[st.Rdev]; w != nil {
		if w.pod != c.pod || w.image != image {
			return nil, fmt.Errorf("image %s is being written to the block volume at %s for sandbox %s: %w", w.image, root.Path, w.pod.id, errdefs.ErrFailedPrecondition)
		}
		return w, nil
	}
	ctx, cancel := context.WithTimeout(c.rt.ctx, populateTimeout)
	w := &population{pod: c.pod, image: image, cancel: cancel, done: make(chan struct{})}
	if all.byDevice == nil {
		all.byDevice = make(map[uint64]*population)
	}
	all.byDevice[st.Rdev] = w
	c.rt.owned.Go(func() {
		defer cancel()
		w.err = w.run(ctx, fmt.Sprintf("%s-root-%x", c.pod.id, st.Rdev), device)
		all.mu.Lock()
		delete(all.byDevice, st.Rdev)
		all.mu.Unlock()
		close(w.done)
	})
	return w, nil
}

// run holds the image itself: the container that asked may be removed meanwhile.
func (w *population) run(ctx context.Context, owner, device string) (err error) {
	images, log := w.pod.rt.images, w.pod.log.With("device", device)
	disk, err := images.FindDisk(ctx, w.image, owner)
	if err != nil {
		return err
	}
	defer func() {
		release, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
		defer cancel()
		err = errors.Join(err, images.Release(release, owner))
	}()
	began, reported := time.Now(), time.Now()
	err = images.Populate(ctx, disk, device, func(written, total int64) {
		w.total.Store(total)
		w.written.Store(written)
		if time.Since(reported) >= populateReport {
			reported = time.Now()
			log.Info("writing the image's disk to a block volume", "percent", w.percent(), "bytes", total)
		}
	})
	switch {
	case err != nil:
		log.Warn("the image's disk is not written to a block volume", "percent", w.percent(), "error", err)
	case w.total.Load() > 0:
		log.Info("the image's disk is written to a block volume", "bytes", w.total.Load(), "took", time.Since(began))
	}
	return err
}

// stop ends the pod's populations and waits for them. There will be no others.
func (all *populations) stop(p *pod) {
	all.mu.Lock()
	p.stopping = true
	var ending []*population
	for _, w := range all.byDevice {
		if w.pod == p {
			w.cancel()
			ending = append(ending, w)
		}
	}
	all.mu.Unlock()
	for _, w := range ending {
		<-w.done
	}
}
