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

// ReadSparse makes f what WriteSparse has written.
func ReadSparse(f *os.File, r io.Reader) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	for {
		var e extent
		if err := binary.Read(r, binary.LittleEndian, &e); err != nil {
			return err
		}
		if e.Length == 0 {
			return f.Truncate(e.Offset)
		}
		if _, err := io.CopyN(io.NewOffsetWriter(f, e.Offset), r, e.Length); err != nil {
			return err
		}
	}
}
