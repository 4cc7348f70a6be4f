package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/vmruntime/vmruntime/image/qcow2"
)

const (
	// diskOwner owns the disk in an image, by KubeVirt's convention: its qemu user.
	diskOwner = 107
	// formatLabel and sizeLabel are in the configuration of images that Pack makes.
	formatLabel = "io.vmruntime.disk.format"
	sizeLabel   = "io.vmruntime.disk.virtual-size"
)

// PackOptions say which disk becomes which image.
type PackOptions struct {
	// Disk is the path of a disk: raw, qcow2, VMDK or VDI. All but qcow2 are converted to that by qemu-img.
	Disk string
	// Name is the image's name, as docker would understand it: NAME[:TAG].
	Name string
	// Architecture is the guest's, as OCI names it (amd64, arm64); empty means this machine's.
	Architecture string
	// TempDir holds the converted disk; empty means os.TempDir.
	TempDir string
	// Launcher is the command that becomes ConvertMain; needed for what has to be converted.
	Launcher []string
	// Progress is called with what is being done, and how far it has come. It may be nil.
	Progress func(what string, done, total int64)
}

// Packed is an image that Pack has made.
type Packed struct {
	// Name is the image's full name.
	Name string
	// Manifest is the digest of its manifest, and Config that of its configuration: the image ID of the CRI.
	Manifest, Config digest.Digest
	// File is the disk's path in the image.
	File string
	// VirtualSize is the disk's size in bytes, FileSize that of the file, and LayerSize that of its packed layer.
	VirtualSize, FileSize, LayerSize int64
}

func (o *PackOptions) setDefaults() (reference.NamedTagged, error) {
	named, err := reference.ParseDockerRef(o.Name)
	if err != nil {
		return nil, fmt.Errorf("image name %q: %w, want NAME[:TAG] in lower case: %w", o.Name, err, errdefs.ErrInvalidArgument)
	}
	tagged, ok := named.(reference.NamedTagged)
	if !ok {
		return nil, fmt.Errorf("image name %q has a digest, want NAME[:TAG]: %w", o.Name, errdefs.ErrInvalidArgument)
	}
	if o.Architecture == "" {
		o.Architecture = goruntime.GOARCH
	}
	if !slices.Contains([]string{"amd64", "arm64"}, o.Architecture) {
		return nil, fmt.Errorf("architecture %q, want amd64 or arm64: %w", o.Architecture, errdefs.ErrInvalidArgument)
	}
	if o.Progress == nil {
		o.Progress = func(string, int64, int64) {}
	}
	return tagged, nil
}

// blobs takes the parts of an image. An archive and containerd do.
type blobs interface {
	// layer takes what write writes; the digest and size are known only when it is written.
	layer(ctx context.Context, write func(io.Writer) (diffID digest.Digest, err error)) (desc ocispec.Descriptor, diffID digest.Digest, err error)
	// blob takes a small part.
	blob(ctx context.Context, desc ocispec.Descriptor, data []byte, labels map[string]string) error
	// finish names the image.
	finish(ctx context.Context, name reference.NamedTagged, manifest ocispec.Descriptor) error
}

// pack makes an image of a disk and gives its parts to b.
func pack(ctx context.Context, o PackOptions, b blobs) (_ *Packed, err error) {
	name, err := o.setDefaults()
	if err != nil {
		return nil, err
	}
	disk, info, err := openPackable(ctx, &o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	stat, err := disk.Stat()
	if err != nil {
		return nil, err
	}
	p := &Packed{
		Name: name.String(), File: "disk/" + path.Base(reference.Path(name)) + ".qcow2",
		VirtualSize: info.VirtualSize, FileSize: stat.Size(),
	}
	layer, diffID, err := b.layer(ctx, func(w io.Writer) (digest.Digest, error) {
		return writeLayer(ctx, w, disk, p, o.Progress)
	})
	if ctx.Err() != nil { // what containerd says of it then may be any of its own errors
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		return nil, fmt.Errorf("pack disk: %w", err)
	}
	p.LayerSize = layer.Size
	if err := p.describe(ctx, b, name, o.Architecture, layer, diffID); err != nil {
		return nil, fmt.Errorf("pack disk: %w", err)
	}
	return p, nil
}

// describe makes the configuration and the manifest.
func (p *Packed) describe(ctx context.Context, b blobs, name reference.NamedTagged, arch string, layer ocispec.Descriptor, diffID digest.Digest) error {
	config := ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: arch},
		Config: ocispec.ImageConfig{Labels: map[string]string{
			formatLabel: qcow2.FormatQcow2, sizeLabel: fmt.Sprint(p.VirtualSize),
		}},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
	}
	configDesc, err := putJSON(ctx, b, ocispec.MediaTypeImageConfig, config, nil)
	if err != nil {
		return err
	}
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: configDesc, Layers: []ocispec.Descriptor{layer},
	}
	desc, err := putJSON(ctx, b, ocispec.MediaTypeImageManifest, manifest, map[string]string{
		"containerd.io/gc.ref.content.config": configDesc.Digest.String(),
		"containerd.io/gc.ref.content.l.0":    layer.Digest.String(),
	})
	if err != nil {
		return err
	}
	desc.Platform = &config.Platform
	p.Manifest, p.Config = desc.Digest, configDesc.Digest
	return b.finish(ctx, name, desc)
}

