package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
)

const populateEnv = "VMRUNTIME_IMAGE_TEST_POPULATE" // root of the store, disk, device, steps to go until the kill

// populateMain populates a device in a process that kills itself on the way.
func populateMain() int {
	args := strings.Fields(os.Getenv(populateEnv))
	steps, err := strconv.Atoi(args[3])
	if err != nil {
		return 2
	}
	s, err := New(Options{Root: args[0], Client: &containerd.Client{}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return 2
	}
	err = s.Populate(context.Background(), testDisk(args[1]), args[2], func(int64, int64) {
		if steps == 0 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		steps--
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// testDisk describes a disk beside its raw twin, FILE.raw.
func testDisk(path string) *Disk {
	d := &Disk{Path: path, Name: filepath.Base(path), Format: "raw"}
	if strings.HasSuffix(path, ".qcow2") {
		d.Format = "qcow2"
	}
	info, err := os.Stat(path)
	if err == nil {
		d.FileSize = info.Size()
	}
	if info, err = os.Stat(strings.TrimSuffix(path, ".qcow2") + ".raw"); err == nil {
		d.VirtualSize = info.Size()
	} else {
		d.VirtualSize = d.FileSize
	}
	return d
}

// makeDisk makes a raw disk with data, holes and an odd end, and a qcow2 disk of the same content.
func makeDisk(t *testing.T) (raw, qcow string) {
	t.Helper()
	raw = filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(40<<20 + 512); err != nil {
		t.Fatal(err)
	}
	for off, size := range map[int64]int{0: 100 << 10, 800 << 10: 400 << 10, 9 << 20: 6 << 20, 30<<20 + 4096: 8192, 40 << 20: 512} {
		if _, err := f.WriteAt([]byte(noise(size)), off); err != nil {
			t.Fatal(err)
		}
	}
	qcow = strings.TrimSuffix(raw, ".raw") + ".qcow2"
	if out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow).CombinedOutput(); err != nil {
		t.Skipf("needs qemu-img: %v %s", err, out)
	}
	return raw, qcow
}

// device makes a block device of size bytes, with something between its ends.
func device(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "device")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if size > 24<<20 {
		if _, err := f.WriteAt(bytes.Repeat([]byte("old"), 6<<20), 5<<20); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("losetup", "--find", "--show", path).Output()
	if err != nil {
		t.Skipf("needs a loop device: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v %s", err, out)
		}
	})
	return dev
}

func mustHold(t *testing.T, dev string, want []byte) {
	t.Helper()
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		at := 0
		for got[at] == want[at] {
			at++
		}
		t.Errorf("the device differs from the disk at byte %d", at)
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestPopulate(t *testing.T) {
	needsRoot(t)
	raw, qcow := makeDisk(t)
	want := readFile(t, raw)
	for _, disk := range []string{raw, qcow} {
		t.Run(filepath.Ext(disk), func(t *testing.T) {
			dev := device(t, 64<<20)
			s := localStore(t)
			var last, total int64
			progress := func(done, of int64) {
				if done < last || of != int64(len(want)) {
					t.Errorf("progress went from %d to %d of %d", last, done, of)
				}
				last, total = done, of
			}
			if err := s.Populate(t.Context(), testDisk(disk), dev, progress); err != nil {
				t.Fatal(err)
			}
			if last != total || last == 0 {
				t.Errorf("progress ended at %d of %d", last, total)
			}
			mustHold(t, dev, want)
			// The guest writes, and wipes its first sector: never again.
			changed := bytes.Clone(want)
			copy(changed[512:], "the guest's own")
			clear(changed[:512])
			f, err := os.OpenFile(dev, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteAt(changed[:4096], 0)
			if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
				t.Fatal(err)
			}
			called := false
			if err := s.Populate(t.Context(), testDisk(disk), dev, func(int64, int64) { called = true }); err != nil || called {
				t.Errorf("populate again: %v, progress %t", err, called)
			}
			mustHold(t, dev, changed)
		})
	}
}

// TestPopulateIsKilled: killed after every step, a device is either populated anew or whole.
func TestPopulateIsKilled(t *testing.T) {
	needsRoot(t)
	raw, qcow := makeDisk(t)
	want := readFile(t, raw)
	s := localStore(t)
	kills, unfinished := 0, 0
	for done := false; !done; kills++ {
		dev := device(t, 64<<20)
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %s %d", populateEnv, t.TempDir(), qcow, dev, kills))
		out, err := child.CombinedOutput()
		if status, ok := child.ProcessState.Sys().(syscall.WaitStatus); !ok || err != nil && status.Signal() != syscall.SIGKILL {
			t.Fatalf("child: %v %s", err, out)
		}
		done = err == nil
		if _, err := inspectDevice(dev, os.O_RDONLY, func(_ *os.File, _ int64, empty bool) error {
			if empty {
				unfinished++
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := s.Populate(t.Context(), testDisk(qcow), dev, nil); err != nil {
			t.Fatalf("after a kill at step %d: %v", kills, err)
		}
		mustHold(t, dev, want)
	}
	// All but the last kill, which comes when everything is written, and the run without one.
	if kills < 8 || unfinished != kills-2 {
		t.Errorf("%d runs, %d of them found unfinished", kills, unfinished)
	}
	t.Logf("killed %d times", kills-1)
}

func TestPopulateLeavesWhatIsNotItsOwn(t *testing.T) {
	needsRoot(t)
	raw, _ := makeDisk(t)
	s := localStore(t)
	for name, off := range map[string]int64{"a label": 1080, "at 3 MiB": 3 << 20, "at the end": 64<<20 - 1} {
		dev := device(t, 64<<20)
		f, err := os.OpenFile(dev, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt([]byte("x"), off)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
		want := readFile(t, dev)
		if err := s.Populate(t.Context(), testDisk(raw), dev, nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(readFile(t, dev), want) {
			t.Errorf("%s: the device was written", name)
		}
	}
}

func TestPopulateRefuses(t *testing.T) {
	needsRoot(t)
	raw, _ := makeDisk(t)
	s := localStore(t)
	small, dev := device(t, 20<<20), device(t, 64<<20)
	zeros := filepath.Join(t.TempDir(), "zeros.raw")
	marked := filepath.Join(t.TempDir(), "marked.raw")
	if err := errors.Join(os.WriteFile(zeros, make([]byte, 1<<20), 0o600), os.WriteFile(marked, []byte(populating+strings.Repeat("x", 4096-len(populating))), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		disk, device string
		is           func(error) bool
	}{
		{raw, small, errdefs.IsFailedPrecondition},
		{raw, raw, errdefs.IsInvalidArgument},
		{raw, "/dev/null", errdefs.IsInvalidArgument},
		{raw, filepath.Dir(raw), errdefs.IsInvalidArgument},
		{raw, "/dev/none", func(err error) bool { return errors.Is(err, fs.ErrNotExist) }},
		{zeros, dev, errdefs.IsInvalidArgument},
		{marked, dev, errdefs.IsInvalidArgument},
	} {
		if err := s.Populate(t.Context(), testDisk(c.disk), c.device, nil); err == nil || !c.is(err) {
			t.Errorf("%s to %s: %v", c.disk, c.device, err)
		}
	}
	used, err := os.OpenFile(dev, os.O_RDWR|os.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Populate(t.Context(), testDisk(raw), dev, nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a device in use: %v, want failed precondition", err)
	}
	if err := used.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Populate(ctx, testDisk(raw), dev, nil); err == nil {
		t.Error("cancelled, and populated")
	}
	if err := s.Populate(t.Context(), testDisk(raw), dev, nil); err != nil {
		t.Error(err)
	}
	mustHold(t, dev, readFile(t, raw))
}
