// Package archive reads and writes the files of a checkpoint: compressed streams in one directory, and a manifest that
// names each with its size and hash.
//
//	DIR/NAME.zst          one stream
//	DIR/manifest.json     what the caller tells, and the list of the streams
//	DIR/manifest.sha256   the manifest's hash; it is written last
//
// Where one file is asked for, it is a tar archive of the same files, which is read after it was unpacked.
//
// The directory is opened once, without following links, and everything in it is reached through that descriptor.
package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

const (
	manifestFile = "manifest.json"
	sumFile      = "manifest.sha256"
	suffix       = ".zst"
	// maxManifest bounds what is read before anything is checked.
	maxManifest = 64 << 20
	format      = 1
	// maxWindow is how much memory a stream may ask for to be read; what is written here asks for 4 MiB.
	maxWindow = 32 << 20
)

// file is one stream as the manifest has it.
type file struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

type manifest struct {
	Format  int             `json:"format"`
	Files   []file          `json:"files"`
	Content json.RawMessage `json:"content"`
}

// openDir opens a directory without following a link on the way. The field is named in errors.
func openDir(field, path string) (*os.Root, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%s %q must be an absolute path: %w", field, path, errdefs.ErrInvalidArgument)
	}
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, fmt.Errorf("%s %q must be an existing directory, with no symbolic link on the way: %w: %w", field, path, err, errdefs.ErrInvalidArgument)
	}
	defer unix.Close(fd)
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", fd))
}

// Writer writes one archive. Close it in every case; what is not finished then is removed.
type Writer struct {
	root     *os.Root
	tar      *tarFile // nil for a directory
	made     []string
	files    []file
	finished bool
}

// Create begins an archive in an existing, empty directory; field names it in errors.
func Create(field, path string) (*Writer, error) {
	root, err := openDir(field, path)
	if err != nil {
		return nil, err
	}
	dir, err := root.Open(".")
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	names, err := dir.Readdirnames(1)
	if len(names) > 0 {
		err = fmt.Errorf("%s %q must be empty; it has %q: %w", field, path, names[0], errdefs.ErrFailedPrecondition)
	} else if errors.Is(err, io.EOF) {
		err = nil
	}
	if err = errors.Join(err, dir.Close()); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return &Writer{root: root}, nil
}

