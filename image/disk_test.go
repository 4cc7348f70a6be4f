package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/image/qcow2"
)

const diskRef = "registry.test/disk:1"

// emptyDisk is a qcow2 image of size bytes without data.
func emptyDisk(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := qcow2.CreateOverlay(path, size); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// diskImage is an image with nothing to run, unlike imageOf's.
func diskImage(t testing.TB, layers ...v1.Layer) v1.Image {
	t.Helper()
	img := imageOf(t, "", layers...)
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Config.Cmd = nil
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return img
}

func files(t testing.TB, files ...string) v1.Layer {
	t.Helper()
	l := newLayer(t)
	l.dir("disk/")
	for i := 0; i < len(files); i += 2 {
		l.add(tar.Header{Name: files[i], Typeflag: tar.TypeReg, Mode: 0o440, Uid: 107, Gid: 107}, files[i+1])
	}
	return l.done()
}

func findDisk(t testing.TB, s *Store, ref, owner string) *Disk {
	t.Helper()
	d, err := s.FindDisk(t.Context(), ref, owner)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func mustBeMounted(t *testing.T, dir string, want bool) {
	t.Helper()
	got, err := mountinfo.Mounted(dir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("%s mounted: %t, want %t", dir, got, want)
	}
}

func TestDiskIsTheFileInTheSnapshot(t *testing.T) {
	for _, snapshotter := range []string{"overlayfs", "native", "erofs"} {
		for _, layers := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s-%d", snapshotter, layers), func(t *testing.T) {
				n := startContainerd(t)
				data := emptyDisk(t, 1<<30)
				all := []v1.Layer{files(t, "disk/system.qcow2", data), files(t, "note", "x")}
				n.load(diskRef, diskImage(t, all[:layers]...), snapshotter)
				s := n.store()
				t.Cleanup(func() { s.Release(n.cleanup(), "c1") })
				d := findDisk(t, s, diskRef, "c1")
				if d.Name != "disk/system.qcow2" || d.Format != "qcow2" || d.VirtualSize != 1<<30 || d.FileSize != int64(len(data)) || d.ImageName != diskRef {
					t.Errorf("disk: %+v", d)
				}
				if got, err := os.ReadFile(d.Path); err != nil || string(got) != data {
					t.Errorf("%d bytes, %v, want the disk's %d", len(got), err, len(data))
				}
				if f, err := os.OpenFile(d.Path, os.O_RDWR, 0); err == nil {
					f.Close()
					t.Error("the disk of the image can be opened for writing")
				}
				var st unix.Statfs_t
				if err := unix.Statfs(d.Path, &st); err != nil || uint64(st.Flags)&viewFlags != viewFlags {
					t.Errorf("mount flags %x, %v, want %x", st.Flags, err, viewFlags)
				}
				u, err := s.Usage(t.Context())
				if err != nil || u.Bytes >= int64(len(data)) {
					t.Errorf("usage %+v, %v: the disk is containerd's", u, err)
				}
			})
		}
	}
}

