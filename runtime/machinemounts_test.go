package runtime

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A volume is written by others: it must not lead the daemon elsewhere, nor hold it up.
func TestReadInside(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	for file, text := range map[string]string{filepath.Join(outside, "secret"): "secret", filepath.Join(dir, "file"): "text", filepath.Join(dir, "long"): "0123456789"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"away": filepath.Join(outside, "secret"), "up": "../" + filepath.Base(outside) + "/secret", "link": "file"} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{"file": "text", "link": "text"} {
		if got, err := readInside(dir, name, 9); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"fifo", "long", "."} {
		if got, err := readInside(dir, name, 9); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %q, %v; want ErrInvalidArgument", name, got, err)
		}
	}
	for _, name := range []string{"away", "up", "none"} {
		if got, err := readInside(dir, name, 9); err == nil {
			t.Errorf("%s: %q, want an error", name, got)
		}
	}
	if got, err := readInside(filepath.Join(dir, "file"), ".", 9); err != nil || string(got) != "text" {
		t.Errorf("a mounted file: %q, %v", got, err)
	}
	if _, err := readInside(filepath.Join(dir, "fifo"), ".", 9); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a mounted FIFO: %v, want ErrInvalidArgument", err)
	}
}