// Stream writes one stream as fill does. It ends with ctx.
func (w *Writer) Stream(ctx context.Context, name string, fill func(io.Writer) error) error {
	name += suffix
	sum, size := sha256.New(), counter(0)
	err := w.member(name, func(to io.Writer) error {
		return compressed(&contextWriter{ctx: ctx, w: io.MultiWriter(to, sum, &size)}, fill)
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	w.files = append(w.files, file{Name: name, Size: int64(size), SHA256: hex.EncodeToString(sum.Sum(nil))})
	return nil
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// member writes one file of the archive.
func (w *Writer) member(name string, fill func(io.Writer) error) error {
	if w.tar != nil {
		return w.tar.member(name, fill)
	}
	f, err := w.create(name)
	if err != nil {
		return err
	}
	return errors.Join(fill(f), f.Sync(), f.Close())
}

func compressed(to io.Writer, fill func(io.Writer) error) error {
	z, err := zstd.NewWriter(to, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return err
	}
	return errors.Join(fill(z), z.Close())
}

type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (c *contextWriter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.w.Write(p)
}

func (w *Writer) create(name string) (*os.File, error) {
	f, err := w.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		w.made = append(w.made, name)
	}
	return f, err
}

func (w *Writer) whole(name string, data []byte) error {
	return w.member(name, func(to io.Writer) error {
		_, err := to.Write(data)
		return err
	})
}

// Finish writes the manifest. The archive is durable when it returns.
func (w *Writer) Finish(content any) error {
	raw, err := json.Marshal(content)
	if err != nil {
		return err
	}
	data, err := json.Marshal(manifest{Format: format, Files: w.files, Content: raw})
	if err != nil {
		return err
	}
	sum := sha256.Sum256(data)
	if err := errors.Join(w.whole(manifestFile, data), w.whole(sumFile, []byte(hex.EncodeToString(sum[:])+"\n")), w.sync()); err != nil {
		return fmt.Errorf("write the manifest: %w", err)
	}
	w.finished = true
	return nil
}

func (w *Writer) sync() error {
	if w.tar != nil {
		if err := w.tar.end(); err != nil {
			return err
		}
	}
	dir, err := w.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Close removes what was written, unless it was finished. The directory stays.
func (w *Writer) Close() error {
	var errs []error
	if w.tar != nil {
		errs = append(errs, w.tar.f.Close())
	}
	if !w.finished {
		for _, name := range w.made {
			errs = append(errs, w.root.Remove(name))
		}
	}
	return errors.Join(append(errs, w.root.Close())...)
}

// Reader reads an archive. Nothing in the directory is changed.
type Reader struct {
	files map[string]*os.File
}

// Open checks a whole archive, every byte by its hash, and fills in content. An archive that is damaged is
// errdefs.ErrInvalidArgument. What is read later are the files that were checked, whatever is put in their places.
func Open(ctx context.Context, field, path string, content any) (_ *Reader, err error) {
	root, err := openDir(field, path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	m, err := readManifest(root)
	if err != nil {
		return nil, fmt.Errorf("%s %q: %w", field, path, err)
	}
	r := &Reader{files: make(map[string]*os.File)}
	for _, f := range m.Files {
		if err := r.open(ctx, root, f); err != nil {
			return nil, errors.Join(fmt.Errorf("%s %q: %s: %w", field, path, f.Name, err), r.Close())
		}
	}
	if err := json.Unmarshal(m.Content, content); err != nil {
		return nil, errors.Join(fmt.Errorf("%s %q: manifest: %w: %w", field, path, err, errdefs.ErrInvalidArgument), r.Close())
	}
	return r, nil
}

func damaged(format string, args ...any) error {
	return fmt.Errorf(format+"; the checkpoint is damaged: %w", append(args, errdefs.ErrInvalidArgument)...)
}

func readManifest(root *os.Root) (*manifest, error) {
	data, err := readSmall(root, manifestFile)
	if err != nil {
		return nil, err
	}
	want, err := readSmall(root, sumFile)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != string(bytes.TrimSpace(want)) {
		return nil, damaged("%s does not have the hash in %s", manifestFile, sumFile)
	}
	m := &manifest{}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, damaged("%s: %v", manifestFile, err)
	}
	if m.Format != format {
		return nil, fmt.Errorf("the checkpoint has format %d; this version reads format %d: %w", m.Format, format, errdefs.ErrFailedPrecondition)
	}
	return m, nil
}

func readSmall(root *os.Root, name string) ([]byte, error) {
	f, err := openRegular(root, name)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxManifest))
	return data, errors.Join(err, f.Close())
}

// openRegular never waits for a FIFO that somebody has put there, nor follows a link.
func openRegular(root *os.Root, name string) (*os.File, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, damaged("%v", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = damaged("%s is no regular file", name)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// open checks one file and keeps it open.
func (r *Reader) open(ctx context.Context, root *os.Root, want file) error {
	if r.files[want.Name] != nil {
		return damaged("it is there twice")
	}
	f, err := openRegular(root, want.Name)
	if err != nil {
		return err
	}
	r.files[want.Name] = f
	sum := sha256.New()
	size, err := io.Copy(&contextWriter{ctx: ctx, w: sum}, f)
	switch {
	case err != nil:
		return err
	case size != want.Size:
		return damaged("it has %d bytes, not %d", size, want.Size)
	case hex.EncodeToString(sum.Sum(nil)) != want.SHA256:
		return damaged("it does not have the hash in the manifest")
	}
	return nil
}

// Stream gives one stream to use.
func (r *Reader) Stream(name string, use func(io.Reader) error) error {
	f := r.files[name+suffix]
	if f == nil {
		return damaged("it has no %s", name+suffix)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	z, err := zstd.NewReader(f, zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return err
	}
	defer z.Close()
	return use(z)
}

// Close closes the files.
func (r *Reader) Close() error {
	var errs []error
	for _, f := range r.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
