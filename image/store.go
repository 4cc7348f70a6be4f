package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/erofs/go-erofs"
	"github.com/moby/locker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	defaultNamespace    = "k8s.io"
	defaultBuildTimeout = 15 * time.Minute
	defaultMaxBytes     = 64 << 30
	cleanupTimeout      = 30 * time.Second
)

// Options say where a Store keeps its files and whose images it uses.
type Options struct {
	// Root is the directory of all files of the store. It is made if it is not there.
	Root string
	// Client is connected to containerd. The store does not close it.
	Client *containerd.Client
	// Namespace is the containerd namespace of the images; empty means "k8s.io".
	Namespace string
	// Snapshotter holds the unpacked images. Empty means: whichever snapshotter
	// containerd recorded for the image, else "overlayfs".
	Snapshotter string
	// MaxImageBytes bounds the sum of file sizes of one image; 0 means 64 GiB.
	MaxImageBytes int64
	// BuildTimeout bounds the build of one EROFS file; 0 means 15 minutes.
	BuildTimeout time.Duration
	// ProjectQuota makes scratch disks with ext4's project quota feature. The
	// guest's kernel needs quota support to mount such a disk with quotas.
	ProjectQuota bool
	// Logger gets what cannot be returned as an error; nil means slog.Default().
	Logger *slog.Logger
}

// Image is a pulled image with its root file system as a disk.
type Image struct {
	// Ref is the reference that was asked for.
	Ref string
	// Digest is the digest of the image's configuration: the image ID of the CRI.
	Digest string
	// ChainID is the digest of the image's layers, as containerd computes it.
	ChainID string
	// Config is the image's configuration.
	Config ocispec.Image
	// RootFS is the path of the EROFS file.
	RootFS string
	// Serial is the serial number of the disk in a VM: at most 20 of [a-z0-9-].
	// Images with the same RootFS have the same serial.
	Serial string
	// Size is the size of RootFS in bytes.
	Size int64
}

// FS opens the root file system for reading. The file system is good until the
// closer is closed.
func (i *Image) FS() (fs.FS, io.Closer, error) {
	f, err := os.Open(i.RootFS)
	if err != nil {
		return nil, nil, fmt.Errorf("open root file system of image %s: %w", i.Ref, err)
	}
	fsys, err := erofs.Open(f)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("read EROFS %s of image %s: %w", i.RootFS, i.Ref, err), f.Close())
	}
	return fsys, f, nil
}

// Store makes and keeps the disks. It is safe for concurrent use.
type Store struct {
	opts     Options
	log      *slog.Logger
	platform platforms.MatchComparer
	dirs     dirs

	ctx    context.Context // ends with Close; builds run under it
	cancel context.CancelFunc
	wg     sync.WaitGroup // running builds

	mu      sync.Mutex
	closed  bool
	refs    refs                            // who uses which EROFS file
	viewers refs                            // who uses which mounted view
	builds  map[string]*build               // by key
	chains  map[digest.Digest]digest.Digest // chain ID by target of an image: immutable facts

	scratchMu sync.Mutex     // one template is made at a time
	viewLocks *locker.Locker // by key: one at a time mounts, unmounts and looks through a view
}

// New opens the store in o.Root and removes what an earlier process left half
// made. It does not talk to containerd.
func New(o Options) (*Store, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	d := dirs{root: o.Root}
	if err := d.prepare(); err != nil {
		return nil, err
	}
	held, err := loadRefs(d.owners())
	if err != nil {
		return nil, err
	}
	viewing, err := loadRefs(d.viewers())
	if err != nil {
		return nil, err
	}
	s := &Store{
		opts:      o,
		log:       o.Logger,
		platform:  platforms.Default(),
		dirs:      d,
		refs:      held,
		viewers:   viewing,
		viewLocks: locker.New(),
		builds:    map[string]*build{},
		chains:    map[digest.Digest]digest.Digest{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

func (o *Options) setDefaults() error {
	if o.Root == "" {
		return fmt.Errorf("Root is empty, want the directory of the image store: %w", errdefs.ErrInvalidArgument)
	}
	if o.Client == nil {
		return fmt.Errorf("Client is nil, want a client of containerd: %w", errdefs.ErrInvalidArgument)
	}
	if o.MaxImageBytes < 0 {
		return fmt.Errorf("MaxImageBytes is %d, want 0 or more: %w", o.MaxImageBytes, errdefs.ErrInvalidArgument)
	}
	if o.Namespace == "" {
		o.Namespace = defaultNamespace
	}
	if o.MaxImageBytes == 0 {
		o.MaxImageBytes = defaultMaxBytes
	}
	if o.BuildTimeout <= 0 {
		o.BuildTimeout = defaultBuildTimeout
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return nil
}

// Close cancels running builds and waits for them. Files and leases stay.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	return nil
}

// in returns ctx for calls in the store's containerd namespace.
func (s *Store) in(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, s.opts.Namespace)
}

// cleanupContext is for teardown: it is bounded, and a cancelled request does not end it.
func (s *Store) cleanupContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(s.in(context.WithoutCancel(ctx)), cleanupTimeout)
}
