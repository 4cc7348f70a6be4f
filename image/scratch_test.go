package image

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// scratchStore is a store without containerd.
func scratchStore(t testing.TB, quota bool) *Store {
	t.Helper()
	if _, err := exec.LookPath("mke2fs"); err != nil {
		t.Skip("needs mke2fs of e2fsprogs")
	}
	s, err := New(Options{Root: t.TempDir(), Client: &containerd.Client{}, ProjectQuota: quota})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestScratchDisk(t *testing.T) {
	for name, quota := range map[string]bool{"plain": false, "quota": true} {
		t.Run(name, func(t *testing.T) {
			s := scratchStore(t, quota)
			path, err := s.CreateScratch(t.Context(), "pod1", 10<<30)
			if err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil || info.Size() != 10<<30 || info.Mode().Perm() != 0o600 {
				t.Errorf("the disk is %+v, %v", info, err)
			}
			u, err := s.ScratchUsage("pod1")
			if err != nil || u.Bytes > 4<<20 || u.Inodes != 1 {
				t.Errorf("an empty disk takes %+v, %v", u, err)
			}
			out, err := exec.Command("dumpe2fs", "-h", path).Output()
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(out), "has_journal") || strings.Contains(string(out), "project") != quota {
				t.Errorf("features:\n%s", out)
			}
			if out, err := exec.Command("e2fsck", "-f", "-n", path).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v\n%s", err, out)
			}
			if _, err := s.CreateScratch(t.Context(), "pod1", 10<<30); !errdefs.IsAlreadyExists(err) {
				t.Errorf("a second disk: %v, want already exists", err)
			}
			if _, err := s.CreateScratch(t.Context(), "pod2", 10<<30); err != nil {
				t.Error(err)
			}
			if pods, err := s.Scratches(); err != nil || strings.Join(pods, " ") != "pod1 pod2" {
				t.Errorf("scratch disks of %v, %v", pods, err)
			}
			mustBeEmpty(t, s.dirs.tmp())
			for range 2 {
				if err := errors.Join(s.RemoveScratch("pod1"), s.RemoveScratch("pod2")); err != nil {
					t.Error(err)
				}
			}
			if err := s.pruneTemplates(); err != nil {
				t.Error(err)
			}
			mustBeEmpty(t, s.dirs.scratch())
			mustBeEmpty(t, s.dirs.templates())
			if _, err := s.ScratchUsage("pod1"); !errdefs.IsNotFound(err) {
				t.Errorf("usage of no disk: %v, want not found", err)
			}
		})
	}
}

func TestScratchRefusesBadInput(t *testing.T) {
	s := scratchStore(t, false)
	for _, size := range []int64{-1, 0, 1 << 20, 16<<20 + 1, 17 << 40} {
		if _, err := s.CreateScratch(t.Context(), "pod", size); !errdefs.IsInvalidArgument(err) {
			t.Errorf("size %d: %v, want invalid argument", size, err)
		}
	}
	if _, err := s.CreateScratch(t.Context(), "../pod", 1<<30); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pod ../pod: %v, want invalid argument", err)
	}
	if err := s.RemoveScratch("a/b"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pod a/b: %v, want invalid argument", err)
	}
}

// TestScratchIsBounded fills a disk through the kernel.
func TestScratchIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root to mount: run by make test")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	s := scratchStore(t, false)
	path, err := s.CreateScratch(t.Context(), "pod", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	dir := mountFile(t, path, "ext4")
	f, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := []byte(noise(1 << 20))
	written := 0
	for err == nil && written < 100 {
		if _, err = f.Write(data); err == nil {
			written++
		}
	}
	if !errors.Is(err, unix.ENOSPC) || written < 48 {
		t.Fatalf("%d MiB written to a disk of 64 MiB, then %v, want at least 48 and no space left", written, err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	u, err := s.Usage(t.Context())
	if err != nil || u.Bytes < 48<<20 || u.Bytes > 72<<20 {
		t.Errorf("a full disk takes %+v, %v", u, err)
	}
}

func BenchmarkCreateScratch(b *testing.B) {
	s := scratchStore(b, false)
	if _, err := s.CreateScratch(b.Context(), "first", 10<<30); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.CreateScratch(b.Context(), "pod", 10<<30); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.RemoveScratch("pod"); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
