package archive

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// extent is the head of one piece of a sparse file. The last one has no length, and its offset is the file's size.
type extent struct{ Offset, Length int64 }

// WriteSparse writes the parts of a file that have data, each after its place.
func WriteSparse(w io.Writer, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	for end := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return binary.Write(w, binary.LittleEndian, extent{Offset: info.Size()})
		}
		if err != nil {
			return fmt.Errorf("find data: %w", err)
		}
		if end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			return fmt.Errorf("find hole: %w", err)
		}
		if err := binary.Write(w, binary.LittleEndian, extent{start, end - start}); err != nil {
			return err
		}
		if _, err := io.Copy(w, io.NewSectionReader(f, start, end-start)); err != nil {
			return err
		}
	}
}

// ReadSparse makes f what WriteSparse has written of a file of the given size. What it has not written of another file reads as zeros.
func ReadSparse(f *os.File, r io.Reader, size int64) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	for end := int64(0); ; {
		var e extent
		if err := binary.Read(r, binary.LittleEndian, &e); err != nil {
			return damaged("read the head of a piece: %v", err)
		}
		if e.Length == 0 {
			return finishSparse(f, r, e.Offset, end, size)
		}
		if e.Offset < end || e.Length < 0 || e.Offset > size || e.Length > size-e.Offset {
			return damaged("there is a piece of %d bytes at %d, after one that ends at %d, in a file of %d", e.Length, e.Offset, end, size)
		}
		end = e.Offset + e.Length
		if n, err := io.CopyN(io.NewOffsetWriter(f, e.Offset), r, e.Length); errors.Is(err, io.EOF) {
			return damaged("a piece at %d ends after %d bytes, not %d", e.Offset, n, e.Length)
		} else if err != nil {
			return err
		}
	}
}

func finishSparse(f *os.File, r io.Reader, got, end, size int64) error {
	if got != size || end > size {
		return damaged("the file has %d bytes, not %d", got, size)
	}
	if n, err := io.CopyN(io.Discard, r, 1); n > 0 || !errors.Is(err, io.EOF) {
		return damaged("there is more after the end of the file (%v)", err)
	}
	return f.Truncate(size)
}
