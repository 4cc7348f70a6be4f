package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/image/qcow2"
)

const (
	// findingVersion is raised when what is accepted as a disk changes, so that images are looked through again.
	findingVersion = 1
	maxDiskSize    = 16 << 40
	sectorSize     = 512
	// maxListed bounds what an error lists, and what is read of a directory.
	maxListed = 16
	maxScan   = 1 << 16
	// qcow2Magic begins every qcow2 image.
	qcow2Magic = "QFI\xfb"
)

// finding is what an image was found to hold, as it is stored. Layers do not change, so it stays true.
type finding struct {
	Version int
	// InDisk and AtRoot are the disk files under /disk and at the root.
	InDisk, AtRoot []*candidate
	// Other lists what else lies under /disk, and why it is no disk.
	Other []string
}

// candidate is one disk file, checked or not.
type candidate struct {
	Name        string // path in the image
	FileSize    int64
	Format      string // set when checked, unless Error is
	VirtualSize int64
	Details     *qcow2.Info `json:",omitempty"`
	// Error says why the disk is refused.
	Error string `json:",omitempty"`
}

func (c *candidate) checked() bool { return c.Format != "" || c.Error != "" }

// disk chooses the image's disk. runs says that the image can be run as a container too: then only what lies under
// /disk makes it a machine.
func (f *finding) disk(runs bool) (*candidate, error) {
	found := f.InDisk
	if len(found) == 0 && !runs {
		found = f.AtRoot
	}
	switch {
	case len(found) > 1:
		return nil, fmt.Errorf("%d disks, want one: %s: %w", len(found), names(found), errdefs.ErrInvalidArgument)
	case len(found) == 1 && found[0].Error != "":
		return nil, fmt.Errorf("disk /%s: %s: %w", found[0].Name, found[0].Error, errdefs.ErrInvalidArgument)
	case len(found) == 1:
		return found[0], nil
	case len(f.Other) == 0:
		return nil, fmt.Errorf("no disk: neither under /disk nor at the root is a file *.qcow2, *.raw or *.img: %w", errdefs.ErrNotFound)
	}
	class := error(errdefs.ErrInvalidArgument)
	if runs {
		class = errdefs.ErrNotFound
	}
	return nil, fmt.Errorf("no disk: want one file *.qcow2, *.raw or *.img under /disk, found %s: %w", strings.Join(f.Other, ", "), class)
}

func names(found []*candidate) string {
	var list []string
	for _, c := range found {
		list = append(list, fmt.Sprintf("/%s (%d bytes)", c.Name, c.FileSize))
	}
	return strings.Join(list, ", ")
}

// scan lists what may be a disk in an image. It parses nothing.
func scan(root *os.Root) (*finding, error) {
	f := &finding{Version: findingVersion}
	var err error
	info, err := root.Lstat("disk")
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.IsDir():
		if f.InDisk, f.Other, err = scanDir(root, "disk"); err != nil {
			return nil, err
		}
	case !isWhiteout(info):
		f.Other = []string{describe("disk", info.Mode())}
	}
	f.AtRoot, _, err = scanDir(root, ".")
	return f, err
}

// scanDir tells the disks in one directory of an image from all else.
func scanDir(root *os.Root, dir string) (disks []*candidate, other []string, err error) {
	d, err := root.Open(dir)
	if err != nil {
		return nil, nil, err
	}
	entries, err := d.Readdirnames(maxScan)
	if err := errors.Join(err, d.Close()); err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("read /%s: %w", dir, err)
	}
	slices.Sort(entries)
	for _, name := range entries {
		name = path.Join(dir, name)
		info, err := root.Lstat(name)
		if err != nil {
			return nil, nil, err
		}
		if isWhiteout(info) {
			continue
		}
		is, err := isDisk(root, name, info)
		if err != nil {
			return nil, nil, err
		}
		switch {
		case is && len(disks) < maxListed:
			disks = append(disks, &candidate{Name: name, FileSize: info.Size()})
		case !is && len(other) < maxListed:
			other = append(other, describe(name, info.Mode()))
		}
	}
	return disks, other, nil
}

