// Package runtime is the CRI for VM pods: it composes QEMU, images, networks and the agent in the guest into pods
// and containers, and finds them again after a restart.
//
// A sandbox is its network, its scratch disk and its record; a guest may end and be booted again inside it. All that
// is durable lies in records (package state); everything else in memory is derived from them and from what runs.
// Every resource on the node is named by the pod's ID, and one idempotent teardown takes all of them away.
package runtime

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/image"
	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/runtime/delegate"
	"github.com/vmruntime/vmruntime/runtime/state"
)

// Runtime is the VM side of the CRI.
type Runtime struct {
	runtimeapi.UnimplementedRuntimeServiceServer

	cfg          Config
	log          *slog.Logger
	launcher     []string
	images       *image.Store
	imageService runtimeapi.ImageServiceClient
	net          *network.Manager
	guestImage   *guestImage
	accel        *acceleration
	templates    *templates
	spares       *spares
	boots        *semaphore.Weighted
	streaming    *streamServer
	events       eventHub
	metrics      vmMetrics

	podStore       *state.Store[podSpec, podStatus]
	containerStore *state.Store[containerSpec, containerStatus]
	podNames       *state.Names
	containerNames *state.Names

	mu         sync.RWMutex
	pods       map[string]*pod
	containers map[string]*container
	// secret is what the keys of machines derive from.
	secret    []byte
	takenUIDs map[uint32]bool // of pods whose record is being written

	populations populations

	// ctx ends when the daemon stops; owned are the goroutines that end with it.
	ctx    context.Context
	cancel context.CancelFunc
	owned  sync.WaitGroup
}

var _ delegate.VMSide = (*Runtime)(nil)

// Dependencies are what a Runtime is made with.
type Dependencies struct {
	Containerd *containerd.Client
	// CRI is a connection to containerd's CRI, for the image service.
	CRI *grpc.ClientConn
	// Launcher is the command that runs QEMU confined; the VM's job is appended to it.
	Launcher []string
	Logger   *slog.Logger
}

// New makes a Runtime that knows no pods yet: Recover finds them.
func New(cfg Config, d Dependencies) (*Runtime, error) {
	guest, err := loadGuestImage(cfg.Guest.Dir)
	if err != nil {
		return nil, err
	}
	rt := &Runtime{
		cfg:            cfg,
		log:            d.Logger,
		launcher:       d.Launcher,
		imageService:   runtimeapi.NewImageServiceClient(d.CRI),
		guestImage:     guest,
		metrics:        newVMMetrics(),
		boots:          semaphore.NewWeighted(int64(max(minBoots, bootsPerCPU*goruntime.NumCPU()))),
		podNames:       state.NewNames(),
		containerNames: state.NewNames(),
		pods:           make(map[string]*pod),
		containers:     make(map[string]*container),
		takenUIDs:      make(map[uint32]bool),
	}
	if err := os.MkdirAll(cfg.Server.Root, 0o700); err != nil {
		return nil, err
	}
	if rt.secret, err = loadSecret(cfg.Server.Root); err != nil {
		return nil, err
	}
	if rt.images, err = image.New(image.Options{
		Root: filepath.Join(cfg.Server.Root, "images"), Client: d.Containerd, Namespace: CRINamespace, Logger: d.Logger,
	}); err != nil {
		return nil, err
	}
	if rt.net, err = network.New(network.Options{
		ConfDir: cfg.Network.ConfDir, BinDirs: cfg.Network.BinDirs, NetNSDir: filepath.Join(cfg.Server.State, "netns"),
	}); err != nil {
		return nil, err
	}
	if rt.podStore, err = state.Open[podSpec, podStatus](filepath.Join(cfg.Server.Root, "pods")); err != nil {
		return nil, err
	}
	if rt.containerStore, err = state.Open[containerSpec, containerStatus](filepath.Join(cfg.Server.Root, "containers")); err != nil {
		return nil, err
	}
	rt.accel = &acceleration{
		configured: cfg.QEMU.Accel, path: filepath.Join(cfg.Server.State, "accel.json"), prove: rt.proveKVM, log: d.Logger,
	}
	rt.ctx, rt.cancel = context.WithCancel(context.Background())
	rt.templates, rt.spares = rt.newTemplates(), rt.newSpares()
	if rt.streaming, err = rt.serveStreams(cfg.Server.StreamAddress); err != nil {
		rt.cancel()
		return nil, err
	}
	rt.owned.Go(func() { rt.images.Watch(rt.ctx) })
	rt.owned.Go(func() {
		if _, err := rt.accel.verdict(rt.ctx); err != nil {
			rt.log.Debug("acceleration", "error", err)
		}
	})
	return rt, nil
}

