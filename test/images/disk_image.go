package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The images that hold a disk, or are wrong in a way of their own. Handler makes each when it is pulled first.
const (
	Tiny       = "vmruntime.test/tiny:1"       // TinyDisk at /disk/tiny.qcow2
	TinyImg    = "vmruntime.test/tiny-raw:1"   // TinyRaw at /disk/tiny.img: SATA, graphics, watchdog
	TinyAtRoot = "vmruntime.test/tiny-root:1"  // TinyDisk at /tiny.qcow2
	KernelBoot = "vmruntime.test/kernelboot:1" // TinyKernel at /boot/vmlinuz and /boot/initrd, no disk
	Debian     = "vmruntime.test/debian:1"     // DebianDisk at /disk/debian.qcow2
	Fio        = "vmruntime.test/fio:1"        // FioDisk at /disk/fio.qcow2
	TwoDisks   = "vmruntime.test/twodisks:1"   // /disk/a.qcow2 and /disk/b.qcow2
	NoDisk     = "vmruntime.test/nodisk:1"     // an empty directory /disk
	Backing    = "vmruntime.test/backing:1"    // BackingDisk at /disk/backing.qcow2
	Corrupt    = "vmruntime.test/corrupt:1"    // /disk/corrupt.qcow2, of which only the magic is right
)

// diskOwner is who owns the disks in images: KubeVirt's qemu.
const diskOwner = 107

// diskFile is a file of an image: a disk of this package, or data.
type diskFile struct {
	disk string // name of a disk; of TinyKernel, with "/" and the file's name
	data []byte
}

func diskImages() map[string]map[string]diskFile {
	tiny := diskFile{disk: TinyDisk}
	return map[string]map[string]diskFile{
		Tiny:       {"disk/tiny.qcow2": tiny},
		TinyImg:    {"disk/tiny.img": {disk: TinyRaw}},
		TinyAtRoot: {"tiny.qcow2": tiny},
		KernelBoot: {"boot/vmlinuz": {disk: TinyKernel + "/vmlinuz"}, "boot/initrd": {disk: TinyKernel + "/initrd"}},
		Debian:     {"disk/debian.qcow2": {disk: DebianDisk}},
		Fio:        {"disk/fio.qcow2": {disk: FioDisk}},
		TwoDisks:   {"disk/a.qcow2": {disk: BackingDisk}, "disk/b.qcow2": {disk: BackingDisk}},
		NoDisk:     {"disk/": {}},
		Backing:    {"disk/backing.qcow2": {disk: BackingDisk}},
		Corrupt:    {"disk/corrupt.qcow2": {data: append([]byte("QFI\xfb"), bytes.Repeat([]byte{0xa5}, 4092)...)}},
	}
}

