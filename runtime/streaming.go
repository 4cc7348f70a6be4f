package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// maxExecOutput bounds what ExecSync keeps of each stream, as containerd does.
const maxExecOutput = 16 << 20

// execIO is where an exec's streams come from and go to. Any may be nil.
type execIO struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	tty            bool
	resize         <-chan remotecommand.TerminalSize
}

// exec runs a command in a running container until it ends, and returns its exit code. When the context ends
// first, the command is killed.
func (c *container) exec(ctx context.Context, cmd []string, streams execIO) (int32, error) {
	if len(cmd) == 0 {
		return 0, fmt.Errorf("cmd is empty; it must name a program: %w", errdefs.ErrInvalidArgument)
	}
	if c.isMachine() {
		return c.machineExec(ctx, cmd, streams)
	}
	g, client, err := c.runningIn(ctx)
	if err != nil {
		return 0, err
	}
	process, err := json.Marshal(execProcess(c.rec.Spec().OCI, cmd, streams.tty))
	if err != nil {
		return 0, err
	}
	ref := &agentpb.ProcessRef{ContainerId: c.guestID(), ExecId: newID()[:16]}
	// Not waited for: the answer need not wait until the guest has forgotten the command.
	defer g.owned.Go(func() { g.removeExec(ref) })
	_, err = client.Exec(ctx, &agentpb.ExecRequest{
		ContainerId: c.guestID(), ExecId: ref.GetExecId(), Process: process, Stdin: streams.stdin != nil,
	})
	if err != nil {
		return 0, err
	}
	return g.serveExec(ctx, ref, streams)
}

// execProcess is the container's own process with another command.
func execProcess(oci *specs.Spec, cmd []string, tty bool) *specs.Process {
	p := *oci.Process
	p.Args = cmd
	p.Terminal = tty
	p.ConsoleSize = nil
	if tty {
		p.Env = append(append([]string(nil), p.Env...), "TERM=xterm")
	}
	return &p
}

func (g *guest) removeExec(ref *agentpb.ProcessRef) {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	client, err := g.session(ctx)
	if err == nil {
		_, err = client.RemoveExec(ctx, ref)
	}
	if err != nil {
		g.log.Debug("removing an exec from the guest", "error", err)
	}
}

// serveExec moves an exec's streams until the process has ended and its output is taken.
func (g *guest) serveExec(ctx context.Context, ref *agentpb.ProcessRef, streams execIO) (int32, error) {
	ctx, cancel := context.WithCancel(ctx)
	var owned sync.WaitGroup
	defer owned.Wait()
	defer cancel()
	if streams.stdin != nil {
		// Not waited for: it may stand in a Read that only the client's end of the connection can end.
		go g.copyStdin(ctx, ref, streams.stdin)
	}
	owned.Go(func() { g.copyResize(ctx, ref, streams.resize) })
	to, copied := &pacedTaker{outputTaker: &execOutput{streams: streams}}, make(chan error, 1)
	owned.Go(func() { copied <- g.copyOutput(ctx, ref, to) })
	state, err := g.waitProcess(ctx, ref)
	if err != nil {
		return 0, err
	}
	return state.GetExitCode(), drain(ctx, copied, to)
}

// execOutput writes an exec's output to its client.
type execOutput struct {
	streams execIO
	taken   offsets
}

func (o *execOutput) cursor() cursor { return cursor{next: o.taken, safe: o.taken} }

func (o *execOutput) take(ch *agentpb.OutputChunk) error {
	o.taken.advance(ch)
	w := o.streams.stdout
	if ch.GetStream() == agentpb.OutputChunk_STDERR {
		w = o.streams.stderr
	}
	if w == nil {
		return nil
	}
	_, err := w.Write(ch.GetData())
	return err
}

func (g *guest) copyStdin(ctx context.Context, ref *agentpb.ProcessRef, in io.Reader) {
	buf := make([]byte, 64<<10)
	for {
		n, err := in.Read(buf)
		if n > 0 {
			if werr := g.writeStdin(ctx, ref, buf[:n]); werr != nil {
				g.log.Debug("writing standard input", "error", werr)
				return
			}
		}
		if err == nil {
			continue
		}
		g.closeStdin(ctx, ref)
		return
	}
}

