package image

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"
)

const goarch = runtime.GOARCH

// list describes each entry below root, as the kernel shows it. first names
// the first of several hard links.
func list(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		line := fmt.Sprintf("mode=%o uid=%d gid=%d rdev=%d mtime=%d.%09d", st.Mode, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if first[st.Ino] == "" {
				first[st.Ino] = rel
			}
			line += fmt.Sprintf(" size=%d first=%s", st.Size, first[st.Ino])
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " target=" + target
		}
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			line += " data=" + hashOf(t, path)
		}
		out[rel] = line + " xattrs=" + xattrsOf(t, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func hashOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func xattrsOf(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]string{}
	for name := range strings.SplitSeq(strings.Trim(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatalf("%s of %s: %v", name, path, err)
		}
		values[name] = string(value[:n])
	}
	var lines []string
	for _, name := range slices.Sorted(maps.Keys(values)) {
		lines = append(lines, fmt.Sprintf("%s=%x", name, values[name]))
	}
	return strings.Join(lines, ",")
}

// mountView mounts the image as a container would see it.
func (n *testNode) mountView(ref, snapshotter string) string {
	n.t.Helper()
	img, err := n.client.GetImage(n.ctx(), ref)
	if err != nil {
		n.t.Fatal(err)
	}
	diffs, err := img.RootFS(n.ctx())
	if err != nil {
		n.t.Fatal(err)
	}
	lease, err := n.client.LeasesService().Create(n.ctx(), leases.WithRandomID())
	if err != nil {
		n.t.Fatal(err)
	}
	ctx := leases.WithLease(n.ctx(), lease.ID)
	mounts, err := n.client.SnapshotService(snapshotter).View(ctx, "test-view", identity.ChainID(diffs).String())
	if err != nil {
		n.t.Fatal(err)
	}
	if info, err := n.client.MountManager().Activate(ctx, "test-view", mounts, mount.WithTemporary); err == nil {
		mounts = info.System
		n.t.Cleanup(func() {
			n.client.MountManager().Deactivate(n.cleanup(), "test-view")
		})
	}
	dir := n.t.TempDir()
	n.t.Cleanup(func() { mount.UnmountAll(dir, 0) })
	if err := mount.All(mounts, dir); err != nil {
		n.t.Fatal(err)
	}
	return dir
}

// mountFile mounts a file system in a file through a loop device.
func mountFile(t testing.TB, file, fstype string, options ...string) string {
	t.Helper()
	dir := t.TempDir()
	m := mount.Mount{Type: fstype, Source: file, Options: append(options, "loop")}
	if err := m.Mount(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mount.UnmountAll(dir, 0) })
	return dir
}

// mustEqual compares two lists entry by entry.
func mustEqual(t *testing.T, want, got map[string]string) {
	t.Helper()
	if len(want) < 2 {
		t.Fatalf("nothing to compare: %v", want)
	}
	for path, line := range want {
		if got[path] != line {
			t.Errorf("%q\n want %.600s\n got  %.600s", path, line, got[path])
		}
	}
	for path, line := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%q should not be there: %.300s", path, line)
		}
	}
}
