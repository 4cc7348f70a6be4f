package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const (
	stdout = 0
	stderr = 1

	defaultOutputBuffer = 1 << 20
	maxChunk            = 32 << 10
	// joinWindow is how far apart reads of one stream may be that become one chunk.
	joinWindow = 5 * time.Millisecond
	// chunkCost is counted for each chunk besides its bytes, so that tiny writes keep within the bound.
	chunkCost = 64

	// After the process's end its children may keep a pipe open. The stream ends when it has been silent
	// for drainIdle, or was read for drainMax after that end, in which time nobody takes what is there does not count; or when it
	// has given drainBytes since, which is more than a pipe holds.
	drainIdle = time.Second
	drainMax  = 10 * time.Second

	drainBytes = 4 << 20
)

type chunk struct {
	stream int
	offset uint64
	data   []byte
	at     time.Time
}

func (c *chunk) end() uint64 { return c.offset + uint64(len(c.data)) }

type stream struct {
	acked uint64 // what is before is forgotten
	end   uint64
	held  int64 // bytes and costs of the chunks
	open  bool
	file  *os.File
}

// output keeps what a process wrote until the host has acknowledged it. A stream with its bound of
// unacknowledged bytes is not read, which blocks the writer like a full pipe.
type output struct {
	limit int64
	// drain is drainMax; tests have less time.
	drain time.Duration
	pumps sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed at each change
	chunks  []chunk       // of both streams, in the order read
	streams [2]stream
	exited  time.Time
	stopped bool
	// cut is how far a frozen process's streams are given; nil while it is not frozen.
	cut *[2]uint64
}

func newOutput(limit int64) *output {
	if limit <= 0 {
		limit = defaultOutputBuffer
	}
	o := &output{limit: limit, drain: drainMax, changed: make(chan struct{})}
	o.streams[stdout].open, o.streams[stderr].open = true, true
	return o
}

// attach reads a stream from f, which must be pollable and which it owns from now on; nil ends the stream.
func (o *output) attach(id int, f *os.File) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if f == nil || o.stopped {
		o.streams[id].open = false
		o.announce()
		if f != nil {
			_ = f.Close()
		}
		return
	}
	o.streams[id].file = f
	o.pumps.Go(func() { o.pump(id, f) })
}

func (o *output) announce() {
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *output) pump(id int, f *os.File) {
	defer func() {
		_ = f.Close()
		o.mu.Lock()
		defer o.mu.Unlock()
		o.streams[id].open, o.streams[id].file = false, nil
		o.announce()
	}()
	buf := make([]byte, maxChunk)
	var full time.Duration
	late := 0
	for late < drainBytes {
		began := time.Now()
		room := o.room(id)
		if room <= 0 {
			return
		}
		full += o.sinceExit(began)
		if !o.armDeadline(f, full) {
			return
		}
		n, err := f.Read(buf[:min(room, int64(len(buf)))])
		if n > 0 {
			o.add(id, buf[:n])
		}
		if o.draining() {
			late += n
		}
		// A terminal gives EIO when its last user has gone.
		if errors.Is(err, os.ErrDeadlineExceeded) && !o.draining() {
			continue
		}
		if err != nil || n == 0 {
			return
		}
	}
}

// room waits until the stream may take bytes and tells how many; 0 when it is to stop.
func (o *output) room(id int) int64 {
	for {
		o.mu.Lock()
		free, changed, stopped := o.limit-o.streams[id].held, o.changed, o.stopped
		o.mu.Unlock()
		if stopped {
			return 0
		}
		if free > 0 {
			return free
		}
		<-changed
	}
}

// sinceExit is how much of the time since then lies after the process's end.
func (o *output) sinceExit(begin time.Time) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.exited.IsZero() {
		return 0
	}
	if begin.Before(o.exited) {
		begin = o.exited
	}
	return time.Since(begin)
}

// armDeadline bounds the next read once the process has ended. It tells false when the time is over, of which the stream was full for
// a part.
func (o *output) armDeadline(f *os.File, full time.Duration) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.exited.IsZero() {
		return true
	}
	return time.Since(o.exited)-full < o.drain && f.SetReadDeadline(time.Now().Add(drainIdle)) == nil
}

func (o *output) draining() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.exited.IsZero() || o.stopped
}

// finish says that the process has ended.
func (o *output) finish() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.exited, o.cut = time.Now(), nil
	for i := range o.streams {
		if f := o.streams[i].file; f != nil {
			_ = f.SetReadDeadline(time.Now().Add(drainIdle))
		} else {
			// Never attached: the process did not start.
			o.streams[i].open = false
		}
	}
	o.announce()
}