// closeStdin tells a process that no more comes, also when its client is no longer served.
func (g *guest) closeStdin(ctx context.Context, ref *agentpb.ProcessRef) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
	defer cancel()
	client, err := g.session(ctx)
	if err == nil {
		_, err = client.CloseStdin(ctx, ref)
	}
	if err != nil {
		g.log.Debug("closing standard input", "error", err)
	}
}

// writeStdin waits until the process has taken all; one that does not read is waited for as on a full pipe.
func (g *guest) writeStdin(ctx context.Context, ref *agentpb.ProcessRef, data []byte) error {
	for len(data) > 0 {
		client, err := g.session(ctx)
		if err != nil {
			return err
		}
		n, err := g.pollStdin(ctx, client, ref, data)
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

func (g *guest) pollStdin(ctx context.Context, client agentClient, ref *agentpb.ProcessRef, data []byte) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	resp, err := client.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: ref, Data: data})
	return resp.GetWritten(), err
}

func (g *guest) copyResize(ctx context.Context, ref *agentpb.ProcessRef, resize <-chan remotecommand.TerminalSize) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-resize:
			if !ok {
				return
			}
			client, err := g.session(ctx)
			if err != nil {
				return
			}
			if _, err := client.ResizeTerminal(ctx, &agentpb.ResizeTerminalRequest{
				Process: ref, Width: uint32(size.Width), Height: uint32(size.Height),
			}); err != nil {
				g.log.Debug("resizing a terminal", "error", err)
			}
		}
	}
}

// limitedBuffer keeps the first bytes and drops the rest, so that a command cannot fill the daemon's memory.
type limitedBuffer struct{ bytes.Buffer }

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if room := maxExecOutput - b.Len(); room < len(p) {
		b.Buffer.Write(p[:max(room, 0)])
		return len(p), nil
	}
	return b.Buffer.Write(p)
}

// ExecSync runs a command in a container and returns its output; after timeout seconds the command is killed and the
// answer is DeadlineExceeded.
func (rt *Runtime) ExecSync(ctx context.Context, req *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if t := req.GetTimeout(); t > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(t)*time.Second)
		defer cancel()
	}
	var stdout, stderr limitedBuffer
	code, err := c.exec(ctx, req.GetCmd(), execIO{stdout: &stdout, stderr: &stderr})
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, fmt.Errorf("command %q in container %s: timeout of %d s exceeded, the command was killed: %w", req.GetCmd(), c.id, req.GetTimeout(), context.DeadlineExceeded)
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ExecSyncResponse{Stdout: stdout.Bytes(), Stderr: stderr.Bytes(), ExitCode: code}, nil
}

// Exec prepares a streaming exec and answers with its URL.
func (rt *Runtime) Exec(_ context.Context, req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if s := c.rec.Status(); !s.running() {
		return nil, fmt.Errorf("container %s is %s, not running: %w", c.id, stateName(s.state()), errdefs.ErrFailedPrecondition)
	}
	return rt.streaming.GetExec(req)
}

// Attach prepares streams to a container's own process and answers with their URL.
func (rt *Runtime) Attach(_ context.Context, req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if s := c.rec.Status(); !s.running() {
		return nil, fmt.Errorf("container %s is %s, not running: %w", c.id, stateName(s.state()), errdefs.ErrFailedPrecondition)
	}
	return rt.streaming.GetAttach(req)
}

// PortForward prepares connections to ports of a sandbox and answers with their URL.
func (rt *Runtime) PortForward(_ context.Context, req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	p, err := rt.podByID(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if p.state() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return nil, fmt.Errorf("sandbox %s is not ready: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	return rt.streaming.GetPortForward(req)
}

// streams serves what the URLs stand for; it implements streaming.Runtime.
type streams struct{ rt *Runtime }

var _ streaming.Runtime = streams{}

// Exec runs a command with the client's streams.
func (s streams) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errs io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	c, err := s.rt.containerByID(id)
	if err != nil {
		return err
	}
	streams := execIO{stdin: in, tty: tty, resize: resize}
	if out != nil {
		streams.stdout = out
	}
	if errs != nil {
		streams.stderr = errs
	}
	code, err := c.exec(ctx, cmd, streams)
	if err != nil {
		return err
	}
	if code != 0 {
		return &utilexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", code), Code: int(code)}
	}
	return nil
}

// endOfInput calls ended when a reader gives no more.
type endOfInput struct {
	io.Reader
	ended func()
}

func (r endOfInput) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		return n, nil // the end comes again, when this has been taken
	}
	if err != nil {
		r.ended()
	}
	return 0, err
}