// diskImage makes the image of one layer that is not compressed: disks are already.
func diskImage(files map[string]diskFile) (v1.Image, *fileLayer, error) {
	layer, err := newFileLayer(files)
	if err != nil {
		return nil, nil, err
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := imageOn(base, arch(), v1.Config{}, layer)
	return img, layer, err
}

// fileLayer is a layer whose content stays in files.
type fileLayer struct {
	parts  []layerPart
	size   int64
	digest v1.Hash
}

// layerPart is bytes, then a file's content.
type layerPart struct {
	head []byte
	file string
	size int64 // of the file
}

func newFileLayer(files map[string]diskFile) (*fileLayer, error) {
	l := &fileLayer{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		part, err := files[name].part(name)
		if err != nil {
			return nil, err
		}
		// The next entry begins at a whole block.
		padding := make([]byte, -part.size&(sectorSize-1))
		l.parts = append(l.parts, part, layerPart{head: padding})
	}
	l.parts = append(l.parts, layerPart{head: make([]byte, 2*sectorSize)})
	for _, p := range l.parts {
		l.size += int64(len(p.head)) + p.size
	}
	content, err := l.Compressed()
	if err != nil {
		return nil, err
	}
	defer content.Close()
	l.digest, _, err = v1.SHA256(content)
	return l, err
}

func (f diskFile) part(name string) (layerPart, error) {
	h := &tar.Header{Name: name, Mode: 0o440, Uid: diskOwner, Gid: diskOwner, Typeflag: tar.TypeReg, Size: int64(len(f.data)), Format: tar.FormatPAX}
	var file string
	switch {
	case strings.HasSuffix(name, "/"):
		h.Typeflag, h.Mode = tar.TypeDir, 0o755
	case f.disk != "":
		disk, rest, _ := strings.Cut(f.disk, "/")
		path, err := Disk(disk)
		if err != nil {
			return layerPart{}, err
		}
		file = filepath.Join(path, rest)
		info, err := os.Stat(file)
		if err != nil {
			return layerPart{}, err
		}
		h.Size = info.Size()
	}
	var head bytes.Buffer
	if err := tar.NewWriter(&head).WriteHeader(h); err != nil {
		return layerPart{}, fmt.Errorf("pack %q: %w", name, err)
	}
	if file == "" {
		return layerPart{head: append(head.Bytes(), f.data...)}, nil // data is of whole blocks
	}
	return layerPart{head: head.Bytes(), file: file, size: h.Size}, nil
}

// Digest and DiffID are the same, as nothing is compressed.
func (l *fileLayer) Digest() (v1.Hash, error)             { return l.digest, nil }
func (l *fileLayer) DiffID() (v1.Hash, error)             { return l.digest, nil }
func (l *fileLayer) Size() (int64, error)                 { return l.size, nil }
func (l *fileLayer) MediaType() (types.MediaType, error)  { return types.OCIUncompressedLayer, nil }
func (l *fileLayer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }

// Compressed opens the layer as it is transferred.
func (l *fileLayer) Compressed() (io.ReadCloser, error) {
	var content openLayer
	var readers []io.Reader
	for _, p := range l.parts {
		readers = append(readers, bytes.NewReader(p.head))
		if p.file == "" {
			continue
		}
		f, err := os.Open(p.file)
		if err != nil {
			_ = content.Close()
			return nil, err
		}
		content.files = append(content.files, f)
		readers = append(readers, io.LimitReader(f, p.size))
	}
	content.Reader = io.MultiReader(readers...)
	return &content, nil
}

type openLayer struct {
	io.Reader
	files []*os.File
}

func (o *openLayer) Close() error {
	for _, f := range o.files {
		_ = f.Close() // it was only read
	}
	return nil
}

// diskRegistry puts the images of disks into a registry when they are asked for: making a disk takes minutes, and most
// users of a registry need none.
type diskRegistry struct {
	http.Handler
	blobs  *diskBlobs
	images map[string]func() error // by repository; each works once
}

func newDiskRegistry() *diskRegistry {
	r := &diskRegistry{blobs: &diskBlobs{BlobHandler: registry.NewInMemoryBlobHandler()}, images: map[string]func() error{}}
	r.Handler = registry.New(registry.Logger(discardLogger()), registry.WithBlobHandler(r.blobs))
	for ref, files := range diskImages() {
		_, rest, _ := strings.Cut(ref, "/")
		repository, _, _ := strings.Cut(rest, ":")
		r.images[repository] = sync.OnceValue(func() error { return r.add(ref, files) })
	}
	return r
}

func (r *diskRegistry) add(ref string, files map[string]diskFile) error {
	img, layer, err := diskImage(files)
	if err != nil {
		return err
	}
	tag, err := name.NewTag(ref)
	if err != nil {
		return err
	}
	r.blobs.layers.Store(layer.digest, layer)
	if err := remote.Write(tag, img, remote.WithTransport(handlerTransport{r.Handler})); err != nil {
		return fmt.Errorf("store image %s: %w", ref, err)
	}
	return nil
}

func (r *diskRegistry) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	// /v2/REPOSITORY/manifests/TAG
	if parts := strings.Split(request.URL.Path, "/"); len(parts) > 3 {
		if add, ok := r.images[parts[2]]; ok {
			if err := add(); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
		}
	}
	r.Handler.ServeHTTP(w, request)
}

// diskBlobs keeps layers of files where they are, and everything else in memory.
type diskBlobs struct {
	registry.BlobHandler
	layers sync.Map // v1.Hash to *fileLayer
}

func (b *diskBlobs) Get(ctx context.Context, repo string, h v1.Hash) (io.ReadCloser, error) {
	if layer, ok := b.layers.Load(h); ok {
		return layer.(*fileLayer).Compressed()
	}
	return b.BlobHandler.Get(ctx, repo, h)
}

func (b *diskBlobs) Stat(ctx context.Context, repo string, h v1.Hash) (int64, error) {
	if layer, ok := b.layers.Load(h); ok {
		return layer.(*fileLayer).Size()
	}
	return b.BlobHandler.(registry.BlobStatHandler).Stat(ctx, repo, h)
}

func (b *diskBlobs) Put(ctx context.Context, repo string, h v1.Hash, content io.ReadCloser) error {
	return b.BlobHandler.(registry.BlobPutHandler).Put(ctx, repo, h, content)
}
