package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/vmruntime/vmruntime/image/qcow2"
)

const (
	maxInspect  = 1 << 40  // bytes of an archive's layers that are unpacked
	maxJSON     = 16 << 20 // bytes of a manifest or configuration
	maxWalk     = 1 << 16  // entries that are looked at for kernels
	kernelDepth = 4
)

// Contents is what inspecting an image finds.
type Contents struct {
	// Name is the image's name, Digest that of its configuration, ChainID that of its layers.
	Name    string
	Digest  digest.Digest
	ChainID digest.Digest
	// Platform is the system that the image says it is for.
	Platform ocispec.Platform
	// LayerSize is the sum of the packed layers in bytes.
	LayerSize int64
	// Verdict is what a pod would be: nil is a machine, ErrNotFound an ordinary image, ErrInvalidArgument a refusal.
	Verdict error
	// Chosen is the path of the disk that would boot; empty if Verdict is not nil.
	Chosen string
	// Disks are all that look like disks, where a pod's disk is looked for.
	Disks []FoundDisk
	// Kernels are the paths of files that look like a kernel or an initrd, for direct boot.
	Kernels []string
}

// FoundDisk is one disk in an image.
type FoundDisk struct {
	// Name is its path in the image.
	Name string
	// Format is qcow2 or raw; empty if Refused is not.
	Format string
	// VirtualSize is what a guest sees, FileSize what the file has, Allocated what of the disk is stored in it; all in bytes.
	VirtualSize, FileSize, Allocated int64
	// Details is set for qcow2.
	Details *qcow2.Info
	// Refused says why the disk cannot be used.
	Refused string
}

// Inspect tells what is in an image of containerd. It leaves nothing behind. Errors are those of Ensure; what is wrong with
// the disks is in the Contents.
func (s *Store) Inspect(ctx context.Context, ref string) (*Contents, error) {
	ctx = s.in(ctx)
	r, err := s.resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	config, err := s.readConfig(ctx, r)
	if err != nil {
		return nil, err
	}
	size, err := r.image.Size(ctx, s.opts.Client.ContentStore(), s.platform)
	if err != nil {
		return nil, fmt.Errorf("size of image %s: %w", ref, err)
	}
	c := &Contents{Name: r.image.Name, Digest: r.config.Digest, ChainID: r.chain, Platform: config.Platform, LayerSize: size}
	if r.chain == "" {
		c.Verdict = fmt.Errorf("no layers, and so no disk: %w", errdefs.ErrNotFound)
		return c, nil
	}
	err = s.withView(ctx, r, func(ctx context.Context, root *os.Root) error {
		return c.look(ctx, root, runsAsContainer(config))
	})
	return c, err
}

// look fills in what the files tell.
func (c *Contents) look(ctx context.Context, root *os.Root, runs bool) error {
	f, err := scan(root)
	if err != nil {
		return err
	}
	for _, d := range append(f.InDisk, f.AtRoot...) {
		if err := d.check(ctx, root); err != nil {
			return err
		}
		found := FoundDisk{Name: d.Name, Format: d.Format, VirtualSize: d.VirtualSize, FileSize: d.FileSize, Details: d.Details, Refused: d.Error}
		if d.Details != nil {
			found.Allocated = d.Details.Allocated
		} else if found.Allocated, err = allocated(root, d.Name); err != nil {
			return err
		}
		c.Disks = append(c.Disks, found)
	}
	chosen, err := f.disk(runs)
	if c.Verdict = err; err == nil {
		c.Chosen = chosen.Name
	}
	c.Kernels, err = findKernels(root.FS())
	return err
}

func allocated(root *os.Root, name string) (int64, error) {
	f, err := openRegular(root, name)
	if err != nil {
		return 0, err
	}
	var sum int64
	for off := int64(0); ; {
		start, end, err := nextData(f, off)
		if errors.Is(err, io.EOF) {
			return sum, f.Close()
		}
		if err != nil {
			return 0, errors.Join(err, f.Close())
		}
		sum, off = sum+end-start, end
	}
}

// findKernels lists files that look like kernels and initrds by their names, as far as it may look and list.
func findKernels(files fs.FS) ([]string, error) {
	var found []string
	walked := 0
	err := fs.WalkDir(files, ".", func(name string, d fs.DirEntry, err error) error {
		walked++
		base := strings.ToLower(path.Base(name))
		switch {
		case err != nil:
			return err
		case walked > maxWalk || len(found) >= maxListed:
			return fs.SkipAll
		case d.IsDir() && (strings.Count(name, "/") >= kernelDepth || base == "systemd"): // its units of initrds are none
			return fs.SkipDir
		case d.Type().IsRegular() && looksLikeKernel(base):
			found = append(found, name)
		}
		return nil
	})
	return found, err
}

func looksLikeKernel(base string) bool {
	for _, prefix := range []string{"vmlinuz", "vmlinux", "bzimage", "initrd", "initramfs"} {
		if strings.HasPrefix(base, prefix) {
			return true
		}
	}
	return false
}