// Attach joins the client's streams to a container's own until either ends. The end of the input is that of the client: there is no
// other sign of one that goes while the container is silent. It is not if it becomes the end of the container's own input (stdin_once).
func (s streams) Attach(ctx context.Context, id string, in io.Reader, out, errs io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	c, err := s.rt.containerByID(id)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if in != nil && (tty || !c.rec.Spec().Config.M.GetStdinOnce()) {
		in = endOfInput{in, cancel}
	}
	if c.isMachine() {
		var screen io.Writer
		if out != nil {
			screen = out
		}
		return c.attachConsole(ctx, in, screen, 0)
	}
	g, _, err := c.runningIn(ctx)
	if err != nil {
		return err
	}
	output, unsubscribe := c.output.subscribe()
	defer unsubscribe()
	var owned sync.WaitGroup
	defer owned.Wait()
	defer cancel()
	owned.Go(func() { g.copyResize(ctx, c.ref(), resize) })
	if in != nil {
		go g.copyStdin(ctx, c.ref(), in)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case ch, ok := <-output:
			if !ok {
				return c.lagged()
			}
			w := out
			if ch.GetStream() == agentpb.OutputChunk_STDERR {
				w = errs
			}
			if w == nil {
				continue
			}
			if _, err := w.Write(ch.GetData()); err != nil {
				return nil // the client has gone
			}
		}
	}
}

// lagged is why the output of an attached client ended: at the container's end there is none.
func (c *container) lagged() error {
	if !c.rec.Status().running() {
		return nil
	}
	return fmt.Errorf("container %s writes faster than the attached client takes; attach again to see what follows: %w", c.id, errdefs.ErrResourceExhausted)
}

// PortForward joins a client's connection to a port that is listened on inside the guest, loopback included.
func (s streams) PortForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	defer func() { _ = stream.Close() }()
	p, err := s.rt.podByID(id)
	if err != nil {
		return err
	}
	g := p.currentGuest()
	if g == nil {
		return fmt.Errorf("sandbox %s has no guest: %w", id, errdefs.ErrFailedPrecondition)
	}
	dial := g.dial
	if g.machine != nil {
		dial = g.dialMachine
	}
	conn, err := dial(ctx, port)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	// The connection's context does not end, with neither the client nor the daemon.
	stop := context.AfterFunc(s.rt.ctx, func() { _ = conn.Close() })
	defer stop()
	return join(conn, stream, halfOpenTimeout)
}

// halfOpenTimeout is how long nothing may come of the guest when its client has sent the last. A client that has gone looks the same
// as one that waits for the rest of an answer.
const halfOpenTimeout = 2 * time.Minute

func (g *guest) dial(ctx context.Context, port int32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, plugTimeout)
	defer cancel()
	client, err := g.session(ctx)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := client.DialGuest(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("nothing in the pod accepts connections to port %d: %w", port, errors.Join(errs...))
}

// join copies both ways. It returns when what the guest sends has ended, or when the guest is silent for so long after the end of what
// the client sends. A client that does not take what there is makes the guest no silent one.
func join(conn net.Conn, stream io.ReadWriteCloser, silence time.Duration) error {
	to := &pacedWriter{Writer: stream}
	over := make(chan struct{})
	defer close(over)
	go func() { // not waited for: it may stand in a Read that only the client's end of the connection can end
		_, _ = io.Copy(conn, stream)
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
		for alive := true; alive; alive = to.moves() {
			select {
			case <-over:
				return
			case <-time.After(silence):
			}
		}
		_ = conn.Close()
	}()
	_, err := io.Copy(to, conn)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// pacedWriter writes at its pace.
type pacedWriter struct {
	io.Writer
	pace
}

func (w *pacedWriter) Write(p []byte) (n int, err error) {
	w.take(func() { n, err = w.Writer.Write(p) })
	return n, err
}
