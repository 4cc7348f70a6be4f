package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/containerd/errdefs"
)

// build is one running build of an EROFS file.
type build struct {
	done chan struct{}
	err  error // set before done is closed
}

// Ensure returns the image as a disk, building it if need be, and keeps it and
// the image's content until owner is released. ref is what the CRI puts into a
// container's image field: an image ID or a name. Callers that want the same
// image at once share one build, and a build goes on when its caller gives up.
// Calling it again for the same owner is harmless.
//
// It fails with errdefs.ErrNotFound if containerd has no such image,
// ErrUnavailable if containerd is down, ErrResourceExhausted if the image is
// above the limit. On error owner holds nothing of this image that it did not
// hold before.
func (s *Store) Ensure(ctx context.Context, ref, owner string) (*Image, error) {
	if err := checkName("owner of an image", owner); err != nil {
		return nil, err
	}
	ctx = s.in(ctx)
	r, err := s.resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	key := keyOf(r.chain)
	s.mu.Lock()
	added, err := s.refs.add(owner, key)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	img, err := s.ensureHeld(ctx, r, owner, key)
	if err != nil {
		if added {
			err = errors.Join(err, s.unhold(ctx, owner, key))
		}
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	img.Ref = ref
	return img, nil
}

// ensureHeld does the work of Ensure once owner is on record.
func (s *Store) ensureHeld(ctx context.Context, r *resolved, owner, key string) (*Image, error) {
	if err := s.pin(ctx, owner, r); err != nil {
		return nil, err
	}
	config, err := s.readConfig(ctx, r)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(s.dirs.erofs(key))
	if errors.Is(err, fs.ErrNotExist) {
		if err = s.awaitBuild(ctx, r, key); err == nil {
			info, err = os.Stat(s.dirs.erofs(key))
		}
	}
	if err != nil {
		return nil, err
	}
	return &Image{
		Digest:  r.config.Digest.String(),
		ChainID: r.chain.String(),
		Config:  config,
		RootFS:  s.dirs.erofs(key),
		Serial:  serialOf(key),
		Size:    info.Size(),
	}, nil
}

// unhold undoes what Ensure recorded for owner before it failed.
func (s *Store) unhold(ctx context.Context, owner, key string) error {
	s.mu.Lock()
	last, err := s.refs.drop(owner, key)
	last = last && !s.viewers.owns(owner)
	s.mu.Unlock()
	if err != nil || !last {
		return err
	}
	ctx, cancel := s.cleanupContext(ctx)
	defer cancel()
	return s.unpin(ctx, owner)
}

// awaitBuild starts the build of key, or joins the one that runs.
func (s *Store) awaitBuild(ctx context.Context, r *resolved, key string) error {
	b, err := s.startBuild(r, key)
	if err != nil {
		return err
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return fmt.Errorf("wait for the root file system: %w", ctx.Err())
	}
}

func (s *Store) startBuild(r *resolved, key string) (*build, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("image store is closed: %w", errdefs.ErrUnavailable)
	}
	if b := s.builds[key]; b != nil {
		return b, nil
	}
	b := &build{done: make(chan struct{})}
	s.builds[key] = b
	s.wg.Go(func() {
		b.err = s.build(r, key)
		s.mu.Lock()
		delete(s.builds, key)
		s.mu.Unlock()
		close(b.done)
	})
	return b, nil
}

// build makes the EROFS file of key unless it is there already.
func (s *Store) build(r *resolved, key string) error {
	if _, err := os.Stat(s.dirs.erofs(key)); err == nil {
		return nil // a build ended between the caller's look and ours
	}
	ctx, cancel := context.WithTimeout(s.in(s.ctx), s.opts.BuildTimeout)
	defer cancel()
	start := time.Now()
	err := s.withView(ctx, r, func(ctx context.Context, root *os.Root) error {
		return s.writeImage(ctx, root, key)
	})
	if err != nil {
		return fmt.Errorf("build root file system: %w", err)
	}
	s.log.Info("built root file system", "image", r.image.Name, "key", key, "took", time.Since(start))
	return nil
}

// Release gives up all that owner holds. Files that nobody uses any more and
// that containerd has no image for are removed. It is idempotent. If containerd
// is down it fails with errdefs.ErrUnavailable after forgetting the owner; a
// repeated Release, or Prune, does the rest.
func (s *Store) Release(ctx context.Context, owner string) error {
	if err := checkName("owner of an image", owner); err != nil {
		return err
	}
	s.mu.Lock()
	err := errors.Join(s.refs.dropOwner(owner), s.viewers.dropOwner(owner))
	s.mu.Unlock()
	if err != nil {
		return err
	}
	ctx = s.in(ctx)
	return errors.Join(s.unpin(ctx, owner), s.collectViews(ctx), s.collect(ctx))
}

// Prune releases every owner that is not in liveOwners and removes all files
// that nobody uses. It is called once after a start, when the live containers
// are known, before any Ensure. Scratch disks and machines are not touched: see
// Scratches and Machines.
func (s *Store) Prune(ctx context.Context, liveOwners map[string]bool) error {
	ctx = s.in(ctx)
	var errs []error
	s.mu.Lock()
	for _, r := range []refs{s.refs, s.viewers} {
		for _, owner := range r.owners() {
			if !liveOwners[owner] {
				errs = append(errs, r.dropOwner(owner))
			}
		}
	}
	s.mu.Unlock()
	errs = append(errs, s.pruneLeases(ctx, liveOwners), s.collectViews(ctx), s.pruneViews(ctx), s.collect(ctx), s.pruneTemplates())
	return errors.Join(errs...)
}

// collect removes EROFS files and findings that have neither an owner nor an image.
func (s *Store) collect(ctx context.Context) error {
	unused, err := s.unusedKeys()
	if err != nil || len(unused) == 0 {
		return err
	}
	present, err := s.presentKeys(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, key := range unused {
		// Looked at again: an Ensure may have come in between.
		if !present[key] && !s.refs.used(key) && !s.viewers.used(key) {
			errs = append(errs, removeIfThere(s.dirs.erofs(key)), removeIfThere(s.dirs.finding(key)))
		}
	}
	return errors.Join(errs...)
}

// unusedKeys lists the images without an owner that there are files of.
func (s *Store) unusedKeys() ([]string, error) {
	keys, err := s.dirs.imageKeys()
	if err != nil {
		return nil, fmt.Errorf("list root file systems: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var unused []string
	for _, key := range keys {
		if !s.refs.used(key) && !s.viewers.used(key) {
			unused = append(unused, key)
		}
	}
	return unused, nil
}
