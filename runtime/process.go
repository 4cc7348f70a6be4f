package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/trace"
)

type agentClient = *agent.Client

const (
	sigkill = 9
	// readChunk bounds one answer of ReadOutput in bytes.
	readChunk = 256 << 10
	// pollTimeout bounds one long poll; it is simply repeated.
	pollTimeout = 5 * time.Minute
	// drainTimeout is how long nothing may come of a process's output after its end. The guest ends the streams by
	// itself when a child keeps them open; this is for one that is slow or loses its session.
	drainTimeout = 15 * time.Second
)

// offsets are the positions up to which a process's streams have been taken.
type offsets struct{ stdout, stderr uint64 }

func (o *offsets) advance(ch *agentpb.OutputChunk) {
	end := ch.GetOffset() + uint64(len(ch.GetData()))
	if ch.GetStream() == agentpb.OutputChunk_STDERR {
		o.stderr = end
	} else {
		o.stdout = end
	}
}

// cursor is how far a reader of output has come: next is what it has not seen, safe what need not be kept for
// it any more.
type cursor struct{ next, safe offsets }

// outputTaker takes output in order.
type outputTaker interface {
	cursor() cursor
	take(*agentpb.OutputChunk) error
}

// copyOutput hands a process's output from the taker's cursor on to it, until both streams have ended. A session
// that breaks is begun again: what was not taken comes once more.
func (g *guest) copyOutput(ctx context.Context, ref *agentpb.ProcessRef, to outputTaker) error {
	for {
		client, err := g.session(ctx)
		if err != nil {
			return err
		}
		resp, err := g.readOutput(ctx, client, ref, to.cursor())
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errdefs.IsUnavailable(err) || errors.Is(err, context.DeadlineExceeded) || errdefs.IsDeadlineExceeded(err):
			continue
		case err != nil:
			return err
		}
		for _, ch := range resp.GetChunks() {
			if err := to.take(ch); err != nil {
				return err
			}
		}
		if resp.GetEof() {
			return nil
		}
	}
}

// pace tells whether something is still on its way: whoever takes his time is not silent.
type pace struct{ taken, taking atomic.Bool }

// take does something with what has come.
func (p *pace) take(do func()) {
	p.taking.Store(true)
	do()
	p.taken.Store(true) // before taking ends: one of the two is always seen
	p.taking.Store(false)
}

// moves tells whether something is being taken, or was since it was last asked.
func (p *pace) moves() bool { return p.taking.Load() || p.taken.Swap(false) }

// pacedTaker takes output at its pace.
type pacedTaker struct {
	outputTaker
	pace
}

func (t *pacedTaker) take(ch *agentpb.OutputChunk) (err error) {
	t.pace.take(func() { err = t.outputTaker.take(ch) })
	return err
}

// drain waits for the rest of the output of a process that has ended, which copyOutput hands to the taker. A taker that takes its time,
// like a client behind a slow line, is waited for.
func drain(ctx context.Context, copied <-chan error, to *pacedTaker) error {
	for {
		select {
		case err := <-copied:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(drainTimeout):
			if !to.moves() {
				return fmt.Errorf("the guest has not given the rest of the output within %s: %w", drainTimeout, errdefs.ErrUnavailable)
			}
		}
	}
}

func (g *guest) readOutput(ctx context.Context, client agentClient, ref *agentpb.ProcessRef, at cursor) (*agentpb.ReadOutputResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	return client.ReadOutput(ctx, &agentpb.ReadOutputRequest{
		Process: ref, MaxBytes: readChunk,
		StdoutOffset: at.next.stdout, StderrOffset: at.next.stderr,
		StdoutAcknowledged: at.safe.stdout, StderrAcknowledged: at.safe.stderr,
	})
}

// waitProcess waits until a process has ended.
func (g *guest) waitProcess(ctx context.Context, ref *agentpb.ProcessRef) (*agentpb.ProcessState, error) {
	for {
		client, err := g.session(ctx)
		if err != nil {
			return nil, err
		}
		state, err := g.pollProcess(ctx, client, ref)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errdefs.IsUnavailable(err) || errors.Is(err, context.DeadlineExceeded) || errdefs.IsDeadlineExceeded(err):
			continue
		case err != nil:
			return nil, err
		case state.GetExited():
			return state, nil
		}
	}
}

func (g *guest) pollProcess(ctx context.Context, client agentClient, ref *agentpb.ProcessRef) (*agentpb.ProcessState, error) {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	return client.Wait(ctx, ref)
}

// containerEnd is how a container ended.
type containerEnd struct {
	code            int32
	reason, message string
	at              time.Time
}

