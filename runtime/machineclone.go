package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/image"
)

// unfreezeTimeout bounds one attempt to have file systems thawed.
const unfreezeTimeout = 30 * time.Second

// clone writes the machine's root disk to a new file, and tells whether the guest had frozen its file systems. The file gets its name when all
// of it is there.
func (g *guest) clone(ctx context.Context, path string) (frozen bool, err error) {
	c, err := g.pod.rt.containerByID(g.machine.container)
	if err != nil {
		return false, err
	}
	spec := c.rec.Spec().Machine
	if !spec.Disk || spec.rootVolume() != nil {
		return false, fmt.Errorf("the machine does not boot a disk of its image; it has nothing to clone: %w", errdefs.ErrFailedPrecondition)
	}
	if state, err := g.vm.State(ctx); err != nil || state != stateRunning {
		return false, errors.Join(err, fmt.Errorf("the machine is %s; it has to run: %w", state, errdefs.ErrFailedPrecondition))
	}
	f, err := nameless("file", path)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := image.WriteEmpty(f, spec.RootSize); err != nil {
		return false, err
	}
	freeze := func() { frozen = g.freezeDisks(ctx) }
	if err := g.vm.CopyDisk(ctx, rootSerial, f, "qcow2", freeze, g.unfreeze); err != nil {
		return false, err
	}
	return frozen, publishFile("file", f, path)
}

// nameless makes a file that is gone when it is closed, unless publishFile gives it its name.
func nameless(field, path string) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%s %q must be an absolute path: %w", field, path, errdefs.ErrInvalidArgument)
	}
	if _, err := os.Lstat(path); err == nil {
		return nil, errThere(field, path)
	}
	f, err := os.OpenFile(filepath.Dir(path), os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s %q must be in a directory whose file system can hold files without a name, such as ext4 and XFS: %w: %w", field, path, err, errdefs.ErrInvalidArgument)
	}
	return f, nil
}

func errThere(field, path string) error {
	return fmt.Errorf("%s %q exists; it must be a new file: %w", field, path, errdefs.ErrFailedPrecondition)
}

func publishFile(field string, f *os.File, path string) error {
	if err := f.Sync(); err != nil {
		return err
	}
	err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if errors.Is(err, unix.EEXIST) {
		return errThere(field, path)
	}
	if err != nil {
		return fmt.Errorf("give %s %q its name: %w", field, path, err)
	}
	return nil
}

// freezeDisks has the guest's agent freeze all file systems, and tells whether it has. unfreeze has to follow.
func (g *guest) freezeDisks(ctx context.Context) bool {
	ga, err := g.guestAgent(ctx)
	if err != nil {
		return false
	}
	if err := g.pod.update(func(s *podStatus) error { s.Frozen = true; return nil }); err != nil {
		g.log.Warn("recording that file systems are frozen; they are not", "error", err)
		return false
	}
	n, err := ga.Freeze(ctx)
	if err != nil {
		g.log.Warn("the guest agent does not freeze the file systems", "error", err)
	}
	return err == nil && n > 0
}

// unfreeze ends freezeDisks, until it has succeeded or the guest has ended.
func (g *guest) unfreeze() {
	if err := g.tryUnfreeze(); err != nil {
		g.unfreezeLeft()
	}
}

func (g *guest) tryUnfreeze() error {
	if !g.pod.rec.Status().Frozen {
		return nil
	}
	ctx, cancel := context.WithTimeout(g.ctx, unfreezeTimeout)
	defer cancel()
	ga, err := g.guestAgent(ctx)
	if err == nil {
		_, err = ga.Thaw(ctx)
	}
	if err != nil {
		return err
	}
	return g.pod.update(func(s *podStatus) error { s.Frozen = false; return nil })
}

// unfreezeLeft thaws what an attempt has left frozen, this daemon's or that of one that was killed.
func (g *guest) unfreezeLeft() {
	if !g.pod.rec.Status().Frozen {
		return
	}
	g.owned.Go(func() {
		for {
			err := g.tryUnfreeze()
			if err == nil {
				return
			}
			g.log.Warn("the guest's file systems are frozen; thawing them is tried again", "error", err)
			select {
			case <-time.After(releaseRetry):
			case <-g.ctx.Done():
				return
			}
		}
	})
}
