package image

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const testRef = "registry.test/two-layers:1"

func (n *testNode) cleanup() context.Context { return context.WithoutCancel(n.ctx()) }

func (n *testNode) store(change ...func(*Options)) *Store {
	n.t.Helper()
	o := Options{Root: filepath.Join(n.dir, "store"), Client: n.client, Logger: slog.New(slog.DiscardHandler)}
	for _, c := range change {
		c(&o)
	}
	s, err := New(o)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { s.Close() })
	return s
}

func twoLayers(t *testing.T) v1.Image { return imageOf(t, "web", baseLayer(t), upperLayer(t)) }

func ensure(t testing.TB, s *Store, ref, owner string) *Image {
	t.Helper()
	img, err := s.Ensure(t.Context(), ref, owner)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func there(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func mustBeEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("left over: %s", filepath.Join(dir, e.Name()))
	}
}

func TestRootFSIsWhatAContainerSees(t *testing.T) {
	for _, snapshotter := range []string{"overlayfs", "native", "erofs"} {
		t.Run(snapshotter, func(t *testing.T) {
			n := startContainerd(t)
			layers := []v1.Layer{baseLayer(t), upperLayer(t)}
			if snapshotter != "erofs" {
				layers = append(layers, longNameLayer(t))
			}
			n.load(testRef, imageOf(t, "web", layers...), snapshotter)
			s := n.store()
			img := ensure(t, s, testRef, "c1")
			want := list(t, n.mountView(testRef, snapshotter))
			mustEqual(t, want, list(t, mountFile(t, img.RootFS, "erofs", "ro")))
			for path, part := range map[string]string{
				"bin/ping": "security.capability=01", "etc/acl": "system.posix_acl_access=02", "bin/su": "mode=104755",
				"bin/applet49": "first=bin/applet00 ", "dev/large": "rdev=", "etc/size-1": ".123456789 ", "etc/epoch": "mtime=0.",
			} {
				if !strings.Contains(want[path], part) {
					t.Errorf("the test image lacks %s at %s: %s", part, path, want[path])
				}
			}
			for _, gone := range []string{"etc/gone", "removed", "opaque/old", "opaque/sub", "bin/cut-removed", "becomes-file/inner"} {
				if _, ok := want[gone]; ok {
					t.Errorf("%s is there", gone)
				}
			}
			if out, err := exec.Command("fsck.erofs", img.RootFS).CombinedOutput(); err != nil && !errors.Is(err, exec.ErrNotFound) {
				t.Errorf("fsck.erofs: %v\n%s", err, out)
			}
			mustBeEmpty(t, s.dirs.tmp())
		})
	}
}

func TestImageOfOneLayerHidesWhiteouts(t *testing.T) {
	n := startContainerd(t)
	l := newLayer(t)
	l.file("file", "x")
	l.file(".wh.other", "")
	n.load(testRef, imageOf(t, "", l.done()), "overlayfs")
	img := ensure(t, n.store(), testRef, "c1")
	if got := list(t, mountFile(t, img.RootFS, "erofs", "ro")); len(got) != 2 || got["file"] == "" {
		t.Errorf("entries: %v, want the root and one file", got)
	}
}

// TestImageCannotSteerTheOverlay: the guest puts an overlay on the root file
// system, which would follow attributes of overlayfs in it.
func TestImageCannotSteerTheOverlay(t *testing.T) {
	n := startContainerd(t)
	l := newLayer(t)
	l.add(tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o755, PAXRecords: map[string]string{
		"SCHILY.xattr.user.overlay.opaque": "y", "SCHILY.xattr.user.overlay.redirect": "/etc", "SCHILY.xattr.user.kept": "1",
	}}, "")
	n.load(testRef, imageOf(t, "", l.done()), "native")
	img := ensure(t, n.store(), testRef, "c1")
	dir := mountFile(t, img.RootFS, "erofs", "ro")
	buf := make([]byte, 4096)
	size, err := unix.Llistxattr(filepath.Join(dir, "dir"), buf)
	if got := string(buf[:max(size, 0)]); err != nil || got != "user.kept\x00" {
		t.Errorf("attributes %q, %v, want user.kept alone", got, err)
	}
}

