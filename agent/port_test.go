package agent

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakePort behaves as QEMU's virtio-serial port does: bytes for the guest stay when the host goes, the
// guest reads io.EOF while no host is connected, and its writes wait for one. Harsher than QEMU, bytes for
// the host stay for the next one too.
type fakePort struct {
	mu      sync.Mutex
	changed *sync.Cond
	toGuest []byte
	toHost  []byte
	host    *fakeHost // nil while none is connected
	closed  bool
	eofs    int
	// damage changes what passes in either direction.
	damage func([]byte) []byte
}

func newFakePort() *fakePort {
	p := &fakePort{}
	p.changed = sync.NewCond(&p.mu)
	return p
}

const fakeRing = 8 << 10

func (p *fakePort) pass(b []byte) []byte {
	if p.damage == nil {
		return append([]byte(nil), b...)
	}
	return p.damage(append([]byte(nil), b...))
}

// guestEnd is the port as the guest has it open.
type guestEnd struct{ *fakePort }

func (g guestEnd) Read(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.toGuest) == 0 && g.host != nil && !g.closed {
		g.changed.Wait()
	}
	if g.closed {
		return 0, os.ErrClosed
	}
	if len(g.toGuest) == 0 {
		g.eofs++
		return 0, io.EOF
	}
	n := copy(b, g.toGuest)
	g.toGuest = g.toGuest[n:]
	g.changed.Broadcast()
	return n, nil
}

func (g guestEnd) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for (g.host == nil || len(g.toHost) > fakeRing) && !g.closed {
		g.changed.Wait()
	}
	if g.closed {
		return 0, os.ErrClosed
	}
	g.toHost = append(g.toHost, g.pass(b)...)
	g.changed.Broadcast()
	return len(b), nil
}

func (g guestEnd) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.changed.Broadcast()
	return nil
}

// fakeHost is the host's socket. A new one takes the place of the one before, as with a chardev.
type fakeHost struct {
	net.Conn // never used
	p        *fakePort
	deadline time.Time
}

func (p *fakePort) connect() *fakeHost {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.host = &fakeHost{p: p}
	p.changed.Broadcast()
	return p.host
}

func (h *fakeHost) Read(b []byte) (int, error) {
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	for h.p.host == h && len(h.p.toHost) == 0 {
		h.p.changed.Wait()
	}
	if h.p.host != h {
		return 0, net.ErrClosed
	}
	n := copy(b, h.p.toHost)
	h.p.toHost = h.p.toHost[n:]
	h.p.changed.Broadcast()
	return n, nil
}

func (h *fakeHost) Write(b []byte) (int, error) {
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	for h.p.host == h && len(h.p.toGuest) > fakeRing && h.deadline.IsZero() {
		h.p.changed.Wait()
	}
	if h.p.host != h {
		return 0, net.ErrClosed
	}
	h.p.toGuest = append(h.p.toGuest, h.p.pass(b)...)
	h.p.changed.Broadcast()
	return len(b), nil
}

func (h *fakeHost) Close() error {
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	if h.p.host == h {
		h.p.host = nil
	}
	h.p.changed.Broadcast()
	return nil
}

func (h *fakeHost) SetWriteDeadline(t time.Time) error {
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	h.deadline = t
	return nil
}

// echoGuest answers every session with what it receives, as the agent would.
func echoGuest(t *testing.T, p *fakePort) *Listener {
	t.Helper()
	l := Listen(guestEnd{p})
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer c.Close()
				_, err := io.Copy(c, c)
				if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, errReplaced) &&
					!errors.Is(err, errGap) && !errors.Is(err, os.ErrClosed) {
					t.Errorf("echo: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close the listener: %v", err)
		}
		work.Wait()
	})
	return l
}