// watch follows a running container until it ends or the daemon stops.
func (c *container) watch(g *guest) {
	c.rt.owned.Go(func() {
		end, err := c.follow(c.rt.ctx, g)
		if c.rt.ctx.Err() != nil {
			return // the container goes on; the next daemon follows it
		}
		if err != nil {
			end = endOfGuest(err)
		}
		c.writeBack(g)
		c.finish(end)
	})
}

// follow reads the container's output into its log until the process has ended.
func (c *container) follow(ctx context.Context, g *guest) (containerEnd, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	to, copied := &pacedTaker{outputTaker: c}, make(chan error, 1)
	go func() {
		defer close(copied)
		copied <- g.copyOutput(ctx, c.ref(), to)
	}()
	state, err := g.waitProcess(ctx, c.ref())
	var left error
	if err == nil {
		left = drain(ctx, copied, to)
	}
	cancel()
	if last := <-copied; left == nil { // nil if drain has it
		left = last
	}
	if left != nil && !errors.Is(left, context.Canceled) {
		c.log.Warn("reading the container's output", "error", left)
	}
	return endOf(state), err
}

func (c *container) cursor() cursor { return c.logs.cursor() }

// take writes one chunk to the log and to whoever is attached.
func (c *container) take(ch *agentpb.OutputChunk) error {
	if err := c.logs.write(ch); err != nil {
		// A full disk must not stop the container: what cannot be logged is dropped.
		c.log.Error("writing the container's log", "error", err)
	}
	c.hasSpoken(nil)
	c.output.send(ch)
	return nil
}

// awaitOutput begins the span up to the first output, before the container is followed.
func (c *container) awaitOutput(ctx context.Context) {
	_, c.spoke = trace.Start(ctx, "first output")
}

func (c *container) hasSpoken(err error) {
	if c.spoke != nil {
		c.spoke(err)
	}
}

func endOf(s *agentpb.ProcessState) containerEnd {
	end := containerEnd{code: s.GetExitCode(), reason: reasonCompleted, at: time.Unix(0, s.GetExitedAtUnixNano())}
	switch {
	case s.GetOomKilled():
		end.reason = reasonOOMKilled
	case end.code != 0:
		end.reason = reasonError
	}
	return end
}

// endOfGuest is how all containers end whose VM is no more: as if killed, with the reason.
func endOfGuest(err error) containerEnd {
	end := containerEnd{code: 128 + sigkill, reason: reasonVMFailed, message: err.Error(), at: time.Now()}
	switch {
	case errors.Is(err, qemu.ErrGuestFailed):
		end.reason = reasonGuestFailed
	case errors.Is(err, errOutOfMemory):
		end.reason = reasonOOMKilled
	}
	return end
}

var errNoOutput = errors.New("the container has ended without a word")

// finish records the end of a container, once, and tells everyone who waits for it. The log is complete before the end
// is told: whoever hears of it reads the log.
func (c *container) finish(end containerEnd) {
	if err := c.logs.close(); err != nil {
		c.log.Error("closing the container's log", "error", err)
	}
	err := c.rec.Update(func(s *containerStatus) error {
		if !s.FinishedAt.IsZero() {
			return nil
		}
		s.ExitCode, s.Reason, s.Message, s.FinishedAt = end.code, end.reason, end.message, end.at
		if s.FinishedAt.Before(s.StartedAt) { // the guest's clock told one, the node's the other
			s.FinishedAt = s.StartedAt
		}
		return nil
	})
	if err != nil {
		c.log.Error("recording the container's end", "error", err)
	}
	c.output.close()
	c.hasSpoken(errNoOutput)
	// Before anybody goes on who waits for the end: the event must not come after those of the container's removal.
	c.rt.containerEvent(c, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	c.markExited()
}

// writeBack copies what the container left in files like its termination log to the node.
func (c *container) writeBack(g *guest) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.rt.ctx), drainTimeout)
	defer cancel()
	for _, m := range c.rec.Spec().Mounts {
		if !m.WriteBack {
			continue
		}
		if err := writeBackFile(ctx, g, m); err != nil {
			c.log.Warn("reading a file back from the guest", "file", m.HostPath, "error", err)
		}
	}
}

func writeBackFile(ctx context.Context, g *guest, m resolvedMount) error {
	client, err := g.session(ctx)
	if err != nil {
		return err
	}
	path := filepath.Join(m.Name, "file")
	resp, err := client.GetFile(ctx, &agentpb.GetFileRequest{Path: path})
	if err != nil {
		return fmt.Errorf("read %s in the guest: %w", path, err)
	}
	if len(resp.GetData()) == 0 {
		return nil
	}
	f, err := os.OpenFile(m.HostPath, os.O_WRONLY|os.O_TRUNC|nofollow, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(resp.GetData())
	return errors.Join(err, f.Close())
}
