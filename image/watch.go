package image

import (
	"context"
	"time"
)

const (
	watchRetry = time.Second
	watchQuiet = 500 * time.Millisecond // several images are mostly removed at once
)

// Watch removes the root file systems of images as they are removed from
// containerd, until ctx ends. When containerd restarts it connects again and
// looks for what it has missed. The caller owns the goroutine it runs in.
func (s *Store) Watch(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.watchOnce(s.in(ctx))
		if ctx.Err() != nil {
			return
		}
		s.log.Debug("events of containerd ended", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(watchRetry):
		}
	}
}

// watchOnce follows one stream of events to its end.
func (s *Store) watchOnce(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, errs := s.opts.Client.Subscribe(ctx, `topic=="/images/delete"`)
	timer := time.NewTimer(0) // once at the start: what was removed before
	defer timer.Stop()
	for {
		select {
		case err := <-errs:
			return err
		case <-events:
			timer.Reset(watchQuiet)
		case <-timer.C:
			if err := s.collect(ctx); err != nil {
				s.log.Warn("removing unused root file systems", "error", err)
			}
		}
	}
}
