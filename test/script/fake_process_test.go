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
	script          []string

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each change
	chunks  []*agentpb.OutputChunk
	end     [2]uint64 // offsets behind the last byte of each stream
	acked   [2]uint64
	stdin   []byte
	closed  bool // stdin
	started time.Time
	exited  time.Time
	code    int32
	oom     bool
	trap    string
	ignore  bool

	stop chan struct{} // closed when the process is to end at once
	once sync.Once
}

func newProcess(container, exec string, script []string) *process {
	return &process{
		container: container, exec: exec, script: script,
		changed: make(chan struct{}), stop: make(chan struct{}),
	}
}

// announce wakes who waits for a change. The caller holds mu.
func (p *process) announce() {
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *process) start() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.started = time.Now()
	go p.run()
	return p.started
}

func (p *process) run() {
	for _, statement := range p.script {
		if err := p.step(statement); err != nil {
			p.write(agentpb.OutputChunk_STDERR, err.Error()+"\n")
			p.finish(127)
		}
		if p.state().GetExited() {
			return
		}
	}
	p.finish(0)
}

func (p *process) step(statement string) error {
	word, rest, _ := strings.Cut(statement, " ")
	switch word {
	case "out":
		p.write(agentpb.OutputChunk_STDOUT, rest+"\n")
	case "err":
		p.write(agentpb.OutputChunk_STDERR, rest+"\n")
	case "part":
		p.write(agentpb.OutputChunk_STDOUT, rest)
	case "lines":
		return p.lines(strings.Fields(rest))
	case "cat":
		p.cat()
	case "sleep":
		d, err := time.ParseDuration(rest)
		p.pause(d)
		return err
	case "trap":
		p.mu.Lock()
		p.trap = rest
		p.mu.Unlock()
	case "ignore":
		p.mu.Lock()
		p.ignore = true
		p.mu.Unlock()
	case "wait":
		<-p.stop
	case "oom":
		p.mu.Lock()
		p.oom = true
		p.mu.Unlock()
		p.finish(128 + int32(syscall.SIGKILL))
	case "exit":
		code, err := strconv.Atoi(rest)
		p.finish(int32(code))
		return err
	default:
		return fmt.Errorf("unknown statement %q", statement)
	}
	return nil
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
	for i := range n {
		if !p.write(agentpb.OutputChunk_STDOUT, lineText(i)+"\n") {
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
		data, closed, changed := p.stdin, p.closed, p.changed
		p.stdin = nil
		p.mu.Unlock()
		if len(data) > 0 {
			p.write(agentpb.OutputChunk_STDOUT, string(data))
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

// write adds output; it waits while too much is not acknowledged, and tells false once the process has ended.
func (p *process) write(stream agentpb.OutputChunk_Stream, text string) bool {
	for {
		p.mu.Lock()
		if !p.exited.IsZero() {
			p.mu.Unlock()
			return false
		}
		if p.end[stream]-p.acked[stream] < outputBound {
			p.keep(stream, text)
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
	if n := len(p.chunks); n > 0 && p.chunks[n-1].Stream == stream && len(p.chunks[n-1].Data) < 16<<10 {
		p.chunks[n-1].Data = append(p.chunks[n-1].Data, text...)
	} else {
		p.chunks = append(p.chunks, &agentpb.OutputChunk{
			Stream: stream, Offset: p.end[stream], Data: []byte(text), TimeUnixNano: time.Now().UnixNano(),
		})
	}
	p.end[stream] += uint64(len(text))
}

func (p *process) finish(code int32) {
	p.mu.Lock()
	if p.exited.IsZero() {
		p.exited, p.code = time.Now(), code
		p.announce()
	}
	p.mu.Unlock()
	p.once.Do(func() { close(p.stop) })
}

func (p *process) signal(s syscall.Signal) {
	p.mu.Lock()
	trap, ignore := p.trap, p.ignore
	p.mu.Unlock()
	switch {
	case s == syscall.SIGTERM && ignore:
	case s == syscall.SIGTERM && trap != "":
		p.write(agentpb.OutputChunk_STDOUT, trap+"\n")
		p.finish(0)
	default:
		p.finish(128 + int32(s))
	}
}

func (p *process) state() *agentpb.ProcessState {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &agentpb.ProcessState{
		ContainerId: p.container, ExecId: p.exec, Started: !p.started.IsZero(), Exited: !p.exited.IsZero(),
		ExitCode: p.code, OomKilled: p.oom, Pid: 100,
	}
	if s.Started {
		s.StartedAtUnixNano = p.started.UnixNano()
	}
	if s.Exited {
		s.ExitedAtUnixNano = p.exited.UnixNano()
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
		if a > from[i] || from[i] > p.end[i] || from[i] < p.acked[i] {
			return fmt.Errorf("stream %d is read from %d with %d acknowledged; it has %d bytes, of which %d were acknowledged: %w",
				i, from[i], a, p.end[i], p.acked[i], errdefs.ErrOutOfRange)
		}
		p.acked[i] = max(p.acked[i], a)
	}
	for len(p.chunks) > 0 && p.chunks[0].Offset+uint64(len(p.chunks[0].Data)) <= p.acked[p.chunks[0].Stream] {
		p.chunks = p.chunks[1:]
	}
	p.announce()
	return nil
}

// behind collects what is behind the offsets. The caller holds mu.
func (p *process) behind(from [2]uint64, limit int64) *agentpb.ReadOutputResponse {
	resp := &agentpb.ReadOutputResponse{}
	whole := true
	for _, c := range p.chunks {
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
	resp.Eof = whole && !p.exited.IsZero()
	return resp
}

func (p *process) writeStdin(data []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("standard input is closed: %w", errdefs.ErrFailedPrecondition)
	}
	p.stdin = append(p.stdin, data...)
	p.announce()
	return nil
}

func (p *process) closeStdin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.announce()
}
