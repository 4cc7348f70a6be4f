package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Disk is the disk of a machine, inside a pulled image. Nothing of it is copied: the file lies in a read-only mount of
// the image's snapshot, which all machines of the image share.
type Disk struct {
	// Ref is the reference that was asked for.
	Ref string
	// Path is the file, good until the owner is released. After a reboot FindDisk mounts it again at the same path.
	Path string
	// Name is the file's path inside the image, without a leading slash.
	Name string
	// Format is "qcow2" or "raw", and checked: the file has no backing file and refers to no other.
	Format string
	// VirtualSize is the size of the disk as a guest sees it, in bytes.
	VirtualSize int64
	// FileSize is the size of the file in bytes.
	FileSize int64
	// Digest is the digest of the image's configuration: the image ID of the CRI.
	Digest string
	// ChainID is the digest of the image's layers.
	ChainID string
	// ImageName is the image's name in containerd.
	ImageName string
	// Config is the image's configuration.
	Config ocispec.Image
}

// FindDisk returns the disk in an image, and keeps it mounted and the image's content in place until owner is
// released. ref is as for Ensure. The disk is the one file under /disk whose name ends in .qcow2, .raw or .img, or that
// begins as a qcow2 image does; failing that, and if the image has neither entrypoint nor command, the one such file at
// the image's root. Symbolic links are never followed. What was found is kept per image, so that only the first call
// parses the disk. Calling it again for the same owner is harmless, and after a reboot needed.
//
// It fails with errdefs.ErrNotFound if containerd has no such image, or the image has no disk: an ordinary image;
// errdefs.ErrInvalidArgument if there are several disks, if the image can be meant for nothing but a disk and has none
// that is usable, or if its disk is refused: the error lists what was found; ErrUnavailable if containerd is down. On
// error owner holds nothing of this image that it did not hold before.
func (s *Store) FindDisk(ctx context.Context, ref, owner string) (*Disk, error) {
	if err := checkName("owner of a disk", owner); err != nil {
		return nil, err
	}
	ctx = s.in(ctx)
	r, err := s.resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	config, err := s.readConfig(ctx, r)
	if err != nil {
		return nil, err
	}
	d, err := s.findDisk(ctx, r, config, owner)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	d.Ref, d.Config = ref, config
	d.Digest, d.ChainID, d.ImageName = r.config.Digest.String(), r.chain.String(), r.image.Name
	return d, nil
}

func (s *Store) findDisk(ctx context.Context, r *resolved, config ocispec.Image, owner string) (*Disk, error) {
	key, runs := keyOf(r.chain), runsAsContainer(config)
	if r.chain == "" {
		return nil, fmt.Errorf("no layers, and so no disk: %w", errdefs.ErrNotFound)
	}
	// Ordinary images, which are most, cost no mount after the first time.
	if f, ok := s.readFinding(key); ok {
		if _, err := f.disk(runs); err != nil {
			return nil, err
		}
	}
	held := s.owns(owner, key)
	if err := s.holdView(ctx, r, owner, key); err != nil {
		return nil, err
	}
	d, err := s.lookThrough(ctx, key, runs)
	if err != nil {
		if !held {
			err = errors.Join(err, s.dropViewer(ctx, owner, key))
		}
		return nil, err
	}
	return d, nil
}

// owns reports whether owner holds the view of key.
func (s *Store) owns(owner, key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.viewers.by[owner][key]
}

// lookThrough finds the disk in a mounted view; one caller at a time for each image.
func (s *Store) lookThrough(ctx context.Context, key string, runs bool) (*Disk, error) {
	s.viewLocks.Lock(key)
	defer s.viewLocks.Unlock(key) //nolint:errcheck // fails only when not locked
	root, err := os.OpenRoot(s.dirs.view(key))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, known := s.readFinding(key)
	if !known {
		if f, err = scan(root); err != nil {
			return nil, err
		}
	}
	c, err := f.disk(runs)
	if err == nil && !c.checked() {
		if err = c.check(ctx, root); err == nil {
			known = false
			_, err = f.disk(runs)
		}
	}
	if !known && (c == nil || c.checked()) {
		if wrote := s.writeFinding(key, f); wrote != nil {
			return nil, errors.Join(err, wrote)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := c.still(root); err != nil {
		return nil, err
	}
	return &Disk{
		Path: filepath.Join(s.dirs.view(key), filepath.FromSlash(c.Name)), Name: c.Name,
		Format: c.Format, VirtualSize: c.VirtualSize, FileSize: c.FileSize,
	}, nil
}

// runsAsContainer reports whether the image says itself what to run in a container.
func runsAsContainer(config ocispec.Image) bool {
	return len(config.Config.Entrypoint) > 0 || len(config.Config.Cmd) > 0
}

// File returns the path on the host of a regular file inside an image, a kernel or an initrd for direct boot, and keeps
// it there as FindDisk keeps a disk. name is the file's path in the image, with or without a leading slash; no part of
// it may be a symbolic link. It fails with errdefs.ErrNotFound if containerd has no such image or the image no such
// file, ErrInvalidArgument if it is no regular file or empty.
func (s *Store) File(ctx context.Context, ref, owner, name string) (string, error) {
	if err := checkName("owner of a file", owner); err != nil {
		return "", err
	}
	clean := path.Clean(strings.TrimPrefix(name, "/"))
	if !fs.ValidPath(clean) || clean == "." {
		return "", fmt.Errorf("path in an image is %q, want one like /boot/vmlinuz: %w", name, errdefs.ErrInvalidArgument)
	}
	ctx = s.in(ctx)
	r, err := s.resolve(ctx, ref)
	if err != nil {
		return "", err
	}
	key := keyOf(r.chain)
	held := s.owns(owner, key)
	if err := s.holdView(ctx, r, owner, key); err != nil {
		return "", fmt.Errorf("image %s: %w", ref, err)
	}
	if err := statInView(s.dirs.view(key), clean); err != nil {
		if !held {
			err = errors.Join(err, s.dropViewer(ctx, owner, key))
		}
		return "", fmt.Errorf("image %s: %w", ref, err)
	}
	return filepath.Join(s.dirs.view(key), filepath.FromSlash(clean)), nil
}

func statInView(dir, name string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	f, err := openRegular(root, name)
	if err != nil {
		return errors.Join(err, root.Close())
	}
	info, err := f.Stat()
	if err == nil && info.Size() == 0 {
		err = fmt.Errorf("/%s is empty: %w", name, errdefs.ErrInvalidArgument)
	}
	return errors.Join(err, f.Close(), root.Close())
}
