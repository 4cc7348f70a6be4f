// Package sshexec runs commands in a guest over SSH, for guests without an agent of ours.
//
// Invariants:
//   - No key is offered and nothing is sent to a guest that has not proven the expected host key.
//   - Arguments reach the program exactly, whatever the user's login shell is.
//   - A command ends with its Exec: when the context ends, all processes of its session are killed in the guest.
//   - The guest is not trusted: what it sends is bounded, and one that falls silent is noticed by keep-alives.
//
// Errors are of the classes of errdefs: ErrUnavailable when the guest cannot be reached or is lost,
// ErrPermissionDenied when host key or login are refused, ErrFailedPrecondition when the login runs no commands.
package sshexec

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"
)

const (
	// handshakeTime bounds one attempt to log in, retryPause separates two.
	handshakeTime = 30 * time.Second
	retryPause    = 500 * time.Millisecond
	// keepAlive is the time between questions to the guest, one of which it has aliveTime to answer.
	keepAlive = 15 * time.Second
	aliveTime = 30 * time.Second
)

// HostKey says which guest is the right one.
type HostKey struct {
	// Expected is the public key, "ssh-ed25519 BASE64"; what follows is ignored. No other is accepted.
	Expected string
	// Record, when Expected is empty, takes the key that the guest shows, for images that do not take ours. What it
	// returns nil for is trusted; the caller keeps it and gives it as Expected from then on.
	Record func(key string) error
}

