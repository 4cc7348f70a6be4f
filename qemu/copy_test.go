package qemu

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A disk is copied as it is at one moment while its guest runs, and nothing of a copy stays in QEMU.
func TestCopyDisk(t *testing.T) {
	disk := diskFile(t, "before")
	g := boot(t, func(s *Spec) { s.Machine.Disks = []Disk{{Serial: "scratch", Path: disk, Format: "raw"}} })
	before := qemuDescriptors(t, g.VM)
	target := func() *os.File {
		f, err := os.Create(filepath.Join(t.TempDir(), "copy"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		if err := f.Truncate(1 << 20); err != nil {
			t.Fatal(err)
		}
		return f
	}
	for range 2 {
		to := target()
		begun := 0
		if err := g.CopyDisk(t.Context(), "scratch", to, "raw", func() { begun++ }); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(to.Name())
		if err != nil {
			t.Fatal(err)
		}
		if len(data) != 1<<20 || !strings.HasPrefix(string(data), "before\x00") || strings.Trim(string(data[6:]), "\x00") != "" {
			t.Errorf("the copy has %d bytes and begins with %q", len(data), data[:min(len(data), 20)])
		}
		if begun != 1 {
			t.Errorf("told %d times that it has begun", begun)
		}
	}
	told := 0
	tell := func() { told++ }
	over, cancel := context.WithCancel(t.Context())
	if err := g.CopyDisk(over, "scratch", target(), "raw", cancel); !errors.Is(err, context.Canceled) && err != nil {
		t.Errorf("ended as it has begun: %v", err)
	}
	if err := g.CopyDisk(over, "scratch", target(), "raw", tell); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that has ended: %v", err)
	}
	if err := g.CopyDisk(t.Context(), "nobody", target(), "raw", tell); err == nil || !strings.Contains(err.Error(), "disk-nobody") {
		t.Errorf("an unknown disk: %v", err)
	}
	read, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if err := g.CopyDisk(t.Context(), "scratch", read, "raw", tell); err == nil {
		t.Error("a file that is only open for reading was written")
	}
	if told != 3 {
		t.Errorf("told %d times that copies which fail have begun, want 3", told)
	}
	if got := g.do("head /dev/sda"); !strings.HasPrefix(got, "before\x00") {
		t.Errorf("the guest's disk is %q", got)
	}
	if after := qemuDescriptors(t, g.VM); after != before {
		t.Errorf("QEMU has %d descriptors before, %d after", before, after)
	}
	if err := g.SaveState(t.Context(), io.Discard); err != nil {
		t.Errorf("the state is not saved after copies: %v", err)
	}
}
