package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

const (
	maxEntries    = 4 << 20   // files of one image; each costs some hundred bytes of memory
	maxXattrBytes = 128 << 10 // of one file; the EROFS inode counts them in 16 bits
)

// node is one entry of a root file system. It is its own fs.FileInfo and
// fs.DirEntry.
type node struct {
	name     string
	path     string // slash separated, "." for the root
	mode     fs.FileMode
	stat     erofs.Stat
	size     int64
	target   string // of a symbolic link
	children []*node
	first    *node  // of a further hard link: the entry that carries the inode
	nid      uint64 // in the EROFS file, once it is written
}

func (n *node) Name() string               { return n.name }
func (n *node) Size() int64                { return n.size }
func (n *node) Mode() fs.FileMode          { return n.mode }
func (n *node) ModTime() time.Time         { return time.Unix(int64(n.stat.Mtime), int64(n.stat.MtimeNs)) }
func (n *node) IsDir() bool                { return n.mode.IsDir() }
func (n *node) Sys() any                   { return &n.stat }
func (n *node) Type() fs.FileMode          { return n.mode.Type() }
func (n *node) Info() (fs.FileInfo, error) { return n, nil }

// tree is a root file system read into memory, all but the files' data. It is
// the fs.FS that the EROFS writer copies.
type tree struct {
	ctx    context.Context
	root   *os.Root
	nodes  map[string]*node
	inodes map[inode]*node // of files with several links
	links  []*node         // further hard links
	bytes  int64
	limit  int64
}

type inode struct{ dev, ino uint64 }

// readTree reads everything below root. Entries are sorted by name, so that the
// same content gives the same tree.
func readTree(ctx context.Context, root *os.Root, maxBytes int64) (*tree, error) {
	t := &tree{ctx: ctx, root: root, nodes: map[string]*node{}, inodes: map[inode]*node{}, limit: maxBytes}
	var st unix.Stat_t
	dir, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	err = errors.Join(unix.Fstat(int(dir.Fd()), &st), dir.Close())
	if err != nil {
		return nil, fmt.Errorf("stat root directory: %w", err)
	}
	top := newNode(".", ".", &st)
	t.nodes["."] = top
	return t, t.readDir(top)
}

// readDir reads the entries of n, and those of directories below. Names are used
// one at a time, relative to an open directory, and never followed.
func (t *tree) readDir(n *node) error {
	dir, err := t.root.Open(n.path)
	if err != nil {
		return err
	}
	err = t.readEntries(n, dir)
	if err := errors.Join(err, dir.Close()); err != nil {
		return err
	}
	n.stat.Nlink = 2
	for _, c := range n.children {
		if !c.IsDir() {
			continue
		}
		n.stat.Nlink++
		if err := t.readDir(c); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) readEntries(n *node, dir *os.File) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("read directory %s: %w", n.path, err)
	}
	slices.Sort(names)
	n.stat.Xattrs, err = readXattrs(dir, ".")
	if err != nil {
		return fmt.Errorf("read attributes of %s: %w", n.path, err)
	}
	for _, name := range names {
		c, err := t.readEntry(dir, n.path, name)
		if err != nil {
			return fmt.Errorf("read %s: %w", path.Join(n.path, name), err)
		}
		if c != nil {
			n.children = append(n.children, c)
		}
	}
	return nil
}

// readEntry reads one entry; nil if it is a whiteout, which a single layer shows
// as a character device with the number 0/0.
func (t *tree) readEntry(dir *os.File, parent, name string) (*node, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 {
		return nil, nil
	}
	n := newNode(name, path.Join(parent, name), &st)
	t.nodes[n.path] = n
	if len(t.nodes) > maxEntries {
		return nil, fmt.Errorf("the image has more than %d files: %w", maxEntries, errdefs.ErrResourceExhausted)
	}
	if n.IsDir() {
		return n, nil // the rest is read when it is open
	}
	if t.linked(n, &st) {
		return n, nil
	}
	return n, t.readContent(dir, n)
}

// linked finds the further links of an inode. They take no room of their own.
func (t *tree) linked(n *node, st *unix.Stat_t) bool {
	n.stat.Nlink = 1
	if st.Nlink < 2 {
		return false
	}
	id := inode{st.Dev, st.Ino}
	first := t.inodes[id]
	if first == nil {
		t.inodes[id] = n
		return false
	}
	first.stat.Nlink++
	n.first, n.size = first, 0
	n.target = first.target
	t.links = append(t.links, n)
	return true
}

// readContent reads what a file has besides its inode and data.
func (t *tree) readContent(dir *os.File, n *node) (err error) {
	if n.mode&fs.ModeSymlink != 0 {
		if n.target, err = readlink(dir, n.name); err != nil {
			return err
		}
	}
	if n.mode.IsRegular() {
		t.bytes += n.size
		if t.bytes > t.limit {
			return fmt.Errorf("the files of the image are larger than the limit of %d bytes: %w", t.limit, errdefs.ErrResourceExhausted)
		}
	}
	n.stat.Xattrs, err = readXattrs(dir, n.name)
	return err
}