// Options say whom to connect to.
type Options struct {
	// Addresses are the guest's IP addresses, tried in order; Port is 22 if 0.
	Addresses []string
	Port      int
	User      string
	// PrivateKey is OpenSSH PEM.
	PrivateKey string
	HostKey    HostKey
	// Dial connects; nil is net.Dialer's, from this process's network namespace.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Client is a login in a guest. It is safe for concurrent use.
type Client struct {
	opts   Options
	config *ssh.ClientConfig
	main   *link
}

// link is one connection to the guest.
type link struct {
	*ssh.Client
	done    chan struct{}
	workers sync.WaitGroup

	mu     sync.Mutex
	closed bool
}

// work runs f, which ends when the link does, in a goroutine that close waits for.
func (l *link) work(f func()) {
	l.mu.Lock()
	closed := l.closed
	if !closed {
		l.workers.Go(f)
	}
	l.mu.Unlock()
	if closed {
		f()
	}
}

// Dial logs in. It tries again until it succeeds or ctx ends, which must have a deadline: a guest that boots refuses
// connections, has no key of ours yet, or is about to change its host keys. The error tells why the last attempt failed.
func Dial(ctx context.Context, opts Options) (*Client, error) {
	c := &Client{opts: opts}
	if c.opts.Port == 0 {
		c.opts.Port = 22
	}
	if c.opts.Dial == nil {
		c.opts.Dial = (&net.Dialer{}).DialContext
	}
	var err error
	if c.config, err = clientConfig(opts); err != nil {
		return nil, err
	}
	c.main, err = c.connectRetry(ctx)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func clientConfig(opts Options) (*ssh.ClientConfig, error) {
	if len(opts.Addresses) == 0 || opts.User == "" {
		return nil, fmt.Errorf("addresses %q, user %q: want at least one address and a user: %w", opts.Addresses, opts.User, errdefs.ErrInvalidArgument)
	}
	signer, err := ssh.ParsePrivateKey([]byte(opts.PrivateKey))
	if err != nil {
		return nil, fmt.Errorf("private key: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	config := &ssh.ClientConfig{
		User: opts.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, ClientVersion: "SSH-2.0-vmruntime",
	}
	if opts.HostKey.Expected == "" {
		if opts.HostKey.Record == nil {
			return nil, fmt.Errorf("host key: want either Expected or Record: %w", errdefs.ErrInvalidArgument)
		}
		config.HostKeyCallback = func(_ string, _ net.Addr, key ssh.PublicKey) error { return opts.HostKey.Record(keyLine(key)) }
		return config, nil
	}
	expected, _, _, _, err := ssh.ParseAuthorizedKey([]byte(opts.HostKey.Expected))
	if err != nil {
		return nil, fmt.Errorf("host key %q: %w: %w", opts.HostKey.Expected, err, errdefs.ErrInvalidArgument)
	}
	config.HostKeyCallback = func(_ string, _ net.Addr, key ssh.PublicKey) error {
		if subtle.ConstantTimeCompare(key.Marshal(), expected.Marshal()) == 1 {
			return nil
		}
		return &hostKeyError{want: keyLine(expected), got: keyLine(key)}
	}
	if expected.Type() != ssh.KeyAlgoRSA {
		// Of several host keys the guest is to show this one. (One of RSA goes by the names of newer algorithms.)
		config.HostKeyAlgorithms = []string{expected.Type()}
	}
	return config, nil
}

type hostKeyError struct{ want, got string }

func (e *hostKeyError) Error() string {
	return fmt.Sprintf("the guest's host key is %q, want %q", e.got, e.want)
}

func (e *hostKeyError) Unwrap() error { return errdefs.ErrPermissionDenied }

func (c *Client) connectRetry(ctx context.Context) (*link, error) {
	for {
		l, err := c.connect(ctx)
		if err == nil {
			return l, nil
		}
		t := time.NewTimer(retryPause)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, fmt.Errorf("SSH to %s: %w", c.opts.User, err)
		case <-t.C:
		}
	}
}

// connect tries every address once.
func (c *Client) connect(ctx context.Context) (*link, error) {
	var errs []error
	for _, ip := range c.opts.Addresses {
		l, err := c.connectTo(ctx, net.JoinHostPort(ip, fmt.Sprint(c.opts.Port)))
		if err == nil {
			return l, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func (c *Client) connectTo(ctx context.Context, address string) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	conn, err := c.opts.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	sc, chans, reqs, err := ssh.NewClientConn(conn, address, c.config)
	if !stop() && err == nil {
		_ = sc.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("log in at %s: %w", address, classify(err))
	}
	l := &link{Client: ssh.NewClient(sc, chans, reqs), done: make(chan struct{})}
	l.work(func() {
		_ = l.Wait()
		close(l.done)
	})
	l.work(l.keepAlive)
	return l, nil
}

// classify gives an error of the handshake its class.
func classify(err error) error {
	var key *hostKeyError
	var negotiation *ssh.AlgorithmNegotiationError
	switch {
	case errors.As(err, &key):
		return err
	case strings.Contains(err.Error(), "unable to authenticate"): // it has no type
		return fmt.Errorf("%w: the guest does not accept the pod's key for this user: %w", err, errdefs.ErrPermissionDenied)
	case errors.As(err, &negotiation):
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}

// keepAlive closes a connection whose other end does not answer.
func (l *link) keepAlive() {
	tick := time.NewTicker(keepAlive)
	defer tick.Stop()
	for {
		select {
		case <-l.done:
			return
		case <-tick.C:
		}
		late := time.AfterFunc(aliveTime, func() { _ = l.Client.Close() })
		_, _, err := l.SendRequest("keepalive@openssh.com", true, nil)
		late.Stop()
		if err != nil {
			_ = l.Client.Close()
			return
		}
	}
}

func (l *link) close() error {
	err := l.Client.Close()
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.workers.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Close ends the connection. Commands under way fail, as if the guest were gone.
func (c *Client) Close() error { return c.main.close() }

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.main.done }

// DialGuest connects to an address as the guest sees it, "localhost:80" for example; network is "tcp". The connection
// has CloseWrite, and no deadlines. It ends with the Client. ErrPermissionDenied says that the guest's sshd forwards no
// connections.
func (c *Client) DialGuest(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := c.main.DialContext(ctx, network, address)
	if err == nil {
		return conn, nil
	}
	var refused *ssh.OpenChannelError
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.As(err, &refused) && refused.Reason == ssh.Prohibited:
		err = fmt.Errorf("%w; AllowTcpForwarding in sshd_config permits it: %w", err, errdefs.ErrPermissionDenied)
	case errors.As(err, &refused):
		err = fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	default:
		err = fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return nil, fmt.Errorf("dial %s in the guest: %w", address, err)
}
