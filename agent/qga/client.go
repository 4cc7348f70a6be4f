// Package qga is a client of qemu-guest-agent, the daemon that most cloud images have or can have, over the Unix
// socket of the VM's virtio-serial port.
//
// Invariants:
//   - One command is under way at a time. One that fails in between leaves the connection out of step, and the next
//     one synchronises it first: whatever a dead client, a dead agent or an earlier boot of the guest has left behind
//     is dropped, in both directions.
//   - No command is sent unless the agent has answered within the last second, so none lies in the socket until an
//     agent starts that nobody expects to obey it any more.
//   - The guest is not trusted: answers have bounds and deadlines, and the output of commands is not kept here.
//   - A process started by Exec ends with Exec, also when the host's daemon is killed.
//
// Errors are of the classes of errdefs: ErrUnavailable when no agent answers, ErrNotImplemented when it has not or has
// blocked a command, ErrFailedPrecondition while file systems are frozen. An error of the agent is an *Error.
package qga

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// syncTime bounds the wait for an agent to answer at all, who is asked again every syncAgain; callTime bounds that for
	// an answer to a command.
	syncTime  = 10 * time.Second
	syncAgain = time.Second
	callTime  = 30 * time.Second
	// freezeTime bounds freezing: it writes all that is dirty.
	freezeTime = 5 * time.Minute
	// freshTime is for how long an answer tells that the agent is there.
	freshTime = time.Second
)

// Client is the connection to one guest's port. It is safe for concurrent use, and outlives reboots of the guest. QEMU
// serves one connection at a time: there may be one Client for each guest.
type Client struct {
	conn   net.Conn
	reader *reader
	turn   chan struct{} // held by the command under way
	done   chan struct{}
	once   sync.Once

	// What follows belongs to the holder of turn.
	heard time.Time // of the last answer; zero when out of step
	info  *Info
}

// Error is what the agent answered to a command.
type Error struct {
	Command, Class, Desc string
	kind                 error
}

func (e *Error) Error() string {
	return fmt.Sprintf("qemu-guest-agent: %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// Unwrap gives the class of errdefs.
func (e *Error) Unwrap() error { return e.kind }

// Dial connects to the Unix socket of the guest's port. That an agent serves the port is not known until a command is
// answered.
func Dial(ctx context.Context, socketPath string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socketPath)
	if err != nil {
		return nil, fmt.Errorf("connect to the port of qemu-guest-agent: %w: %w", err, errdefs.ErrUnavailable)
	}
	return newClient(conn), nil
}

func newClient(conn net.Conn) *Client {
	return &Client{conn: conn, reader: newReader(conn), turn: make(chan struct{}, 1), done: make(chan struct{})}
}

// Close ends the connection. A command under way fails.
func (c *Client) Close() error {
	c.once.Do(func() { close(c.done) })
	return c.conn.Close()
}

// Done is closed when the Client is closed, or when a command has found the socket's other end closed: QEMU is gone.
func (c *Client) Done() <-chan struct{} { return c.done }

// errSilent says that nothing came in time.
var errSilent = errors.New("no answer")

// timed calls f, which uses the connection until ctx's end or for limit. An error tells why.
func (c *Client) timed(ctx context.Context, limit time.Duration, f func() error) error {
	if err := c.conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return c.lost(err)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = c.conn.SetDeadline(time.Unix(1, 0))
	})
	err := f()
	if !stop() {
		<-interrupted
	}
	var timeout net.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &timeout) && timeout.Timeout():
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%w within %s: %w", errSilent, limit, errdefs.ErrUnavailable)
	case errors.Is(err, errTooLong), errors.Is(err, errMalformed):
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return c.lost(err)
}

// lost says that the socket has ended.
func (c *Client) lost(err error) error {
	c.once.Do(func() { close(c.done) })
	return fmt.Errorf("the guest's port is closed: %w: %w", err, errdefs.ErrUnavailable)
}

// begin waits for this command's turn and sees to it that the agent listens.
func (c *Client) begin(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return fmt.Errorf("the connection is closed: %w", errdefs.ErrUnavailable)
	}
	if !c.heard.IsZero() && time.Since(c.heard) < freshTime {
		return nil
	}
	if err := c.sync(ctx); err != nil {
		<-c.turn
		return fmt.Errorf("qemu-guest-agent does not answer; it is not installed, not running, or the guest is booting: %w", err)
	}
	return nil
}

// sync drops what is left of earlier commands.
func (c *Client) sync(ctx context.Context) error {
	if c.heard.IsZero() {
		// Another boot may have another agent.
		c.info = nil
	}
	c.heard = time.Time{}
	var raw [8]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return err
	}
	id := int64(binary.BigEndian.Uint64(raw[:]) >> 12) // as many bits as every JSON parser keeps
	for end := time.Now().Add(syncTime); ; {
		err := c.timed(ctx, syncAgain, func() error {
			// The sentinel ends what the agent may have read of a command that was cut.
			if err := c.send(true, "guest-sync-delimited", map[string]int64{"id": id}); err != nil {
				return err
			}
			return c.reader.synced(id)
		})
		if err == nil {
			c.heard = time.Now()
			return nil
		}
		// A guest that boots loses what came before its agent.
		if !errors.Is(err, errSilent) || time.Now().After(end) {
			return err
		}
	}
}

func (c *Client) send(flush bool, command string, args any) error {
	data, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return err
	}
	if flush {
		data = append([]byte{sentinel}, data...)
	}
	_, err = c.conn.Write(append(data, '\n'))
	return err
}

// call runs a command. args and result may be nil.
func (c *Client) call(ctx context.Context, command string, args, result any) error {
	return c.callWithin(ctx, callTime, maxMessage, command, args, result)
}

func (c *Client) callWithin(ctx context.Context, limit time.Duration, size int, command string, args, result any) error {
	if err := c.begin(ctx); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	defer func() { <-c.turn }()
	return c.exchange(ctx, limit, size, command, args, result)
}

// exchange is callWithin for who has begun.
func (c *Client) exchange(ctx context.Context, limit time.Duration, size int, command string, args, result any) error {
	var a answer
	err := c.timed(ctx, limit, func() (err error) {
		if err = c.send(false, command, args); err != nil {
			return err
		}
		a, err = c.reader.answer(size)
		return err
	})
	if err != nil {
		c.heard = time.Time{}
		return fmt.Errorf("%s: qemu-guest-agent: %w", command, err)
	}
	c.heard = time.Now()
	if len(c.reader.rest) > 0 {
		c.heard = time.Time{} // nobody asked for more
	}
	if a.Error != nil {
		return commandError(command, a.Error.Class, a.Error.Desc)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(a.Return, result); err != nil {
		c.heard = time.Time{}
		return fmt.Errorf("%s: qemu-guest-agent's answer: %w: %w", command, err, errdefs.ErrInternal)
	}
	return nil
}
