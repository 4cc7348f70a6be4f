package qemu

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// helper is a process that serves a device of a VM beside QEMU. It may have been started by an earlier daemon.
type helper struct {
	name string
	p    *process
	out  *tail // nil if another daemon started it
	done chan struct{}

	owned sync.WaitGroup
	close func() error
}

func newHelper(name string, p *process, out *tail) *helper {
	h := &helper{name: name, p: p, out: out, done: make(chan struct{})}
	h.close = sync.OnceValue(h.release)
	h.owned.Go(func() {
		if p.wait() == nil {
			p.reap()
			close(h.done)
		}
	})
	return h
}

// Done is closed when the process is gone.
func (h *helper) Done() <-chan struct{} { return h.done }

// Stderr is the end of the process's messages; empty if an earlier daemon started it.
func (h *helper) Stderr() string {
	if h.out == nil {
		return ""
	}
	return h.out.String()
}

// Kill ends the process and its children and returns when it is gone. One that is gone is no error.
func (h *helper) Kill(ctx context.Context) error {
	select {
	case <-h.done:
		return nil
	default:
	}
	if err := h.p.killGroup(); err != nil {
		return err
	}
	select {
	case <-h.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s, process %d, does not end: %w", h.name, h.p.pid, ctx.Err())
	}
}

// Close detaches: the process goes on. It may be called more than once.
func (h *helper) Close() error { return h.close() }

func (h *helper) release() error {
	errs := []error{h.p.close()}
	if h.out != nil {
		errs = append(errs, h.out.Close())
	}
	h.owned.Wait()
	return errors.Join(errs...)
}
