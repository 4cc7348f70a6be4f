package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/erofs/go-erofs"
)

// writeImage writes the EROFS file of key from root and puts it in its place.
func (s *Store) writeImage(ctx context.Context, root *os.Root, key string) error {
	if err := s.writeFile(ctx, root, s.dirs.erofs(key)); err != nil {
		return err
	}
	return syncDir(s.dirs.images())
}

// Pack makes a directory of the node an EROFS file of the store, which is replaced if it is there, and tells its path. No image has to do with it.
func (s *Store) Pack(ctx context.Context, dir, name string) (path string, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	path = filepath.Join(s.opts.Root, name+erofsSuffix)
	return path, s.writeFile(ctx, root, path)
}

// writeFile writes an EROFS file from root to a path, whole or not at all.
func (s *Store) writeFile(ctx context.Context, root *os.Root, path string) (err error) {
	t, err := readTree(ctx, root, s.opts.MaxImageBytes)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(s.dirs.tmp(), "erofs-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeIfThere(f.Name()))
		}
	}()
	if err := errors.Join(writeEROFS(f, t, s.dirs.tmp()), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// writeEROFS writes t to f, which is empty, and syncs it.
func writeEROFS(f *os.File, t *tree, tmp string) error {
	w := erofs.Create(f, erofs.WithBuildTime(0, 0), erofs.WithBlockSize(blockSize), erofs.WithTempDir(tmp))
	if err := w.CopyFrom(t); err != nil {
		return fmt.Errorf("write EROFS: %w", err)
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("write EROFS: %w", err)
	}
	if err := joinLinks(f, t); err != nil {
		return fmt.Errorf("join hard links in EROFS: %w", err)
	}
	return f.Sync()
}

// The parts of the on-disk format that joinLinks needs. All numbers are little
// endian. See the kernel's Documentation/filesystems/erofs.rst and
// fs/erofs/erofs_fs.h.
const (
	blockSize     = 4096
	superOffset   = 1024
	superRootNID  = superOffset + 14 // u16
	superInodes   = superOffset + 16 // u64
	superMetaBlk  = superOffset + 40 // u32
	nidUnit       = 32               // an inode lies at meta + nid*nidUnit
	inodeExtended = 64               // bytes; the compact form has 32
	inodeXattrs   = 2                // u16
	inodeSize     = 8                // u64, u32 in the compact form
	inodeBlock    = 16               // u32
	layoutInline  = 2
	direntSize    = 12 // u64 nid, u16 offset of the name, u8 type, u8 reserved
)

// joinLinks makes hard links of what the writer, which knows none, wrote as
// separate empty files: each further link's directory entry is pointed at the
// inode of the first. Sharing the inode matters for more than its identity: an
// image of busybox has hundreds of links to one large file.
func joinLinks(f *os.File, t *tree) error {
	if len(t.links) == 0 {
		return nil
	}
	d := direntReader{f: f, at: map[*node]int64{}}
	root := t.nodes["."]
	super := make([]byte, superMetaBlk+4)
	if _, err := f.ReadAt(super, 0); err != nil {
		return err
	}
	root.nid = uint64(binary.LittleEndian.Uint16(super[superRootNID:]))
	d.meta = int64(binary.LittleEndian.Uint32(super[superMetaBlk:])) * blockSize
	if err := d.readTree(root); err != nil {
		return err
	}
	for _, n := range t.links {
		if err := writeUint64(f, n.first.nid, d.at[n]); err != nil {
			return err
		}
	}
	inodes := binary.LittleEndian.Uint64(super[superInodes:])
	return writeUint64(f, inodes-uint64(len(t.links)), superInodes)
}

func writeUint64(w io.WriterAt, v uint64, off int64) error {
	_, err := w.WriteAt(binary.LittleEndian.AppendUint64(nil, v), off)
	return err
}

// direntReader finds the directory entries of a tree in its EROFS file.
type direntReader struct {
	f    *os.File
	meta int64           // offset of the inodes
	at   map[*node]int64 // offset of the directory entry
}

// readTree finds the entries of n and of all directories below.
func (d *direntReader) readTree(n *node) error {
	children := make(map[string]*node, len(n.children))
	for _, c := range n.children {
		children[c.name] = c
	}
	if err := d.readDir(n, children); err != nil {
		return fmt.Errorf("directory %s: %w", n.path, err)
	}
	for _, c := range n.children {
		if _, ok := d.at[c]; !ok {
			return fmt.Errorf("directory %s has no entry %s", n.path, c.name)
		}
		if c.IsDir() {
			if err := d.readTree(c); err != nil {
				return err
			}
		}
	}
	return nil
}

// readDir reads the blocks of one directory.
func (d *direntReader) readDir(n *node, children map[string]*node) error {
	off, size, err := d.data(n.nid)
	if err != nil {
		return err
	}
	buf := make([]byte, blockSize)
	for size > 0 {
		block := buf[:min(size, blockSize)]
		if _, err := d.f.ReadAt(block, off); err != nil {
			return err
		}
		if err := d.readBlock(block, off, children); err != nil {
			return err
		}
		off, size = off+int64(len(block)), size-int64(len(block))
	}
	return nil
}

// data returns where the data of a directory lies.
func (d *direntReader) data(nid uint64) (off, size int64, err error) {
	pos := d.meta + int64(nid)*nidUnit
	head := make([]byte, 32)
	if _, err := d.f.ReadAt(head, pos); err != nil {
		return 0, 0, err
	}
	format := binary.LittleEndian.Uint16(head)
	inodeBytes := int64(32)
	size = int64(binary.LittleEndian.Uint32(head[inodeSize:]))
	if format&1 != 0 {
		inodeBytes = inodeExtended
		size = int64(binary.LittleEndian.Uint64(head[inodeSize:]))
	}
	if format>>1&7 != layoutInline {
		return int64(binary.LittleEndian.Uint32(head[inodeBlock:])) * blockSize, size, nil
	}
	off = pos + inodeBytes
	if x := int64(binary.LittleEndian.Uint16(head[inodeXattrs:])); x > 0 {
		off += 12 + (x-1)*4
	}
	return off, size, nil
}

// readBlock reads the entries of one block of a directory.
func (d *direntReader) readBlock(block []byte, off int64, children map[string]*node) error {
	if len(block) < direntSize {
		return fmt.Errorf("block of %d bytes is too short", len(block))
	}
	count := int(binary.LittleEndian.Uint16(block[8:])) / direntSize
	for i := range count {
		entry := block[i*direntSize:]
		start, end := int(binary.LittleEndian.Uint16(entry[8:])), len(block)
		if i+1 < count {
			end = int(binary.LittleEndian.Uint16(entry[direntSize+8:]))
		}
		if start > end || end > len(block) {
			return fmt.Errorf("entry %d has its name at %d to %d", i, start, end)
		}
		name, _, _ := bytes.Cut(block[start:end], []byte{0})
		if c := children[string(name)]; c != nil {
			c.nid = binary.LittleEndian.Uint64(entry)
			d.at[c] = off + int64(i)*direntSize
		}
	}
	return nil
}
