package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestCreateOverlay(t *testing.T) {
	for _, size := range []int64{512, 1 << 20, 1<<20 + 512, 512 << 20, 512<<20 + 512, 10 << 40, 16 << 40} {
		path := filepath.Join(t.TempDir(), "overlay.qcow2")
		if err := CreateOverlay(path, size); err != nil {
			t.Fatal(err)
		}
		f, fileSize := openImage(t, path)
		r, err := Open(f, fileSize, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		want := Info{Version: 3, VirtualSize: size, ClusterSize: 64 << 10, CompressionType: "zlib"}
		if *r.Info() != want {
			t.Errorf("info is %+v, want %+v", r.Info(), want)
		}
		if _, _, err := r.NextData(0); err == nil {
			t.Errorf("an empty overlay of %d bytes has data", size)
		}
		if st, err := f.Stat(); err != nil || st.Mode() != 0o600 {
			t.Errorf("mode is %v, %v, want 0600", st.Mode(), err)
		}
	}
}

func TestCreateOverlayIsCleanToQEMU(t *testing.T) {
	needTools(t, "qemu-img")
	for _, size := range []int64{512, 1<<30 + 512, 16 << 40} {
		path := filepath.Join(t.TempDir(), "overlay.qcow2")
		if err := CreateOverlay(path, size); err != nil {
			t.Fatal(err)
		}
		if out := qemuImg(t, "check", "-f", "qcow2", path); !strings.Contains(out, "No errors were found") {
			t.Error(out)
		}
		out := qemuImg(t, "info", "-f", "qcow2", path)
		if !strings.Contains(out, fmt.Sprintf("(%d bytes)", size)) || strings.Contains(out, "backing") {
			t.Error(out)
		}
	}
}

func TestCreateOverlayErrors(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "overlay.qcow2")
	for _, size := range []int64{-512, 0, 513, 16<<40 + 512} {
		if err := CreateOverlay(path, size); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), fmt.Sprint(size)) {
			t.Errorf("size %d: %v", size, err)
		}
	}
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CreateOverlay(path, 512); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("over a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
		t.Errorf("the file that was there is %q, %v", b, err)
	}
	if err := CreateOverlay(filepath.Join(dir, "none", "overlay"), 512); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a directory: %v", err)
	}
}

// QEMU opens the overlay over a backing node that is given to it though the header
// names none, reads through, writes, discards, and leaves the image clean and
// the backing file as it was.
func TestOverlayOverBackingNode(t *testing.T) {
	needTools(t, "qemu-img", "qemu-io")
	raw := rawDisk(t, diskSize)
	before, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"raw", "qcow2"} {
		base := raw
		if format == "qcow2" {
			base = filepath.Join(t.TempDir(), "base.qcow2")
			qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", raw, base)
		}
		overlayOver(t, base, format, before)
	}
	if after, err := os.ReadFile(raw); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the backing file was written to, %v", err)
	}
}

func overlayOver(t *testing.T, base, format string, disk []byte) {
	t.Helper()
	const size = 8 << 20 // larger than its backing
	path := filepath.Join(t.TempDir(), "overlay.qcow2")
	if err := CreateOverlay(path, size); err != nil {
		t.Fatal(err)
	}
	node := fmt.Sprintf(`json:{"driver":"qcow2","discard":"unmap","file":{"driver":"file","filename":%q},`+
		`"backing":{"driver":%q,"read-only":true,"file":{"driver":"file","filename":%q}}}`, path, format, base)
	run(t, "qemu-io", "-c", "write -P 170 1M 100k", "-c", "write -P 187 7M 1k", "-c", "discard 2M 64k", "-c", "flush", node)

	want := make([]byte, size)
	copy(want, disk)
	copy(want[1<<20:], bytes.Repeat([]byte{170}, 100<<10))
	copy(want[7<<20:], bytes.Repeat([]byte{187}, 1<<10))
	clear(want[2<<20 : 2<<20+64<<10])
	flat := filepath.Join(t.TempDir(), "flat")
	qemuImg(t, "convert", "-O", "raw", node, flat)
	if got, err := os.ReadFile(flat); err != nil || !bytes.Equal(got, want) {
		t.Errorf("over %s: the disk is not what was written over its backing, %v", format, err)
	}
	if out := qemuImg(t, "check", "-f", "qcow2", path); !strings.Contains(out, "No errors were found") {
		t.Error(out)
	}
	f, fileSize := openImage(t, path)
	info, err := Check(f, fileSize, Limits{})
	if err != nil {
		t.Fatalf("QEMU left what is refused: %v", err)
	}
	if info.Allocated != 3*64<<10 {
		t.Errorf("%d bytes are allocated, want three clusters", info.Allocated)
	}
}
