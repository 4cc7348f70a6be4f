package runtime

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// atomicVolume writes a volume as the kubelet does: a directory of its own, to which "..data" leads after one rename.
func atomicVolume(t *testing.T, dir, version string) {
	t.Helper()
	old, _ := os.Readlink(filepath.Join(dir, dataLink))
	tmp := filepath.Join(dir, "..data_tmp")
	err := errors.Join(
		os.Mkdir(filepath.Join(dir, ".."+version), 0o755),
		os.WriteFile(filepath.Join(dir, ".."+version, "key"), []byte(version), 0o644),
		os.Symlink(".."+version, tmp),
		os.Rename(tmp, filepath.Join(dir, dataLink)),
	)
	if old != "" {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, old)))
	}
	if err != nil {
		t.Error(err)
	}
}

// current is the content that a reader of the pushed entries finds behind "..data".
func current(t *testing.T, dir string) string {
	t.Helper()
	entries, err := readTree(dir)
	if err != nil {
		t.Error(err)
		return ""
	}
	files := make(map[string]string)
	for _, e := range entries {
		files[e.GetPath()] = e.GetSymlinkTarget() + string(e.GetData())
	}
	content, ok := files[files[dataLink]+"/key"]
	if !ok {
		t.Errorf("%q leads to %q, which is not among %v", dataLink, files[dataLink], files)
	}
	return content
}

func TestReadTreeIsOneMoment(t *testing.T) {
	dir := t.TempDir()
	atomicVolume(t, dir, "0")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				atomicVolume(t, dir, time.Now().Format(".150405.000000000"))
			}
		}
	}()
	for range 200 {
		current(t, dir)
	}
	close(stop)
	<-stopped
}

// TestProjectionPushes holds that a volume is pushed when its watch begins, when it changes, and again after a push
// that failed.
func TestProjectionPushes(t *testing.T) {
	dir := t.TempDir()
	atomicVolume(t, dir, "1")
	pushed := make(chan string)
	p, err := newProjections(t.Context(), slog.New(slog.DiscardHandler), func(ctx context.Context, m resolvedMount) error {
		content := current(t, m.HostPath)
		select {
		case pushed <- content:
		case <-ctx.Done():
		}
		if content == "2" {
			return unix.EIO
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	m := resolvedMount{Name: "v", HostPath: dir}
	if err := p.add(m); err != nil {
		t.Fatal(err)
	}
	expect := func(want string) {
		t.Helper()
		select {
		case got := <-pushed:
			if got != want {
				t.Errorf("pushed %q, want %q", got, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("nothing was pushed, want %q", want)
		}
	}
	expect("1")
	atomicVolume(t, dir, "2")
	expect("2")
	expect("2")
	atomicVolume(t, dir, "3")
	expect("3")
}

func TestRunDirWithMountIsKept(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	node, link := t.TempDir(), filepath.Join(t.TempDir(), "state")
	keep := filepath.Join(node, "keep")
	state := t.TempDir()
	target := filepath.Join(state, "pod", "share", "v")
	if err := errors.Join(os.WriteFile(keep, nil, 0o600), os.MkdirAll(target, 0o755), os.Symlink(state, link)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(node, target, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("needs to be allowed to mount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	if err := removeRunDir(filepath.Join(link, "pod")); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), target) {
		t.Errorf("got %v, want an error that names %s", err, target)
	}
	if _, err := os.Stat(keep); err != nil {
		t.Errorf("a file of the node behind a mount: %v", err)
	}
	if err := unix.Unmount(target, 0); err != nil {
		t.Fatal(err)
	}
	if err := removeRunDir(filepath.Join(link, "pod")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(state, "pod")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the run directory: %v, want that it is gone", err)
	}
}