func TestImageWithoutLayers(t *testing.T) {
	n := startContainerd(t)
	n.load(testRef, imageOf(t, ""), "")
	img := ensure(t, n.store(), testRef, "c1")
	if got := list(t, mountFile(t, img.RootFS, "erofs", "ro")); len(got) != 1 {
		t.Errorf("entries: %v, want the root alone", got)
	}
}

func TestFS(t *testing.T) {
	n := startContainerd(t)
	n.load(testRef, twoLayers(t), "overlayfs")
	img := ensure(t, n.store(), testRef, "c1")
	fsys, closer, err := img.FS()
	if err != nil {
		t.Fatal(err)
	}
	defer closer.Close()
	for name, want := range map[string]string{"etc/passwd": "web:x:1000", "etc/group": "late:x:2000", "etc/absolute": "web:x:1000"} {
		if got, err := fs.ReadFile(fsys, name); err != nil || !strings.Contains(string(got), want) {
			t.Errorf("%s is %q, %v", name, got, err)
		}
	}
	if _, err := fs.ReadFile(fsys, "etc/escape"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a symbolic link out of the image: %v, want not exist", err)
	}
}

func TestReferences(t *testing.T) {
	n := startContainerd(t)
	const ref = "docker.io/library/thing:latest"
	v := twoLayers(t)
	loaded := n.load(ref, v, "overlayfs")
	id, _ := v.ConfigName()
	byDigest := "docker.io/library/thing@" + loaded.Target().Digest.String()
	if _, err := n.client.ImageService().Create(n.ctx(), images.Image{Name: byDigest, Target: loaded.Target()}); err != nil {
		t.Fatal(err)
	}
	s := n.store()
	for i, r := range []string{ref, "thing", "thing:latest", byDigest, "thing:latest@" + loaded.Target().Digest.String(), id.String(), id.Hex, id.Hex[:12]} {
		img, err := s.Ensure(t.Context(), r, fmt.Sprintf("c%d", i))
		if err != nil {
			t.Errorf("%s: %v", r, err)
			continue
		}
		if img.Digest != id.String() || img.Ref != r || img.Config.Config.User != "web" || img.Size == 0 || len(img.Serial) > 20 {
			t.Errorf("%s gives %+v", r, img)
		}
	}
	for r, is := range map[string]func(error) bool{
		"":                                   errdefs.IsInvalidArgument,
		"registry.test/unknown:1":            errdefs.IsNotFound,
		"Not A Reference":                    errdefs.IsNotFound,
		"sha256:" + strings.Repeat("00", 32): errdefs.IsNotFound,
	} {
		if _, err := s.Ensure(t.Context(), r, "failed"); !is(err) {
			t.Errorf("reference %q: %v", r, err)
		}
	}
	if _, err := s.Ensure(t.Context(), ref, "../x"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("owner ../x: %v, want invalid argument", err)
	}
	if there(filepath.Join(s.dirs.owners(), "failed")) {
		t.Error("a failed Ensure left its owner")
	}
}

// builds counts log records of builds.
type buildCounter struct {
	slog.Handler
	n *atomic.Int32
}

func (c buildCounter) Enabled(context.Context, slog.Level) bool { return true }
func (c buildCounter) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "built root file system" {
		c.n.Add(1)
	}
	return nil
}

