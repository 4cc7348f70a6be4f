package image

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// resolved is an image of containerd with what its content says of it.
type resolved struct {
	image  images.Image
	config ocispec.Descriptor
	chain  digest.Digest
}

// resolve finds an image as the CRI names it: by image ID (digest of the
// configuration), by name, by name@digest, or by the beginning of an image ID.
func (s *Store) resolve(ctx context.Context, ref string) (*resolved, error) {
	if ref == "" {
		return nil, fmt.Errorf("image reference is empty, want a name or an image ID: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := digest.Parse(ref); err == nil {
		return s.resolveID(ctx, ref)
	}
	if named, err := reference.ParseDockerRef(ref); err == nil {
		img, err := s.opts.Client.ImageService().Get(ctx, named.String())
		if err == nil {
			return s.describe(ctx, img)
		}
		if !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("find image %s: %w", ref, err)
		}
	}
	return s.resolveID(ctx, ref)
}

// resolveID finds an image by its ID, which may be cut short.
func (s *Store) resolveID(ctx context.Context, ref string) (*resolved, error) {
	// The CRI plugin stores every image under its ID too.
	img, err := s.opts.Client.ImageService().Get(ctx, ref)
	if err == nil {
		return s.describe(ctx, img)
	}
	if !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("find image %s: %w", ref, err)
	}
	all, err := s.opts.Client.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("find image %s: %w", ref, err)
	}
	var found *resolved
	for _, img := range all {
		r, err := s.describe(ctx, img)
		if errdefs.IsUnavailable(err) || ctx.Err() != nil {
			return nil, err
		}
		if err != nil || !matchesID(r.config.Digest, ref) {
			continue // an image without content here cannot be the one
		}
		if found != nil && found.config.Digest != r.config.Digest {
			return nil, fmt.Errorf("image ID %s is the beginning of several, want more digits: %w", ref, errdefs.ErrInvalidArgument)
		}
		found = r
	}
	if found == nil {
		return nil, fmt.Errorf("image %s is not in containerd's namespace %s: %w", ref, s.opts.Namespace, errdefs.ErrNotFound)
	}
	return found, nil
}

// matchesID reports whether ref is id or the beginning of its hex digits.
func matchesID(id digest.Digest, ref string) bool {
	return id.String() == ref || strings.HasPrefix(id.Encoded(), ref)
}

// describe reads what the content store says of an image for this platform.
func (s *Store) describe(ctx context.Context, img images.Image) (*resolved, error) {
	store := s.opts.Client.ContentStore()
	diffs, err := img.RootFS(ctx, store, s.platform)
	if err != nil {
		return nil, fmt.Errorf("read layers of image %s: %w", img.Name, err)
	}
	config, err := img.Config(ctx, store, s.platform)
	if err != nil {
		return nil, fmt.Errorf("read manifest of image %s: %w", img.Name, err)
	}
	return &resolved{image: img, config: config, chain: identity.ChainID(diffs)}, nil
}

// readConfig reads the image's configuration.
func (s *Store) readConfig(ctx context.Context, r *resolved) (ocispec.Image, error) {
	var config ocispec.Image
	blob, err := content.ReadBlob(ctx, s.opts.Client.ContentStore(), r.config)
	if err != nil {
		return config, fmt.Errorf("read configuration of image %s: %w", r.image.Name, err)
	}
	if err := json.Unmarshal(blob, &config); err != nil {
		return config, fmt.Errorf("configuration %s of image %s: %w: %w", r.config.Digest, r.image.Name, err, errdefs.ErrInvalidArgument)
	}
	return config, nil
}

// presentKeys returns the keys of all images in containerd. What is known of an
// image is remembered by its target, so mostly this is one call.
func (s *Store) presentKeys(ctx context.Context) (map[string]bool, error) {
	all, err := s.opts.Client.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images of containerd: %w", err)
	}
	s.mu.Lock()
	known := s.chains
	s.mu.Unlock()
	present := map[string]bool{}
	chains := map[digest.Digest]digest.Digest{}
	for _, img := range all {
		chain, ok := known[img.Target.Digest]
		if !ok {
			r, err := s.describe(ctx, img)
			if errdefs.IsNotFound(err) {
				continue // no content for this platform: no EROFS either
			}
			if err != nil {
				return nil, err
			}
			chain = r.chain
		}
		chains[img.Target.Digest] = chain
		present[keyOf(chain)] = true
	}
	s.mu.Lock()
	s.chains = chains
	s.mu.Unlock()
	return present, nil
}
