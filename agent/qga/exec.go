package qga

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/posixsh"
)

// Command is a program to run in the guest. The agent has no standard input and no terminal for it.
type Command struct {
	// Args are the program, found by the agent's PATH, and its arguments.
	Args []string
	// Env is NAME=value in addition to the agent's environment.
	Env []string
	// Stdout and Stderr get the output; nil drops it. While one blocks, the command is held up, not kept in memory.
	Stdout, Stderr io.Writer
	// BeginBy bounds the wait for an agent that hangs or is busy; zero is no bound.
	BeginBy time.Time
}

// ErrNotBegun says that Exec has failed before the agent took the command.
var ErrNotBegun = errors.New("the command was not begun")

func notBegun(err error) error { return fmt.Errorf("%w: %w", ErrNotBegun, err) }

// beginning is ctx until the command has to begin.
func (cmd Command) beginning(ctx context.Context) (context.Context, context.CancelFunc) {
	if cmd.BeginBy.IsZero() {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, cmd.BeginBy)
}

const (
	firstPoll, lastPoll = 10 * time.Millisecond, 200 * time.Millisecond
	leaseTime           = 10 * time.Second
	// cleanupTime bounds what is done in the guest when Exec ends.
	cleanupTime = 30 * time.Second
	// When the command has ended, children of it may keep its output open. It ends when it has been silent for
	// drainIdle, or when drainMax has been waited or drainBytes read.
	drainIdle  = time.Second
	drainMax   = 10 * time.Second
	drainBytes = 16 << 20
)

// Exec runs a command and gives its exit status, or 128 plus the number of the signal that ended it; 127 and 126 say
// that the program is not there or cannot be executed. When ctx ends, the command and all processes of its session are
// killed; it is killed too when the host is gone for a minute.
//
// The output comes while the command runs. Only in guests without /bin/sh, mkfifo, setsid or the agent's file commands
// it comes at the end, at most 16 MiB of each stream; what is beyond is an ErrResourceExhausted.
//
// ErrNotBegun says that somebody else may run the command. With ErrNotImplemented the agent's configuration blocks guest-exec, as RHEL's
// and Fedora's does.
func (c *Client) Exec(ctx context.Context, cmd Command) (int32, error) {
	line, err := posixsh.Command(cmd.Args, cmd.Env)
	if err != nil {
		return 0, err
	}
	if cmd.Stdout == nil {
		cmd.Stdout = io.Discard
	}
	if cmd.Stderr == nil {
		cmd.Stderr = io.Discard
	}
	begin, cancel := cmd.beginning(ctx)
	defer cancel()
	info, err := c.knownInfo(begin)
	if err != nil {
		return 0, notBegun(err)
	}
	if !info.Can("guest-exec", "guest-exec-status") {
		return 0, notBegun(fmt.Errorf("the guest's qemu-guest-agent blocks guest-exec; allow guest-exec and guest-file-* in its "+
			"configuration (BLACKLIST_RPC, FILTER_RPC_ARGS or /etc/qemu/qemu-ga.conf), or use SSH: %w", errdefs.ErrNotImplemented))
	}
	if info.Can("guest-file-open", "guest-file-read", "guest-file-close") {
		code, err := c.stream(ctx, cmd, line)
		if !errors.Is(err, errNoStreaming) {
			return code, err
		}
		cmd.BeginBy = time.Time{} // the agent has done something
	}
	return c.capture(ctx, cmd, line)
}

// errNoStreaming says that this guest lacks what streaming takes. The command has not been started.
var errNoStreaming = errors.New("the guest cannot stream")

// execStatus is the answer to guest-exec-status.
type execStatus struct {
	Exited       bool   `json:"exited"`
	ExitCode     int64  `json:"exitcode"`
	Signal       int32  `json:"signal"`
	OutData      []byte `json:"out-data"`
	ErrData      []byte `json:"err-data"`
	OutTruncated bool   `json:"out-truncated"`
	ErrTruncated bool   `json:"err-truncated"`
}

func (s *execStatus) code() int32 {
	if s.Signal != 0 {
		return 128 + s.Signal
	}
	return int32(s.ExitCode)
}

// start spawns a command, or what runs it, if its turn comes in time.
func (c *Client) start(ctx context.Context, cmd Command, args, env []string) (pid int64, err error) {
	ctx, cancel := cmd.beginning(ctx)
	defer cancel()
	if err := c.begin(ctx); err != nil {
		return 0, notBegun(err)
	}
	defer func() { <-c.turn }()
	return c.guestExec(ctx, args, env)
}

// spawn starts a program of our own.
func (c *Client) spawn(ctx context.Context, args []string) (pid int64, err error) {
	if err := c.begin(ctx); err != nil {
		return 0, err
	}
	defer func() { <-c.turn }()
	return c.guestExec(ctx, args, nil)
}

// guestExec is not interrupted: a program whose number nobody knows could not be ended.
func (c *Client) guestExec(ctx context.Context, args, env []string) (pid int64, err error) {
	req := map[string]any{"path": args[0], "arg": args[1:], "capture-output": true}
	if len(env) > 0 {
		req["env"] = env
	}
	var r struct {
		PID int64 `json:"pid"`
	}
	err = c.exchange(context.WithoutCancel(ctx), callTime, maxMessage, "guest-exec", req, &r)
	return r.PID, err
}

