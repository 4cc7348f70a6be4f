package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/agent/qga"
	"github.com/vmruntime/vmruntime/agent/sshexec"
)

const (
	// machineProcesses is the container ID under which our agent in a machine runs commands.
	machineProcesses = "machine"
	// sshTimeout bounds the wait for the guest's SSH server, and that of a command for whoever runs it.
	sshTimeout = 20 * time.Second
	// agentShare is the part of that time which qemu-guest-agent has before SSH is tried.
	agentShare = 3
)

// noExec says how a guest comes to run commands.
const noExec = "no way into the machine: it runs neither our agent nor, for commands without terminal and input, qemu-guest-agent, and SSH with the pod's key does not work; " +
	"install qemu-guest-agent in the image, or let cloud-init configure it (annotation vmruntime.io/datasource), or set vmruntime.io/guest-agent-install"

// machineExec runs a command in the machine: by our agent if it runs there, by qemu-guest-agent what needs neither terminal nor input,
// and by SSH.
func (c *container) machineExec(ctx context.Context, cmd []string, streams execIO) (int32, error) {
	if len(cmd) == 0 {
		return 0, fmt.Errorf("cmd is empty; it must name a program: %w", errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, err := c.runningMachine()
	if err != nil {
		return 0, err
	}
	if g.agentNow() != nil {
		return g.agentExec(ctx, cmd, streams)
	}
	begin, cancelBegin := context.WithTimeout(ctx, sshTimeout)
	defer cancelBegin()
	var errs []error
	if streams.stdin == nil && !streams.tty {
		code, err := g.guestAgentExec(ctx, shareOf(begin), qga.Command{Args: cmd, Stdout: streams.stdout, Stderr: streams.stderr})
		if !errors.Is(err, qga.ErrNotBegun) {
			return code, err
		}
		errs = append(errs, err)
	}
	client, err := c.pod.ssh(begin)
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %w", noExec, errors.Join(append(errs, err)...), errdefs.ErrUnavailable)
	}
	defer func() { _ = client.Close() }()
	return client.Exec(ctx, sshexec.Command{
		Args: cmd, TTY: streams.tty, Stdin: streams.stdin, Stdout: streams.stdout, Stderr: streams.stderr, Resize: sizes(ctx, streams.resize),
	})
}

// shareOf is when SSH is tried.
func shareOf(begin context.Context) time.Time {
	deadline, _ := begin.Deadline() // it has one
	return time.Now().Add(time.Until(deadline) / agentShare)
}

// guestAgentExec runs a command by qemu-guest-agent, if that takes it in time; else it is qga.ErrNotBegun.
func (g *guest) guestAgentExec(ctx context.Context, by time.Time, cmd qga.Command) (int32, error) {
	begin, cancel := context.WithDeadline(ctx, by)
	defer cancel()
	ga, err := g.guestAgent(begin)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", qga.ErrNotBegun, err)
	}
	cmd.BeginBy = by
	return ga.Exec(ctx, cmd)
}

