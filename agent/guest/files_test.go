package guest

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

func fileServer(t *testing.T) *Server {
	t.Helper()
	s := &Server{opts: Options{Root: t.TempDir()}}
	if err := os.Mkdir(filepath.Join(s.opts.Root, "files"), 0o755); err != nil {
		t.Fatal(err)
	}
	return s
}

func dirEntry(path string, mode uint32) *agentpb.FileEntry {
	return entry(path, unix.S_IFDIR|mode, "")
}

func fileEntry(path, data string) *agentpb.FileEntry { return entry(path, unix.S_IFREG|0o644, data) }

func entry(path string, mode uint32, data string) *agentpb.FileEntry {
	return &agentpb.FileEntry{Path: path, Mode: mode, Data: []byte(data), Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())}
}

func linkEntry(path, target string) *agentpb.FileEntry {
	e := entry(path, unix.S_IFLNK|0o777, "")
	e.SymlinkTarget = target
	return e
}

// tree lists what is below dir: kinds, permissions, contents.
func listTree(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		info, err := d.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			text = "-> " + target
		case d.Type().IsRegular():
			data, _ := os.ReadFile(path)
			text += " " + string(data)
		}
		got[rel] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func put(t *testing.T, s *Server, name string, inPlace bool, entries ...*agentpb.FileEntry) {
	t.Helper()
	if _, err := s.PutFiles(t.Context(), &agentpb.PutFilesRequest{Name: name, Entries: entries, InPlace: inPlace}); err != nil {
		t.Fatal(err)
	}
}

func TestPutFilesKeepsProjectionsLive(t *testing.T) {
	s := fileServer(t)
	dir := filepath.Join(s.opts.Root, "files", "vol")
	put(t, s, "vol", false, dirEntry(".", 0o777|unix.S_ISVTX), linkEntry("..data", "..1"), dirEntry("..1", 0o755),
		fileEntry("..1/a", "one"), fileEntry("..1/b", "two"), linkEntry("a", "..data/a"), linkEntry("b", "..data/b"))
	put(t, s, "vol", false, dirEntry(".", 0o777|unix.S_ISVTX), linkEntry("..data", "..2"), dirEntry("..2", 0o755),
		fileEntry("..2/a", "new"), fileEntry("..2/c", "three"), linkEntry("a", "..data/a"), linkEntry("c", "..data/c"))
	want := map[string]string{
		".": "dtrwxrwxrwx", "..data": "-> ..2", "..2": "drwxr-xr-x", "..2/a": "-rw-r--r-- new", "..2/c": "-rw-r--r-- three",
		"a": "-> ..data/a", "c": "-> ..data/c",
	}
	if diff := cmp.Diff(want, listTree(t, dir)); diff != "" {
		t.Error(diff)
	}
	// Kinds change too.
	put(t, s, "vol", false, dirEntry(".", 0o755), fileEntry("..2", "file"), dirEntry("a", 0o700), fileEntry("a/x", "deep"))
	want = map[string]string{".": "drwxr-xr-x", "..2": "-rw-r--r-- file", "a": "drwx------", "a/x": "-rw-r--r-- deep"}
	if diff := cmp.Diff(want, listTree(t, dir)); diff != "" {
		t.Error(diff)
	}
	put(t, s, "vol", false)
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("an empty tree is still there: %v", err)
	}
}

// A reader of the tree sees whole old files or whole new ones, at any moment.
func TestPutFilesIsAtomic(t *testing.T) {
	s := fileServer(t)
	versions := [2][]*agentpb.FileEntry{
		{dirEntry(".", 0o755), dirEntry("..1", 0o755), linkEntry("..data", "..1"), fileEntry("..1/a", "11111111"), linkEntry("a", "..data/a")},
		{dirEntry(".", 0o755), dirEntry("..2", 0o755), linkEntry("..data", "..2"), fileEntry("..2/a", "22222222"), linkEntry("a", "..data/a")},
	}
	put(t, s, "vol", false, versions[0]...)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 200 {
			put(t, s, "vol", false, versions[(i+1)%2]...)
		}
	}()
	path := filepath.Join(s.opts.Root, "files", "vol", "a")
	for {
		data, err := os.ReadFile(path)
		// Between reading "..data" and opening the file its directory may go; kubelet's own writer is no better.
		if err != nil && !os.IsNotExist(err) || err == nil && string(data) != "11111111" && string(data) != "22222222" {
			t.Fatalf("read %q, %v", data, err)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

func TestPutFilesInPlaceKeepsInode(t *testing.T) {
	s := fileServer(t)
	path := filepath.Join(s.opts.Root, "files", "etc-hosts")
	inode := func() uint64 {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	put(t, s, "etc-hosts", true, fileEntry(".", "long content"))
	before := inode()
	put(t, s, "etc-hosts", true, fileEntry(".", "short"))
	if data, _ := os.ReadFile(path); string(data) != "short" || inode() != before {
		t.Errorf("%q, inode %d, was %d", data, inode(), before)
	}
}

func TestPutFilesRefuses(t *testing.T) {
	s := fileServer(t)
	for name, req := range map[string]*agentpb.PutFilesRequest{
		"name outside":   {Name: "../x"},
		"absolute name":  {Name: "/etc"},
		"the root":       {Name: "."},
		"path outside":   {Name: "v", Entries: []*agentpb.FileEntry{fileEntry("../x", "")}},
		"a device":       {Name: "v", Entries: []*agentpb.FileEntry{entry("d", unix.S_IFCHR, "")}},
		"a mode of none": {Name: "v", Entries: []*agentpb.FileEntry{entry("d", 0o644, "")}},
	} {
		if _, err := s.PutFiles(t.Context(), req); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		}
	}
	// A link out of the tree, as a container might put there, is not followed.
	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, s, "v", false, dirEntry(".", 0o755))
	if err := os.Symlink(outside, filepath.Join(s.opts.Root, "files", "v", "log")); err != nil {
		t.Fatal(err)
	}
	if resp, err := s.GetFile(t.Context(), &agentpb.GetFileRequest{Path: "v/log"}); err == nil {
		t.Errorf("read %q through a link", resp.Data)
	}
}

func TestGetFile(t *testing.T) {
	s := fileServer(t)
	put(t, s, "term", true, fileEntry(".", "0123456789"))
	resp, err := s.GetFile(t.Context(), &agentpb.GetFileRequest{Path: "term", MaxBytes: 4})
	if err != nil || string(resp.Data) != "0123" {
		t.Errorf("%v, %v", resp, err)
	}
	if _, err := s.GetFile(t.Context(), &agentpb.GetFileRequest{Path: "none"}); !errdefs.IsNotFound(err) {
		t.Errorf("missing file: %v", err)
	}
	if err := unix.Mkfifo(filepath.Join(s.opts.Root, "files", "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetFile(t.Context(), &agentpb.GetFileRequest{Path: "fifo"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("fifo: %v", err)
	}
}
