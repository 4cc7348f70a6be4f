package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/agent/qga"
	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/qemu"
)

const (
	// portPoll is how often it is looked whether a guest has opened its agent's port, which may be never.
	portPoll = 2 * time.Second
	// askTimeout bounds a question to QEMU or to a guest agent that is there.
	askTimeout = 10 * time.Second
	// poweroffPoll is how often a machine that is to stop is asked to shut down.
	poweroffPoll = 5 * time.Second
	// quitTimeout bounds how long QEMU may take to flush its disks and end.
	quitTimeout = 20 * time.Second
	// consoleKept is how much of a machine's console is kept for `vmruntime vm console`, in bytes.
	consoleKept = 64 << 10
)

// machineParts are what a guest that is a machine has beside its QEMU.
type machineParts struct {
	// container is the ID of the container that the machine is.
	container string
	share     *qemu.ShareServer
	tpm       *qemu.TPM
	responder *network.Responder

	mu  sync.Mutex
	qga *qga.Client

	// decided is set by whoever decides what the end of this QEMU is: the container's, or nothing, since another QEMU goes on as the
	// machine. followed is closed when its console is all taken.
	decided  atomic.Bool
	followed chan struct{}

	// writer is held by the one attached client that may type on the console.
	writer sync.Mutex
}

func newMachineParts(container string) *machineParts {
	return &machineParts{container: container, followed: make(chan struct{})}
}

// record adds what a later daemon needs to find the parts again.
func (m *machineParts) record(r *guestRecord) {
	if m == nil {
		return
	}
	r.Machine = m.container
	if m.share != nil {
		record := m.share.Record()
		r.Share = &record
	}
	if m.tpm != nil {
		record := m.tpm.Record()
		r.TPM = &record
	}
}

// handOver gives virtiofsd to the guest, which from then on follows it.
func (m *machineParts) handOver() *qemu.ShareServer {
	if m == nil {
		return nil
	}
	share := m.share
	m.share = nil
	return share
}

// respond hands out the pod's addresses to a guest that asks for them.
func (m *machineParts) respond(p *pod) (err error) {
	servers, searches, err := p.resolver()
	if err != nil {
		return err
	}
	m.responder, err = p.rt.net.Respond(p.rec.Status().Network, network.ResponderOptions{
		DNS: network.DNS{Servers: servers, Searches: searches}, Hostname: p.hostname(), Log: p.log,
	})
	return err
}

