package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const (
	connReadSize  = 64 << 10
	connWriteSize = 256 << 10
	connCallTime  = time.Minute
)

// DialGuest connects to an address as seen from inside the guest, "localhost:80" for example. The
// connection ends with the session. It has CloseWrite, as a TCP connection has.
func (c *Client) DialGuest(ctx context.Context, network, address string) (net.Conn, error) {
	resp, err := c.Dial(ctx, &agentpb.DialRequest{Network: network, Address: address})
	if err != nil {
		return nil, err
	}
	near, far := net.Pipe()
	run, cancel := context.WithCancel(c.ctx)
	// Closing the far end frees a pump whose bytes nobody reads.
	context.AfterFunc(run, func() { _ = far.Close() })
	g := &GuestConn{
		Conn: near, client: c, id: resp.ConnId, ctx: run, cancel: cancel,
		remote: guestAddr{network, address},
	}
	c.dials.Add(1)
	g.reader.Go(func() {
		defer c.dials.Done()
		g.pump(far)
	})
	return g, nil
}

// GuestConn is a connection made by DialGuest.
type GuestConn struct {
	net.Conn // reads and their deadlines
	client   *Client
	id       uint64
	ctx      context.Context
	cancel   context.CancelFunc
	remote   net.Addr
	reader   sync.WaitGroup
	once     sync.Once
	readErr  error // of the pump; readable when the pipe has ended

	mu       sync.Mutex
	deadline time.Time
}

// pump moves what the guest's connection gives into the pipe that Read reads.
func (g *GuestConn) pump(far net.Conn) {
	defer far.Close()
	for {
		ctx, cancel := context.WithTimeout(g.ctx, connCallTime)
		resp, err := g.client.ConnRead(ctx, &agentpb.ConnReadRequest{ConnId: g.id, MaxBytes: connReadSize})
		cancel()
		if err != nil {
			g.readErr = err
			return
		}
		if len(resp.Data) > 0 {
			if _, err := far.Write(resp.Data); err != nil {
				return
			}
		}
		if resp.Eof {
			return
		}
	}
}

// Read gives what the guest's connection received. A lost connection is an error, not io.EOF.
func (g *GuestConn) Read(b []byte) (int, error) {
	n, err := g.Conn.Read(b)
	if errors.Is(err, io.EOF) && g.readErr != nil {
		return n, fmt.Errorf("read from %s in the guest: %w", g.remote, g.readErr)
	}
	return n, err
}

// Write sends b into the guest's connection.
func (g *GuestConn) Write(b []byte) (int, error) {
	sent := 0
	for sent < len(b) {
		part := b[sent:min(len(b), sent+connWriteSize)]
		ctx, cancel := g.writeContext()
		_, err := g.client.ConnWrite(ctx, &agentpb.ConnWriteRequest{ConnId: g.id, Data: part})
		cancel()
		if err != nil {
			return sent, fmt.Errorf("write to %s in the guest: %w", g.remote, err)
		}
		sent += len(part)
	}
	return sent, nil
}

func (g *GuestConn) writeContext() (context.Context, context.CancelFunc) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.deadline.IsZero() {
		return context.WithTimeout(g.ctx, connCallTime)
	}
	return context.WithDeadline(g.ctx, g.deadline)
}

// CloseWrite ends the direction towards the guest.
func (g *GuestConn) CloseWrite() error {
	ctx, cancel := context.WithTimeout(g.ctx, connCallTime)
	defer cancel()
	_, err := g.client.ConnClose(ctx, &agentpb.ConnCloseRequest{ConnId: g.id, WriteOnly: true})
	return err
}

// Close closes both directions.
func (g *GuestConn) Close() error {
	g.once.Do(func() {
		g.cancel()
		_ = g.Conn.Close()
		g.reader.Wait()
		if g.client.Err() != nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		// The guest forgets the connection with the session at the latest.
		_, _ = g.client.ConnClose(ctx, &agentpb.ConnCloseRequest{ConnId: g.id})
	})
	return nil
}

// SetDeadline sets the deadline of reads, and of writes that begin later.
func (g *GuestConn) SetDeadline(t time.Time) error {
	if err := g.SetReadDeadline(t); err != nil {
		return err
	}
	return g.SetWriteDeadline(t)
}

// SetWriteDeadline sets the deadline of writes that begin later. A write without one has a minute for each
// 256 KiB.
func (g *GuestConn) SetWriteDeadline(t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deadline = t
	return nil
}

// RemoteAddr is the address dialled.
func (g *GuestConn) RemoteAddr() net.Addr { return g.remote }

type guestAddr struct{ network, address string }

func (a guestAddr) Network() string { return a.network }
func (a guestAddr) String() string  { return a.address }
