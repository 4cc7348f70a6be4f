package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Usage is room on the host's file system.
type Usage struct {
	// Bytes are allocated blocks, not file sizes: scratch disks are sparse.
	Bytes int64
	// Inodes counts files and directories.
	Inodes int64
}

// Usage returns what all files of the store take: root file systems, scratch
// disks, templates, machines, and what is being made. What images with a disk take is
// containerd's.
func (s *Store) Usage(ctx context.Context) (Usage, error) {
	var u Usage
	err := u.addTree(ctx, s.dirs.root, s.dirs.views())
	if err != nil {
		return Usage{}, fmt.Errorf("measure image store: %w", err)
	}
	return u, nil
}

// addTree adds everything from root on, but not what lies below skip.
func (u *Usage) addTree(ctx context.Context, root, skip string) error {
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = u.add(path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err == nil && path == skip {
			return fs.SkipDir
		}
		return err
	})
}

// ScratchUsage returns what the scratch disk of a pod takes. It fails with
// errdefs.ErrNotFound if the pod has none.
func (s *Store) ScratchUsage(podID string) (Usage, error) {
	var u Usage
	if err := checkName("pod of a scratch disk", podID); err != nil {
		return u, err
	}
	err := u.add(s.dirs.scratchDisk(podID))
	if errors.Is(err, fs.ErrNotExist) {
		return u, fmt.Errorf("pod %s has no scratch disk: %w", podID, errdefs.ErrNotFound)
	}
	return u, err
}

func (u *Usage) add(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	u.Bytes += st.Blocks * 512
	u.Inodes++
	return nil
}
