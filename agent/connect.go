package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/containerd/errdefs"
)

// helloInterval is the time between two HELLOs while the guest does not answer: it may still be booting.
// They wait in the socket until the guest opens its port, so a long interval delays nothing.
const helloInterval = 500 * time.Millisecond

// connect begins a session over an open connection to the guest's port, which it owns from now on. It
// returns when the guest has answered.
func connect(ctx context.Context, rw net.Conn) (*conn, error) {
	var raw [8]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return nil, err
	}
	p := &port{rw: rw}
	c := newConn(p, nonceOf(raw), nil)
	acked := make(chan struct{})
	readerDone := make(chan struct{})
	go func() {
		defer close(readerDone)
		c.end(readSession(c, acked))
	}()
	c.onClose = func() {
		_ = rw.Close()
		<-readerDone
	}
	if err := greet(ctx, rw, c, acked); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// greet sends HELLO until the guest answers.
func greet(ctx context.Context, rw net.Conn, c *conn, acked <-chan struct{}) error {
	tick := time.NewTicker(helloInterval)
	defer tick.Stop()
	for {
		_ = rw.SetWriteDeadline(time.Now().Add(helloInterval))
		err := c.port.send(frame{nonce: c.nonce, kind: kindHello}, nil)
		var timeout net.Error
		if err != nil && !(errors.As(err, &timeout) && timeout.Timeout()) {
			return fmt.Errorf("send to the guest's agent: %w: %w", err, errdefs.ErrUnavailable)
		}
		select {
		case <-acked:
			return rw.SetWriteDeadline(time.Time{})
		case <-c.done:
			return fmt.Errorf("guest's agent: %w: %w", c.err, errdefs.ErrUnavailable)
		case <-ctx.Done():
			return fmt.Errorf("the guest's agent has not answered: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// readSession reads the port until the session ends and tells why.
func readSession(c *conn, acked chan struct{}) error {
	var frames frameReader
	var failed error
	begun := false
	buf := make([]byte, 32<<10)
	each := func(f frame, err error) {
		switch {
		case failed != nil:
		case err != nil:
			// Before the answer these are remains of a dead session; after it bytes of this one, and none may follow that
			// would tell it.
			if begun {
				failed = errGap
			}
		case f.nonce != c.nonce:
		case f.kind == kindAck && !begun:
			begun = true
			close(acked)
		case f.kind == kindBye:
			failed = errBye
		case f.kind == kindData && begun:
			failed = c.deliver(f)
		}
	}
	for {
		n, err := c.port.rw.Read(buf)
		frames.feed(buf[:n], each)
		if failed != nil {
			return failed
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("the port was closed")
			}
			return err
		}
	}
}