func shell(script string) []string { return []string{"/bin/sh", "-c", script} }

func (c *Client) status(ctx context.Context, pid int64) (execStatus, error) {
	var st execStatus
	err := c.callWithin(ctx, callTime, maxCapture, "guest-exec-status", map[string]int64{"pid": pid}, &st)
	return st, restarted(err)
}

// restarted explains that the agent does not know what it has told us itself.
func restarted(err error) error {
	var e *Error
	if errors.As(err, &e) && e.Class == "GenericError" {
		return fmt.Errorf("the guest or its agent has restarted while the command ran: %w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}

// wait waits for a program's end.
func (c *Client) wait(ctx context.Context, pid int64) (execStatus, error) {
	pause := firstPoll
	for {
		st, err := c.status(ctx, pid)
		if err != nil || st.Exited {
			return st, err
		}
		if err := sleep(ctx, pause); err != nil {
			return st, err
		}
		pause = min(2*pause, lastPoll)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stream runs a command with its output in files that are read as they grow; see script.go.
func (c *Client) stream(ctx context.Context, cmd Command, line string) (int32, error) {
	var raw [16]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return 0, err
	}
	dir := "/tmp/vmruntime-exec-" + hex.EncodeToString(raw[:])
	pid, err := c.start(ctx, cmd, shell(streamScript(dir, line)), nil)
	if _, refused := errors.AsType[*Error](err); refused {
		return 0, errNoStreaming // no /bin/sh
	}
	if err != nil {
		if ctx.Err() == nil && !errors.Is(err, ErrNotBegun) {
			c.cleanup(ctx, dir, 0, true)
		}
		return 0, err
	}
	r := &run{
		client: c, pid: pid, dir: dir,
		streams: [2]*outputStream{{name: dir + "/1.", to: cmd.Stdout}, {name: dir + "/2.", to: cmd.Stderr}},
	}
	code, err := r.follow(ctx)
	r.closeFiles(ctx)
	c.cleanup(ctx, dir, pid, err != nil)
	return code, err
}

// cleanup leaves nothing of a stream. What it fails to do, the watchdog in the guest does.
func (c *Client) cleanup(ctx context.Context, dir string, pid int64, kill bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	if pid, err := c.spawn(ctx, shell(cleanupScript(dir, strconv.FormatInt(pid, 10), kill))); err == nil {
		_, _ = c.wait(ctx, pid)
	}
}

// run is a command that streams.
type run struct {
	client  *Client
	pid     int64
	dir     string
	streams [2]*outputStream
	lease   time.Time // when it was last renewed

	exited bool
	code   int32
	// Since the end of the command: what has been waited in total and since the last output.
	waited, silent time.Duration
}

// follow moves output until the command and its output have ended.
func (r *run) follow(ctx context.Context) (int32, error) {
	pause := firstPoll
	for {
		if err := r.renew(ctx); err != nil {
			return 0, err
		}
		// Asked first: what a command that has ended has written is there.
		if err := r.look(ctx); err != nil {
			return 0, err
		}
		moved, err := r.move(ctx)
		if err != nil {
			return 0, err
		}
		if r.over() {
			return r.code, nil
		}
		if moved {
			pause, r.silent = firstPoll, 0
			continue
		}
		if err := sleep(ctx, pause); err != nil {
			return 0, err
		}
		if r.exited {
			r.waited += pause
			r.silent += pause
		}
		pause = min(2*pause, lastPoll)
	}
}

// renew shows the guest that the host lives.
func (r *run) renew(ctx context.Context) error {
	if time.Since(r.lease) < leaseTime {
		return nil
	}
	first := r.lease.IsZero()
	r.lease = time.Now()
	if first {
		return nil // the directory may not be there yet
	}
	return restarted(r.client.empty(ctx, r.dir+"/lease"))
}

// look asks for the command's end.
func (r *run) look(ctx context.Context) error {
	if r.exited {
		return nil
	}
	st, err := r.client.status(ctx, r.pid)
	if err != nil || !st.Exited {
		return err
	}
	if strings.HasPrefix(string(st.OutData), noSetup) {
		return errNoStreaming
	}
	r.exited, r.code = true, st.code()
	for _, s := range r.streams {
		s.moved = 0
	}
	return nil
}

func (r *run) move(ctx context.Context) (bool, error) {
	moved := false
	for _, s := range r.streams {
		m, err := s.move(ctx, r.client)
		if err != nil {
			return false, err
		}
		moved = moved || m
	}
	return moved, nil
}

func (r *run) over() bool {
	if !r.exited {
		return false
	}
	out, err := r.streams[0], r.streams[1]
	return out.ended && err.ended || r.silent >= drainIdle || r.waited >= drainMax || max(out.moved, err.moved) >= drainBytes
}

// closeFiles closes the agent's files, also when ctx has ended.
func (r *run) closeFiles(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	for _, s := range r.streams {
		if s.file != 0 {
			_ = r.client.closeFile(ctx, s.file)
		}
	}
}