func newNode(name, path string, st *unix.Stat_t) *node {
	n := &node{name: name, path: path, mode: fileMode(st.Mode)}
	if n.mode.IsRegular() {
		n.size = st.Size
	}
	n.stat = erofs.Stat{
		UID: st.Uid, GID: st.Gid, Rdev: uint32(st.Rdev),
		Mtime: uint64(st.Mtim.Sec), MtimeNs: uint32(st.Mtim.Nsec),
	}
	return n
}

// fileMode translates st_mode.
func fileMode(m uint32) fs.FileMode {
	types := map[uint32]fs.FileMode{
		unix.S_IFDIR: fs.ModeDir, unix.S_IFLNK: fs.ModeSymlink, unix.S_IFIFO: fs.ModeNamedPipe,
		unix.S_IFSOCK: fs.ModeSocket, unix.S_IFBLK: fs.ModeDevice, unix.S_IFCHR: fs.ModeDevice | fs.ModeCharDevice,
	}
	mode := fs.FileMode(m&0o777) | types[m&unix.S_IFMT]
	if m&unix.S_ISUID != 0 {
		mode |= fs.ModeSetuid
	}
	if m&unix.S_ISGID != 0 {
		mode |= fs.ModeSetgid
	}
	if m&unix.S_ISVTX != 0 {
		mode |= fs.ModeSticky
	}
	return mode
}

func readlink(dir *os.File, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// readXattrs reads the extended attributes that mean something in a guest.
func readXattrs(dir *os.File, name string) (map[string]string, error) {
	p := "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + name
	list, err := xattr(func(b []byte) (int, error) { return unix.Llistxattr(p, b) })
	if err != nil || len(list) == 0 {
		return nil, err
	}
	var out map[string]string
	total := 0
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		stored, ok := storedXattr(attr)
		if !ok {
			continue
		}
		value, err := xattr(func(b []byte) (int, error) { return unix.Lgetxattr(p, attr, b) })
		if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", attr, err)
		}
		if total += len(attr) + len(value) + 8; total > maxXattrBytes {
			return nil, fmt.Errorf("extended attributes are larger than %d bytes: %w", maxXattrBytes, errdefs.ErrResourceExhausted)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[stored] = string(value)
	}
	return out, nil
}

// storedXattr returns the name under which the EROFS writer stores an attribute,
// or false if it is left out. Left out are: attributes of overlayfs, because the
// image would steer the guest's overlay with them; SELinux labels, which are the
// host's; and kinds that EROFS cannot hold.
func storedXattr(name string) (string, bool) {
	for _, p := range []string{"trusted.overlay.", "user.overlay.", "security.selinux"} {
		if strings.HasPrefix(name, p) {
			return "", false
		}
	}
	if name == "system.posix_acl_access" || name == "system.posix_acl_default" {
		return name + ".", true // the writer takes these for prefixes of an empty name
	}
	for _, p := range []string{"user.", "trusted.", "security."} {
		if strings.HasPrefix(name, p) {
			return name, true
		}
	}
	return "", false
}

// xattr calls get with a buffer that is large enough. A file system without
// extended attributes has none.
func xattr(get func([]byte) (int, error)) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := get(buf)
		switch {
		case err == nil:
			return buf[:n], nil
		case errors.Is(err, unix.ENOTSUP):
			return nil, nil
		case !errors.Is(err, unix.ERANGE) || len(buf) >= 1<<20:
			return nil, err
		}
		buf = make([]byte, 4*len(buf))
	}
}

// Open implements fs.FS. A file is opened in truth at its first Read.
func (t *tree) Open(name string) (fs.File, error) {
	n, err := t.find("open", name)
	if err != nil {
		return nil, err
	}
	return &lazyFile{tree: t, node: n}, nil
}

// Stat implements fs.StatFS.
func (t *tree) Stat(name string) (fs.FileInfo, error) { return t.find("stat", name) }

// ReadDir implements fs.ReadDirFS.
func (t *tree) ReadDir(name string) ([]fs.DirEntry, error) {
	n, err := t.find("readdir", name)
	if err != nil {
		return nil, err
	}
	entries := make([]fs.DirEntry, len(n.children))
	for i, c := range n.children {
		entries[i] = c
	}
	return entries, nil
}

// ReadLink returns the target of a symbolic link.
func (t *tree) ReadLink(name string) (string, error) {
	n, err := t.find("readlink", name)
	if err != nil {
		return "", err
	}
	return n.target, nil
}

func (t *tree) find(op, name string) (*node, error) {
	if n := t.nodes[name]; n != nil {
		return n, nil
	}
	return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
}

// lazyFile is a regular file of a tree: the writer holds all files of an image at
// once, more than a process may have open.
type lazyFile struct {
	tree *tree
	node *node
	file *os.File
}

func (f *lazyFile) Stat() (fs.FileInfo, error) { return f.node, nil }

func (f *lazyFile) Read(p []byte) (int, error) {
	if err := f.tree.ctx.Err(); err != nil {
		return 0, err
	}
	if f.file == nil {
		file, err := f.tree.root.OpenFile(f.node.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return 0, err
		}
		f.file = file
	}
	return f.file.Read(p)
}

func (f *lazyFile) Close() error {
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}
