package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

const (
	// commandTimeout bounds a command whose context has no deadline.
	commandTimeout = 30 * time.Second
	// maxReply bounds one line from QEMU, which is not trusted with our memory.
	maxReply = 16 << 20
	// maxQueuedEvents bounds what a subscriber leaves unread; the oldest are dropped.
	maxQueuedEvents = 1024
)

// CommandError is QEMU's refusal of a command.
type CommandError struct {
	Command string // what was to be executed
	Class   string // QEMU's error class, such as "GenericError"
	Desc    string // QEMU's own words
}

func (e *CommandError) Error() string { return fmt.Sprintf("QEMU refuses %s: %s", e.Command, e.Desc) }

// Is makes DeviceNotFound an errdefs.ErrNotFound.
func (e *CommandError) Is(target error) bool {
	return target == errdefs.ErrNotFound && e.Class == "DeviceNotFound"
}

// Monitor speaks QMP over one connection. Commands carry IDs and may overlap; one goroutine reads, and never
// waits for anybody. It implements qmp.Monitor.
type Monitor struct {
	conn   *net.UnixConn
	log    *slog.Logger
	notify func(qmp.Event) // called by the reader: must not block

	write sync.Mutex

	mu      sync.Mutex
	next    uint64
	pending map[string]chan reply
	subs    map[*subscription]struct{}
	err     error // why the connection is no more

	version qmp.Version
	closed  chan struct{} // closed when the reader has ended
	quit    chan struct{} // closed by Disconnect
	once    sync.Once
	owned   sync.WaitGroup
}

var _ qmp.Monitor = (*Monitor)(nil)

type reply struct {
	line []byte
	err  error
}

