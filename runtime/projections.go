package runtime

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

// projections keeps the pushed volumes of a pod equal to the node's: the kubelet replaces the link "..data" in
// a volume's directory, which the watch sees.
type projections struct {
	log     *slog.Logger
	push    func(ctx context.Context, m resolvedMount) error
	watcher *fsnotify.Watcher
	cancel  context.CancelFunc
	owned   sync.WaitGroup

	mu     sync.Mutex
	mounts map[string]resolvedMount // by name
	dirty  map[string]bool          // names that are to be pushed
	wake   chan struct{}            // that there is a dirty one
}

const (
	// settle is how long a directory must be quiet before it is read: the kubelet writes several entries.
	settle = 50 * time.Millisecond
	// retry is how long after a push that failed it is tried again.
	retry = 5 * time.Second
)

func newProjections(parent context.Context, log *slog.Logger, push func(context.Context, resolvedMount) error) (*projections, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(parent)
	p := &projections{
		log: log, push: push, watcher: w, cancel: cancel,
		mounts: make(map[string]resolvedMount), dirty: make(map[string]bool), wake: make(chan struct{}, 1),
	}
	p.owned.Go(func() { p.run(ctx) })
	return p, nil
}

func (p *projections) close() {
	p.cancel()
	p.owned.Wait()
	_ = p.watcher.Close()
}

// add watches a volume, and pushes it once: what changed before the watch began is not seen by it.
func (p *projections) add(m resolvedMount) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.watcher.Add(m.HostPath); err != nil {
		return err
	}
	p.mounts[m.Name] = m
	p.dirty[m.Name] = true
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return nil
}

func (p *projections) remove(m resolvedMount) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.mounts, m.Name)
	delete(p.dirty, m.Name)
	for _, other := range p.mounts {
		if other.HostPath == m.HostPath {
			return
		}
	}
	_ = p.watcher.Remove(m.HostPath) // gone already when the directory is
}

func (p *projections) run(ctx context.Context) {
	quiet := time.NewTimer(time.Hour)
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
			quiet.Reset(settle)
		case ev, ok := <-p.watcher.Events:
			if !ok {
				return
			}
			p.markDirty(ev.Name)
			quiet.Reset(settle)
		case err, ok := <-p.watcher.Errors:
			if !ok {
				return
			}
			p.log.Warn("watching projected volumes; all are read again", "error", err)
			p.markDirty("")
			quiet.Reset(settle)
		case <-quiet.C:
			if !p.pushDirty(ctx) {
				quiet.Reset(retry)
			}
		}
	}
}

// markDirty notes the volumes that a path is in; without a path, all of them.
func (p *projections) markDirty(path string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, m := range p.mounts {
		if path == "" || path == m.HostPath || strings.HasPrefix(path, m.HostPath+"/") {
			p.dirty[name] = true
		}
	}
}

// takeDirty gives the volumes that are to be pushed.
func (p *projections) takeDirty() []resolvedMount {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []resolvedMount
	for name := range p.dirty {
		if m, ok := p.mounts[name]; ok {
			out = append(out, m)
		}
	}
	clear(p.dirty)
	return out
}

// pushDirty tells whether nothing is left to be tried again. A volume that is gone from the node, and a guest that
// has ended, need no more.
func (p *projections) pushDirty(ctx context.Context) bool {
	done := true
	for _, m := range p.takeDirty() {
		err := p.push(ctx, m)
		if err == nil || ctx.Err() != nil {
			continue
		}
		p.log.Warn("updating a projected volume in the guest", "volume", m.HostPath, "error", err)
		if errors.As(err, new(errGuestGone)) || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		done = false
		p.mu.Lock()
		p.dirty[m.Name] = true
		p.mu.Unlock()
	}
	return done
}

// watchProjections begins to keep a container's pushed volumes live.
func (p *pod) watchProjections(c *container) {
	for _, m := range c.rec.Spec().Mounts {
		if m.Via != viaFiles {
			continue
		}
		if err := p.watchProjection(m); err != nil {
			p.log.Warn("watching a projected volume; its updates will not be seen in the guest", "volume", m.HostPath, "error", err)
		}
	}
}

func (p *pod) watchProjection(m resolvedMount) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.files == nil {
		files, err := newProjections(p.rt.ctx, p.log, p.pushProjection)
		if err != nil {
			return err
		}
		p.files = files
	}
	return p.files.add(m)
}

func (p *pod) pushProjection(ctx context.Context, m resolvedMount) error {
	g := p.currentGuest()
	if g == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, plugTimeout)
	defer cancel()
	client, err := g.session(ctx)
	if err != nil {
		return err
	}
	return pushFiles(ctx, client, m)
}

func (p *pod) dropProjections(c *container) {
	p.mu.Lock()
	files := p.files
	p.mu.Unlock()
	if files == nil {
		return
	}
	for _, m := range c.rec.Spec().Mounts {
		if m.Via == viaFiles {
			files.remove(m)
		}
	}
}

func (p *pod) stopProjections() {
	p.mu.Lock()
	files := p.files
	p.files = nil
	p.mu.Unlock()
	if files != nil {
		files.close()
	}
}