func putJSON(ctx context.Context, b blobs, mediaType string, v any, labels map[string]string) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return desc, b.blob(ctx, desc, data, labels)
}

// writeLayer writes the layer with the disk to w and returns the digest of what is not compressed of it. The same disk
// gives the same layer: times are zero.
func writeLayer(ctx context.Context, w io.Writer, disk *os.File, p *Packed, progress func(string, int64, int64)) (digest.Digest, error) {
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(goruntime.GOMAXPROCS(0)))
	if err != nil {
		return "", err
	}
	diff := digest.Canonical.Digester()
	err = writeTar(ctx, io.MultiWriter(z, diff.Hash()), disk, p, progress)
	return diff.Digest(), errors.Join(err, z.Close())
}

func writeTar(ctx context.Context, w io.Writer, disk *os.File, p *Packed, progress func(string, int64, int64)) error {
	t := tar.NewWriter(w)
	dir, _ := path.Split(p.File)
	epoch := time.Unix(0, 0)
	if err := t.WriteHeader(&tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: epoch, Format: tar.FormatPAX}); err != nil {
		return err
	}
	h := &tar.Header{
		Name: p.File, Typeflag: tar.TypeReg, Mode: 0o444, Uid: diskOwner, Gid: diskOwner,
		Size: p.FileSize, ModTime: epoch, Format: tar.FormatPAX,
	}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	src := &progressReader{ctx: ctx, r: io.NewSectionReader(disk, 0, p.FileSize), total: p.FileSize, what: "packing", report: progress}
	// A buffer of its own size: tar.Writer would read in pieces of 32 KiB.
	if _, err := io.CopyBuffer(struct{ io.Writer }{t}, src, make([]byte, 1<<20)); err != nil {
		return err
	}
	return t.Close()
}

// progressReader reports what was read of it, and ends with its context.
type progressReader struct {
	ctx         context.Context
	r           io.Reader
	done, total int64
	what        string
	report      func(what string, done, total int64)
}

func (p *progressReader) Read(b []byte) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := p.r.Read(b)
	p.done += int64(n)
	p.report(p.what, p.done, p.total)
	return n, err
}

// openPackable opens the disk as qcow2, converting it first if it is not, and checks it.
func openPackable(ctx context.Context, o *PackOptions) (*os.File, *qcow2.Info, error) {
	f, err := os.Open(o.Disk)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("disk %s is no regular file (%s): %w", o.Disk, info.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	format, err := sourceFormat(f, info.Size(), o.Disk)
	if err == nil && format != qcow2.FormatQcow2 {
		var converted *os.File
		converted, err = convert(ctx, o, f, format)
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, nil, fmt.Errorf("convert disk %s from %s: %w", o.Disk, format, err)
		}
		if f, info, err = converted, nil, error(nil); f != nil {
			info, err = f.Stat()
		}
	}
	var checked *qcow2.Info
	if err == nil {
		o.Progress("checking", 0, info.Size())
		checked, err = qcow2.Check(contextReader{ctx, f}, info.Size(), qcow2.Limits{MaxVirtualSize: maxDiskSize})
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("disk %s: %w", o.Disk, err), f.Close())
	}
	return f, checked, nil
}

// sourceFormat tells the format of a disk by its beginning.
func sourceFormat(f io.ReaderAt, size int64, name string) (string, error) {
	head := make([]byte, 68)
	if _, err := f.ReadAt(head[:min(68, size)], 0); err != nil {
		return "", err
	}
	switch {
	case strings.HasPrefix(string(head), "KDMV"):
		return "vmdk", nil
	case strings.HasPrefix(string(head[64:]), "\x7f\x10\xda\xbe"):
		return "vdi", nil
	}
	format, err := qcow2.DetectFormat(f, size, "disk"+path.Ext(name))
	if err == nil && format == qcow2.FormatRaw && (size == 0 || size%sectorSize != 0) {
		err = fmt.Errorf("disk %s is raw and has %d bytes, want a multiple of %d: %w", name, size, sectorSize, errdefs.ErrInvalidArgument)
	}
	return format, err
}
