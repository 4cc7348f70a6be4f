package script

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// outputBound is how many unacknowledged bytes of a stream a process may have before it waits.
const outputBound = 1 << 20

// process is one process of the fake guest. Its arguments are statements, carried out one after the other:
//
//	out TEXT, err TEXT    a line on a stream
//	part TEXT             bytes on stdout without a line feed
//	lines N [PAUSE]       N numbered lines on stdout
//	cat                   stdin to stdout, until stdin is closed
//	sleep DURATION
//	trap TEXT             from now on SIGTERM writes TEXT and exits with 0
//	ignore                from now on SIGTERM does nothing
//	wait                  until a signal
//	oom                   ends as the kernel ends a process that has no memory left
//	exit N
type process struct {
	container, exec string

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each change
	image   image

	stop chan struct{} // closed when the process is to end at once
	once sync.Once
}

// image is all that a process is, and what a saved guest has of it.
type image struct {
	Container, Exec string
	Script          []string
	// Next is the statement under way, Line what it has done of its lines.
	Next, Line int
	Frozen     bool
	Chunks     []*agentpb.OutputChunk
	End        [2]uint64 // offsets behind the last byte of each stream
	Acked      [2]uint64
	Stdin      []byte
	Closed     bool // Stdin
	Started    time.Time
	Exited     time.Time
	Code       int32
	OOM        bool
	Trap       string
	Ignore     bool
}

func newProcess(container, exec string, script []string) *process {
	return loadProcess(image{Container: container, Exec: exec, Script: script})
}

func loadProcess(i image) *process {
	return &process{container: i.Container, exec: i.Exec, image: i, changed: make(chan struct{}), stop: make(chan struct{})}
}

// save returns what loadProcess takes. Nothing of a process that is frozen changes.
func (p *process) save() image {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.image
}

// freeze lets the process do nothing until it is thawed, and tells where its streams end.
func (p *process) freeze() [2]uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.image.Frozen = true
	return p.image.End
}

func (p *process) thaw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.image.Frozen = false
	p.announce()
}

// change waits until the process is not frozen, and makes a change of it.
func (p *process) change(f func(*image)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.image.Frozen {
		changed := p.changed
		p.mu.Unlock()
		<-changed
		p.mu.Lock()
	}
	f(&p.image)
	p.announce()
}

// announce wakes who waits for a change. The caller holds mu.
func (p *process) announce() {
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *process) start() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.image.Started = time.Now()
	go p.run()
	return p.image.Started
}

func (p *process) run() {
	for {
		i := p.save()
		if i.Next == len(i.Script) {
			p.exit(0)
			return
		}
		if err := p.step(i.Script[i.Next]); err != nil {
			p.write(agentpb.OutputChunk_STDERR, err.Error()+"\n", nil)
			p.exit(127)
		}
		if p.state().GetExited() {
			return
		}
	}
}

// step carries out a statement, of which a part may be done already, and leaves the process at the next one.
func (p *process) step(statement string) error {
	word, rest, _ := strings.Cut(statement, " ")
	var err error
	done := func(*image) {}
	switch word {
	case "out":
		p.write(agentpb.OutputChunk_STDOUT, rest+"\n", &p.image.Next)
		return nil
	case "err":
		p.write(agentpb.OutputChunk_STDERR, rest+"\n", &p.image.Next)
		return nil
	case "part":
		p.write(agentpb.OutputChunk_STDOUT, rest, &p.image.Next)
		return nil
	case "lines":
		err = p.lines(strings.Fields(rest))
	case "cat":
		p.cat()
	case "sleep":
		var d time.Duration
		d, err = time.ParseDuration(rest)
		p.pause(d)
	case "trap":
		done = func(i *image) { i.Trap = rest }
	case "ignore":
		done = func(i *image) { i.Ignore = true }
	case "wait":
		<-p.stop
	case "oom":
		p.change(func(i *image) { i.OOM = true })
		p.exit(128 + int32(syscall.SIGKILL))
	case "exit":
		var code int
		code, err = strconv.Atoi(rest)
		p.exit(int32(code))
	default:
		return fmt.Errorf("unknown statement %q", statement)
	}
	p.change(func(i *image) { done(i); i.Next++; i.Line = 0 })
	return err
}

func (p *process) lines(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("lines needs a number")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	var every time.Duration
	if len(args) > 1 {
		if every, err = time.ParseDuration(args[1]); err != nil {
			return err
		}
	}
	for i := p.save().Line; i < n; i++ {
		if !p.write(agentpb.OutputChunk_STDOUT, lineText(i)+"\n", &p.image.Line) {
			return nil
		}
		if every > 0 {
			p.pause(every)
		}
	}
	return nil
}

// lineText is what the statement lines writes.
func lineText(i int) string { return fmt.Sprintf("line %06d of the output", i) }

func (p *process) pause(d time.Duration) {
	select {
	case <-time.After(d):
	case <-p.stop:
	}
}

func (p *process) cat() {
	for {
		p.mu.Lock()
		data, closed, changed := p.image.Stdin, p.image.Closed, p.changed
		p.image.Stdin = nil
		p.mu.Unlock()
		if len(data) > 0 {
			p.write(agentpb.OutputChunk_STDOUT, string(data), nil)
			continue
		}
		if closed {
			return
		}
		select {
		case <-changed:
		case <-p.stop:
			return
		}
	}
}

