package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
)

// block is what files in a tar archive are filled up to.
const block = 512

// tarFile is a tar archive that is being written. The size of a file is known after the file was written; its header is filled in then.
type tarFile struct{ f *os.File }

// CreateTar begins an archive that is one file, which must not exist yet, in an existing directory; field names it in errors.
func CreateTar(field, path string) (*Writer, error) {
	if path != filepath.Clean(path) {
		return nil, fmt.Errorf("%s %q must be the plain path of a file, as %q is: %w", field, path, filepath.Clean(path), errdefs.ErrInvalidArgument)
	}
	root, err := openDir("the directory of "+field, filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	w := &Writer{root: root}
	f, err := w.create(filepath.Base(path))
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%s %q exists; it must be a new file: %w", field, path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	w.tar = &tarFile{f}
	return w, nil
}

// member writes one file of the archive.
func (t *tarFile) member(name string, fill func(io.Writer) error) error {
	at, err := t.f.Seek(block, io.SeekCurrent)
	if err != nil {
		return err
	}
	if err := fill(t.f); err != nil {
		return err
	}
	end, err := t.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	head, err := header(name, end-at)
	if err != nil {
		return err
	}
	if _, err := t.f.WriteAt(head, at-block); err != nil {
		return err
	}
	_, err = t.f.Seek((block-end%block)%block, io.SeekCurrent)
	return err
}

// header is in GNU's format, where it is one block whatever the size.
func header(name string, size int64) ([]byte, error) {
	var b bytes.Buffer
	err := tar.NewWriter(&b).WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: time.Now().Truncate(time.Second), Format: tar.FormatGNU,
	})
	if err == nil && b.Len() != block {
		err = fmt.Errorf("the header of %s has %d bytes, not %d: %w", name, b.Len(), block, errdefs.ErrInternal)
	}
	return b.Bytes(), err
}

// end writes the two empty blocks that end a tar archive.
func (t *tarFile) end() error {
	_, err := t.f.Write(make([]byte, 2*block))
	return errors.Join(err, t.f.Sync())
}
