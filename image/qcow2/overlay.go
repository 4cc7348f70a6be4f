package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

const (
	overlayBits    = 16
	overlayCluster = 1 << overlayBits
)

// CreateOverlay writes an empty qcow2 image of virtualSize bytes, a multiple of
// 512 up to 16 TiB, to path, where there must be no file. Its header names no
// backing file: whoever opens it gives the backing node, so that nothing in
// the file, which a guest's QEMU can write, says which other file is opened.
// The file has mode 0600 and is on stable storage when the call returns; if
// it fails, there is no file. A file that is there already is
// errdefs.ErrAlreadyExists.
func CreateOverlay(path string, virtualSize int64) error {
	if err := checkEmpty(path, virtualSize); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create overlay: %w: %w", err, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return fmt.Errorf("create overlay: %w", err)
	}
	if err := errors.Join(writeEmpty(f, virtualSize), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("create overlay: %w", err), os.Remove(path))
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return errors.Join(fmt.Errorf("create overlay: %w", err), os.Remove(path))
	}
	return nil
}

func checkEmpty(path string, virtualSize int64) error {
	if virtualSize <= 0 || virtualSize > defaultMaxVirtualSize || virtualSize%sectorSize != 0 {
		return fmt.Errorf("virtual size of %s is %d bytes, want a multiple of %d up to %d: %w",
			path, virtualSize, sectorSize, int64(defaultMaxVirtualSize), errdefs.ErrInvalidArgument)
	}
	return nil
}

// WriteEmpty makes an empty file a qcow2 image as CreateOverlay does.
func WriteEmpty(f *os.File, virtualSize int64) error {
	if err := checkEmpty(f.Name(), virtualSize); err != nil {
		return err
	}
	return writeEmpty(f, virtualSize)
}

// writeEmpty lays out header, refcount table, refcount block and L1 table,
// each from a cluster of its own on.
func writeEmpty(f *os.File, virtualSize int64) error {
	h := header{clusterBits: overlayBits, clusterSize: overlayCluster, virtualSize: virtualSize}
	entries := h.l1Needed()
	clusters := 3 + h.clusters(entries*entrySize)

	head := make([]byte, headerSizeV3, 3*overlayCluster)
	copy(head, magic)
	binary.BigEndian.PutUint32(head[4:], 3)
	binary.BigEndian.PutUint32(head[20:], overlayBits)
	binary.BigEndian.PutUint64(head[24:], uint64(virtualSize))
	binary.BigEndian.PutUint32(head[36:], uint32(entries))
	binary.BigEndian.PutUint64(head[40:], 3*overlayCluster) // L1 table
	binary.BigEndian.PutUint64(head[48:], overlayCluster)   // refcount table
	binary.BigEndian.PutUint32(head[56:], 1)                // clusters of it
	binary.BigEndian.PutUint32(head[96:], 4)                // refcounts of 16 bits
	binary.BigEndian.PutUint32(head[100:], headerSizeV3)
	head = head[:cap(head)]
	binary.BigEndian.PutUint64(head[overlayCluster:], 2*overlayCluster) // refcount block
	for i := range clusters {
		binary.BigEndian.PutUint16(head[2*overlayCluster+2*i:], 1)
	}
	if _, err := f.Write(head); err != nil {
		return err
	}
	// The L1 table is a hole: no cluster is allocated.
	return errors.Join(f.Truncate(clusters*overlayCluster), f.Sync())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
