package runtime

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/runtime/archive"
)

// saved is an archive with one stream that WriteSparse has made of a file with the text.
func saved(t *testing.T, name, text string) *archive.Reader {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	w, err := archive.Create("out", dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := errors.Join(w.Stream(ctx, name, func(to io.Writer) error { return archive.WriteSparse(to, f) }), w.Finish(0), w.Close()); err != nil {
		t.Fatal(err)
	}
	var content int
	r, err := archive.Open(ctx, "in", dir, &content)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// A machine's files are unpacked beside those in use, none but those that a machine has, and as large as the manifest says.
func TestUnpackMachine(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "vars.fd"), []byte("in use"), 0o600); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, bad := range []checkpointFile{{Name: "../vars.fd"}, {Name: "tpm"}, {Name: ""}, {Name: "vars.fd", Size: 3}} {
		m := &checkpointMachine{Files: []checkpointFile{bad}}
		if err := m.unpack(root, saved(t, "vars.fd", "saved"), machineFiles{}.saved()); !errdefs.IsInvalidArgument(err) {
			t.Errorf("unpacked %+v with %v", bad, err)
		}
		if err := dropUnpacked(root); err != nil {
			t.Error(err)
		}
	}
	m := &checkpointMachine{Files: []checkpointFile{{Name: "vars.fd", Size: 5}}}
	if err := m.unpack(root, saved(t, "vars.fd", "saved"), machineFiles{}.saved()); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"vars.fd": "in use", unpacked("vars.fd"): "saved"} {
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != want {
			t.Errorf("%s is %q (%v), want %q", name, data, err, want)
		}
	}
	if err := errors.Join(dropUnpacked(root), dropUnpacked(root)); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || !slices.Equal(left, []string{filepath.Join(dir, "vars.fd")}) {
		t.Errorf("left are %q (%v)", left, err)
	}
}