// write adds output and counts it; it waits while too much is not acknowledged, and tells false once the process has ended.
func (p *process) write(stream agentpb.OutputChunk_Stream, text string, count *int) bool {
	for {
		p.mu.Lock()
		if !p.image.Exited.IsZero() {
			p.mu.Unlock()
			return false
		}
		if p.image.End[stream]-p.image.Acked[stream] < outputBound && !p.image.Frozen {
			p.keep(stream, text)
			if count != nil {
				*count++
			}
			p.announce()
			p.mu.Unlock()
			return true
		}
		changed := p.changed
		p.mu.Unlock()
		select {
		case <-changed:
		case <-p.stop:
			return false
		}
	}
}

// keep adds to the last chunk if it is of the same stream and not large, as the agent does. The caller holds mu.
func (p *process) keep(stream agentpb.OutputChunk_Stream, text string) {
	if n := len(p.image.Chunks); n > 0 && p.image.Chunks[n-1].Stream == stream && len(p.image.Chunks[n-1].Data) < 16<<10 {
		p.image.Chunks[n-1].Data = append(p.image.Chunks[n-1].Data, text...)
	} else {
		p.image.Chunks = append(p.image.Chunks, &agentpb.OutputChunk{
			Stream: stream, Offset: p.image.End[stream], Data: []byte(text), TimeUnixNano: time.Now().UnixNano(),
		})
	}
	p.image.End[stream] += uint64(len(text))
}

// exit is the end that a process comes to by itself, which it does not while it is frozen.
func (p *process) exit(code int32) {
	p.change(func(i *image) { i.end(code) })
	p.once.Do(func() { close(p.stop) })
}

func (i *image) end(code int32) {
	if i.Exited.IsZero() {
		i.Exited, i.Code = time.Now(), code
	}
}

func (p *process) finish(code int32) {
	p.mu.Lock()
	p.image.end(code)
	p.image.Frozen = false // a signal that kills wakes
	p.announce()
	p.mu.Unlock()
	p.once.Do(func() { close(p.stop) })
}

func (p *process) signal(s syscall.Signal) {
	p.mu.Lock()
	trap, ignore := p.image.Trap, p.image.Ignore
	p.mu.Unlock()
	switch {
	case s == syscall.SIGTERM && ignore:
	case s == syscall.SIGTERM && trap != "":
		go func() { // when it is not frozen
			p.write(agentpb.OutputChunk_STDOUT, trap+"\n", nil)
			p.exit(0)
		}()
	default:
		p.finish(128 + int32(s))
	}
}

func (p *process) state() *agentpb.ProcessState {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &agentpb.ProcessState{
		ContainerId: p.container, ExecId: p.exec, Started: !p.image.Started.IsZero(), Exited: !p.image.Exited.IsZero(),
		ExitCode: p.image.Code, OomKilled: p.image.OOM, Pid: 100,
	}
	if s.Started {
		s.StartedAtUnixNano = p.image.Started.UnixNano()
	}
	if s.Exited {
		s.ExitedAtUnixNano = p.image.Exited.UnixNano()
	}
	return s
}

// wait answers when the process has ended, or with its state when ctx does.
func (p *process) wait(ctx context.Context) *agentpb.ProcessState {
	select {
	case <-p.stop:
	case <-ctx.Done():
	}
	return p.state()
}

// read forgets what is acknowledged and answers with what is behind the offsets, at most limit bytes.
func (p *process) read(ctx context.Context, from, acked [2]uint64, limit int64) (*agentpb.ReadOutputResponse, error) {
	if err := p.acknowledge(from, acked); err != nil {
		return nil, err
	}
	for {
		p.mu.Lock()
		resp, changed := p.behind(from, limit), p.changed
		p.mu.Unlock()
		if len(resp.Chunks) > 0 || resp.Eof {
			return resp, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return resp, nil
		}
	}
}

func (p *process) acknowledge(from, acked [2]uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, a := range acked {
		if a > from[i] || from[i] > p.image.End[i] || from[i] < p.image.Acked[i] {
			return fmt.Errorf("stream %d is read from %d with %d acknowledged; it has %d bytes, of which %d were acknowledged: %w",
				i, from[i], a, p.image.End[i], p.image.Acked[i], errdefs.ErrOutOfRange)
		}
		p.image.Acked[i] = max(p.image.Acked[i], a)
	}
	for len(p.image.Chunks) > 0 && p.image.Chunks[0].Offset+uint64(len(p.image.Chunks[0].Data)) <= p.image.Acked[p.image.Chunks[0].Stream] {
		p.image.Chunks = p.image.Chunks[1:]
	}
	p.announce()
	return nil
}

// behind collects what is behind the offsets. The caller holds mu.
func (p *process) behind(from [2]uint64, limit int64) *agentpb.ReadOutputResponse {
	resp := &agentpb.ReadOutputResponse{}
	whole := true
	for _, c := range p.image.Chunks {
		data, offset := c.Data, c.Offset
		if skip := from[c.Stream]; skip > offset {
			if skip >= offset+uint64(len(data)) {
				continue
			}
			data, offset = data[skip-offset:], skip
		}
		part := data[:min(int64(len(data)), limit)]
		resp.Chunks = append(resp.Chunks, &agentpb.OutputChunk{Stream: c.Stream, Offset: offset, Data: part, TimeUnixNano: c.TimeUnixNano})
		if limit -= int64(len(data)); limit <= 0 {
			whole = false
			break
		}
	}
	resp.Eof = whole && !p.image.Exited.IsZero()
	return resp
}

func (p *process) writeStdin(data []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.image.Closed {
		return fmt.Errorf("standard input is closed: %w", errdefs.ErrFailedPrecondition)
	}
	p.image.Stdin = append(p.image.Stdin, data...)
	p.announce()
	return nil
}

func (p *process) closeStdin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.image.Closed = true
	p.announce()
}
