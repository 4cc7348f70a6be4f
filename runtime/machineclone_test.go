package runtime

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A file gets its name when it is whole, and takes nobody's place.
func TestNamelessFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	for bad, is := range map[string]func(error) bool{
		"disk": errdefs.IsInvalidArgument, "": errdefs.IsInvalidArgument, filepath.Join(dir, "gone", "disk"): errdefs.IsInvalidArgument, dir: errdefs.IsFailedPrecondition,
	} {
		if f, err := nameless("file", bad); !is(err) || !strings.HasPrefix(err.Error(), "file ") {
			t.Errorf("made %q with %v", bad, err)
			if err == nil {
				_ = f.Close()
			}
		}
	}
	for _, want := range []string{"first", "refused"} {
		f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600) // as nameless does where nothing has the name
		if err != nil {
			t.Skipf("the file system of temporary files cannot hold files without a name: %v", err)
		}
		if _, err := f.WriteString(want); err != nil {
			t.Fatal(err)
		}
		if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 && want == "first" {
			t.Errorf("before it has its name there is %q (%v)", left, err)
		}
		if err := publishFile("file", f, path); (err == nil) != (want == "first") || err != nil && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: named with %v", want, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "first" {
		t.Errorf("the file is %q (%v)", data, err)
	}
}
