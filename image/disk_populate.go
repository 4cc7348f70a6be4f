package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/image/qcow2"
)

const (
	// populating is in the first sector of a device that is being populated, and nowhere else.
	populating = "vmruntime: this disk is being written from an image and is not whole\n"
	// headSize is how much of a disk is written last.
	headSize = 1 << 20
	// edgeSize is how much at either end of a device is zeros if it is empty. Partition tables, boot sectors and the labels
	// of file systems, LVM, RAID and LUKS lie there.
	edgeSize = 4 << 20
	// chunkSize is what is copied at a time, and zeroChunk what is zeroed: a call to cancel waits for one.
	chunkSize = 4 << 20
	zeroChunk = 1 << 30
	pageSize  = 4096
)

// Populate makes a block device the persistent root disk of a machine: it writes d to a device that is empty, once. A
// device that holds anything else is left as it is. device is the path of a block device at least as large as d.
// progress, if not nil, is called with how many bytes of the disk are done; it is not called for a device that is left as
// it is.
//
// It may be broken off at any point, by an error, a kill or a power cut, and is simply called again:
//
//  1. A marker is written to the device's first sector, and synced.
//  2. Everything from 1 MiB on is written, holes as zeros, and synced.
//  3. The first MiB but its first sector is written, and synced.
//  4. The first sector is written over the marker, and synced. A sector is written whole or not at all.
//
// So a device with the marker is not whole and is written anew, and one that lacks it is either empty or never written
// again. Empty is a device whose first and last 4 MiB are zeros; a disk whose own first 4 MiB are zeros is
// refused, for it could not be told from an empty device, and cannot boot.
//
// It fails with errdefs.ErrInvalidArgument if device is no block device or d cannot be written to one,
// ErrFailedPrecondition if the device is too small or in use.
func (s *Store) Populate(ctx context.Context, d *Disk, device string, progress func(done, total int64)) error {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	empty, err := inspectDevice(device, os.O_RDONLY, func(_ *os.File, _ int64, empty bool) error { return nil })
	if err != nil || !empty {
		return wrapDevice(device, err)
	}
	// Exclusively: nobody else on this node has it mounted or populates it. Another look, since it was not ours before.
	_, err = inspectDevice(device, os.O_RDWR|unix.O_EXCL, func(f *os.File, size int64, empty bool) error {
		if !empty {
			return nil
		}
		s.log.Info("populating device", "device", device, "image", d.ImageName, "disk", d.Name, "size", d.VirtualSize)
		return populate(ctx, d, f, size, progress)
	})
	return wrapDevice(device, err)
}

func wrapDevice(device string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("populate device %s: %w", device, err)
}

// inspectDevice opens a block device, tells whether it is to be populated, and calls fn with it.
func inspectDevice(device string, flags int, fn func(f *os.File, size int64, empty bool) error) (empty bool, err error) {
	f, err := openDevice(device, flags)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return false, err
	}
	if empty, err = awaitsDisk(f, size); err != nil {
		return false, err
	}
	return empty, fn(f, size, empty)
}

func openDevice(device string, flags int) (*os.File, error) {
	f, err := os.OpenFile(device, flags|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("it is mounted or otherwise in use on this node: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		err = fmt.Errorf("it is no block device (%s): %w", info.Mode(), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// awaitsDisk reports whether a device is empty, or was being populated.
func awaitsDisk(f io.ReaderAt, size int64) (bool, error) {
	head := make([]byte, min(edgeSize, size))
	if _, err := f.ReadAt(head, 0); err != nil {
		return false, fmt.Errorf("read its beginning: %w", err)
	}
	if bytes.HasPrefix(head, []byte(populating)) {
		return true, nil
	}
	tail := make([]byte, len(head))
	if _, err := f.ReadAt(tail, size-int64(len(tail))); err != nil {
		return false, fmt.Errorf("read its end: %w", err)
	}
	return isZero(head) && isZero(tail), nil
}

// isZero reports whether p is all zeros.
func isZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[:len(p)-1], p[1:])
}

// populate writes the disk to f, a device of size bytes.
func populate(ctx context.Context, d *Disk, f *os.File, size int64, progress func(done, total int64)) (err error) {
	if size < d.VirtualSize {
		return fmt.Errorf("it has %d bytes, want at least the %d of the disk %s: %w", size, d.VirtualSize, d.Name, errdefs.ErrFailedPrecondition)
	}
	src, err := openSource(d)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.close()) }()
	head := make([]byte, min(edgeSize, d.VirtualSize))
	if _, err := src.ReadAt(head, 0); err != nil {
		return fmt.Errorf("read disk %s: %w", d.Name, err)
	}
	if isZero(head) || bytes.HasPrefix(head, []byte(populating)) {
		return fmt.Errorf("disk %s has nothing at its beginning that can boot: %w", d.Name, errdefs.ErrInvalidArgument)
	}
	head = head[:min(headSize, len(head))]
	w := &deviceWriter{ctx: ctx, f: f, src: src, size: d.VirtualSize, progress: progress}
	marker := make([]byte, sectorSize)
	copy(marker, populating)
	return w.run([]func() error{
		func() error { return w.write(marker, 0) },
		func() error { return w.writeFrom(int64(len(head))) },
		func() error { return w.write(head[sectorSize:], sectorSize) },
		func() error { return w.write(head[:sectorSize], 0) },
	})
}

