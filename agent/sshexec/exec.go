package sshexec

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"

	"github.com/vmruntime/vmruntime/agent/posixsh"
)

// Size is a terminal's, in characters.
type Size struct{ Width, Height uint16 }

// Command is a program to run in the guest.
type Command struct {
	// Args are the program, found by the login's PATH, and its arguments.
	Args []string
	// Env is NAME=value in addition to the login's environment.
	Env []string
	// TTY gives the program a terminal. Then all output is Stdout's.
	TTY bool
	// Size is the terminal's at the start; 80 by 24 if zero. Resize changes it later and may be nil.
	Size   Size
	Resize <-chan Size
	// Stdin is read until its end, which closes the program's standard input; nil is empty. A Read that has not
	// returned when the command ends is not waited for; what it gives is lost.
	Stdin io.Reader
	// Stdout and Stderr get the output; nil drops it. While one blocks, the command is held up.
	Stdout, Stderr io.Writer
}

const (
	// maxCommand is what Linux allows one argument of the login shell.
	maxCommand = 128<<10 - 1
	// maxPrelude bounds what login shells may print before the command begins.
	maxPrelude = 64 << 10
	// beginTime bounds the wait for a command that is no longer wanted to begin; killTime that for its end in the guest.
	beginTime = 5 * time.Second
	killTime  = 30 * time.Second
	// closeTime is what the guest has for the end of a session; then its connection ends.
	closeTime = 10 * time.Second
)

// Exec runs a command and gives its exit status, or 128 plus the number of the signal that ended it; 127 and 126 say
// that the program is not there or cannot be executed. When ctx ends, all processes of the command's session are killed.
// A command that loses its guest is ErrUnavailable; whether it goes on there is then unknown.
func (c *Client) Exec(ctx context.Context, cmd Command) (int32, error) {
	line, err := posixsh.Command(cmd.Args, cmd.Env)
	if err != nil {
		return 0, err
	}
	var raw [16]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return 0, err
	}
	mark := hex.EncodeToString(raw[:])
	// The number of the session comes first, and without it the program does not run.
	login := posixsh.LoginShell("echo " + mark + " $$ || exit; " + line)
	if len(login) > maxCommand {
		return 0, fmt.Errorf("args and env take %d bytes as one line for the guest's shell, at most %d are possible: %w",
			len(login), maxCommand, errdefs.ErrInvalidArgument)
	}
	s, err := c.open(ctx)
	if err != nil {
		return 0, err
	}
	defer s.close()
	if err := s.start(cmd, login); err != nil {
		return 0, err
	}
	return s.run(ctx, cmd, newPrelude(mark, cmd.Stdout))
}

// session is one SSH session, in a connection of its own when the shared one has as many as the guest allows.
type session struct {
	client *Client
	link   *link
	own    bool
	ssh.Channel
	requests <-chan *ssh.Request

	ended  chan struct{} // closed when the exit status has come, or cannot come any more
	closed chan struct{} // closed when the guest has ended the session
	status exitStatus
	known  bool // status has come; readable when ended is closed
}

type exitStatus struct {
	code   uint32
	signal string
}