// isDisk reports whether a file is meant as a disk: by its name or, under /disk, as qcow2 by its beginning.
func isDisk(root *os.Root, name string, info fs.FileInfo) (bool, error) {
	if !info.Mode().IsRegular() {
		return false, nil
	}
	switch strings.ToLower(path.Ext(name)) {
	case ".qcow2", ".raw", ".img":
		return true, nil
	}
	if path.Dir(name) != "disk" {
		return false, nil
	}
	f, err := openRegular(root, name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	magic := make([]byte, 4)
	if _, err := io.ReadFull(f, magic); err != nil {
		return false, nil //nolint:nilerr // too short, or not readable: no disk
	}
	return string(magic) == qcow2Magic, nil
}

// isWhiteout reports whether an entry stands for a file that an image of one layer removes.
func isWhiteout(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Rdev == 0 && info.Mode()&fs.ModeCharDevice != 0
}

// describe names what is no disk.
func describe(name string, mode fs.FileMode) string {
	kind := "no disk by its name"
	switch {
	case mode.IsDir():
		kind = "a directory"
	case mode&fs.ModeSymlink != 0:
		kind = "a symbolic link"
	case !mode.IsRegular():
		kind = "no regular file"
	}
	return fmt.Sprintf("/%s (%s)", name, kind)
}

// openRegular opens a regular file of an image. No part of name may be a symbolic link, and nothing but a regular file
// is opened: opening a device or a FIFO does things.
func openRegular(root *os.Root, name string) (*os.File, error) {
	for i := range len(name) {
		if name[i] != '/' {
			continue
		}
		info, err := root.Lstat(name[:i])
		if err := notInImage(name[:i], err); err != nil {
			return nil, err
		}
		if !info.IsDir() {
			return nil, fmt.Errorf("/%s is no directory (%s), want one, and no symbolic links: %w", name[:i], info.Mode().Type(), errdefs.ErrInvalidArgument)
		}
	}
	info, err := root.Lstat(name)
	if err := notInImage(name, err); err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("/%s is no regular file (%s), want one, and no symbolic links: %w", name, info.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	return root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

func notInImage(name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("no file /%s: %w", name, errdefs.ErrNotFound)
	}
	return err
}

// check parses the disk. An error is one of reading; that the disk is refused is noted in c.
func (c *candidate) check(ctx context.Context, root *os.Root) error {
	f, err := openRegular(root, c.Name)
	if err != nil {
		return err
	}
	defer f.Close()
	r := contextReader{ctx, f}
	c.Format, c.Details, err = checkDisk(r, c.FileSize, c.Name)
	if errdefs.IsInvalidArgument(err) && ctx.Err() == nil {
		c.Format, c.Details, c.Error = "", nil, trimClass(err)
		return nil
	}
	if err != nil {
		c.Format = ""
		return fmt.Errorf("check disk /%s: %w", c.Name, err)
	}
	c.VirtualSize = c.FileSize
	if c.Details != nil {
		c.VirtualSize = c.Details.VirtualSize
	}
	return nil
}

// checkDisk finds out a disk's format, and checks that a guest may have it.
func checkDisk(r io.ReaderAt, size int64, name string) (format string, info *qcow2.Info, err error) {
	format, err = qcow2.DetectFormat(r, size, name)
	if err != nil {
		return "", nil, err
	}
	if format == qcow2.FormatQcow2 {
		info, err = qcow2.Check(r, size, qcow2.Limits{MaxVirtualSize: maxDiskSize})
		return format, info, err
	}
	if size <= 0 || size%sectorSize != 0 || size > maxDiskSize {
		err = fmt.Errorf("a raw disk of %d bytes, want a multiple of %d up to 16 TiB: %w", size, sectorSize, errdefs.ErrInvalidArgument)
	}
	return format, nil, err
}

// trimClass takes the error's class out of its text: it is put there again when the text is.
func trimClass(err error) string {
	return strings.TrimSuffix(err.Error(), ": "+errdefs.ErrInvalidArgument.Error())
}

// still makes sure that a disk known from before is the one that is there.
func (c *candidate) still(root *os.Root) error {
	f, err := openRegular(root, c.Name)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Size() != c.FileSize {
		err = fmt.Errorf("disk /%s has %d bytes and had %d when it was checked: the snapshot was changed: %w",
			c.Name, info.Size(), c.FileSize, errdefs.ErrDataLoss)
	}
	return errors.Join(err, f.Close())
}

// contextReader ends reading with its context.
type contextReader struct {
	ctx context.Context
	r   io.ReaderAt
}

func (c contextReader) ReadAt(p []byte, off int64) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.ReadAt(p, off)
}

// readFinding returns what is known of an image. What cannot be read, or is of another version, is not known.
func (s *Store) readFinding(key string) (*finding, bool) {
	data, err := os.ReadFile(s.dirs.finding(key))
	if err != nil {
		return nil, false
	}
	f := &finding{}
	if err := json.Unmarshal(data, f); err != nil || f.Version != findingVersion {
		return nil, false
	}
	return f, true
}

func (s *Store) writeFinding(key string, f *finding) (err error) {
	data, err := json.Marshal(f)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(s.dirs.tmp(), "finding-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeIfThere(tmp.Name())) }()
	_, err = tmp.Write(data)
	if err := errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	return publish(tmp.Name(), s.dirs.finding(key))
}
