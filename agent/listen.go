package agent

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// idlePause is waited after the port has read as ended: the guest's driver does so while no host is
// connected, and does not tell when one comes.
const idlePause = 30 * time.Millisecond

// Listener is the guest's end of the port: a net.Listener whose connections are the host's sessions, one
// at a time.
type Listener struct {
	port   *port
	accept chan *conn
	closed chan struct{}
	once   sync.Once
	reader sync.WaitGroup
	err    error // of the port; readable when the reader has ended

	// The reader's own: the session, and the number of the last one whose end the host has been told.
	current *conn
	told    uint64
}

// Listen serves the port, which it owns from now on. Reads that give io.EOF mean that no host is connected;
// any other error ends the listener.
func Listen(rw io.ReadWriteCloser) *Listener {
	l := &Listener{port: &port{rw: rw}, accept: make(chan *conn), closed: make(chan struct{})}
	l.reader.Go(l.read)
	return l
}

// Accept waits for the host's next session.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.closed:
		if l.err != nil {
			return nil, l.err
		}
		return nil, net.ErrClosed
	}
}

// Close closes the port and ends the session. It returns when nothing of the listener runs any more.
func (l *Listener) Close() error {
	l.shut(nil)
	err := l.port.rw.Close()
	l.reader.Wait()
	return err
}

// Addr names the port.
func (l *Listener) Addr() net.Addr { return portAddr{} }

func (l *Listener) shut(err error) {
	l.once.Do(func() {
		l.err = err
		close(l.closed)
	})
}

func (l *Listener) read() {
	var frames frameReader
	buf := make([]byte, 32<<10)
	for {
		n, err := l.port.rw.Read(buf)
		if n > 0 {
			frames.feed(buf[:n], l.handle)
			continue
		}
		if err == nil || errors.Is(err, io.EOF) {
			// No host is connected, or none was a moment ago: the kernel tells it aside of the bytes, so the next host's
			// HELLO may have been read already. The session stays; the next HELLO ends it.
			if l.pause() {
				continue
			}
			err = net.ErrClosed
		}
		if errors.Is(err, os.ErrClosed) {
			err = net.ErrClosed
		}
		l.drop(err)
		l.shut(err)
		return
	}
}

// pause waits before the port is read again. It tells false when the listener is closed.
func (l *Listener) pause() bool {
	t := time.NewTimer(idlePause)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-l.closed:
		return false
	}
}

func (l *Listener) handle(f frame, err error) {
	switch {
	case err != nil:
		// Either what a dead host left half written, or damage to the session's own bytes, which the number of
		// its next frame will tell.
	case f.kind == kindHello:
		l.hello(f.nonce)
	case f.kind == kindData && l.current != nil && l.current.nonce == f.nonce:
		if l.current.ended() != nil {
			l.leave(l.current.err)
		} else if err := l.current.deliver(f); err != nil {
			l.leave(err)
		}
	case f.kind == kindData && l.current == nil && f.nonce != l.told:
		// A session of an earlier agent: the guest has rebooted, which the host may not know.
		l.told = f.nonce
		_ = l.port.send(frame{nonce: f.nonce, kind: kindBye}, nil)
	}
}

// hello begins the session with the given nonce, or repeats the answer if it runs already.
func (l *Listener) hello(nonce uint64) {
	if l.current == nil || l.current.nonce != nonce {
		l.drop(errReplaced)
		l.current = newConn(l.port, nonce, nil)
		c := l.current
		c.onClose = func() {
			if errors.Is(c.err, net.ErrClosed) { // by its user here; the host has to be told
				_ = c.port.send(frame{nonce: nonce, kind: kindBye}, nil)
			}
		}
		if err := l.port.send(frame{nonce: nonce, kind: kindAck}, nil); err != nil {
			l.drop(err)
			return
		}
		select {
		case l.accept <- c:
		case <-l.closed:
			l.drop(net.ErrClosed)
		}
		return
	}
	if l.current.ended() != nil {
		l.leave(l.current.err)
		return
	}
	// A host that is gone again does not read this; the next HELLO finds that out.
	_ = l.port.send(frame{nonce: nonce, kind: kindAck}, nil)
}

// leave ends the session and says so to the host.
func (l *Listener) leave(err error) {
	nonce := l.current.nonce
	l.drop(err)
	l.told = nonce
	_ = l.port.send(frame{nonce: nonce, kind: kindBye}, nil)
}

func (l *Listener) drop(err error) {
	if l.current != nil {
		l.current.end(err)
		l.current = nil
	}
}
