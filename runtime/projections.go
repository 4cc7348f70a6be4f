package runtime

import (
	"context"
	"log/slog"
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
	mounts map[string]resolvedMount // by directory and name
}

// settle is how long a directory must be quiet before it is read: the kubelet writes several entries.
const settle = 50 * time.Millisecond

func newProjections(parent context.Context, log *slog.Logger, push func(context.Context, resolvedMount) error) (*projections, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(parent)
	p := &projections{log: log, push: push, watcher: w, cancel: cancel, mounts: make(map[string]resolvedMount)}
	p.owned.Go(func() { p.run(ctx) })
	return p, nil
}

func (p *projections) close() {
	p.cancel()
	p.owned.Wait()
	_ = p.watcher.Close()
}

func (p *projections) add(m resolvedMount) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mounts[m.Name] = m
	return p.watcher.Add(m.HostPath)
}

func (p *projections) remove(m resolvedMount) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.mounts, m.Name)
	for _, other := range p.mounts {
		if other.HostPath == m.HostPath {
			return
		}
	}
	_ = p.watcher.Remove(m.HostPath) // gone already when the directory is
}

func (p *projections) run(ctx context.Context) {
	dirty := make(map[string]bool)
	quiet := time.NewTimer(time.Hour)
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case ev, ok := <-p.watcher.Events:
			if !ok {
				return
			}
			p.markDirty(dirty, ev.Name)
			quiet.Reset(settle)
		case err, ok := <-p.watcher.Errors:
			if !ok {
				return
			}
			p.log.Warn("watching projected volumes", "error", err)
		case <-quiet.C:
			p.pushAll(ctx, dirty)
		}
	}
}

func (p *projections) markDirty(dirty map[string]bool, path string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, m := range p.mounts {
		if len(path) >= len(m.HostPath) && path[:len(m.HostPath)] == m.HostPath {
			dirty[name] = true
		}
	}
}

func (p *projections) pushAll(ctx context.Context, dirty map[string]bool) {
	for name := range dirty {
		delete(dirty, name)
		p.mu.Lock()
		m, ok := p.mounts[name]
		p.mu.Unlock()
		if !ok {
			continue
		}
		if err := p.push(ctx, m); err != nil {
			p.log.Warn("updating a projected volume in the guest", "volume", m.HostPath, "error", err)
		}
	}
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
