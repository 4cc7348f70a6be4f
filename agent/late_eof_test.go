package agent

import (
	"io"
	"testing"
	"time"
)

// scriptedPort gives what it is told to read; an empty piece is a read of nothing, as while no host is connected.
type scriptedPort struct {
	pieces chan []byte
}

func (p *scriptedPort) Read(b []byte) (int, error) {
	piece, ok := <-p.pieces
	if !ok || len(piece) == 0 {
		return 0, io.EOF
	}
	return copy(b, piece), nil
}

func (p *scriptedPort) Write(b []byte) (int, error) { return len(b), nil }

func (p *scriptedPort) Close() error { return nil }

// The kernel may tell that the last host has gone after the next one's HELLO was read: that one's session stays.
func TestSessionOutlivesALateReadOfNothing(t *testing.T) {
	const nonce = 7
	data := appendFrame(nil, frame{nonce: nonce, kind: kindData, payload: []byte("hello")})
	half := len(data) / 2
	port := &scriptedPort{pieces: make(chan []byte, 8)}
	for _, piece := range [][]byte{appendFrame([]byte{0}, frame{nonce: nonce, kind: kindHello}), {}, data[:half], {}, data[half:]} {
		port.pieces <- piece
	}
	l := Listen(port)
	defer func() {
		close(port.pieces)
		_ = l.Close()
	}()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	go func() {
		b := make([]byte, 5)
		_, _ = io.ReadFull(c, b)
		got <- string(b)
	}()
	select {
	case s := <-got:
		if s != "hello" {
			t.Errorf("read %q", s)
		}
	case <-time.After(10 * time.Second):
		t.Error("the session is dead")
	}
}
