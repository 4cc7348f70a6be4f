package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

func begin(t *testing.T, p *fakePort) *conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := connect(ctx, p.connect())
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	return c
}

// echoed sends data and wants it back.
func echoed(t *testing.T, c *conn, data []byte) {
	t.Helper()
	var sender sync.WaitGroup
	sender.Go(func() {
		if _, err := c.Write(data); err != nil {
			t.Errorf("write: %v", err)
		}
	})
	got := make([]byte, len(data))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("read: %v, session %v", err, c.ended())
	}
	sender.Wait()
	if !bytes.Equal(got, data) {
		t.Fatal("the echo differs from what was sent")
	}
}

func randomBytes(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32() & r.Uint32()) // many zeros
	}
	return b
}

func TestSessionCarriesBytes(t *testing.T) {
	p := newFakePort()
	echoGuest(t, p)
	c := begin(t, p)
	defer c.Close()
	for _, n := range []int{1, 253, 254, 255, maxPayload, maxPayload + 1, 1 << 20} {
		echoed(t, c, randomBytes(uint64(n), n))
	}
}

func TestSessionReplacesDeadOne(t *testing.T) {
	p := newFakePort()
	echoGuest(t, p)
	for i := range 20 {
		// The host dies in the middle of a stream: bytes of it are in both directions, frames half written. The
		// guest may or may not notice before the next host is there.
		old := begin(t, p)
		data := randomBytes(uint64(i), 200<<10)
		var sender sync.WaitGroup
		sender.Go(func() { _, _ = old.Write(data) })
		if _, err := io.ReadFull(old, make([]byte, 10<<10)); err != nil {
			t.Fatal(err)
		}
		c := begin(t, p)
		echoed(t, c, randomBytes(uint64(100+i), 50<<10))
		if err := old.Close(); err != nil {
			t.Error(err)
		}
		sender.Wait()
		if old.ended() == nil {
			t.Error("the replaced session goes on")
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestSessionIgnoresGarbageBefore(t *testing.T) {
	p := newFakePort()
	echoGuest(t, p)
	for i, garbage := range [][]byte{
		{1},
		{0},
		{0, 0, 0},
		randomBytes(1, 100), randomBytes(2, 100<<10),
		appendFrame(nil, frame{nonce: 7, kind: kindData, payload: []byte("stale")}),
		appendFrame(nil, frame{nonce: 7, kind: kindHello})[:5],
		appendFrame(nil, frame{nonce: 7, kind: kindBye}),
	} {
		p.mu.Lock()
		p.toGuest = append(p.toGuest, garbage...)
		p.toHost = append(p.toHost, garbage...)
		p.mu.Unlock()
		c := begin(t, p)
		echoed(t, c, []byte(fmt.Sprintf("round %d", i)))
		_ = c.Close()
	}
}

// With damage anywhere a session gives a prefix of what was sent, never anything else.
func TestSessionOnLossyPort(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) { lossySession(t, seed) })
	}
}

func lossySession(t *testing.T, seed uint64) {
	p := newFakePort()
	r := rand.New(rand.NewPCG(seed, 1))
	p.damage = func(b []byte) []byte {
		if r.IntN(6) > 0 || len(b) == 0 {
			return b
		}
		i := r.IntN(len(b))
		switch r.IntN(3) {
		case 0:
			return append(b[:i], b[i+1:]...)
		case 1:
			b[i] ^= byte(1 + r.IntN(255))
			return b
		}
		return append(b[:i], append([]byte{byte(r.IntN(4))}, b[i:]...)...)
	}
	echoGuest(t, p)
	c := begin(t, p)
	data := randomBytes(seed, 50<<10)
	var sender sync.WaitGroup
	sender.Go(func() { _, _ = c.Write(data) })
	got := make([]byte, 0, len(data))
	timeout := time.AfterFunc(time.Second, func() { c.end(errStalled) })
	buf := make([]byte, 4096)
	for len(got) < len(data) {
		n, err := c.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil {
			break
		}
	}
	timeout.Stop()
	_ = c.Close()
	sender.Wait()
	if !bytes.HasPrefix(data, got) {
		t.Fatalf("seed %d: %d bytes received are not what was sent", seed, len(got))
	}
}

func TestSessionWithoutGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		p := newFakePort()
		if _, err := connect(ctx, p.connect()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("connect: %v, want the deadline", err)
		}
		if n := len(p.toGuest); n == 0 || n > 500 {
			t.Errorf("%d bytes wait for the guest, want a few hellos", n)
		}
	})
}

// While no host is connected the guest asks the port now and then, not all the time.
func TestListenerDoesNotSpin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newFakePort()
		l := Listen(guestEnd{p})
		time.Sleep(3 * time.Second)
		p.mu.Lock()
		eofs := p.eofs
		p.mu.Unlock()
		if limit := int(3*time.Second/idlePause) + 2; eofs > limit || eofs == 0 {
			t.Errorf("%d reads of the idle port in 3 s, want at most %d", eofs, limit)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A session whose user does not read ends, and the next one works.
func TestSessionStalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newFakePort()
		l := Listen(guestEnd{p})
		defer l.Close()
		c, err := connect(t.Context(), p.connect())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Accept(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(make([]byte, 4*inboxFrames*maxPayload)); err == nil {
			<-c.done
		}
		if err := c.ended(); !errors.Is(err, errBye) {
			t.Errorf("the session ended by %v, want %v", err, errBye)
		}
		_ = c.Close()
		next, err := connect(t.Context(), p.connect())
		if err != nil {
			t.Fatal(err)
		}
		_ = next.Close()
	})
}

func TestClientLosesSession(t *testing.T) {
	p := newFakePort()
	echoGuest(t, p)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := NewClient(ctx, p.connect())
	if err != nil {
		t.Fatal(err)
	}
	p.connect()
	<-c.Done()
	if _, err := c.Info(ctx, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("call on a lost session: %v, want unavailable", err)
	}
	if c.Err() == nil {
		t.Error("no reason for the end")
	}
	_ = c.Close()
}

func FuzzCOBS(f *testing.F) {
	for _, n := range []int{0, 1, 253, 254, 255, 508, 600} {
		f.Add(bytes.Repeat([]byte{1}, n))
		f.Add(append(bytes.Repeat([]byte{1}, n), 0))
		f.Add(make([]byte, n))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		enc := cobsEncode(nil, data)
		if bytes.IndexByte(enc, 0) >= 0 {
			t.Fatal("a zero in the encoding")
		}
		if len(enc) > len(data)+len(data)/254+1 {
			t.Fatalf("%d bytes became %d", len(data), len(enc))
		}
		dec, ok := cobsDecode(nil, enc)
		if !ok || !bytes.Equal(dec, data) {
			t.Fatalf("decoded %x, want %x", dec, data)
		}
		cobsDecode(nil, data) // must not panic
	})
}

func FuzzFrameReader(f *testing.F) {
	f.Add(appendFrame(nil, frame{nonce: 1, kind: kindData, seq: 2, payload: []byte("x")}), 3)
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		var whole, parts frameReader
		var a, b []frame
		collect := func(to *[]frame) func(frame, error) {
			return func(f frame, err error) {
				if err == nil {
					*to = append(*to, f)
				}
			}
		}
		whole.feed(data, collect(&a))
		cut = max(1, cut)
		for i := 0; i < len(data); i += cut {
			parts.feed(data[i:min(len(data), i+cut)], collect(&b))
		}
		if len(a) != len(b) {
			t.Fatalf("%d frames at once, %d in parts", len(a), len(b))
		}
	})
}
