package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// process is a container's own process or an exec, with its standard streams.
type process struct {
	container, exec string
	run             string // names an exec's files and cgroup
	terminal        bool
	wantStdin       bool
	// keepStdin ignores CloseStdin: another client may attach later.
	keepStdin bool
	out       *output
	exited    chan struct{}
	giveUp    func() // has an exec that is held not be started

	mu        sync.Mutex
	pid       int
	startedAt time.Time
	end       exit // valid when exited is closed
	oom       bool
	console   *os.File
	stdin     *os.File // the writing end; nil when closed
}

func (p *process) name() string {
	if p.exec == "" {
		return "container " + p.container
	}
	return "exec " + p.exec + " of container " + p.container
}

// streams are the descriptors of a process about to start, and the socket over which its terminal comes.
type streams struct {
	child    [3]uintptr
	ours     []*os.File // closed after the start
	console  *net.UnixListener
	path     string
	stdin    *os.File
	out, err *os.File
}

// openStreams makes pipes for a process of the given user, or a socket at consolePath for its terminal.
func (p *process) openStreams(consolePath string, uid, gid int) (*streams, error) {
	s := &streams{}
	if err := p.fillStreams(s, consolePath, uid, gid); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (p *process) fillStreams(s *streams, consolePath string, uid, gid int) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	s.ours = append(s.ours, null)
	s.child = [3]uintptr{null.Fd(), null.Fd(), null.Fd()}
	if p.terminal {
		s.path = consolePath
		s.console, err = net.ListenUnix("unix", &net.UnixAddr{Name: consolePath, Net: "unix"})
		return err
	}
	if p.wantStdin {
		if s.stdin, err = s.pipe(0, uid, gid); err != nil {
			return err
		}
	}
	if s.out, err = s.pipe(1, uid, gid); err != nil {
		return err
	}
	s.err, err = s.pipe(2, uid, gid)
	return err
}

// pipe makes the pipe of one descriptor and gives our end of it, which is pollable; the other blocks.
func (s *streams) pipe(fd, uid, gid int) (*os.File, error) {
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	theirs, ours := ends[1], ends[0]
	if fd == 0 {
		theirs, ours = ours, theirs
	}
	s.child[fd] = uintptr(theirs)
	s.ours = append(s.ours, os.NewFile(uintptr(theirs), "pipe"))
	// A user without rights may open its own /dev/stdout again only if the pipe is its own.
	if err := unix.Fchown(theirs, uid, gid); err != nil {
		_ = unix.Close(ours)
		return nil, fmt.Errorf("chown pipe: %w", err)
	}
	if err := unix.SetNonblock(ours, true); err != nil {
		_ = unix.Close(ours)
		return nil, err
	}
	return os.NewFile(uintptr(ours), "pipe"), nil
}

// own gives the pipes of standard output and error, which were made for another user, to one.
func (s *streams) own(uid, gid int) error {
	for _, fd := range s.child[1:] {
		if err := unix.Fchown(int(fd), uid, gid); err != nil {
			return fmt.Errorf("chown pipe: %w", err)
		}
	}
	return nil
}

// closeChild closes what belongs to the started process.
func (s *streams) closeChild() {
	for _, f := range s.ours {
		_ = f.Close()
	}
	s.ours = nil
	if s.console != nil {
		_ = s.console.Close()
		_ = os.Remove(s.path)
	}
}

