package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// MaxMessage bounds one request or answer in bytes, less some room for its envelope. A greater request
// fails with ErrInvalidArgument before it is sent.
const MaxMessage = 4<<20 - 4<<10

// Client is a session with one guest's agent. It is safe for concurrent use. Every call needs a context
// with a deadline; the guest ends long waits (Wait, ReadOutput, ConnRead) shortly before it.
//
// Errors are of the classes of errdefs, as the guest gave them. ErrUnavailable means that the session is
// lost: whether the guest has carried out the call is then unknown, and a new Dial is needed.
type Client struct {
	agentpb.AgentService
	session *conn
	rpc     *ttrpc.Client
	dials   sync.WaitGroup
	ctx     context.Context // of the guest connections
	cancel  context.CancelFunc
}

// Dial connects to the Unix socket of the guest's port and begins a session, which ends the session of any
// earlier client. It waits for the guest to boot; give ctx a deadline.
func Dial(ctx context.Context, socketPath string) (*Client, error) {
	var d net.Dialer
	rw, err := d.DialContext(ctx, "unix", socketPath)
	if err != nil {
		return nil, fmt.Errorf("connect to the guest's agent: %w: %w", err, errdefs.ErrUnavailable)
	}
	return NewClient(ctx, rw)
}

// NewClient is Dial over an open connection, which it owns from now on, also when it fails.
func NewClient(ctx context.Context, rw net.Conn) (*Client, error) {
	session, err := connect(ctx, rw)
	if err != nil {
		return nil, err
	}
	c := &Client{session: session}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.rpc = ttrpc.NewClient(session, ttrpc.WithUnaryClientInterceptor(c.intercept))
	c.AgentService = agentpb.NewAgentClient(c.rpc)
	return c, nil
}

// Done is closed when the session has ended.
func (c *Client) Done() <-chan struct{} { return c.session.done }

// Err tells why the session has ended, nil while it has not.
func (c *Client) Err() error { return c.session.ended() }

// Close ends the session. Calls under way fail with ErrUnavailable; the guest and its containers go on.
func (c *Client) Close() error {
	c.cancel()
	err := c.session.Close()
	_ = c.rpc.Close()
	c.dials.Wait()
	return err
}

// intercept bounds the request and gives errors their class.
func (c *Client) intercept(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, info *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	if len(req.Payload) > MaxMessage {
		return fmt.Errorf("%s: the request has %d bytes, at most %d are possible: %w",
			info.FullMethod, len(req.Payload), MaxMessage, errdefs.ErrInvalidArgument)
	}
	err := invoke(ctx, req, resp)
	if err == nil {
		// The guest's own error is in the answer.
		return errgrpc.ToNative(status.FromProto(resp.GetStatus()).Err())
	}
	if ended := c.session.ended(); ended != nil && ctx.Err() == nil {
		return fmt.Errorf("%s: session with the guest's agent lost: %w: %w", info.FullMethod, ended, errdefs.ErrUnavailable)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", info.FullMethod, context.Cause(ctx))
	}
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("%s: session with the guest's agent closed: %w", info.FullMethod, errdefs.ErrUnavailable)
	}
	return errgrpc.ToNative(err)
}
