package cluster

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// dialTimeout bounds one connection to the API server, which is on the same machine.
const dialTimeout = 5 * time.Second

// proxy forwards connections on the machine's loopback to the API server in the node's network namespace.
type proxy struct {
	listener net.Listener
	dial     func(ctx context.Context, network, address string) (net.Conn, error)
	target   string
	wg       sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]bool
}

func startProxy(dial func(ctx context.Context, network, address string) (net.Conn, error), target string) (*proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{listener: listener, dial: dial, target: target, conns: map[net.Conn]bool{}}
	p.wg.Go(p.serve)
	return p, nil
}

func (p *proxy) address() string { return p.listener.Addr().String() }

// serve ends when the listener is closed.
func (p *proxy) serve() {
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.forward(conn) })
	}
}

// forward copies both ways until both have ended.
func (p *proxy) forward(client net.Conn) {
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	server, err := p.dial(ctx, "tcp", p.target)
	if err != nil {
		return // a client sees what it would see without us: a connection that is no good
	}
	defer server.Close()
	if !p.hold(client, server) {
		return
	}
	defer p.release(client, server)
	var wg sync.WaitGroup
	wg.Go(func() { pipe(server, client) })
	pipe(client, server)
	wg.Wait()
}

// pipe copies until from ends, and tells to so.
func pipe(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if half, ok := to.(*net.TCPConn); ok && err == nil {
		_ = half.CloseWrite() // the other way may go on
		return
	}
	_ = to.Close()
}

// hold has close end the connections; it tells whether there is still time for that.
func (p *proxy) hold(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		p.conns[c] = true
	}
	return !p.closed
}

func (p *proxy) release(conns ...net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		delete(p.conns, c)
	}
}

// close ends all connections and waits for who serves them.
func (p *proxy) close() error {
	err := p.listener.Close()
	p.mu.Lock()
	p.closed = true
	for c := range p.conns {
		if e := c.Close(); !errors.Is(e, net.ErrClosed) {
			err = errors.Join(err, e)
		}
	}
	p.mu.Unlock()
	p.wg.Wait()
	return err
}
