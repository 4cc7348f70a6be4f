package sshexec

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// When the command has ended, children of it may keep its output open. It ends when it has been silent for
	// drainIdle, or when drainMax has been waited or drainBytes read. Time in which a writer blocks does not count.
	drainIdle  = 3 * time.Second
	drainMax   = 10 * time.Second
	drainBytes = 16 << 20
	drainTick  = 20 * time.Millisecond
)

// output moves a command's output streams.
type output struct {
	failed chan error // of the writers
	ended  chan struct{}
	movers sync.WaitGroup

	mu      sync.Mutex
	open    int
	writing int
	moved   int64
}

func newOutput() *output {
	return &output{failed: make(chan error, 2), ended: make(chan struct{}), open: 2}
}

// move moves one of the two streams until its end. That of the guest, whatever its reason, is no error of the output.
func (o *output) move(to io.Writer, from io.Reader) {
	o.movers.Go(func() {
		if err := o.copy(to, from); err != nil {
			o.failed <- err
		}
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.open--; o.open == 0 {
			close(o.ended)
		}
	})
}

func (o *output) copy(to io.Writer, from io.Reader) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			o.note(1, 0)
			_, werr := to.Write(buf[:n])
			o.note(-1, n)
			if werr != nil {
				return fmt.Errorf("write output: %w", werr)
			}
		}
		if err != nil {
			return nil
		}
	}
}

func (o *output) note(writing, moved int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.writing += writing
	o.moved += int64(moved)
}

func (o *output) state() (writing bool, moved int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.writing > 0, o.moved
}

func (o *output) wait() { o.movers.Wait() }

// drain waits for the rest of the output of a command that has ended.
func (o *output) drain(ctx context.Context) {
	tick := time.NewTicker(drainTick)
	defer tick.Stop()
	var idle, waited time.Duration
	_, first := o.state()
	for last := first; idle < drainIdle && waited < drainMax && last-first < drainBytes; {
		select {
		case <-o.ended:
			return
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		writing, moved := o.state()
		switch {
		case writing:
			idle = 0
		case moved > last:
			idle = 0
			waited += drainTick
		default:
			idle += drainTick
			waited += drainTick
		}
		last = moved
	}
}
