package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

const (
	viewPrefix = "vmruntime-view-"
	viewLabel  = "vmruntime.github.io/view" // on leases of mounted views; the value names store and image
	// viewFlags are on every mounted view. A mount that lacks one was cut short, and is made anew.
	viewFlags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
)

// viewID is the name of a view in containerd. Two stores never share one, so that neither takes away the other's.
func (s *Store) viewID(key string) string { return viewPrefix + s.storeID() + "-" + key[:32] }

func (s *Store) storeID() string {
	sum := sha256.Sum256([]byte(s.dirs.root))
	return hex.EncodeToString(sum[:4])
}

// holdView records that owner uses the mounted view of the image, pins the image, and mounts the view if it is not.
func (s *Store) holdView(ctx context.Context, r *resolved, owner, key string) error {
	s.mu.Lock()
	closed := s.closed
	added, err := false, error(nil)
	if !closed {
		added, err = s.viewers.add(owner, key)
	}
	s.mu.Unlock()
	if closed {
		return fmt.Errorf("image store is closed: %w", errdefs.ErrUnavailable)
	}
	if err != nil {
		return err
	}
	err = s.pin(ctx, owner, r)
	if err == nil {
		err = s.mountView(ctx, r, key)
	}
	if err != nil && added {
		err = errors.Join(err, s.dropViewer(ctx, owner, key))
	}
	return err
}

// dropViewer undoes holdView.
func (s *Store) dropViewer(ctx context.Context, owner, key string) error {
	s.mu.Lock()
	last, err := s.viewers.drop(owner, key)
	last = last && !s.refs.owns(owner)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	ctx, cancel := s.cleanupContext(ctx)
	defer cancel()
	if last {
		err = s.unpin(ctx, owner)
	}
	return errors.Join(err, s.collectView(ctx, key))
}

// mountView mounts the image's view unless it is mounted. The view outlives this process, and containerd's.
func (s *Store) mountView(ctx context.Context, r *resolved, key string) error {
	s.viewLocks.Lock(key)
	defer s.viewLocks.Unlock(key) //nolint:errcheck // fails only when not locked
	dir := s.dirs.view(key)
	if viewReady(dir) {
		return nil
	}
	// The directory is there for as long as containerd holds anything for it: collectViews goes by it.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := mount.UnmountAll(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount what was left of a view: %w", err)
	}
	mounts, err := s.viewMounts(ctx, r, key)
	if err != nil {
		return err
	}
	if err := mount.All(readOnly(mounts), dir); err != nil {
		return errors.Join(fmt.Errorf("mount snapshot: %w", err), mount.UnmountAll(dir, unix.MNT_DETACH))
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|viewFlags, ""); err != nil {
		return errors.Join(fmt.Errorf("make view read-only: %w", err), mount.UnmountAll(dir, unix.MNT_DETACH))
	}
	return nil
}

// viewReady reports whether a view is wholly mounted on dir.
func viewReady(dir string) bool {
	var st unix.Statfs_t
	// ST_RDONLY and its like have the values of MS_RDONLY and its like.
	if err := unix.Statfs(dir, &st); err != nil || uint64(st.Flags)&viewFlags != viewFlags {
		return false
	}
	mounted, err := mountinfo.Mounted(dir)
	return err == nil && mounted
}

// viewMounts returns how to mount the view of the image's topmost snapshot, making the view and its lease if need be.
func (s *Store) viewMounts(ctx context.Context, r *resolved, key string) ([]mount.Mount, error) {
	snapshotter, err := s.unpacked(ctx, r)
	if err != nil {
		return nil, err
	}
	id := s.viewID(key)
	manager := s.opts.Client.LeasesService()
	lease, err := manager.Create(ctx, leases.WithID(id), leases.WithLabel(viewLabel, id))
	if errdefs.IsAlreadyExists(err) {
		lease, err = leases.Lease{ID: id}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("create lease for a view: %w", err)
	}
	ctx = leases.WithLease(ctx, id)
	snapshots := s.opts.Client.SnapshotService(snapshotter)
	mounts, err := snapshots.View(ctx, id, r.chain.String())
	if errdefs.IsAlreadyExists(err) {
		if mounts, err = snapshots.Mounts(ctx, id); err == nil {
			// The lease under which it was made may be gone.
			err = manager.AddResource(ctx, lease, leases.Resource{ID: id, Type: "snapshots/" + snapshotter})
		}
	}
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, fmt.Errorf("view snapshot %s of snapshotter %s: %w", r.chain, snapshotter, err)
	}
	return s.activate(ctx, id, mounts)
}

