package guest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const (
	// maxGetFile bounds one answer of GetFile.
	maxGetFile = 1 << 20
	// newSuffix marks an entry that is about to replace another.
	newSuffix = ".vm-new"
)

// PutFiles makes the tree equal to the entries, in an order in which a reader finds the old content or the
// new: directories and files, then the link "..data", then the other links, and what is stale goes last.
func (s *Server) PutFiles(_ context.Context, req *agentpb.PutFilesRequest) (*agentpb.Empty, error) {
	if !filepath.IsLocal(req.Name) || req.Name == "." {
		return nil, fmt.Errorf("name %q: want a path below the files' root, without \"..\": %w", req.Name, errdefs.ErrInvalidArgument)
	}
	s.files.Lock()
	defer s.files.Unlock()
	root, err := os.OpenRoot(filepath.Join(s.opts.Root, "files"))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	t := &tree{root: root, name: path.Clean(req.Name), inPlace: req.InPlace, owner: s.owner}
	if err := t.put(req.Entries); err != nil {
		return nil, fmt.Errorf("put files %q: %w", req.Name, err)
	}
	return &agentpb.Empty{}, nil
}

// tree is one name below the files' root. os.Root keeps every path inside, whatever links say.
type tree struct {
	root    *os.Root
	name    string
	inPlace bool
	owner   func(uid, gid uint32) (int, int)
}

func (t *tree) put(entries []*agentpb.FileEntry) error {
	for _, e := range entries {
		if e.Path != "." && !filepath.IsLocal(e.Path) {
			return fmt.Errorf("path %q: want a path inside the tree: %w", e.Path, errdefs.ErrInvalidArgument)
		}
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFDIR, unix.S_IFREG, unix.S_IFLNK:
		default:
			return fmt.Errorf("path %q: mode %#o is neither directory, regular file nor symbolic link: %w", e.Path, e.Mode, errdefs.ErrInvalidArgument)
		}
	}
	sorted := slices.Clone(entries)
	slices.SortStableFunc(sorted, func(a, b *agentpb.FileEntry) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(path.Clean(a.Path), path.Clean(b.Path)))
	})
	if err := t.root.MkdirAll(path.Dir(t.name), 0o755); err != nil {
		return err
	}
	keep := make(map[string]bool, len(sorted))
	for _, e := range sorted {
		at := path.Join(t.name, e.Path)
		keep[at] = true
		if err := t.place(at, e); err != nil {
			return err
		}
	}
	return t.prune(t.name, keep)
}

// rank orders entries by when they may change.
func rank(e *agentpb.FileEntry) int {
	switch {
	case e.Mode&unix.S_IFMT == unix.S_IFDIR:
		return 0
	case e.Mode&unix.S_IFMT == unix.S_IFREG:
		return 1
	case path.Base(e.Path) == "..data":
		return 2
	}
	return 3
}

func (t *tree) place(at string, e *agentpb.FileEntry) error {
	have, err := t.root.Lstat(at)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	kind := e.Mode & unix.S_IFMT
	if err == nil && sameKind(have, kind) {
		same, err := t.same(at, kind, e)
		if err != nil {
			return err
		}
		if same {
			return t.own(at, kind, e)
		}
	} else if err == nil && (have.IsDir() || kind == unix.S_IFDIR) {
		// A rename cannot put a file in a directory's place, nor the other way round.
		if err := t.root.RemoveAll(at); err != nil {
			return err
		}
	}
	switch kind {
	case unix.S_IFDIR:
		if err := t.root.MkdirAll(at, 0o755); err != nil {
			return err
		}
		return t.own(at, kind, e)
	case unix.S_IFREG:
		if t.inPlace && err == nil && have.Mode().IsRegular() {
			if err := t.write(at, os.O_WRONLY|os.O_TRUNC, e.Data); err != nil {
				return err
			}
			return t.own(at, kind, e)
		}
	}
	return t.replace(at, kind, e)
}

// replace makes the entry beside its place and renames it.
func (t *tree) replace(at string, kind uint32, e *agentpb.FileEntry) error {
	fresh := at + newSuffix
	if err := t.root.RemoveAll(fresh); err != nil {
		return err
	}
	var err error
	if kind == unix.S_IFLNK {
		err = t.root.Symlink(e.SymlinkTarget, fresh)
	} else {
		err = t.write(fresh, os.O_WRONLY|os.O_CREATE|os.O_EXCL, e.Data)
	}
	if err != nil {
		return err
	}
	if err := t.own(fresh, kind, e); err != nil {
		return err
	}
	return t.root.Rename(fresh, at)
}

func (t *tree) write(at string, flag int, data []byte) error {
	f, err := t.root.OpenFile(at, flag, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// own sets owner and permissions.
func (t *tree) own(at string, kind uint32, e *agentpb.FileEntry) error {
	uid, gid := t.owner(e.Uid, e.Gid)
	if err := t.root.Lchown(at, uid, gid); err != nil {
		return err
	}
	if kind == unix.S_IFLNK {
		return nil
	}
	return t.root.Chmod(at, fileMode(e.Mode))
}

// fileMode turns permission bits as in inode(7) into Go's.
func fileMode(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, goBit := range map[uint32]os.FileMode{unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky} {
		if mode&bit != 0 {
			m |= goBit
		}
	}
	return m
}

func sameKind(have os.FileInfo, kind uint32) bool {
	switch kind {
	case unix.S_IFDIR:
		return have.IsDir()
	case unix.S_IFLNK:
		return have.Mode()&os.ModeSymlink != 0
	}
	return have.Mode().IsRegular()
}

// same tells whether what is there has the entry's content.
func (t *tree) same(at string, kind uint32, e *agentpb.FileEntry) (bool, error) {
	switch kind {
	case unix.S_IFDIR:
		return true, nil
	case unix.S_IFLNK:
		target, err := t.root.Readlink(at)
		return target == e.SymlinkTarget, err
	}
	data, err := t.root.ReadFile(at)
	return bytes.Equal(data, e.Data), err
}

// prune removes what is not to be kept.
func (t *tree) prune(dir string, keep map[string]bool) error {
	info, err := t.root.Lstat(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil || !info.IsDir() {
		return err
	}
	if !keep[dir] && dir == t.name && len(keep) == 0 {
		return t.root.RemoveAll(dir)
	}
	entries, err := fs.ReadDir(t.root.FS(), dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		at := path.Join(dir, e.Name())
		switch {
		case !keep[at] && !hasBelow(keep, at):
			err = t.root.RemoveAll(at)
		case e.IsDir():
			err = t.prune(at, keep)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func hasBelow(keep map[string]bool, dir string) bool {
	for at := range keep {
		if strings.HasPrefix(at, dir+"/") {
			return true
		}
	}
	return false
}

// GetFile reads the head of a regular file. What a container has put in its place is not followed out of
// the tree, and not waited for.
func (s *Server) GetFile(_ context.Context, req *agentpb.GetFileRequest) (*agentpb.GetFileResponse, error) {
	if !filepath.IsLocal(req.Path) {
		return nil, fmt.Errorf("path %q: want a path below the files' root: %w", req.Path, errdefs.ErrInvalidArgument)
	}
	root, err := os.OpenRoot(filepath.Join(s.opts.Root, "files"))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := root.OpenFile(req.Path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("file %q: %w", req.Path, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("file %q is not a regular file: %w", req.Path, errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	limit := int64(maxGetFile)
	if req.MaxBytes > 0 {
		limit = min(limit, req.MaxBytes)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit))
	return &agentpb.GetFileResponse{Data: data}, err
}