// close lets go of the parts. The processes go on; those of a machine that has ended are ended with the pod's cgroup.
func (m *machineParts) close() error {
	var errs []error
	if m.responder != nil {
		m.responder.Close()
	}
	if m.share != nil {
		errs = append(errs, m.share.Close())
	}
	if m.tpm != nil {
		errs = append(errs, m.tpm.Close())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.qga != nil {
		errs = append(errs, m.qga.Close())
	}
	return errors.Join(errs...)
}

// keepAgent keeps a session with our agent in a machine, if it ever has one, until the machine ends or the daemon does.
func (g *guest) keepAgent(ctx context.Context) {
	defer close(g.done)
	for g.waitPort(ctx, qemu.AgentPort) {
		client, err := agent.Dial(ctx, g.vm.AgentSocket())
		if err != nil { // the port was closed again, or the machine ends
			select {
			case <-time.After(portPoll):
			case <-ctx.Done():
			}
			continue
		}
		g.publish(client, nil)
		select {
		case <-client.Done():
		case <-ctx.Done():
		}
		g.publish(nil, nil)
		if err := client.Close(); err != nil {
			g.log.Debug("closing the agent session", "error", err)
		}
	}
	if !g.ends(ctx) {
		return // closed; the VM goes on
	}
	err := g.end()
	if err == nil {
		err = errors.New("QEMU was told to quit")
	}
	g.publish(nil, err)
}

// waitPort waits until the guest has opened a port; false is the end of the context.
func (g *guest) waitPort(ctx context.Context, port string) bool {
	tick := time.NewTicker(portPoll)
	defer tick.Stop()
	for {
		if g.portOpen(ctx, port) {
			return true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}

func (g *guest) portOpen(ctx context.Context, port string) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	open, err := g.vm.PortOpen(ctx, port)
	return err == nil && open
}

// agentNow returns the session with our agent, if there is one at this moment.
func (g *guest) agentNow() *agent.Client {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.client
}

// guestAgent returns a client of qemu-guest-agent, or ErrUnavailable if the guest does not run one.
func (g *guest) guestAgent(ctx context.Context) (*qga.Client, error) {
	if !g.portOpen(ctx, qemu.GuestAgentPort) {
		return nil, fmt.Errorf("the guest does not run qemu-guest-agent: %w", errdefs.ErrUnavailable)
	}
	g.machine.mu.Lock()
	defer g.machine.mu.Unlock()
	if g.machine.qga != nil {
		select {
		case <-g.machine.qga.Done():
			_ = g.machine.qga.Close() // its connection is lost already
		default:
			return g.machine.qga, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	client, err := qga.Dial(ctx, g.vm.GuestAgentSocket())
	g.machine.qga = client
	return client, err
}

// watchMachine follows a machine until it ends or the daemon does.
func (c *container) watchMachine(g *guest) {
	c.output.remember(consoleKept)
	c.rt.owned.Go(func() {
		c.copyConsole(c.rt.ctx, g)
		close(g.machine.followed)
		if c.rt.ctx.Err() != nil || !g.machine.decided.CompareAndSwap(false, true) {
			return // the machine goes on; the next daemon, or whoever replaces this QEMU, follows it
		}
		c.finish(endOfMachine(g.end()))
		c.pod.clearMachine(g)
	})
}

// clearMachine ends what stood beside a machine that has ended.
func (p *pod) clearMachine(g *guest) {
	p.life.Lock()
	defer p.life.Unlock()
	if p.currentGuest() != g {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), teardownTimeout)
	defer cancel()
	if err := p.endGuest(ctx, g); err != nil {
		p.log.Warn("clearing away a machine that ended", "error", err)
	}
}

// copyConsole writes the machine's serial console to the log and to whoever is attached, until the machine has ended and all of it is
// taken, or the daemon ends.
func (c *container) copyConsole(ctx context.Context, g *guest) {
	if err := c.followConsole(ctx, g); err != nil && ctx.Err() == nil {
		c.log.Error("reading the console", "error", err)
	}
	select {
	case <-g.vm.Done():
	case <-ctx.Done():
	}
}

func (c *container) followConsole(ctx context.Context, g *guest) (err error) {
	_, fifo, err := g.vm.Record().ConsoleFIFOs()
	if err != nil {
		return err
	}
	spool, err := qemu.OpenSpool(fifo, c.spoolFile(), c.log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, spool.Close()) }()
	var owned sync.WaitGroup
	defer owned.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	owned.Go(func() {
		select {
		case <-g.ctx.Done(): // with the VM, or because the guest is given up
		case <-ctx.Done():
			return
		}
		select {
		case <-g.vm.Done():
			spool.Finish()
		default:
			cancel()
		}
	})
	return c.copySpool(ctx, spool)
}

// spoolFile keeps what the machine wrote to its console and is not in the log yet.
func (c *container) spoolFile() string {
	return filepath.Join(c.pod.runDir(), "console-"+c.id[:16]+".spool")
}

func (c *container) copySpool(ctx context.Context, spool *qemu.Spool) error {
	for {
		chunk, err := spool.Next(ctx, int64(c.cursor().next.stdout))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		_ = c.take(&agentpb.OutputChunk{ // tells its own errors
			Stream: agentpb.OutputChunk_STDOUT, Offset: uint64(chunk.Offset), Data: chunk.Data, TimeUnixNano: chunk.Time.UnixNano(),
		})
		if err := spool.Forget(int64(c.cursor().safe.stdout)); err != nil {
			return err
		}
	}
}

// endOfMachine is how a machine's container ends: powering off is its orderly end.
func endOfMachine(err error) containerEnd {
	end := containerEnd{code: 128 + sigkill, reason: reasonError, at: time.Now()}
	var exit *qemu.ExitError
	switch {
	case err == nil:
		end.message = "the machine did not power off in the time it was given"
	case errors.As(err, &exit) && exit.Reason == qemu.ReasonPoweroff:
		end.code, end.reason = 0, reasonCompleted
	case errors.As(err, &exit) && exit.Guest:
		end.code, end.reason, end.message = 1, reasonGuestFailed, err.Error()
	case errors.Is(err, errOutOfMemory):
		end.reason, end.message = reasonOOMKilled, err.Error()
	default:
		end.reason, end.message = reasonVMFailed, err.Error()
	}
	return end
}

// stopMachine asks the operating system to shut down, waits for the grace period, and ends the machine.
func (c *container) stopMachine(ctx context.Context, grace time.Duration) error {
	g := c.machineGuest()
	if g != nil && grace > 0 {
		wait, cancel := context.WithTimeout(ctx, grace)
		defer cancel()
		if c.poweredOff(wait, g) {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("container %s: the request ended before the grace period: %w", c.id, err)
		}
	}
	return c.killMachine(ctx)
}

// poweredOff asks the machine to shut down, again and again: one that still boots hears nothing of what it is asked. False is the end of
// the context.
func (c *container) poweredOff(ctx context.Context, g *guest) bool {
	tick := time.NewTicker(poweroffPoll)
	defer tick.Stop()
	for {
		g.askPoweroff(ctx)
		select {
		case <-c.exited:
			return true
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}

// askPoweroff asks by the first way that takes the request: an agent, then the power button. One that has begun to shut down does not
// mind.
func (g *guest) askPoweroff(ctx context.Context) {
	if g.askAgents(ctx) {
		return
	}
	if err := g.vm.Powerdown(ctx); err != nil {
		g.log.Debug("pressing the power button", "error", err)
	}
}

// askAgents tells whether an agent in the guest has begun to shut it down. One that hangs leaves time for the power button.
func (g *guest) askAgents(ctx context.Context) bool {
	limit := askTimeout
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline)/4)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if client := g.agentNow(); client != nil {
		_, err := client.Shutdown(ctx, &agentpb.ShutdownRequest{})
		return err == nil
	}
	ga, err := g.guestAgent(ctx)
	if err == nil {
		err = ga.Shutdown(ctx, qga.PowerDown)
	}
	return err == nil
}

// killMachine ends QEMU in order, so that what the guest has written is on its disk, or else at once.
func (c *container) killMachine(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	if g := c.machineGuest(); g != nil {
		g.told.Store(true)
		quit, cancel := context.WithTimeout(ctx, quitTimeout)
		defer cancel()
		if err := g.vm.Quit(quit); err != nil {
			kill, cancel := context.WithTimeout(ctx, killTimeout)
			defer cancel()
			if err := g.vm.Kill(kill); err != nil {
				return err
			}
		}
	}
	wait, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	select {
	case <-c.exited:
		return nil
	case <-wait.Done():
		return fmt.Errorf("container %s outlives its VM: %w", c.id, wait.Err())
	}
}

// machineGuest returns the guest that is this container, if it is there.
func (c *container) machineGuest() *guest {
	if g := c.pod.currentGuest(); g != nil && g.machine != nil && g.machine.container == c.id {
		return g
	}
	return nil
}

// runningMachine returns the guest of a machine that runs.
func (c *container) runningMachine() (*guest, error) {
	if s := c.rec.Status(); !s.running() {
		return nil, fmt.Errorf("container %s is %s, not running: %w", c.id, stateName(s.state()), errdefs.ErrFailedPrecondition)
	}
	if g := c.machineGuest(); g != nil && g.alive() {
		return g, nil
	}
	return nil, fmt.Errorf("the machine of container %s is gone: %w", c.id, errdefs.ErrUnavailable)
}

// recoverMachine takes up a machine that an earlier daemon started. One whose container is no more, or has ended, is ended.
func (rt *Runtime) recoverMachine(ctx context.Context, p *pod, g *guest, r guestRecord) error {
	rt.mu.RLock()
	c := rt.containers[r.Machine]
	rt.mu.RUnlock()
	if c == nil || !c.rec.Status().FinishedAt.IsZero() {
		p.life.Lock()
		defer p.life.Unlock()
		return p.endGuest(ctx, g)
	}
	if r.TPM != nil {
		tpm, err := qemu.AttachTPM(*r.TPM)
		if err != nil {
			p.log.Error("taking up the TPM", "error", err) // the guest goes on without
		}
		g.machine.tpm = tpm
	}
	if err := g.machine.respond(p); err != nil {
		p.log.Error("answering the machine's DHCP", "error", err)
	}
	if err := p.applyCPUQuota(); err != nil {
		p.log.Warn("bounding the machine's CPU time", "error", err)
	}
	if c.rec.Status().StartedAt.IsZero() {
		if waits, err := c.waitsForStart(ctx, g); waits || err != nil {
			return err
		}
		// Caught between QEMU's start and its record.
		if err := c.rec.Update(func(s *containerStatus) error {
			s.Boot, s.StartedAt = g.boot, time.Now()
			return nil
		}); err != nil {
			c.log.Error("recording a machine that runs", "error", err)
		}
	}
	if err := c.openLog(); err != nil {
		c.log.Error("taking up the log of a machine", "error", err) // it must be followed all the same
	}
	c.watchMachine(g)
	g.owned.Go(g.tell)
	return nil
}

// drainConsole writes to the log what a machine that is gone has left of its console.
func (c *container) drainConsole() {
	ctx, cancel := context.WithTimeout(c.rt.ctx, drainTimeout)
	defer cancel()
	if err := c.drainSpool(ctx); err != nil {
		c.log.Warn("reading what is left of the console", "error", err)
	}
}

func (c *container) drainSpool(ctx context.Context) (err error) {
	fifo := qemu.Record{RunDir: c.pod.runDir(), ConsolePipe: true}
	_, out, err := fifo.ConsoleFIFOs()
	if err != nil {
		return err
	}
	if _, err := os.Stat(out); errors.Is(err, os.ErrNotExist) {
		return nil // the node was rebooted
	}
	if err := c.openLog(); err != nil {
		return err
	}
	spool, err := qemu.OpenSpool(out, c.spoolFile(), c.log)
	if err != nil {
		return err
	}
	spool.Finish()
	return errors.Join(c.copySpool(ctx, spool), spool.Close())
}