func TestOneBuildForAll(t *testing.T) {
	n := startContainerd(t)
	base := baseLayer(t)
	n.load("registry.test/a:1", imageOf(t, "a", base), "overlayfs")
	n.load("registry.test/b:1", imageOf(t, "b", base), "overlayfs")
	var built atomic.Int32
	s := n.store(func(o *Options) { o.Logger = slog.New(buildCounter{slog.DiscardHandler, &built}) })
	var group errgroup.Group
	var mu sync.Mutex
	paths, ids := map[string]bool{}, map[string]bool{}
	for i := range 20 {
		group.Go(func() error {
			img, err := s.Ensure(t.Context(), fmt.Sprintf("registry.test/%c:1", 'a'+i%2), fmt.Sprintf("c%d", i))
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				paths[img.RootFS+img.Serial], ids[img.Digest] = true, true
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if built.Load() != 1 || len(paths) != 1 || len(ids) != 2 {
		t.Errorf("%d builds, %d files, %d images, want 1, 1, 2", built.Load(), len(paths), len(ids))
	}
}

func (n *testNode) deleteImages() {
	n.t.Helper()
	all, err := n.client.ImageService().List(n.ctx())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, img := range all {
		if err := n.client.ImageService().Delete(n.ctx(), img.Name, images.SynchronousDelete()); err != nil && !errdefs.IsNotFound(err) {
			n.t.Fatal(err)
		}
	}
}

func (n *testNode) leases() []leases.Lease {
	n.t.Helper()
	all, err := n.client.LeasesService().List(n.ctx())
	if err != nil {
		n.t.Fatal(err)
	}
	return all
}

// snapshots counts the image's snapshots.
func (n *testNode) snapshots() int {
	n.t.Helper()
	count := 0
	err := n.client.SnapshotService("overlayfs").Walk(n.ctx(), func(context.Context, snapshots.Info) error {
		count++
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return count
}

// collectGarbage makes containerd remove what nothing refers to, and waits.
func (n *testNode) collectGarbage() {
	n.t.Helper()
	lease, err := n.client.LeasesService().Create(n.ctx(), leases.WithRandomID())
	if err == nil {
		err = n.client.LeasesService().Delete(n.ctx(), lease, leases.SynchronousDelete)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

func TestImageInUseSurvivesGarbageCollection(t *testing.T) {
	n := startContainerd(t)
	loaded := n.load(testRef, twoLayers(t), "overlayfs")
	s := n.store()
	img := ensure(t, s, testRef, "c1")
	ensure(t, s, testRef, "c2")
	n.deleteImages()
	n.collectGarbage()
	if err := s.Release(t.Context(), "c2"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client.ContentStore().Info(n.ctx(), loaded.Target().Digest); err != nil {
		t.Errorf("content of an image in use: %v", err)
	}
	if got := n.snapshots(); got != 2 || !there(img.RootFS) {
		t.Errorf("%d snapshots, want 2; root file system there: %t", got, there(img.RootFS))
	}
	for range 2 { // idempotent
		if err := s.Release(t.Context(), "c1"); err != nil {
			t.Fatal(err)
		}
	}
	n.collectGarbage()
	if _, err := n.client.ContentStore().Info(n.ctx(), loaded.Target().Digest); !errdefs.IsNotFound(err) {
		t.Errorf("content after release: %v, want not found", err)
	}
	if got := n.snapshots(); got != 0 || there(img.RootFS) || len(n.leases()) != 0 {
		t.Errorf("%d snapshots, root file system there: %t, leases %v", got, there(img.RootFS), n.leases())
	}
}

func TestRootFSStaysWithItsImage(t *testing.T) {
	n := startContainerd(t)
	n.load(testRef, twoLayers(t), "overlayfs")
	s := n.store()
	img := ensure(t, s, testRef, "c1")
	if err := s.Release(t.Context(), "c1"); err != nil {
		t.Fatal(err)
	}
	if !there(img.RootFS) {
		t.Fatal("released, and gone although the image is there")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Watch(ctx) }()
	n.kill() // the watch must get over it
	n.start()
	n.awaitServing()
	n.deleteImages()
	await(t, "the root file system goes with its image", func() bool { return !there(img.RootFS) })
	cancel()
	<-done
}

func TestContainerdRestarts(t *testing.T) {
	n := startContainerd(t)
	n.load(testRef, twoLayers(t), "overlayfs")
	s := n.store()
	ensure(t, s, testRef, "c1")
	n.kill()
	if _, err := s.Ensure(t.Context(), testRef, "c2"); !errdefs.IsUnavailable(err) {
		t.Errorf("containerd is down: %v, want unavailable", err)
	}
	if err := s.Release(t.Context(), "c1"); !errdefs.IsUnavailable(err) {
		t.Errorf("containerd is down: %v, want unavailable", err)
	}
	n.start()
	n.awaitServing()
	ensure(t, s, testRef, "c2")
	if err := s.Release(t.Context(), "c1"); err != nil {
		t.Error(err)
	}
	if got := n.leases(); len(got) != 1 || got[0].Labels[ownerLabel] != "c2" {
		t.Errorf("leases: %v, want one of c2", got)
	}
}

func TestPruneKeepsOnlyWhatLives(t *testing.T) {
	n := startContainerd(t)
	n.load(testRef, twoLayers(t), "overlayfs")
	l := newLayer(t)
	l.file("other", "x")
	n.load("registry.test/other:1", imageOf(t, "", l.done()), "overlayfs")
	s := n.store()
	live, dead := ensure(t, s, testRef, "live"), ensure(t, s, "registry.test/other:1", "dead")
	s.Close()
	n.deleteImages()

	s = n.store() // a new process
	if err := s.Prune(t.Context(), map[string]bool{"live": true}); err != nil {
		t.Fatal(err)
	}
	if !there(live.RootFS) || there(dead.RootFS) {
		t.Errorf("live there: %t, dead there: %t", there(live.RootFS), there(dead.RootFS))
	}
	if got := n.leases(); len(got) != 1 || got[0].Labels[ownerLabel] != "live" {
		t.Errorf("leases: %v, want one of live", got)
	}
}

func TestTooLargeImage(t *testing.T) {
	n := startContainerd(t)
	n.load(testRef, twoLayers(t), "overlayfs")
	s := n.store(func(o *Options) { o.MaxImageBytes = 1 << 20 })
	if _, err := s.Ensure(t.Context(), testRef, "c1"); !errdefs.IsResourceExhausted(err) {
		t.Errorf("an image above the limit: %v, want resource exhausted", err)
	}
	mustBeEmpty(t, s.dirs.tmp())
	mustBeEmpty(t, s.dirs.images())
	mustBeEmpty(t, s.dirs.owners())
	if got := n.leases(); len(got) != 0 {
		t.Errorf("leases: %v, want none", got)
	}
	if got := n.snapshots(); got != 2 {
		t.Errorf("%d snapshots, want the image's 2", got)
	}
}

const crashEnv = "VMRUNTIME_IMAGE_TEST_CRASH" // address of containerd, root of the store, "disk" to find one

// crashMain builds an image, or finds a disk, in a process that is to be killed.
func crashMain() int {
	args := append(strings.Fields(os.Getenv(crashEnv)), "")
	client, err := containerd.New(args[0])
	if err != nil {
		return 1
	}
	s, err := New(Options{Root: args[1], Client: client, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return 1
	}
	fmt.Println("ready")
	if args[2] == "disk" {
		_, err = s.FindDisk(context.Background(), diskRef, "c1")
	} else {
		_, err = s.Ensure(context.Background(), testRef, "c1")
	}
	if err != nil {
		fmt.Println(err)
	}
	return 0
}

func TestCrashLeavesNothingHalfMade(t *testing.T) {
	n := startContainerd(t)
	l := newLayer(t)
	for i := range 64 {
		l.file(fmt.Sprintf("file-%d", i), noise(1<<20))
	}
	n.load(testRef, imageOf(t, "", l.done()), "overlayfs")
	s := n.store()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), crashEnv+"="+n.address()+" "+s.opts.Root)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("child says %q, %v", line, err)
	}
	await(t, "the child writes", func() bool {
		files, _ := filepath.Glob(filepath.Join(s.dirs.tmp(), "erofs-*"))
		return len(files) > 0
	})
	child.Process.Kill()
	child.Wait()
	if mounts, _ := os.ReadFile("/proc/self/mounts"); strings.Contains(string(mounts), s.opts.Root) {
		t.Errorf("a mount is left over:\n%s", mounts)
	}
	mustBeEmpty(t, s.dirs.images())

	s = n.store()
	mustBeEmpty(t, s.dirs.tmp())
	if err := s.Prune(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	n.collectGarbage()
	if n.snapshots() != 1 || len(n.leases()) != 0 {
		t.Errorf("%d snapshots, want the image's 1; leases %v", n.snapshots(), n.leases())
	}
	ensure(t, s, testRef, "c1")
}

func TestCancelledCallerDoesNotEndTheBuild(t *testing.T) {
	n := startContainerd(t)
	n.load(testRef, twoLayers(t), "overlayfs")
	s := n.store()
	r, err := s.resolve(s.in(t.Context()), testRef)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.awaitBuild(ctx, r, keyOf(r.chain)); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled caller: %v, want context canceled", err)
	}
	await(t, "the build goes on", func() bool { return there(s.dirs.erofs(keyOf(r.chain))) })
	start := time.Now()
	s.Close()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("Close took %s", took)
	}
}