// deviceWriter writes one disk to a device.
type deviceWriter struct {
	ctx      context.Context
	f        *os.File
	src      *diskSource
	size     int64
	done     int64
	progress func(done, total int64)
	buf      []byte
}

// run does the steps in turn, each on stable storage before the next.
func (w *deviceWriter) run(steps []func() error) error {
	for _, step := range steps {
		if err := w.ctx.Err(); err != nil { // a sync may have taken long
			return err
		}
		if err := step(); err != nil {
			return err
		}
		if err := w.f.Sync(); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
		w.progress(w.done, w.size)
	}
	return nil
}

func (w *deviceWriter) write(p []byte, off int64) error {
	_, err := w.f.WriteAt(p, off)
	return err
}

// writeFrom writes the disk from off, a multiple of the page size, to its end.
func (w *deviceWriter) writeFrom(off int64) error {
	w.buf = make([]byte, chunkSize)
	for w.done = off; w.done < w.size; {
		start, end, err := w.src.nextData(w.done)
		if errors.Is(err, io.EOF) {
			start, end = w.size, w.size
		} else if err != nil {
			return fmt.Errorf("find data from %d on: %w", w.done, err)
		}
		// Whole pages, so that what is zeroed is aligned too.
		start, end = max(start/pageSize*pageSize, w.done), min((end+pageSize-1)/pageSize*pageSize, w.size)
		if err := w.zero(start); err != nil {
			return err
		}
		if err := w.copy(end); err != nil {
			return err
		}
	}
	return nil
}

// step ends one piece of work.
func (w *deviceWriter) step(done int64) error {
	w.done = done
	w.progress(w.done, w.size)
	return w.ctx.Err()
}

// copy writes the disk's data from w.done to end.
func (w *deviceWriter) copy(end int64) error {
	for w.done < end {
		p := w.buf[:min(end-w.done, chunkSize)]
		if _, err := w.src.ReadAt(p, w.done); err != nil {
			return fmt.Errorf("read disk at %d: %w", w.done, err)
		}
		next := w.done + int64(len(p))
		if isZero(p) {
			if err := w.zero(next); err != nil {
				return err
			}
			continue
		}
		if err := w.write(p, w.done); err != nil {
			return err
		}
		if err := w.step(next); err != nil {
			return err
		}
	}
	return nil
}

// zero makes zeros from w.done to end: an empty device may hold something between its ends.
func (w *deviceWriter) zero(end int64) error {
	for w.done < end {
		n := min(end-w.done, zeroChunk)
		if err := w.zeroRange(w.done, n); err != nil {
			return fmt.Errorf("zero %d bytes at %d: %w", n, w.done, err)
		}
		if err := w.step(w.done + n); err != nil {
			return err
		}
	}
	return nil
}

func (w *deviceWriter) zeroRange(off, n int64) error {
	// The first frees the room where the device can and fails where it cannot, the second has the kernel write zeros then.
	for _, mode := range []uint32{unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE} {
		err := unix.Fallocate(int(w.f.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	zeros := make([]byte, min(n, chunkSize))
	for end := off + n; off < end; off += int64(len(zeros)) {
		if err := w.write(zeros[:min(end-off, int64(len(zeros)))], off); err != nil {
			return err
		}
	}
	return nil
}

// diskSource reads what a guest would see of a disk.
type diskSource struct {
	io.ReaderAt
	nextData func(off int64) (start, end int64, err error)
	close    func() error
}

func openSource(d *Disk) (*diskSource, error) {
	f, err := os.Open(d.Path)
	if err != nil {
		return nil, err
	}
	if d.Format != qcow2.FormatQcow2 {
		return &diskSource{ReaderAt: f, nextData: func(off int64) (int64, int64, error) { return nextData(f, off) }, close: f.Close}, nil
	}
	r, err := qcow2.Open(f, d.FileSize, qcow2.Limits{MaxVirtualSize: maxDiskSize})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open disk %s: %w", d.Name, err), f.Close())
	}
	return &diskSource{ReaderAt: r, nextData: r.NextData, close: f.Close}, nil
}

// nextData finds data in a sparse file; io.EOF if there is none from off on.
func nextData(f *os.File, off int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, 0, io.EOF
	}
	if err == nil {
		end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	}
	return start, end, err
}