// Close ends everything that the daemon does for VM pods, and leaves them running.
func (rt *Runtime) Close() error {
	rt.cancel()
	err := rt.streaming.close()
	for _, p := range rt.allPods() {
		p.stopProjections()
		if g := p.currentGuest(); g != nil {
			err = errors.Join(err, g.Close())
		}
	}
	rt.owned.Wait()
	return errors.Join(err, rt.templates.close(), rt.images.Close())
}

// Handles tells whether pods of a runtime handler become VMs.
func (rt *Runtime) Handles(handler string) bool { return slices.Contains(rt.cfg.VM.Handlers, handler) }

// OwnsPod tells whether a sandbox ID, or a prefix that is unique, is a VM pod's.
func (rt *Runtime) OwnsPod(id string) bool {
	_, err := rt.podStore.Find(id)
	return err == nil
}

// OwnsContainer is OwnsPod for containers.
func (rt *Runtime) OwnsContainer(id string) bool {
	_, err := rt.containerStore.Find(id)
	return err == nil
}

// ImageFilesystem is what root filesystems of images and scratch disks take beside containerd's images.
func (rt *Runtime) ImageFilesystem(ctx context.Context) (*runtimeapi.FilesystemUsage, error) {
	u, err := rt.images.Usage(ctx)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.FilesystemUsage{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: rt.cfg.Server.Root},
		UsedBytes:  &runtimeapi.UInt64Value{Value: uint64(u.Bytes)},
		InodesUsed: &runtimeapi.UInt64Value{Value: uint64(u.Inodes)},
	}, nil
}

func (rt *Runtime) podByID(id string) (*pod, error) {
	full, err := rt.podStore.Find(id)
	if err != nil {
		return nil, fmt.Errorf("sandbox %q: %w", id, err)
	}
	rt.mu.RLock()
	defer rt.mu.RUnlock()
	if p := rt.pods[full]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("sandbox %q was removed meanwhile: %w", id, errdefs.ErrNotFound)
}

func (rt *Runtime) containerByID(id string) (*container, error) {
	full, err := rt.containerStore.Find(id)
	if err != nil {
		return nil, fmt.Errorf("container %q: %w", id, err)
	}
	rt.mu.RLock()
	defer rt.mu.RUnlock()
	if c := rt.containers[full]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %q was removed meanwhile: %w", id, errdefs.ErrNotFound)
}

// podIDMatches tells whether a filter's ID, which may be a unique prefix, means this sandbox.
func (rt *Runtime) podIDMatches(filter, id string) bool {
	full, err := rt.podStore.Find(filter)
	return err == nil && full == id
}

func (rt *Runtime) containerIDMatches(filter, id string) bool {
	full, err := rt.containerStore.Find(filter)
	return err == nil && full == id
}

func (rt *Runtime) allPods() []*pod {
	rt.mu.RLock()
	defer rt.mu.RUnlock()
	return slices.Collect(maps.Values(rt.pods))
}

func (rt *Runtime) allContainers() []*container {
	rt.mu.RLock()
	defer rt.mu.RUnlock()
	return slices.Collect(maps.Values(rt.containers))
}

func (rt *Runtime) containersOf(podID string) []*container {
	rt.mu.RLock()
	defer rt.mu.RUnlock()
	var out []*container
	for _, c := range rt.containers {
		if c.pod.id == podID {
			out = append(out, c)
		}
	}
	return out
}
