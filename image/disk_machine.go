package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/image/qcow2"
)

// RootName is the writable root disk of a machine, in its directory: an overlay of its image's disk.
const RootName = "overlay.qcow2"

// CreateMachine makes the directory for the files of one machine, readable by root only, and returns its path. owner is
// the container's ID. It fails with errdefs.ErrAlreadyExists if there is one.
func (s *Store) CreateMachine(owner string) (string, error) {
	if err := checkName("owner of a machine", owner); err != nil {
		return "", err
	}
	dir := s.dirs.machine(owner)
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("directory of machine %s: %w", owner, errdefs.ErrAlreadyExists)
	}
	if err == nil {
		err = syncDir(s.dirs.machines())
	}
	if err != nil {
		return "", fmt.Errorf("make directory of machine %s: %w", owner, err)
	}
	return dir, nil
}

// WriteEmpty makes an empty file a qcow2 image of size bytes in which all is zeros.
func WriteEmpty(f *os.File, size int64) error { return qcow2.WriteEmpty(f, size) }

// OpenMachine opens the directory of a machine.
func (s *Store) OpenMachine(owner string) (*os.Root, error) {
	if err := checkName("owner of a machine", owner); err != nil {
		return nil, err
	}
	return os.OpenRoot(s.dirs.machine(owner))
}

// RemoveMachine removes all files of a machine. It is idempotent.
func (s *Store) RemoveMachine(owner string) error {
	if err := checkName("owner of a machine", owner); err != nil {
		return err
	}
	if err := os.RemoveAll(s.dirs.machine(owner)); err != nil {
		return fmt.Errorf("remove files of machine %s: %w", owner, err)
	}
	return nil
}

// Machines lists the owners that have a machine's directory.
func (s *Store) Machines() ([]string, error) {
	owners, err := listNames(s.dirs.machines(), "")
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	return owners, nil
}

// MachineUsage returns what all files of a machine take: its root disk's writable layer above all. It fails with
// errdefs.ErrNotFound if there is no such machine.
func (s *Store) MachineUsage(owner string) (Usage, error) {
	var u Usage
	if err := checkName("owner of a machine", owner); err != nil {
		return u, err
	}
	dir := s.dirs.machine(owner)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return u, fmt.Errorf("no machine %s: %w", owner, errdefs.ErrNotFound)
	}
	err := u.addTree(context.Background(), dir, "")
	return u, err
}

// CreateRoot makes the root disk of a machine and returns its path: an empty qcow2 overlay of size bytes over d, whose
// file the one that starts QEMU has to name as its backing: the overlay names none. size is a multiple of 512, at least
// d.VirtualSize and at most 16 TiB; 0 means d.VirtualSize. The overlay can never take more than that and its tables, about
// 1/6500 of it. It fails with errdefs.ErrNotFound if the machine has no directory, ErrAlreadyExists if it has a root disk.
func (s *Store) CreateRoot(owner string, d *Disk, size int64) (string, error) {
	if err := checkName("owner of a machine", owner); err != nil {
		return "", err
	}
	if size == 0 {
		size = d.VirtualSize
	}
	if size < d.VirtualSize || size > maxDiskSize || size%sectorSize != 0 {
		return "", fmt.Errorf("size of the root disk is %d bytes, want 0 or a multiple of %d from %d, the size of the image's disk, to 16 TiB: %w",
			size, sectorSize, d.VirtualSize, errdefs.ErrInvalidArgument)
	}
	path := filepath.Join(s.dirs.machine(owner), RootName)
	err := qcow2.CreateOverlay(path, size)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("it has no directory: %w", errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("make root disk of machine %s: %w", owner, err)
	}
	return path, nil
}
