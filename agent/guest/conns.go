package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const (
	dialTimeout = 30 * time.Second
	maxConnRead = 256 << 10
)

// session is the service as one session of the host sees it: the connections are its own.
type session struct {
	*Server

	mu     sync.Mutex
	conns  map[uint64]*guestConn
	lastID uint64
	closed bool
}

// guestConn is one dialled connection. reading and writing let one call at a time use a direction.
type guestConn struct {
	net.Conn
	reading, writing sync.Mutex
}

// Dial connects from inside the guest. The name localhost is 127.0.0.1, then ::1.
func (s *session) Dial(ctx context.Context, req *agentpb.DialRequest) (*agentpb.DialResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var c net.Conn
	err := s.inPod(func() (err error) {
		c, err = dialGuest(ctx, req.Network, req.Address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dial %s in the guest: %w: %w", req.Address, err, errdefs.ErrFailedPrecondition)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = c.Close()
		return nil, net.ErrClosed
	}
	s.lastID++
	s.conns[s.lastID] = &guestConn{Conn: c}
	return &agentpb.DialResponse{ConnId: s.lastID}, nil
}

func dialGuest(ctx context.Context, network, address string) (net.Conn, error) {
	if network != "tcp" && network != "tcp4" && network != "tcp6" {
		return nil, fmt.Errorf("network %q: want tcp, tcp4 or tcp6: %w", network, errdefs.ErrInvalidArgument)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	if host != "localhost" {
		return d.DialContext(ctx, network, address)
	}
	c, err4 := d.DialContext(ctx, network, net.JoinHostPort("127.0.0.1", port))
	if err4 == nil {
		return c, nil
	}
	c, err6 := d.DialContext(ctx, network, net.JoinHostPort("::1", port))
	if err6 == nil {
		return c, nil
	}
	return nil, errors.Join(err4, err6)
}

func (s *session) conn(id uint64) (*guestConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.conns[id]
	if !ok {
		return nil, fmt.Errorf("connection %d: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// ConnRead waits for bytes. An empty answer without eof says that none came in time.
func (s *session) ConnRead(ctx context.Context, req *agentpb.ConnReadRequest) (*agentpb.ConnReadResponse, error) {
	c, err := s.conn(req.ConnId)
	if err != nil {
		return nil, err
	}
	ctx, cancel := waitContext(ctx)
	defer cancel()
	size := int64(maxConnRead)
	if req.MaxBytes > 0 {
		size = min(size, req.MaxBytes)
	}
	c.reading.Lock()
	defer c.reading.Unlock()
	deadline, _ := ctx.Deadline()
	if err := c.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	buf := make([]byte, size)
	n, err := c.Read(buf)
	switch {
	case n > 0, errors.Is(err, os.ErrDeadlineExceeded):
		return &agentpb.ConnReadResponse{Data: buf[:n]}, nil
	case errors.Is(err, io.EOF):
		return &agentpb.ConnReadResponse{Eof: true}, nil
	}
	return nil, err
}

// ConnWrite writes all of the data.
func (s *session) ConnWrite(ctx context.Context, req *agentpb.ConnWriteRequest) (*agentpb.Empty, error) {
	c, err := s.conn(req.ConnId)
	if err != nil {
		return nil, err
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	deadline, _ := ctx.Deadline()
	if err := c.SetWriteDeadline(deadline); err != nil {
		return nil, err
	}
	_, err = c.Write(req.Data)
	return &agentpb.Empty{}, err
}

// ConnClose closes a connection, or its writing half. An unknown one succeeds.
func (s *session) ConnClose(_ context.Context, req *agentpb.ConnCloseRequest) (*agentpb.Empty, error) {
	s.mu.Lock()
	c, ok := s.conns[req.ConnId]
	if ok && !req.WriteOnly {
		delete(s.conns, req.ConnId)
	}
	s.mu.Unlock()
	if !ok {
		return &agentpb.Empty{}, nil
	}
	if half, can := c.Conn.(*net.TCPConn); can && req.WriteOnly {
		return &agentpb.Empty{}, half.CloseWrite()
	}
	return &agentpb.Empty{}, c.Close()
}

func (s *session) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, c := range s.conns {
		_ = c.Close()
	}
	clear(s.conns)
}
