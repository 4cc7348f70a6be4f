package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// importLease is how long what a killed import left stays in containerd.
const importLease = 24 * time.Hour

// Import packs a disk into an image of containerd, and unpacks that, so that a pod can use it at once. An image of the same
// name is replaced. It fails with errdefs.ErrInvalidArgument if the disk or an option is refused, ErrFailedPrecondition
// if qemu-img is needed and not there, ErrUnavailable if containerd is down; then nothing is left.
func Import(ctx context.Context, client *containerd.Client, namespace string, o PackOptions) (_ *Packed, err error) {
	if namespace == "" {
		namespace = defaultNamespace
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	id := leasePrefix + "import-" + rand.Text()
	manager := client.LeasesService()
	if _, err := manager.Create(ctx, leases.WithID(id), leases.WithExpiration(importLease)); err != nil {
		return nil, fmt.Errorf("create lease for an import: %w", err)
	}
	ctx = leases.WithLease(ctx, id)
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		err = errors.Join(err, manager.Delete(clean, leases.Lease{ID: id}, leases.SynchronousDelete))
	}()
	c := &containerdBlobs{client: client, ref: id, progress: o.Progress}
	return pack(ctx, o, c)
}

// containerdBlobs puts an image into containerd, under the lease of its context.
type containerdBlobs struct {
	client   *containerd.Client
	ref      string // of the content that is being written
	progress func(what string, done, total int64)
}

func (c *containerdBlobs) layer(ctx context.Context, write func(io.Writer) (digest.Digest, error)) (ocispec.Descriptor, digest.Digest, error) {
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd}
	store := c.client.ContentStore()
	w, err := content.OpenWriter(ctx, store, content.WithRef(c.ref))
	if err != nil {
		return desc, "", fmt.Errorf("write content of containerd: %w", err)
	}
	count := &countWriter{w: w}
	diffID, err := write(count)
	if err == nil {
		desc.Digest, desc.Size = w.Digest(), count.n
		err = w.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(map[string]string{"containerd.io/uncompressed": diffID.String()}))
	}
	err = errors.Join(err, w.Close())
	if errdefs.IsAlreadyExists(err) {
		err = nil
	}
	if err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		if abort := store.Abort(clean, c.ref); !errdefs.IsNotFound(abort) {
			err = errors.Join(err, abort)
		}
	}
	return desc, diffID, err
}

func (c *containerdBlobs) blob(ctx context.Context, desc ocispec.Descriptor, data []byte, labels map[string]string) error {
	ref := c.ref + "-" + desc.Digest.Encoded()
	return content.WriteBlob(ctx, c.client.ContentStore(), ref, bytes.NewReader(data), desc, content.WithLabels(labels))
}

func (c *containerdBlobs) finish(ctx context.Context, name reference.NamedTagged, manifest ocispec.Descriptor) error {
	if c.progress != nil {
		c.progress("unpacking", 0, 0)
	}
	img := images.Image{Name: name.String(), Target: manifest}
	unpackable := containerd.NewImageWithPlatform(c.client, img, platforms.OnlyStrict(*manifest.Platform))
	if err := unpackable.Unpack(ctx, defaults.DefaultSnapshotter); err != nil {
		return fmt.Errorf("unpack image %s: %w", name, err)
	}
	service := c.client.ImageService()
	_, err := service.Create(ctx, img)
	if errdefs.IsAlreadyExists(err) {
		_, err = service.Update(ctx, img, "target")
	}
	if err != nil {
		return fmt.Errorf("name image %s: %w", name, err)
	}
	return nil
}

type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// WriteArchive packs a disk into an OCI archive at path, where there must be no file. It fails as Import does, with
// errdefs.ErrAlreadyExists if there is one; then nothing is left.
func WriteArchive(ctx context.Context, path string, o PackOptions) (_ *Packed, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("file %s: %w", path, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return nil, err
	}
	p, err := pack(ctx, o, &archiveBlobs{f: f})
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return p, nil
}

// archiveBlobs writes a tar archive with an OCI layout.
type archiveBlobs struct{ f *os.File }

const tarBlock = 512

func blobPath(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

// header is one block: what it holds is short enough.
func (a *archiveBlobs) header(name string, size int64) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: size, Format: tar.FormatGNU}
	if err := w.WriteHeader(h); err != nil {
		return nil, err
	}
	if buf.Len() != tarBlock {
		return nil, fmt.Errorf("tar header of %s has %d bytes, want %d", name, buf.Len(), tarBlock)
	}
	return buf.Bytes(), nil
}

// layer writes the header last, when the name, which is the digest, is known.
func (a *archiveBlobs) layer(_ context.Context, write func(io.Writer) (digest.Digest, error)) (ocispec.Descriptor, digest.Digest, error) {
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd}
	at, err := a.f.Seek(0, io.SeekEnd)
	if err != nil {
		return desc, "", err
	}
	if _, err := a.f.Write(make([]byte, tarBlock)); err != nil {
		return desc, "", err
	}
	sum := digest.Canonical.Digester()
	count := &countWriter{w: io.MultiWriter(a.f, sum.Hash())}
	diffID, err := write(count)
	if err != nil {
		return desc, "", err
	}
	desc.Digest, desc.Size = sum.Digest(), count.n
	if err := a.pad(count.n); err != nil {
		return desc, "", err
	}
	h, err := a.header(blobPath(desc.Digest), desc.Size)
	if err == nil {
		_, err = a.f.WriteAt(h, at)
	}
	return desc, diffID, err
}

func (a *archiveBlobs) pad(size int64) error {
	_, err := a.f.Write(make([]byte, (tarBlock-size%tarBlock)%tarBlock))
	return err
}

func (a *archiveBlobs) file(name string, data []byte) error {
	h, err := a.header(name, int64(len(data)))
	if err != nil {
		return err
	}
	if _, err := a.f.Write(append(h, data...)); err != nil {
		return err
	}
	return a.pad(int64(len(data)))
}

func (a *archiveBlobs) blob(_ context.Context, desc ocispec.Descriptor, data []byte, _ map[string]string) error {
	return a.file(blobPath(desc.Digest), data)
}

func (a *archiveBlobs) finish(_ context.Context, name reference.NamedTagged, manifest ocispec.Descriptor) error {
	manifest.Annotations = map[string]string{
		images.AnnotationImageName: name.String(),
		ocispec.AnnotationRefName:  name.Tag(),
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{manifest},
	})
	if err != nil {
		return err
	}
	layout, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	if err := errors.Join(a.file(ocispec.ImageLayoutFile, layout), a.file(ocispec.ImageIndexFile, index)); err != nil {
		return err
	}
	_, err = a.f.Write(make([]byte, 2*tarBlock))
	return err
}