func (c *Client) open(ctx context.Context) (*session, error) {
	s := &session{client: c, link: c.main, ended: make(chan struct{}), closed: make(chan struct{})}
	err := s.openChannel(ctx)
	if _, refused := errors.AsType[*ssh.OpenChannelError](err); refused {
		if s.link, err = c.connect(ctx); err != nil {
			return nil, err
		}
		s.own = true
		if err = s.openChannel(ctx); err != nil {
			_ = s.link.close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open a session in the guest: %w: %w", err, errdefs.ErrUnavailable)
	}
	s.link.work(s.follow)
	return s, nil
}

// openChannel waits for the guest's answer. A channel that comes after ctx has ended is closed again.
func (s *session) openChannel(ctx context.Context) error {
	type opened struct {
		channel  ssh.Channel
		requests <-chan *ssh.Request
		err      error
	}
	answer := make(chan opened, 1)
	s.link.work(func() {
		ch, reqs, err := s.link.OpenChannel("session", nil)
		answer <- opened{ch, reqs, err}
	})
	select {
	case o := <-answer:
		s.Channel, s.requests = o.channel, o.requests
		return o.err
	case <-ctx.Done():
		s.link.work(func() {
			if o := <-answer; o.err == nil {
				_ = o.channel.Close()
				ssh.DiscardRequests(o.requests)
			}
		})
		return context.Cause(ctx)
	}
}

func (s *session) close() {
	_ = s.Channel.Close()
	if s.own {
		_ = s.link.close()
	}
}

// start asks for a terminal and runs the line in the login shell.
func (s *session) start(cmd Command, line string) error {
	if cmd.TTY {
		if cmd.Size == (Size{}) {
			cmd.Size = Size{80, 24}
		}
		msg := ptyRequest{Term: term(cmd.Env), Columns: uint32(cmd.Size.Width), Rows: uint32(cmd.Size.Height), Modes: "\x00"}
		if err := s.ask("pty-req", ssh.Marshal(&msg), "a terminal"); err != nil {
			return err
		}
	}
	return s.ask("exec", ssh.Marshal(&struct{ Command string }{line}), "commands")
}

// RFC 4254, 6.2 and 6.7.
type ptyRequest struct {
	Term          string
	Columns, Rows uint32
	Width, Height uint32
	Modes         string
}

type windowChange struct{ Columns, Rows, Width, Height uint32 }

func (s *session) ask(request string, payload []byte, what string) error {
	ok, err := s.SendRequest(request, true, payload)
	if err != nil {
		return fmt.Errorf("ask the guest's sshd for %s: %w: %w", what, err, errdefs.ErrUnavailable)
	}
	if !ok {
		return fmt.Errorf("the guest's sshd allows no %s: %w", what, errdefs.ErrPermissionDenied)
	}
	return nil
}

func term(env []string) string {
	for _, e := range env {
		if t, ok := strings.CutPrefix(e, "TERM="); ok {
			return t
		}
	}
	return "xterm"
}

// follow collects the guest's messages about the command's end until the session is closed.
func (s *session) follow() {
	defer close(s.closed)
	for r := range s.requests {
		if st, ok := statusOf(r); ok && !s.known {
			s.status, s.known = st, true
			close(s.ended)
		}
		if r.WantReply {
			_ = r.Reply(false, nil)
		}
	}
	if !s.known {
		close(s.ended)
	}
}

// statusOf reads the messages of RFC 4254, 6.10.
func statusOf(r *ssh.Request) (exitStatus, bool) {
	switch r.Type {
	case "exit-status":
		var m struct{ Status uint32 }
		err := ssh.Unmarshal(r.Payload, &m)
		return exitStatus{code: m.Status}, err == nil
	case "exit-signal":
		var m struct {
			Signal    string
			Core      bool
			Text, Tag string
		}
		err := ssh.Unmarshal(r.Payload, &m)
		return exitStatus{signal: m.Signal}, err == nil
	}
	return exitStatus{}, false
}

// run moves streams until the command has ended.
func (s *session) run(ctx context.Context, cmd Command, out *prelude) (int32, error) {
	output := newOutput()
	output.move(out, s.Channel)
	output.move(orDiscard(cmd.Stderr), s.Channel.Stderr())
	s.feed(cmd.Stdin)
	resizing, stop := context.WithCancel(ctx)
	var resizer sync.WaitGroup
	resizer.Go(func() { s.resize(resizing, cmd.Resize) })
	defer func() {
		stop()
		resizer.Wait()
		_ = s.Channel.Close()
		late := time.AfterFunc(closeTime, s.abandon)
		output.wait()
		late.Stop()
	}()

	var err error
	select {
	case <-s.ended:
		output.drain(ctx)
	case <-ctx.Done():
		err = context.Cause(ctx)
	case err = <-output.failed:
	}
	if err != nil {
		return 0, errors.Join(err, s.kill(out))
	}
	select {
	case err := <-output.failed:
		return 0, err
	default:
	}
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	if s.link.gone() || !s.known {
		return 0, fmt.Errorf("the guest was lost while the command ran: %w", errdefs.ErrUnavailable)
	}
	if text, begun := out.state(); !begun {
		return 0, fmt.Errorf("the user's login shell in the guest did not run the command; it says %q (%s): %w", text, s.status, errdefs.ErrFailedPrecondition)
	}
	return s.status.exitCode(), nil
}

func orDiscard(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}

// abandon ends the connection of a guest that does not close a session.
func (s *session) abandon() {
	select {
	case <-s.closed:
	default:
		_ = s.link.Client.Close()
	}
}

// feed moves standard input. Nothing waits for it: nobody can interrupt a Read.
func (s *session) feed(from io.Reader) {
	if from == nil {
		_ = s.CloseWrite()
		return
	}
	go func() {
		_, _ = io.Copy(s.Channel, from)
		_ = s.CloseWrite()
	}()
}

func (s *session) resize(ctx context.Context, sizes <-chan Size) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			msg := windowChange{Columns: uint32(size.Width), Rows: uint32(size.Height)}
			_, _ = s.SendRequest("window-change", false, ssh.Marshal(&msg))
		case <-s.ended:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (l *link) gone() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// kill ends the command in the guest by a session of its own: sshd passes on no signals to most of its children, and the
// end of a session none at all.
func (s *session) kill(out *prelude) error {
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	var pid string
	begin := time.NewTimer(beginTime)
	defer begin.Stop()
	select {
	case pid = <-out.pid:
	case <-s.ended:
		return nil
	case <-begin.C:
		// Whose number is not read by now does not run when the channel is closed.
		return nil
	}
	killer, err := s.client.open(ctx)
	if err == nil {
		defer killer.close()
		err = killer.start(Command{}, posixsh.LoginShell(posixsh.KillSession+"; kill_session "+pid))
	}
	if err != nil {
		return fmt.Errorf("the command may still run in the guest: %w", err)
	}
	// It prints next to nothing, for which the channel's window is enough.
	_ = killer.CloseWrite()
	select {
	case <-killer.ended:
		if killer.known && killer.status.exitCode() == 0 {
			return nil
		}
	case <-ctx.Done():
	}
	return fmt.Errorf("the command may still run in the guest: its end was not told: %w", errdefs.ErrUnavailable)
}
