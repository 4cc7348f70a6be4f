package images

import (
	"archive/tar"
	"errors"
	"io"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Every image of a disk, but those that take long to make, can be pulled and holds what its name says.
func TestDiskImages(t *testing.T) {
	if testing.Short() || arch() != "amd64" || os.Geteuid() != 0 {
		t.Skip("makes disks, which takes long, root and amd64: run by make test")
	}
	h := newDiskRegistry()
	for ref, files := range diskImages() {
		if ref == Debian || ref == Fio {
			continue
		}
		tag, err := name.NewTag(ref)
		if err != nil {
			t.Fatal(err)
		}
		img, err := remote.Image(tag, remote.WithTransport(handlerTransport{h}))
		if err != nil {
			t.Errorf("pull %s: %v", ref, err)
			continue
		}
		layers, err := img.Layers()
		if err != nil || len(layers) != 1 {
			t.Fatalf("%s has %d layers (%v), want 1", ref, len(layers), err)
		}
		content, err := layers[0].Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		var found []string
		for r := tar.NewReader(content); ; {
			header, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", ref, err)
			}
			found = append(found, header.Name)
			if header.Uid != diskOwner || header.Gid != diskOwner {
				t.Errorf("%s: %s is owned by %d:%d, want %d", ref, header.Name, header.Uid, header.Gid, diskOwner)
			}
		}
		if err := content.Close(); err != nil { // compares the digest
			t.Errorf("%s: %v", ref, err)
		}
		if want := slices.Sorted(maps.Keys(files)); !slices.Equal(found, want) {
			t.Errorf("%s has %q, want %q", ref, found, want)
		}
	}
}
