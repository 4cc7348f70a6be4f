package runtime

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// slowTaker takes its time for a chunk.
type slowTaker time.Duration

func (slowTaker) cursor() cursor { return cursor{} }

func (s slowTaker) take(*agentpb.OutputChunk) error {
	time.Sleep(time.Duration(s))
	return nil
}

func TestDrain(t *testing.T) {
	for _, c := range []struct {
		name         string
		taker        slowTaker
		gap          time.Duration // between chunks
		chunks       int
		wantErr      error
		wantDuration time.Duration
	}{
		{"a client that takes a chunk each minute", slowTaker(time.Minute), 0, 5, nil, 5 * time.Minute},
		{"a guest that gives a chunk each ten seconds", 0, 10 * time.Second, 5, nil, 50 * time.Second},
		{"a guest that gives nothing", 0, time.Hour, 1, errdefs.ErrUnavailable, drainTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				to, copied := &pacedTaker{outputTaker: c.taker}, make(chan error, 1)
				go func() {
					for range c.chunks {
						time.Sleep(c.gap)
						_ = to.take(nil) // never fails
					}
					copied <- nil
				}()
				begun := time.Now()
				if err := drain(t.Context(), copied, to); !errors.Is(err, c.wantErr) || time.Since(begun) != c.wantDuration {
					t.Errorf("%v after %s, want %v after %s", err, time.Since(begun), c.wantErr, c.wantDuration)
				}
				time.Sleep(2 * time.Hour) // until the last chunk
			})
		})
	}
}

func TestDrainEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := drain(ctx, make(chan error), &pacedTaker{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that it was canceled", err)
	}
}

// What comes with the end is read before that is told.
func TestEndOfInput(t *testing.T) {
	ended := false
	r := endOfInput{iotest.DataErrReader(strings.NewReader("last words")), func() { ended = true }}
	buf := make([]byte, 64)
	if n, err := r.Read(buf); string(buf[:n]) != "last words" || err != nil || ended {
		t.Errorf("read %q, %v, ended %v; want the words first", buf[:n], err, ended)
	}
	if _, err := r.Read(buf); !errors.Is(err, io.EOF) || !ended {
		t.Errorf("then %v, ended %v; want the end", err, ended)
	}
}

// halfClosed is a guest's end of a connection that knows when its client sends no more.
type halfClosed struct {
	net.Conn
	closed chan struct{}
}

func (h halfClosed) CloseWrite() error {
	close(h.closed)
	return nil
}

// A client that has sent its last is answered as long as the guest has something to say, and a guest that has not is left.
func TestJoin(t *testing.T) {
	const silence, answers = time.Minute, 5
	synctest.Test(t, func(t *testing.T) {
		near, guest := net.Pipe()
		client, stream := net.Pipe()
		conn := halfClosed{near, make(chan struct{})}
		joined := make(chan error, 1)
		go func() { joined <- join(conn, endingAtOnce{stream}, silence) }()
		go func() {
			<-conn.closed
			for range answers {
				time.Sleep(silence * 2 / 3)
				_, _ = guest.Write([]byte("x")) // read below, or not
			}
		}()
		time.Sleep(3 * silence) // a client that takes its time
		got := make([]byte, answers)
		if _, err := io.ReadFull(client, got); err != nil {
			t.Errorf("after the end of what the client sends came %q, %v; want %d answers", got, err, answers)
		}
		begun := time.Now()
		<-joined
		if waited := time.Since(begun); waited > 2*silence {
			t.Errorf("a guest that is silent was waited for %s, want at most %s", waited, 2*silence)
		}
		for _, c := range []io.Closer{guest, client, stream} {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// endingAtOnce is a client that sends nothing.
type endingAtOnce struct{ net.Conn }

func (endingAtOnce) Read([]byte) (int, error) { return 0, io.EOF }