// sizes passes a terminal's sizes on until there are no more.
func sizes(ctx context.Context, from <-chan remotecommand.TerminalSize) <-chan sshexec.Size {
	if from == nil {
		return nil
	}
	to := make(chan sshexec.Size)
	go func() {
		defer close(to)
		for {
			select {
			case size, ok := <-from:
				if !ok {
					return
				}
				select {
				case to <- sshexec.Size{Width: size.Width, Height: size.Height}:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return to
}

// agentExec runs a command by our agent in the machine.
func (g *guest) agentExec(ctx context.Context, cmd []string, streams execIO) (int32, error) {
	process := &specs.Process{Args: cmd, Cwd: "/", Terminal: streams.tty, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}}
	if streams.tty {
		process.Env = append(process.Env, "TERM=xterm")
	}
	data, err := json.Marshal(process)
	if err != nil {
		return 0, err
	}
	client, err := g.session(ctx)
	if err != nil {
		return 0, err
	}
	ref := &agentpb.ProcessRef{ContainerId: machineProcesses, ExecId: newID()[:16]}
	defer g.owned.Go(func() { g.removeExec(ref) })
	if _, err := client.Exec(ctx, &agentpb.ExecRequest{
		ContainerId: ref.GetContainerId(), ExecId: ref.GetExecId(), Process: data, Stdin: streams.stdin != nil,
	}); err != nil {
		return 0, err
	}
	return g.serveExec(ctx, ref, streams)
}

// ssh connects to the guest's SSH server with the pod's key.
func (p *pod) ssh(ctx context.Context) (*sshexec.Client, error) {
	keys, err := p.rt.podKeys(p)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, sshTimeout)
	defer cancel()
	o := sshexec.Options{
		User: "root", PrivateKey: keys.PrivateKey, HostKey: sshexec.HostKey{Expected: keys.HostPublicKey},
	}
	for _, a := range p.rec.Status().Network.Addresses() {
		o.Addresses = append(o.Addresses, a.String())
	}
	return sshexec.Dial(ctx, o)
}

// dialMachine connects to a port of the machine: straight, or, for what listens on the guest's loopback only, from inside.
func (g *guest) dialMachine(ctx context.Context, port int32) (net.Conn, error) {
	p := g.pod
	ctx, cancel := context.WithTimeout(ctx, plugTimeout)
	defer cancel()
	var errs []error
	var dialer net.Dialer
	for _, a := range p.rec.Status().Network.Addresses() {
		direct, cancel := context.WithTimeout(ctx, directTimeout)
		conn, err := dialer.DialContext(direct, "tcp", net.JoinHostPort(a.String(), strconv.Itoa(int(port))))
		cancel()
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	if g.agentNow() != nil {
		return g.dial(ctx, port)
	}
	client, err := p.ssh(ctx)
	if err != nil {
		return nil, fmt.Errorf("port %d does not answer on the machine's addresses, and there is no way to its loopback: %w", port, errors.Join(append(errs, err)...))
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := client.DialGuest(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return sshConn{conn, client}, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("nothing in the machine accepts connections to port %d: %w", port, errors.Join(append(errs, client.Close())...))
}

// directTimeout bounds the wait for one address; what drops packets would use up all the time.
const directTimeout = 3 * time.Second

// sshConn is a connection that ends its SSH session with itself.
type sshConn struct {
	net.Conn
	client *sshexec.Client
}

func (c sshConn) Close() error { return errors.Join(c.Conn.Close(), c.client.Close()) }

// CloseWrite ends what is sent, if the connection can.
func (c sshConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// attachConsole joins a client to the machine's serial console, of which it first gets the given number of last lines. All who are
// attached see it; the first with input may type.
func (c *container) attachConsole(ctx context.Context, in io.Reader, out io.Writer, replay int) error {
	g, err := c.runningMachine()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	recent, output, unsubscribe := c.output.subscribeRecent()
	defer unsubscribe()
	if in != nil {
		stop, err := c.typeOn(g, in, cancel)
		if err != nil {
			return err
		}
		defer stop()
	}
	if last := lastLines(recent, replay); out != nil && len(last) > 0 {
		if _, err := out.Write(last); err != nil {
			return nil // the client has gone
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.rt.ctx.Done():
			return nil
		case ch, ok := <-output:
			if !ok {
				return c.lagged()
			}
			if out == nil {
				continue
			}
			if _, err := out.Write(ch.GetData()); err != nil {
				return nil // the client has gone
			}
		}
	}
}

// typeOn gives the machine's console what a client types. At the end of that, or by stop, another one may type. broken is called when
// the client's connection or the console breaks: a machine that was restored has another one.
func (c *container) typeOn(g *guest, in io.Reader, broken func()) (stop func(), err error) {
	if !g.machine.writer.TryLock() {
		return nil, fmt.Errorf("somebody else types on the console of container %s; attach without input to watch: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	console, err := g.openConsole()
	if err != nil {
		g.machine.writer.Unlock()
		return nil, err
	}
	stop = sync.OnceFunc(func() {
		_ = console.Close()
		g.machine.writer.Unlock()
	})
	c.rt.owned.Go(func() { // ends with the connection, which is closed when the client is served no more
		defer stop()
		if _, err := io.Copy(console, in); err != nil {
			broken()
		}
	})
	return stop, nil
}

// openConsole opens what the machine's serial console reads.
func (g *guest) openConsole() (*os.File, error) {
	path, _, err := g.vm.Record().ConsoleFIFOs()
	if err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK|nofollow, 0)
}