// activate lets containerd make those mounts that only it can make.
func (s *Store) activate(ctx context.Context, id string, mounts []mount.Mount) ([]mount.Mount, error) {
	manager := s.opts.Client.MountManager()
	info, err := manager.Activate(ctx, id, mounts, mount.WithTemporary)
	if errdefs.IsAlreadyExists(err) {
		// From before a reboot, or a crash: what it names may not be mounted any more.
		if err = manager.Deactivate(ctx, id); err == nil || errdefs.IsNotFound(err) {
			info, err = manager.Activate(ctx, id, mounts, mount.WithTemporary)
		}
	}
	switch {
	case err == nil:
		return info.System, nil
	case errdefs.IsNotImplemented(err): // plain mounts, or a containerd before 2.2
		return mounts, nil
	}
	return nil, fmt.Errorf("activate view %s: %w", id, err)
}

// collectViews unmounts the views that nobody uses.
func (s *Store) collectViews(ctx context.Context) error {
	dirs, err := os.ReadDir(s.dirs.views())
	if err != nil {
		return fmt.Errorf("list mounted views: %w", err)
	}
	var errs []error
	for _, d := range dirs {
		if keyFormat.MatchString(d.Name()) {
			errs = append(errs, s.collectView(ctx, d.Name()))
		}
	}
	return errors.Join(errs...)
}

// collectView unmounts a view if nobody uses it, and makes containerd forget it.
func (s *Store) collectView(ctx context.Context, key string) error {
	s.viewLocks.Lock(key)
	defer s.viewLocks.Unlock(key) //nolint:errcheck // fails only when not locked
	s.mu.Lock()
	used := s.viewers.used(key)
	s.mu.Unlock()
	if used {
		return nil
	}
	dir := s.dirs.view(key)
	if err := mount.UnmountAll(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unmount view: %w", err)
	}
	if err := s.forgetView(ctx, s.viewID(key)); err != nil {
		return err
	}
	return removeIfThere(dir)
}

// forgetView removes the view of a lease with its lease: nothing else refers to it.
func (s *Store) forgetView(ctx context.Context, id string) error {
	err := s.opts.Client.MountManager().Deactivate(ctx, id)
	if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsNotImplemented(err) {
		return fmt.Errorf("deactivate view %s: %w", id, err)
	}
	return s.deleteLease(ctx, id, leases.SynchronousDelete)
}

// pruneViews removes this store's views in containerd that it has no directory for.
func (s *Store) pruneViews(ctx context.Context) error {
	all, err := s.opts.Client.LeasesService().List(ctx, fmt.Sprintf("labels.%q", viewLabel))
	if err != nil {
		return fmt.Errorf("list leases of views: %w", err)
	}
	known := map[string]bool{}
	dirs, err := os.ReadDir(s.dirs.views())
	if err != nil {
		return fmt.Errorf("list mounted views: %w", err)
	}
	for _, d := range dirs {
		if keyFormat.MatchString(d.Name()) {
			known[s.viewID(d.Name())] = true
		}
	}
	var errs []error
	for _, l := range all {
		if ours := len(l.ID) > len(viewPrefix)+8 && l.ID[len(viewPrefix):len(viewPrefix)+8] == s.storeID(); ours && !known[l.ID] {
			errs = append(errs, s.forgetView(ctx, l.ID))
		}
	}
	return errors.Join(errs...)
}