// message is any line that QEMU sends.
type message struct {
	QMP *struct {
		Version qmp.Version `json:"version"`
	} `json:"QMP"`
	ID     string          `json:"id"`
	Event  string          `json:"event"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// NewMonitor makes a monitor of a connection to QEMU's QMP socket; Connect makes it usable. It owns conn.
// notify, if not nil, is called with every event, in order, and must not block.
func NewMonitor(conn *net.UnixConn, notify func(qmp.Event), log *slog.Logger) *Monitor {
	return &Monitor{
		conn: conn, log: log, notify: notify,
		pending: make(map[string]chan reply),
		subs:    make(map[*subscription]struct{}),
		closed:  make(chan struct{}),
		quit:    make(chan struct{}),
	}
}

// dialMonitor connects and greets within the context's deadline.
func dialMonitor(ctx context.Context, path string, notify func(qmp.Event), log *slog.Logger) (*Monitor, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to QMP: %w", err)
	}
	m := NewMonitor(conn.(*net.UnixConn), notify, log)
	if err := m.connect(ctx); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return m, nil
}

// Connect reads QEMU's greeting and negotiates. It waits for QEMU to answer for at most 30 seconds.
func (m *Monitor) Connect() error {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	return m.connect(ctx)
}

func (m *Monitor) connect(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = m.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	in := bufio.NewScanner(m.conn)
	in.Buffer(make([]byte, 0, 4096), maxReply)
	var msg message
	if err := next(in, &msg); err != nil {
		return fmt.Errorf("wait for QMP's greeting: %w", errors.Join(err, ctx.Err()))
	}
	if msg.QMP == nil {
		return errors.New("QMP does not begin with a greeting")
	}
	m.version = msg.QMP.Version
	if !stop() {
		return fmt.Errorf("wait for QMP's greeting: %w", ctx.Err())
	}
	m.owned.Go(func() { m.read(in) })
	if err := m.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		return errors.Join(err, m.Disconnect())
	}
	return nil
}

func next(in *bufio.Scanner, msg *message) error {
	if !in.Scan() {
		return errors.Join(in.Err(), errors.New("QMP's connection ended"))
	}
	if err := json.Unmarshal(in.Bytes(), msg); err != nil {
		return fmt.Errorf("QMP sent %.100q: %w", in.Bytes(), err)
	}
	return nil
}

// Disconnect ends the connection and returns when the reader and all subscriptions have ended. It may be
// called more than once.
func (m *Monitor) Disconnect() error {
	m.once.Do(func() { close(m.quit) })
	err := m.conn.Close()
	m.owned.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Version is QEMU's own, from its greeting.
func (m *Monitor) Version() qmp.Version { return m.version }

func (m *Monitor) read(in *bufio.Scanner) {
	defer close(m.closed)
	for {
		var msg message
		if err := next(in, &msg); err != nil {
			m.fail(fmt.Errorf("QMP: %w: %w", err, errdefs.ErrUnavailable))
			return
		}
		line := append([]byte(nil), in.Bytes()...)
		if msg.Event != "" {
			m.publish(line)
			continue
		}
		m.mu.Lock()
		ch := m.pending[msg.ID]
		delete(m.pending, msg.ID)
		m.mu.Unlock()
		if ch != nil {
			ch <- reply{line: line}
		}
	}
}

// fail answers all that wait. The connection is not used again.
func (m *Monitor) fail(err error) {
	_ = m.conn.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
	for id, ch := range m.pending {
		ch <- reply{err: err}
		delete(m.pending, id)
	}
	for s := range m.subs {
		s.end()
	}
}

func (m *Monitor) publish(line []byte) {
	var e qmp.Event
	if err := json.Unmarshal(line, &e); err != nil {
		m.log.Warn("QMP sent an event that cannot be read", "error", err)
		return
	}
	if m.notify != nil {
		m.notify(e)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := range m.subs {
		s.put(e)
	}
}

// Execute runs a command with args (anything that marshals to a JSON object, or nil), and unmarshals its result
// into out unless that is nil. The files go along as SCM_RIGHTS, as getfd and add-fd expect. A command whose context
// ends goes on in QEMU; its answer is thrown away.
func (m *Monitor) Execute(ctx context.Context, name string, args, out any, files ...*os.File) error {
	line, err := m.roundTrip(ctx, map[string]any{"execute": name}, args, files)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var msg message
	if err := json.Unmarshal(line, &msg); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if msg.Error != nil {
		return &CommandError{Command: name, Class: msg.Error.Class, Desc: msg.Error.Desc}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(msg.Return, out); err != nil {
		return fmt.Errorf("%s: result %.100q: %w", name, msg.Return, err)
	}
	return nil
}

// Run executes a command given as JSON and returns QEMU's whole answer, as qmp.Monitor wants it.
func (m *Monitor) Run(command []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	var cmd map[string]any
	if err := json.Unmarshal(command, &cmd); err != nil {
		return nil, fmt.Errorf("QMP command %.100q: %w", command, err)
	}
	line, err := m.roundTrip(ctx, cmd, nil, nil)
	if err != nil {
		return nil, err
	}
	var msg message
	if err := json.Unmarshal(line, &msg); err != nil {
		return nil, err
	}
	if msg.Error != nil {
		return nil, &CommandError{Command: fmt.Sprint(cmd["execute"]), Class: msg.Error.Class, Desc: msg.Error.Desc}
	}
	return line, nil
}

func (m *Monitor) roundTrip(ctx context.Context, cmd map[string]any, args any, files []*os.File) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	if args != nil {
		cmd["arguments"] = args
	}
	id, ch, err := m.expect()
	if err != nil {
		return nil, err
	}
	cmd["id"] = id
	if err := m.send(ctx, cmd, files); err != nil {
		m.forget(id)
		return nil, err
	}
	select {
	case r := <-ch:
		return r.line, r.err
	case <-ctx.Done():
		m.forget(id)
		return nil, fmt.Errorf("QEMU does not answer: %w", ctx.Err())
	}
}

func (m *Monitor) expect() (string, chan reply, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return "", nil, m.err
	}
	m.next++
	id := strconv.FormatUint(m.next, 10)
	ch := make(chan reply, 1)
	m.pending[id] = ch
	return id, ch, nil
}

func (m *Monitor) forget(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pending, id)
}

// send writes one command. A command that was written in part ends the connection.
func (m *Monitor) send(ctx context.Context, cmd map[string]any, files []*os.File) error {
	data, err := json.Marshal(cmd)
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	m.write.Lock()
	defer m.write.Unlock()
	deadline, _ := ctx.Deadline()
	if err := m.conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	n, _, err := m.conn.WriteMsgUnix(data, rights, nil)
	if err == nil && n < len(data) {
		_, err = m.conn.Write(data[n:])
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && n == 0 {
		return fmt.Errorf("write to QMP: %w", context.DeadlineExceeded) // nothing of it was written
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write to QMP: %w: %w", err, errdefs.ErrUnavailable), m.conn.Close())
	}
	return nil
}

// subscription queues events for one reader.
type subscription struct {
	mu    sync.Mutex
	queue []qmp.Event
	ended bool
	wake  chan struct{}
}

func (s *subscription) put(e qmp.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == maxQueuedEvents {
		s.queue = s.queue[1:]
	}
	s.queue = append(s.queue, e)
	s.signal()
}

func (s *subscription) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.signal()
}

func (s *subscription) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *subscription) take() (events []qmp.Event, ended bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	events, s.queue = s.queue, nil
	return events, s.ended
}

// Events subscribes to all events from now on. The channel is closed when the context or the connection ends. A
// reader that falls more than 1024 events behind loses the oldest.
func (m *Monitor) Events(ctx context.Context) (<-chan qmp.Event, error) {
	s := &subscription{wake: make(chan struct{}, 1)}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	m.subs[s] = struct{}{}
	out := make(chan qmp.Event)
	m.owned.Go(func() {
		defer close(out)
		m.forward(ctx, s, out)
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.subs, s)
	})
	return out, nil
}

func (m *Monitor) forward(ctx context.Context, s *subscription, out chan<- qmp.Event) {
	for {
		events, ended := s.take()
		for _, e := range events {
			select {
			case out <- e:
			case <-ctx.Done():
				return
			case <-m.quit:
				return
			}
		}
		if ended {
			return
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return
		case <-m.quit:
			return
		}
	}
}