func TestWhichDiskIsFound(t *testing.T) {
	n := startContainerd(t)
	s := n.store()
	disk, raw := emptyDisk(t, 1<<20), noise(4096)
	links := newLayer(t)
	links.dir("disk/")
	links.file("real.qcow2", disk)
	links.symlink("disk/link.qcow2", "../real.qcow2")
	linkedDir := newLayer(t)
	linkedDir.dir("elsewhere/")
	linkedDir.file("elsewhere/disk.qcow2", disk)
	linkedDir.symlink("disk", "elsewhere")
	device := newLayer(t)
	device.dir("disk/")
	device.add(tar.Header{Name: "disk/a.raw", Typeflag: tar.TypeBlock, Devmajor: 8}, "")
	whiteout := newLayer(t)
	whiteout.dir("disk/")
	whiteout.file("disk/.wh.old.qcow2", "")
	whiteout.file("disk/new.img", raw)
	runs := func(l v1.Layer) v1.Image { return imageOf(t, "", l) }
	bad := bytes.Replace([]byte(disk), []byte{0, 0, 0, 0, 0, 0, 0, 0}, []byte{0, 0, 0, 0, 0, 0, 2, 0}, 1) // a backing file
	for i, c := range []struct {
		what string
		img  v1.Image
		name string           // what is found, or
		is   func(error) bool // this error
		says []string         // that has these words
	}{
		{"qcow2 under /disk", diskImage(t, files(t, "disk/a.qcow2", disk)), "disk/a.qcow2", nil, nil},
		{"raw under /disk", diskImage(t, files(t, "disk/a.raw", raw)), "disk/a.raw", nil, nil},
		{"img that is qcow2", diskImage(t, files(t, "disk/a.img", disk)), "disk/a.img", nil, nil},
		{"in an image that runs", runs(files(t, "disk/a.IMG", raw)), "disk/a.IMG", nil, nil},
		{"qcow2 of any name", diskImage(t, files(t, "disk/downloaded", disk, "disk/README", "x")), "disk/downloaded", nil, nil},
		{"at the root", diskImage(t, files(t, "a.qcow2", disk)), "a.qcow2", nil, nil},
		{"/disk goes before the root", diskImage(t, files(t, "disk/a.qcow2", disk, "b.qcow2", disk, "c.img", raw)), "disk/a.qcow2", nil, nil},
		{"a whiteout of one layer", diskImage(t, whiteout.done()), "disk/new.img", nil, nil},
		{"several under /disk", diskImage(t, files(t, "disk/a.qcow2", disk, "disk/b.raw", raw)), "", errdefs.IsInvalidArgument, []string{"/disk/a.qcow2", "/disk/b.raw (4096 bytes)"}},
		{"several at the root", diskImage(t, files(t, "a.qcow2", disk, "b.raw", raw)), "", errdefs.IsInvalidArgument, []string{"/a.qcow2", "/b.raw"}},
		{"nothing under /disk", diskImage(t, files(t)), "", errdefs.IsNotFound, []string{"no disk"}},
		{"no /disk", runs(baseLayer(t)), "", errdefs.IsNotFound, []string{"no disk"}},
		{"img at the root of an image that runs", runs(files(t, "initrd.img", raw)), "", errdefs.IsNotFound, nil},
		{"only other files", diskImage(t, files(t, "disk/a.vmdk", "KDMV")), "", errdefs.IsInvalidArgument, []string{"/disk/a.vmdk"}},
		{"only other files, but it runs", runs(files(t, "disk/README", "x")), "", errdefs.IsNotFound, []string{"/disk/README"}},
		{"a symbolic link under /disk", runs(links.done()), "", errdefs.IsNotFound, []string{"symbolic link"}},
		{"/disk is a symbolic link", diskImage(t, linkedDir.done()), "", errdefs.IsInvalidArgument, []string{"/disk (a symbolic link)"}},
		{"a device", diskImage(t, device.done()), "", errdefs.IsInvalidArgument, []string{"/disk/a.raw (no regular file)"}},
		{"a backing file", diskImage(t, files(t, "disk/a.qcow2", string(bad))), "", errdefs.IsInvalidArgument, []string{"/disk/a.qcow2", "backing"}},
		{"qcow2 by name only", diskImage(t, files(t, "disk/a.qcow2", raw)), "", errdefs.IsInvalidArgument, []string{"/disk/a.qcow2"}},
		{"an empty raw disk", diskImage(t, files(t, "disk/a.raw", "")), "", errdefs.IsInvalidArgument, []string{"0 bytes"}},
		{"an odd raw disk", diskImage(t, files(t, "disk/a.raw", raw[:1000])), "", errdefs.IsInvalidArgument, []string{"1000 bytes"}},
		{"no layers", diskImage(t), "", errdefs.IsNotFound, nil},
	} {
		ref := fmt.Sprintf("registry.test/case:%d", i)
		n.load(ref, c.img, "overlayfs")
		for _, again := range []string{"first", "known"} { // the second time from what is stored
			owner := fmt.Sprintf("c%d", i)
			d, err := s.FindDisk(t.Context(), ref, owner)
			switch {
			case c.is == nil && (err != nil || d.Name != c.name):
				t.Errorf("%s, %s: %+v, %v, want %s", c.what, again, d, err, c.name)
			case c.is != nil && (err == nil || !c.is(err)):
				t.Errorf("%s, %s: error %v", c.what, again, err)
			}
			for _, word := range c.says {
				if err != nil && !strings.Contains(err.Error(), word) {
					t.Errorf("%s, %s: error %v lacks %q", c.what, again, err, word)
				}
			}
			if err != nil && (strings.Count(err.Error(), "invalid argument") > 1 || there(filepath.Join(s.dirs.viewers(), owner))) {
				t.Errorf("%s, %s: error %v, owner left: %t", c.what, again, err, there(filepath.Join(s.dirs.viewers(), owner)))
			}
			if err := s.Release(t.Context(), owner); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := s.FindDisk(t.Context(), "registry.test/none:1", "c"); !errdefs.IsNotFound(err) {
		t.Errorf("no image: %v, want not found", err)
	}
	if _, err := s.FindDisk(t.Context(), diskRef, "../c"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad owner: %v, want invalid argument", err)
	}
	mustBeEmpty(t, s.dirs.views())
	mustBeEmpty(t, s.dirs.viewers())
	mustBeEmpty(t, s.dirs.tmp())
	if got := n.leases(); len(got) != 0 {
		t.Errorf("leases left: %v", got)
	}
}

func TestDiskIsSharedAndGoesWithItsLastOwner(t *testing.T) {
	n := startContainerd(t)
	loaded := n.load(diskRef, diskImage(t, files(t, "disk/a.qcow2", emptyDisk(t, 1<<20))), "overlayfs")
	s := n.store()
	var group errgroup.Group
	paths := make([]string, 20)
	for i := range paths {
		group.Go(func() error {
			d, err := s.FindDisk(t.Context(), diskRef, fmt.Sprintf("c%d", i))
			if err == nil {
				paths[i] = d.Path
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		if p != paths[0] {
			t.Errorf("paths %s and %s, want one", p, paths[0])
		}
	}
	if got := n.snapshots(); got != 2 {
		t.Errorf("%d snapshots, want the image's and one view", got)
	}
	n.deleteImages()
	n.collectGarbage()
	for i := 1; i < len(paths); i++ {
		if err := s.Release(t.Context(), fmt.Sprintf("c%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	n.collectGarbage()
	if _, err := os.ReadFile(paths[0]); err != nil {
		t.Errorf("the disk of the last owner: %v", err)
	}
	if _, err := n.client.ContentStore().Info(n.ctx(), loaded.Target().Digest); err != nil {
		t.Errorf("content of an image in use: %v", err)
	}
	for range 2 {
		if err := s.Release(t.Context(), "c0"); err != nil {
			t.Fatal(err)
		}
	}
	n.collectGarbage()
	mustBeEmpty(t, s.dirs.views())
	mustBeEmpty(t, s.dirs.viewers())
	mustBeEmpty(t, s.dirs.disks())
	if got := n.snapshots(); got != 0 || len(n.leases()) != 0 {
		t.Errorf("%d snapshots, leases %v, want none", got, n.leases())
	}
}

// TestDiskComesBack: after a reboot nothing is mounted, and containerd's records are from before.
func TestDiskComesBack(t *testing.T) {
	for _, snapshotter := range []string{"overlayfs", "erofs"} {
		t.Run(snapshotter, func(t *testing.T) {
			n := startContainerd(t)
			data := emptyDisk(t, 1<<20)
			n.load(diskRef, diskImage(t, files(t, "disk/a.qcow2", data), files(t, "b", "x")), snapshotter)
			s := n.store()
			d := findDisk(t, s, diskRef, "c1")
			s.Close()
			n.kill()
			if got, err := os.ReadFile(d.Path); err != nil || string(got) != data {
				t.Errorf("without containerd: %d bytes, %v", len(got), err)
			}
			unmountBelow(t, n.dir)
			n.start()
			n.awaitServing()
			s = n.store()
			t.Cleanup(func() { s.Release(n.cleanup(), "c1") })
			if err := s.Prune(t.Context(), map[string]bool{"c1": true}); err != nil {
				t.Fatal(err)
			}
			n.collectGarbage()
			view := filepath.Dir(filepath.Dir(d.Path))
			mustBeMounted(t, view, false)
			again := findDisk(t, s, diskRef, "c1")
			mustBeMounted(t, view, true)
			if got, err := os.ReadFile(again.Path); err != nil || string(got) != data || again.Path != d.Path {
				t.Errorf("%s: %d bytes, %v, want %d at %s", again.Path, len(got), err, len(data), d.Path)
			}
			if err := s.Release(t.Context(), "c1"); err != nil {
				t.Fatal(err)
			}
			mustBeEmpty(t, s.dirs.views())
			if got := n.leases(); len(got) != 0 {
				t.Errorf("leases left: %v", got)
			}
		})
	}
}

// unmountBelow unmounts everything below dir, as a reboot would.
func unmountBelow(t *testing.T, dir string) {
	t.Helper()
	for {
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		if err != nil {
			t.Fatal(err)
		}
		if len(mounts) == 0 {
			return
		}
		for _, m := range mounts {
			if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestPruneSweepsViews(t *testing.T) {
	n := startContainerd(t)
	n.load(diskRef, diskImage(t, files(t, "disk/a.qcow2", emptyDisk(t, 1<<20))), "overlayfs")
	n.load("registry.test/other:1", diskImage(t, files(t, "disk/b.qcow2", emptyDisk(t, 1<<21))), "overlayfs")
	s := n.store()
	live, dead := findDisk(t, s, diskRef, "live"), findDisk(t, s, "registry.test/other:1", "dead")
	other := n.store(func(o *Options) { o.Root = filepath.Join(n.dir, "other") }) // another daemon
	theirs := findDisk(t, other, "registry.test/other:1", "theirs")
	s.Close()
	s = n.store()
	t.Cleanup(func() { s.Release(n.cleanup(), "live") })
	t.Cleanup(func() { other.Release(n.cleanup(), "theirs") })
	if err := s.Prune(t.Context(), map[string]bool{"live": true, "theirs": true}); err != nil {
		t.Fatal(err)
	}
	n.collectGarbage()
	if !there(live.Path) || there(dead.Path) || !there(theirs.Path) {
		t.Errorf("live there: %t, dead there: %t, the other store's there: %t", there(live.Path), there(dead.Path), there(theirs.Path))
	}
	if got := n.snapshots(); got != 4 {
		t.Errorf("%d snapshots, want two images' and two views", got)
	}
	// What a crash leaves between containerd's lease and the owner's record, or when the store's files are lost.
	if err := os.RemoveAll(filepath.Join(s.dirs.viewers(), "live")); err != nil {
		t.Fatal(err)
	}
	unmountBelow(t, s.dirs.views())
	if err := os.RemoveAll(s.dirs.views()); err != nil {
		t.Fatal(err)
	}
	s = n.store()
	if err := s.Prune(t.Context(), map[string]bool{"theirs": true}); err != nil {
		t.Fatal(err)
	}
	n.collectGarbage()
	if got := n.snapshots(); got != 3 || len(n.leases()) != 2 {
		t.Errorf("%d snapshots, %d leases, want 3 and 2", got, len(n.leases()))
	}
}

// TestHoldersOfDiskAndRootFS: one owner may hold an image as a root file system and another as a disk.
func TestHoldersOfDiskAndRootFS(t *testing.T) {
	n := startContainerd(t)
	n.load(diskRef, diskImage(t, files(t, "disk/a.qcow2", emptyDisk(t, 1<<20))), "overlayfs")
	n.load(testRef, twoLayers(t), "overlayfs")
	s := n.store()
	findDisk(t, s, diskRef, "c1")
	if _, err := s.FindDisk(t.Context(), testRef, "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("an ordinary image: %v, want not found", err)
	}
	ensure(t, s, testRef, "c1")
	ensure(t, s, testRef, "c2")
	if _, err := s.FindDisk(t.Context(), testRef, "c2"); !errdefs.IsNotFound(err) {
		t.Errorf("an ordinary image: %v, want not found", err)
	}
	if got := n.leases(); len(got) != 3 {
		t.Errorf("%d leases, want those of c1, c2 and a view", len(got))
	}
	for _, owner := range []string{"c1", "c2"} {
		if err := s.Release(t.Context(), owner); err != nil {
			t.Fatal(err)
		}
	}
	if got := n.leases(); len(got) != 0 {
		t.Errorf("leases left: %v", got)
	}
}

func TestFileInImage(t *testing.T) {
	n := startContainerd(t)
	l := newLayer(t)
	l.dir("boot/")
	l.file("boot/vmlinuz", "kernel")
	l.file("boot/empty", "")
	l.symlink("boot/link", "vmlinuz")
	l.symlink("link", "boot")
	n.load(testRef, imageOf(t, "", l.done()), "overlayfs")
	s := n.store()
	t.Cleanup(func() { s.Release(n.cleanup(), "c1") })
	for _, name := range []string{"/boot/vmlinuz", "boot/vmlinuz", "/boot/vmlinuz"} {
		path, err := s.File(t.Context(), testRef, "c1", name)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != "kernel" {
			t.Errorf("%s is %q, %v", name, got, err)
		}
	}
	for name, is := range map[string]func(error) bool{
		"":                    errdefs.IsInvalidArgument,
		"/":                   errdefs.IsInvalidArgument,
		"../etc/passwd":       errdefs.IsInvalidArgument,
		"/boot":               errdefs.IsInvalidArgument,
		"/boot/empty":         errdefs.IsInvalidArgument,
		"/boot/link":          errdefs.IsInvalidArgument,
		"/link/vmlinuz":       errdefs.IsInvalidArgument,
		"/boot/vmlinuz/below": errdefs.IsInvalidArgument,
		"/boot/none":          errdefs.IsNotFound,
	} {
		if path, err := s.File(t.Context(), testRef, "c2", name); err == nil || !is(err) {
			t.Errorf("%q: %s, %v", name, path, err)
		}
	}
	if there(filepath.Join(s.dirs.viewers(), "c2")) {
		t.Error("a failed File left its owner")
	}
}

// TestDiskIsParsedOnce: what was found is believed until the format of what is stored changes.
func TestDiskIsParsedOnce(t *testing.T) {
	n := startContainerd(t)
	n.load(diskRef, diskImage(t, files(t, "disk/a.qcow2", emptyDisk(t, 1<<20))), "overlayfs")
	s := n.store()
	t.Cleanup(func() { s.Release(n.cleanup(), "c1"); s.Release(n.cleanup(), "c2") })
	findDisk(t, s, diskRef, "c1")
	stored, err := filepath.Glob(filepath.Join(s.dirs.disks(), "*"))
	if err != nil || len(stored) != 1 {
		t.Fatalf("stored: %v, %v", stored, err)
	}
	change := func(from, to string) {
		t.Helper()
		data := bytes.ReplaceAll(readFile(t, stored[0]), []byte(from), []byte(to))
		if err := os.WriteFile(stored[0], data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	change(fmt.Sprintf(`"VirtualSize":%d`, 1<<20), `"VirtualSize":512`)
	s.Close()
	s = n.store()
	if d := findDisk(t, s, diskRef, "c2"); d.VirtualSize != 512 {
		t.Errorf("virtual size %d: the disk was parsed again", d.VirtualSize)
	}
	for _, c := range [][2]string{{`"Version":1,"InDisk"`, `"Version":0,"InDisk"`}, {"{", "["}} {
		change(c[0], c[1])
		if d := findDisk(t, s, diskRef, "c2"); d.VirtualSize != 1<<20 {
			t.Errorf("virtual size %d: a finding that is %s was believed", d.VirtualSize, c[1])
		}
	}
}

// TestCrashWhileFindingDisk kills a process ever later while it finds a disk.
func TestCrashWhileFindingDisk(t *testing.T) {
	n := startContainerd(t)
	data := emptyDisk(t, 1<<20)
	n.load(diskRef, diskImage(t, files(t, "disk/a.qcow2", data), files(t, "b", "x")), "overlayfs")
	root := filepath.Join(n.dir, "store")
	step := 0
	for found := false; !found; step++ {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), crashEnv+"="+n.address()+" "+root+" disk")
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
		kill := time.AfterFunc(time.Duration(step)*2*time.Millisecond, func() { child.Process.Kill() })
		found = child.Wait() == nil
		kill.Stop()

		s := n.store()
		if step%2 == 0 { // the owner is alive: it goes on
			if err := s.Prune(t.Context(), map[string]bool{"c1": true}); err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
			if got, err := os.ReadFile(findDisk(t, s, diskRef, "c1").Path); err != nil || string(got) != data {
				t.Fatalf("step %d: %d bytes, %v", step, len(got), err)
			}
			if err := s.Release(t.Context(), "c1"); err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
		} else if err := s.Prune(t.Context(), nil); err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
		n.collectGarbage()
		mustBeEmpty(t, s.dirs.views())
		mustBeEmpty(t, s.dirs.viewers())
		mustBeEmpty(t, s.dirs.tmp())
		if got := n.snapshots(); got != 2 || len(n.leases()) != 0 {
			t.Fatalf("step %d: %d snapshots, want the image's 2; leases %v", step, got, n.leases())
		}
		s.Close()
		if err := os.RemoveAll(s.dirs.disks()); err != nil { // so that the next one has to look again
			t.Fatal(err)
		}
	}
	if step < 3 {
		t.Errorf("killed %d times only", step-1)
	}
	t.Logf("killed %d times", step-1)
}
