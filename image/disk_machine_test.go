package image

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/image/qcow2"
)

// localStore is a store that never talks to containerd.
func localStore(t *testing.T) *Store {
	t.Helper()
	s, err := New(Options{Root: t.TempDir(), Client: &containerd.Client{}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestMachineFiles(t *testing.T) {
	s := localStore(t)
	d := &Disk{VirtualSize: 1 << 30}
	if _, err := s.CreateRoot("m1", d, 0); !errdefs.IsNotFound(err) {
		t.Errorf("a root disk without a machine: %v, want not found", err)
	}
	if _, err := s.MachineUsage("m1"); !errdefs.IsNotFound(err) {
		t.Errorf("usage without a machine: %v, want not found", err)
	}
	before, err := s.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := s.CreateMachine("m1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateMachine("m1"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the machine again: %v, want already exists", err)
	}
	if _, err := s.CreateMachine("../m"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad name: %v, want invalid argument", err)
	}
	for _, size := range []int64{1 << 29, -1, 1<<30 + 1, 17 << 40} {
		if _, err := s.CreateRoot("m1", d, size); !errdefs.IsInvalidArgument(err) {
			t.Errorf("size %d: %v, want invalid argument", size, err)
		}
	}
	path, err := s.CreateRoot("m1", d, 20<<30)
	if err != nil {
		t.Fatal(err)
	}
	if path != filepath.Join(dir, "overlay.qcow2") || virtualSize(t, path) != 20<<30 {
		t.Errorf("root disk %s of %d bytes", path, virtualSize(t, path))
	}
	if _, err := s.CreateRoot("m1", d, 0); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the root disk again: %v, want already exists", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "vars.fd"), []byte(noise(1<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	used, err := s.MachineUsage("m1")
	if err != nil || used.Bytes < 1<<20 || used.Inodes != 3 {
		t.Errorf("usage %+v, %v, want more than 1 MiB in 3 inodes", used, err)
	}
	if after, err := s.Usage(t.Context()); err != nil || after.Inodes != before.Inodes+3 || after.Bytes < before.Bytes+1<<20 {
		t.Errorf("usage of the store went from %+v to %+v, %v", before, after, err)
	}
	if got, err := s.Machines(); err != nil || len(got) != 1 || got[0] != "m1" {
		t.Errorf("machines %v, %v", got, err)
	}
	for range 2 {
		if err := s.RemoveMachine("m1"); err != nil {
			t.Fatal(err)
		}
	}
	mustBeEmpty(t, s.dirs.machines())
}

func virtualSize(t *testing.T, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	got, err := qcow2.Check(f, info.Size(), qcow2.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return got.VirtualSize
}
