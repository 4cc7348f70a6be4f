package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	minScratch = 16 << 20
	maxScratch = 16 << 40
	// A scratch disk is seen by one guest only, so all may have the same UUID;
	// a fixed one makes the templates alike.
	scratchUUID = "5cbd3b6e-76bc-4c3f-9d52-6b0f4a8f6d01"
)

// CreateScratch makes the scratch disk of a pod and returns its path: a sparse
// raw ext4 file system of size bytes without a journal. size must be a multiple of
// 1 MiB from 16 MiB to 16 TiB. It fails with errdefs.ErrAlreadyExists if the pod has
// one. The disk is not synced: it does not outlive the machine's uptime.
func (s *Store) CreateScratch(ctx context.Context, podID string, size int64) (string, error) {
	if err := checkName("pod of a scratch disk", podID); err != nil {
		return "", err
	}
	if size < minScratch || size > maxScratch || size%(1<<20) != 0 {
		return "", fmt.Errorf("size of a scratch disk is %d bytes, want a multiple of 1 MiB from 16 MiB to 16 TiB: %w", size, errdefs.ErrInvalidArgument)
	}
	template, err := s.template(ctx, size)
	if err != nil {
		return "", fmt.Errorf("make template of a scratch disk of %d bytes: %w", size, err)
	}
	path := s.dirs.scratchDisk(podID)
	if err := s.copyInto(template, path); err != nil {
		return "", fmt.Errorf("make scratch disk of pod %s: %w", podID, err)
	}
	return path, nil
}

// RemoveScratch removes the scratch disk of a pod. It is idempotent.
func (s *Store) RemoveScratch(podID string) error {
	if err := checkName("pod of a scratch disk", podID); err != nil {
		return err
	}
	if err := removeIfThere(s.dirs.scratchDisk(podID)); err != nil {
		return fmt.Errorf("remove scratch disk of pod %s: %w", podID, err)
	}
	return nil
}

// Scratches lists the pods that have a scratch disk.
func (s *Store) Scratches() ([]string, error) {
	pods, err := listNames(s.dirs.scratch(), scratchSuffix)
	if err != nil {
		return nil, fmt.Errorf("list scratch disks: %w", err)
	}
	return pods, nil
}

// template returns an empty scratch disk of size bytes, made at the first use.
func (s *Store) template(ctx context.Context, size int64) (string, error) {
	s.scratchMu.Lock()
	defer s.scratchMu.Unlock()
	path := filepath.Join(s.dirs.templates(), s.templateName(size))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	f, err := os.CreateTemp(s.dirs.tmp(), "template-")
	if err != nil {
		return "", err
	}
	err = errors.Join(f.Truncate(size), f.Close())
	if err == nil {
		err = s.format(ctx, f.Name())
	}
	if err == nil {
		err = publish(f.Name(), path)
	}
	return path, errors.Join(err, removeIfThere(f.Name()))
}

func (s *Store) templateName(size int64) string {
	if s.opts.ProjectQuota {
		return fmt.Sprintf("quota-%d%s", size, scratchSuffix)
	}
	return fmt.Sprintf("plain-%d%s", size, scratchSuffix)
}

// publish syncs a file and gives it its name.
func publish(tmp, path string) error {
	f, err := os.Open(tmp)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// format makes an ext4 file system in a sparse file.
func (s *Store) format(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, "mke2fs", mke2fsArgs(path, s.opts.ProjectQuota)...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("mke2fs is not there, install e2fsprogs: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("mke2fs: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// mke2fsArgs leaves out what a disk that is thrown away after a crash, and that
// never grows, does not need: journal, spare descriptors, reserved blocks.
// The inode tables of the sparse file are zeros already, but a lazy
// initialisation in the guest would write them all again, and allocate them.
func mke2fsArgs(path string, quota bool) []string {
	features, extended := "^has_journal,^resize_inode,extent,64bit", "hash_seed="+scratchUUID+",lazy_itable_init=0,root_owner=0:0"
	if quota {
		features, extended = features+",quota,project", extended+",quotatype=prjquota"
	}
	return []string{"-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-U", scratchUUID, "-O", features, "-E", extended, path}
}

// copyInto copies a sparse file to path, which must not exist.
func (s *Store) copyInto(template, path string) (err error) {
	src, err := os.Open(template)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	dst, err := os.CreateTemp(s.dirs.tmp(), "scratch-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeIfThere(dst.Name())) }()
	if err := errors.Join(copySparse(dst, src), dst.Close()); err != nil {
		return err
	}
	if err := os.Link(dst.Name(), path); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s: %w", path, errdefs.ErrAlreadyExists)
		}
		return err
	}
	return nil
}

// copySparse shares the blocks of src where the file system can, else copies
// what is not a hole.
func copySparse(dst, src *os.File) error {
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err == nil {
		return nil
	}
	info, err := src.Stat()
	if err != nil {
		return err
	}
	if err := dst.Truncate(info.Size()); err != nil {
		return err
	}
	for end := int64(0); ; {
		start, err := unix.Seek(int(src.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // no data after end
		}
		if err != nil {
			return fmt.Errorf("find data: %w", err)
		}
		if end, err = unix.Seek(int(src.Fd()), start, unix.SEEK_HOLE); err != nil {
			return fmt.Errorf("find hole: %w", err)
		}
		if _, err := io.Copy(io.NewOffsetWriter(dst, start), io.NewSectionReader(src, start, end-start)); err != nil {
			return err
		}
	}
}

// pruneTemplates removes templates of sizes that no scratch disk has.
func (s *Store) pruneTemplates() error {
	s.scratchMu.Lock()
	defer s.scratchMu.Unlock()
	used := map[int64]bool{}
	disks, err := os.ReadDir(s.dirs.scratch())
	if err != nil {
		return err
	}
	for _, d := range disks {
		if info, err := d.Info(); err == nil {
			used[info.Size()] = true
		}
	}
	templates, err := os.ReadDir(s.dirs.templates())
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range templates {
		if info, err := t.Info(); err == nil && !used[info.Size()] {
			errs = append(errs, removeIfThere(filepath.Join(s.dirs.templates(), t.Name())))
		}
	}
	return errors.Join(errs...)
}

// OpenScratch opens the scratch disk of a pod to read and write.
func (s *Store) OpenScratch(podID string) (*os.File, error) {
	if err := checkName("pod of a scratch disk", podID); err != nil {
		return nil, err
	}
	return os.OpenFile(s.dirs.scratchDisk(podID), os.O_RDWR|unix.O_NOFOLLOW, 0)
}
