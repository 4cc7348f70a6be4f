package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const snapshotLabel = "containerd.io/gc.ref.snapshot." // + snapshotter, on the configuration's content

// withView calls fn with the image's root file system, mounted read-only from a
// view of its topmost snapshot. The mount is detached as soon as it is open, so
// that it ends with this process at the latest.
func (s *Store) withView(ctx context.Context, r *resolved, fn func(context.Context, *os.Root) error) (err error) {
	snapshotter, err := s.unpacked(ctx, r)
	if err != nil {
		return err
	}
	ctx, id, err := s.buildLease(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.dropView(ctx, snapshotter, id)) }()

	mounts, err := s.opts.Client.SnapshotService(snapshotter).View(ctx, id, r.chain.String())
	if err != nil {
		return fmt.Errorf("view snapshot %s of snapshotter %s: %w", r.chain, snapshotter, err)
	}
	info, err := s.opts.Client.MountManager().Activate(ctx, id, mounts, mount.WithTemporary)
	if err == nil {
		mounts = info.System
	} else if !errdefs.IsNotImplemented(err) { // plain mounts, or a containerd before 2.2
		return fmt.Errorf("activate snapshot %s of snapshotter %s: %w", r.chain, snapshotter, err)
	}
	root, err := openDetached(readOnly(mounts), s.dirs.tmp())
	if err != nil {
		return err
	}
	return errors.Join(fn(ctx, root), root.Close())
}

// dropView removes a view and all that came with it.
func (s *Store) dropView(ctx context.Context, snapshotter, id string) error {
	ctx, cancel := s.cleanupContext(ctx)
	defer cancel()
	var errs []error
	err := s.opts.Client.MountManager().Deactivate(ctx, id)
	if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsNotImplemented(err) {
		errs = append(errs, fmt.Errorf("deactivate view %s: %w", id, err))
	}
	err = s.opts.Client.SnapshotService(snapshotter).Remove(ctx, id)
	if err != nil && !errdefs.IsNotFound(err) {
		errs = append(errs, fmt.Errorf("remove view %s: %w", id, err))
	}
	return errors.Join(append(errs, s.deleteLease(ctx, id, leases.SynchronousDelete))...)
}

// unpacked returns a snapshotter that holds the image, unpacking it if none does.
func (s *Store) unpacked(ctx context.Context, r *resolved) (string, error) {
	names, err := s.snapshotters(ctx, r)
	if err != nil || r.chain == "" {
		return names[0], err
	}
	for _, name := range names {
		_, err := s.opts.Client.SnapshotService(name).Stat(ctx, r.chain.String())
		if err == nil {
			return name, nil
		}
		if !errdefs.IsNotFound(err) {
			return "", fmt.Errorf("find snapshot %s in snapshotter %s: %w", r.chain, name, err)
		}
	}
	img := containerd.NewImageWithPlatform(s.opts.Client, r.image, s.platform)
	if err := img.Unpack(ctx, names[0]); err != nil {
		return "", fmt.Errorf("unpack into snapshotter %s: %w", names[0], err)
	}
	return names[0], nil
}

// snapshotters lists where the image may be unpacked; there is at least one.
func (s *Store) snapshotters(ctx context.Context, r *resolved) ([]string, error) {
	if s.opts.Snapshotter != "" {
		return []string{s.opts.Snapshotter}, nil
	}
	names := []string{defaults.DefaultSnapshotter}
	info, err := s.opts.Client.ContentStore().Info(ctx, r.config.Digest)
	if err != nil {
		return names, fmt.Errorf("read labels of configuration %s: %w", r.config.Digest, err)
	}
	for _, label := range slices.Sorted(maps.Keys(info.Labels)) {
		if name, ok := strings.CutPrefix(label, snapshotLabel); ok && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// readOnly makes sure that no mount can be written through.
func readOnly(mounts []mount.Mount) []mount.Mount {
	out := slices.Clone(mounts)
	for i, m := range out {
		if !slices.Contains(m.Options, "ro") {
			keep := slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "rw" })
			out[i].Options = append(keep, "ro")
		}
	}
	return out
}

// openDetached mounts, opens the root and takes the mount out of the tree again.
func openDetached(mounts []mount.Mount, tmp string) (root *os.Root, err error) {
	dir, err := os.MkdirTemp(tmp, "view-")
	if err != nil {
		return nil, err
	}
	defer func() {
		cleanup := errors.Join(mount.UnmountMounts(mounts, dir, unix.MNT_DETACH), removeTmp(dir, true))
		if cleanup != nil && root != nil {
			cleanup = errors.Join(cleanup, root.Close())
		}
		err = errors.Join(err, cleanup)
	}()
	if err := mount.All(mounts, dir); err != nil {
		return nil, fmt.Errorf("mount snapshot: %w", err)
	}
	return os.OpenRoot(dir)
}
