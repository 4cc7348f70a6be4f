package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/containerd/errdefs"
	"github.com/erofs/go-erofs"
	"github.com/opencontainers/go-digest"
)

func TestStoredXattr(t *testing.T) {
	for name, want := range map[string]string{
		"user.note":                "user.note",
		"security.capability":      "security.capability",
		"trusted.x":                "trusted.x",
		"system.posix_acl_access":  "system.posix_acl_access.",
		"system.posix_acl_default": "system.posix_acl_default.",
		"trusted.overlay.opaque":   "",
		"trusted.overlay.redirect": "",
		"user.overlay.metacopy":    "",
		"security.selinux":         "",
		"system.nfs4_acl":          "",
	} {
		got, ok := storedXattr(name)
		if got != want || ok != (want != "") {
			t.Errorf("storedXattr(%s) = %q, %t, want %q", name, got, ok, want)
		}
	}
}

func TestSerial(t *testing.T) {
	format := regexp.MustCompile(`^[a-z0-9-]{1,20}$`)
	for _, chain := range []digest.Digest{"", digest.FromString("a"), digest.SHA512.FromString("a")} {
		key := keyOf(chain)
		if !keyFormat.MatchString(key) || !format.MatchString(serialOf(key)) {
			t.Errorf("chain %q has key %q, serial %q", chain, key, serialOf(key))
		}
	}
}

// writeDir writes the EROFS file of a directory.
func writeDir(t *testing.T, dir string, limit int64) (*os.File, error) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	tree, err := readTree(t.Context(), root, limit)
	if err != nil {
		return nil, err
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "erofs"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, writeEROFS(f, tree, t.TempDir())
}

// makeTree has hard links in several directories, one of them of many blocks.
func makeTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	must(os.Mkdir(filepath.Join(dir, "many"), 0o755))
	must(os.WriteFile(filepath.Join(dir, "a/file"), []byte(noise(200_000)), 0o644))
	for i := range 1000 {
		must(os.Link(filepath.Join(dir, "a/file"), filepath.Join(dir, fmt.Sprintf("many/a-rather-long-name-%d", i))))
	}
	must(os.Link(filepath.Join(dir, "a/file"), filepath.Join(dir, "a/b/link")))
	must(os.WriteFile(filepath.Join(dir, "single"), []byte("single"), 0o600))
	must(os.Symlink("../../../../etc/passwd", filepath.Join(dir, "escape")))
	must(os.Link(filepath.Join(dir, "escape"), filepath.Join(dir, "escape-link")))
	return dir
}

func TestHardLinksShareOneInode(t *testing.T) {
	f, err := writeDir(t, makeTree(t), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	if info, _ := f.Stat(); info.Size() > 400_000 {
		t.Errorf("the file has %d bytes: a link has data of its own", info.Size())
	}
	fsys, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	inodes := map[int64]int{}
	err = fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*erofs.Stat)
		if !d.IsDir() && strings.Contains(path, "link") || strings.HasPrefix(path, "many/") {
			inodes[st.Ino]++
		}
		if strings.HasPrefix(path, "many/") && (st.Nlink != 1002 || st.Size != 200_000) {
			return fmt.Errorf("%s has %d links and %d bytes, want 1002 and 200000", path, st.Nlink, st.Size)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(inodes) != 2 {
		t.Errorf("links have %d inodes, want 2: one file, one symbolic link", len(inodes))
	}
	got, err := fs.ReadFile(fsys, "many/a-rather-long-name-999")
	if err != nil || string(got) != noise(200_000) {
		t.Errorf("a link reads %d bytes, error %v", len(got), err)
	}
}

func TestSameContentGivesSameBytes(t *testing.T) {
	dir := makeTree(t)
	var files [2][]byte
	for i := range files {
		f, err := writeDir(t, dir, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		if files[i], err = os.ReadFile(f.Name()); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("two builds of one directory differ")
	}
}

func TestSizeLimit(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "sparse"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "sparse"), 1<<40); err != nil {
		t.Fatal(err)
	}
	if _, err := writeDir(t, dir, 1<<30); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a file of 1 TiB: %v, want resource exhausted", err)
	}
}

func TestCancelledBuildEnds(t *testing.T) {
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := readTree(ctx, root, 1<<30); !errors.Is(err, context.Canceled) {
		t.Errorf("readTree: %v, want context canceled", err)
	}
}

func TestRefs(t *testing.T) {
	dir := t.TempDir()
	r, err := loadRefs(dir)
	if err != nil {
		t.Fatal(err)
	}
	a, b := keyOf(digest.FromString("a")), keyOf(digest.FromString("b"))
	for _, step := range []struct {
		owner, key string
		added      bool
	}{{"one", a, true}, {"one", a, false}, {"one", b, true}, {"two", b, true}} {
		if added, err := r.add(step.owner, step.key); err != nil || added != step.added {
			t.Fatalf("add %s: %t, %v", step.owner, added, err)
		}
	}
	if r, err = loadRefs(dir); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(r.owners(), " "); got != "one two" {
		t.Errorf("owners after a restart: %s", got)
	}
	if err := r.dropOwner("one"); err != nil || r.used(a) || !r.used(b) {
		t.Errorf("after one is gone: a used %t, b used %t, %v", r.used(a), r.used(b), err)
	}
	if last, err := r.drop("two", b); !last || err != nil || len(r.owners()) != 0 {
		t.Errorf("after two is gone: last %t, %v, owners %v", last, err, r.owners())
	}
}

func TestNames(t *testing.T) {
	for _, bad := range []string{"", "..", ".", "a/b", "../x", "a\x00", strings.Repeat("a", 129), "-a"} {
		if err := checkName("owner", bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v, want invalid argument", bad, err)
		}
	}
	if err := checkName("owner", strings.Repeat("0a", 32)); err != nil {
		t.Error(err)
	}
}

// What looks like a kernel is listed, of very many files as far as that goes.
func TestFindKernels(t *testing.T) {
	tree := func(names ...string) fstest.MapFS {
		files := fstest.MapFS{}
		for _, name := range names {
			files[name] = &fstest.MapFile{}
		}
		return files
	}
	numbered := func(format string, n int) (names []string) {
		for i := range n {
			names = append(names, fmt.Sprintf(format, i))
		}
		return names
	}
	found := func(names ...string) []string {
		t.Helper()
		list, err := findKernels(tree(names...))
		if err != nil {
			t.Error(err)
		}
		return list
	}
	want := []string{"boot/initrd.img-6.1", "boot/vmlinuz-6.1", "usr/lib/modules/6.1/vmlinuz"}
	if got := found(append(want, "boot/grub", "a/b/c/d/e/vmlinuz", "usr/lib/systemd/system/initrd.target", "usr/lib/systemd/system/initrd-cleanup.service")...); !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}
	if got := found(numbered("boot/vmlinuz-%03d", maxListed+2)...); len(got) != maxListed {
		t.Errorf("listed %d of too many kernels, want %d", len(got), maxListed)
	}
	if got := found(append(numbered("file-%06d", maxWalk), "boot/vmlinuz", "vmlinuz")...); len(got) != 1 || got[0] != "boot/vmlinuz" {
		t.Errorf("among too many files it found %q, want what comes first", got)
	}
	unreadable := errors.New("unreadable")
	if _, err := findKernels(brokenFS{unreadable}); !errors.Is(err, unreadable) {
		t.Errorf("files that cannot be read: %v", err)
	}
}

type brokenFS struct{ err error }

func (b brokenFS) Open(string) (fs.File, error) { return nil, b.err }