func (s *streams) close() {
	s.closeChild()
	for _, f := range []*os.File{s.stdin, s.out, s.err} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// terminal receives the controlling end of the terminal that crun has made.
func (s *streams) terminal() (*os.File, error) {
	if err := s.console.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	c, err := s.console.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	defer c.Close()
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(make([]byte, 256), oob)
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("receive terminal: %d control messages, want 1: %w", len(msgs), errors.Join(err, errdefs.ErrInternal))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("receive terminal: %d descriptors, want 1: %w", len(fds), errors.Join(err, errdefs.ErrInternal))
	}
	unix.CloseOnExec(fds[0])
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

// start starts the process by a crun command whose --pid-file is pidFile, and follows it until onExit has
// been told.
func (p *process) start(ctx context.Context, s *Server, cr crunCall, st *streams, onExit func(exit)) error {
	cr.console = st.path
	return p.follow(s, cr, st, func() error { return s.crun(ctx, cr, st.child) }, onExit)
}

// follow is start with another way to have crun run.
func (p *process) follow(s *Server, cr crunCall, st *streams, crun func() error, onExit func(exit)) error {
	ended := s.reaper.starting()
	defer ended()
	if err := crun(); err != nil {
		st.close()
		return err
	}
	pid, err := readInt(cr.pidFile)
	if err != nil {
		st.close()
		return fmt.Errorf("crun's pid file: %w", err)
	}
	if st.console != nil {
		if st.stdin, err = st.terminal(); err != nil {
			_ = unix.Kill(int(pid), unix.SIGKILL)
			st.close()
			return err
		}
	}
	st.closeChild()
	p.begin(int(pid), st)
	s.reaper.watch(int(pid), func(e exit) { s.work.Go(func() { onExit(e) }) })
	return nil
}

// begin records the start and connects the streams.
func (p *process) begin(pid int, st *streams) {
	p.mu.Lock()
	p.pid, p.startedAt, p.stdin = pid, time.Now(), st.stdin
	if p.terminal {
		p.console = st.stdin
		st.out = p.console
		if !p.wantStdin {
			p.stdin = nil
		}
	}
	p.mu.Unlock()
	p.out.attach(stdout, st.out)
	p.out.attach(stderr, st.err)
}

// finish records the end. It may be called once.
func (p *process) finish(e exit, oom bool) {
	p.mu.Lock()
	p.end, p.oom = e, oom
	if e.at.Before(p.startedAt) {
		// It ended before crun had told of its start.
		p.end.at = p.startedAt
	}
	p.closeStdinLocked()
	p.console = nil
	p.mu.Unlock()
	p.out.finish()
	close(p.exited)
}

func (p *process) closeStdinLocked() {
	// A terminal's file is the output's to close.
	if p.stdin != nil && p.stdin != p.console {
		_ = p.stdin.Close()
	}
	p.stdin = nil
}

func (p *process) hasExited() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

func (p *process) state() *agentpb.ProcessState {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := &agentpb.ProcessState{ContainerId: p.container, ExecId: p.exec, Pid: int32(p.pid), Started: p.pid != 0}
	if st.Started {
		st.StartedAtUnixNano = p.startedAt.UnixNano()
	}
	if p.hasExited() {
		st.Exited, st.ExitCode, st.OomKilled = true, int32(p.end.code()), p.oom
		st.ExitedAtUnixNano = p.end.at.UnixNano()
	}
	return st
}

func (p *process) writeStdin(ctx context.Context, data []byte) (int, error) {
	p.mu.Lock()
	f, pid := p.stdin, p.pid
	p.mu.Unlock()
	if f == nil {
		why := "is closed"
		switch {
		case !p.wantStdin:
			why = "was not asked for"
		case pid == 0:
			why = "is not open before the start"
		}
		return 0, fmt.Errorf("standard input of %s %s: %w", p.name(), why, errdefs.ErrFailedPrecondition)
	}
	deadline, _ := ctx.Deadline()
	if err := f.SetWriteDeadline(deadline); err != nil && !errors.Is(err, os.ErrClosed) {
		return 0, err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Now()) })
	defer stop()
	n, err := f.Write(data)
	switch {
	case errors.Is(err, unix.EPIPE), errors.Is(err, os.ErrClosed), errors.Is(err, unix.EIO):
		return n, fmt.Errorf("standard input of %s is closed: %w", p.name(), errdefs.ErrFailedPrecondition)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return n, nil
	}
	return n, err
}

func (p *process) closeStdin() {
	if p.keepStdin {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.console == nil {
		p.closeStdinLocked()
	}
}

func (p *process) resize(width, height uint32) error {
	if !p.terminal {
		return fmt.Errorf("%s has no terminal: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.console == nil {
		return nil
	}
	raw, err := p.console.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(height), Col: uint16(width)})
	})
	return errors.Join(err, failed)
}

// release ends the streams; for a process that is over or has never started.
func (p *process) release() {
	p.out.stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closeStdinLocked()
}

// wait gives the state at the process's end, or at ctx's.
func (p *process) wait(ctx context.Context) *agentpb.ProcessState {
	select {
	case <-p.exited:
	case <-ctx.Done():
	}
	return p.state()
}