// InspectArchive tells what is in an OCI archive, for the platform of this machine if it holds several. What it unpacks
// lies in tempDir, or os.TempDir if that is empty, until it returns. It fails with errdefs.ErrInvalidArgument if it is
// no such archive.
func InspectArchive(ctx context.Context, file, tempDir string) (_ *Contents, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	a, err := readArchive(f)
	if err != nil {
		return nil, fmt.Errorf("archive %s: %w", file, err)
	}
	c, manifest, config, err := a.manifest()
	if err != nil {
		return nil, fmt.Errorf("archive %s: %w", file, err)
	}
	dir, err := os.MkdirTemp(tempDir, "vmruntime-inspect-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for _, layer := range manifest.Layers {
		c.LayerSize += layer.Size
		if err := a.unpack(ctx, layer, dir); err != nil {
			return nil, fmt.Errorf("archive %s: unpack layer %s: %w", file, layer.Digest, err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return c, errors.Join(c.look(ctx, root, runsAsContainer(config)), root.Close())
}

// ociArchive knows where in a tar archive each file lies.
type ociArchive struct {
	f     *os.File
	files map[string]*io.SectionReader
}

func readArchive(f *os.File) (*ociArchive, error) {
	a := &ociArchive{f: f, files: map[string]*io.SectionReader{}}
	t := tar.NewReader(f)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return a, nil
		}
		if err != nil {
			return nil, fmt.Errorf("no tar archive: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if h.Typeflag != tar.TypeReg || len(a.files) >= maxWalk {
			continue
		}
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		a.files[path.Clean(h.Name)] = io.NewSectionReader(f, at, h.Size)
	}
}

// json reads one of the archive's documents. A blob has to have its digest.
func (a *ociArchive) json(name string, want digest.Digest, v any) error {
	r := a.files[name]
	if r == nil {
		return fmt.Errorf("no file %s in it, want an OCI image layout: %w", name, errdefs.ErrInvalidArgument)
	}
	data, err := io.ReadAll(io.LimitReader(r, maxJSON))
	if err != nil {
		return err
	}
	if want != "" && digest.FromBytes(data) != want {
		return fmt.Errorf("file %s has another digest: %w", name, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("file %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (a *ociArchive) blobJSON(d digest.Digest, v any) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	return a.json(blobPath(d), d, v)
}

// manifest finds the image's manifest and configuration.
func (a *ociArchive) manifest() (*Contents, *ocispec.Manifest, ocispec.Image, error) {
	var manifest ocispec.Manifest
	var config ocispec.Image
	desc, err := a.choose("", ocispec.ImageIndexFile, 0)
	if err == nil {
		err = a.blobJSON(desc.Digest, &manifest)
	}
	if err == nil {
		err = a.blobJSON(manifest.Config.Digest, &config)
	}
	if err != nil {
		return nil, nil, config, err
	}
	c := &Contents{
		Name: desc.Annotations["io.containerd.image.name"], Digest: manifest.Config.Digest,
		ChainID: identity.ChainID(config.RootFS.DiffIDs), Platform: config.Platform,
	}
	return c, &manifest, config, nil
}

// choose takes the manifest for this machine out of an index, or the only one.
func (a *ociArchive) choose(d digest.Digest, name string, depth int) (ocispec.Descriptor, error) {
	var index ocispec.Index
	if err := a.json(name, d, &index); err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(index.Manifests) == 0 || depth > 2 {
		return ocispec.Descriptor{}, fmt.Errorf("no manifest in %s: %w", name, errdefs.ErrInvalidArgument)
	}
	match := platforms.Default()
	best := index.Manifests[0]
	for _, m := range index.Manifests {
		if m.Platform != nil && match.Match(*m.Platform) {
			best = m
			break
		}
	}
	if err := best.Digest.Validate(); err != nil {
		return best, fmt.Errorf("digest %q in %s: %w: %w", best.Digest, name, err, errdefs.ErrInvalidArgument)
	}
	if best.MediaType == ocispec.MediaTypeImageIndex || strings.Contains(best.MediaType, "manifest.list") {
		nested, err := a.choose(best.Digest, blobPath(best.Digest), depth+1)
		if nested.Annotations == nil {
			nested.Annotations = best.Annotations
		}
		return nested, err
	}
	return best, nil
}

// unpack applies a layer to dir: files and directories only.
func (a *ociArchive) unpack(ctx context.Context, layer ocispec.Descriptor, dir string) error {
	if err := layer.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	blob := a.files[blobPath(layer.Digest)]
	if blob == nil {
		return fmt.Errorf("it is not there: %w", errdefs.ErrInvalidArgument)
	}
	r, err := compression.DecompressStream(blob)
	if err != nil {
		return err
	}
	_, err = archive.Apply(ctx, dir, io.LimitReader(r, maxInspect), archive.WithNoSameOwner(), archive.WithFilter(func(h *tar.Header) (bool, error) {
		return h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeDir || h.Typeflag == tar.TypeLink || h.Typeflag == tar.TypeSymlink, nil
	}))
	return errors.Join(err, r.Close())
}