// stop ends both streams at once and waits for their readers.
func (o *output) stop() {
	o.mu.Lock()
	o.stopped, o.cut = true, nil
	for i := range o.streams {
		o.streams[i].open = o.streams[i].file != nil
		if f := o.streams[i].file; f != nil {
			_ = f.SetReadDeadline(time.Now())
		}
	}
	o.announce()
	o.mu.Unlock()
	o.pumps.Wait()
}

func (o *output) add(id int, p []byte) {
	now := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	s := &o.streams[id]
	s.held += int64(len(p))
	if n := len(o.chunks); n > 0 {
		last := &o.chunks[n-1]
		if last.stream == id && len(last.data)+len(p) <= maxChunk && now.Sub(last.at) < joinWindow {
			// Readers hold the shorter slice; what is appended lies behind it.
			last.data = append(last.data, p...)
			s.end += uint64(len(p))
			o.announce()
			return
		}
	}
	o.chunks = append(o.chunks, chunk{stream: id, offset: s.end, data: append([]byte(nil), p...), at: now})
	s.held += chunkCost
	s.end += uint64(len(p))
	o.announce()
}

// read forgets what is acknowledged and waits for something beyond the given offsets: chunks of at most limit bytes
// together, or the end of both streams. When ctx ends it gives nothing.
func (o *output) read(ctx context.Context, offsets, acknowledged [2]uint64, limit int64) (chunks []*agentpb.OutputChunk, eof bool, err error) {
	for {
		o.mu.Lock()
		if err := o.acknowledge(offsets, acknowledged); err != nil {
			o.mu.Unlock()
			return nil, false, err
		}
		chunks = o.beyond(offsets, limit)
		ended := !o.streams[stdout].open && !o.streams[stderr].open
		changed := o.changed
		o.mu.Unlock()
		if len(chunks) > 0 {
			return chunks, false, nil
		}
		if ended {
			return nil, true, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, false, nil
		}
	}
}

func (o *output) acknowledge(offsets, acknowledged [2]uint64) error {
	for id, off := range offsets {
		s := &o.streams[id]
		if off > s.end {
			return fmt.Errorf("offset %d of %s is beyond the %d bytes written: %w", off, streamName(id), s.end, errdefs.ErrOutOfRange)
		}
		if off < s.acked {
			return fmt.Errorf("offset %d of %s has been acknowledged and forgotten, the first one kept is %d: %w",
				off, streamName(id), s.acked, errdefs.ErrOutOfRange)
		}
		if acknowledged[id] > off {
			return fmt.Errorf("%d bytes of %s are acknowledged, but only %d have been read: %w",
				acknowledged[id], streamName(id), off, errdefs.ErrInvalidArgument)
		}
	}
	changed := false
	for id, ack := range acknowledged {
		// An older call that comes late takes nothing back.
		if s := &o.streams[id]; ack > s.acked {
			s.acked, changed = ack, true
		}
	}
	if changed {
		o.forget([2]uint64{o.streams[stdout].acked, o.streams[stderr].acked})
		o.announce()
	}
	return nil
}

// forget drops the chunks that lie wholly before the offsets. A chunk that lies partly before one is kept whole.
func (o *output) forget(offsets [2]uint64) {
	kept := o.chunks[:0]
	for _, c := range o.chunks {
		if c.end() > offsets[c.stream] {
			kept = append(kept, c)
		} else {
			o.streams[c.stream].held -= int64(len(c.data)) + chunkCost
		}
	}
	clear(o.chunks[len(kept):])
	o.chunks = kept
}

func (o *output) beyond(offsets [2]uint64, limit int64) []*agentpb.OutputChunk {
	var chunks []*agentpb.OutputChunk
	for _, c := range o.chunks {
		end := c.end()
		if o.cut != nil {
			end = min(end, o.cut[c.stream])
		}
		off := max(offsets[c.stream], c.offset)
		if off >= end {
			continue // read, and kept because it is not acknowledged; or behind the cut
		}
		skip := off - c.offset
		data := c.data[skip : end-c.offset]
		if int64(len(data)) > limit {
			if len(chunks) > 0 {
				break
			}
			data = data[:limit]
		}
		limit -= int64(len(data))
		chunks = append(chunks, &agentpb.OutputChunk{
			Stream: agentpb.OutputChunk_Stream(c.stream), Offset: c.offset + skip, Data: data, TimeUnixNano: c.at.UnixNano(),
		})
		if limit <= 0 {
			break
		}
	}
	return chunks
}

// hold gives no more than what is there now, until release. It returns the ends.
func (o *output) hold() [2]uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cut == nil {
		o.cut = &[2]uint64{o.streams[stdout].end, o.streams[stderr].end}
	}
	return *o.cut
}

func (o *output) release() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.cut = nil
	o.announce()
}

func streamName(id int) string {
	if id == stdout {
		return "stdout"
	}
	return "stderr"
}
