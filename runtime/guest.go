package runtime

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/trace"
)

const (
	// bootTimeout bounds the time from QEMU's start to the agent's answer. Under TCG on a loaded node a
	// boot of two seconds can take many times that.
	bootTimeout = 2 * time.Minute
	// bootsPerCPU, of the node, and at least minBoots guests of ours are between QEMU's start and being their pod at the same time. What
	// is started beside more of them only has all of them come later, up to none in time.
	bootsPerCPU, minBoots = 2, 4
	// plugTimeout bounds one hot-plug.
	plugTimeout = 30 * time.Second
	// endGrace is how long after its sockets QEMU's process may end.
	endGrace = time.Second
	// shutdownTimeout bounds how long a guest may take to write its shares back and power off.
	shutdownTimeout = 2 * time.Second
)

// guest is one boot of a pod's VM. It owns the goroutine that keeps a session with the agent; Close
// returns after that has ended, and leaves QEMU running.
type guest struct {
	pod  *pod
	boot int
	vm   *qemu.VM
	// machine is what it has beside QEMU if it boots a disk; nil for a guest of ours.
	machine *machineParts
	log     *slog.Logger
	// began is when QEMU was started, until the guest is its pod; zero if an earlier daemon started it.
	began time.Time
	// first is a session that is there already.
	first *agent.Client
	// told says that the guest is to end, so that its end is no failure.
	told atomic.Bool
	// ungrown says that it did not come to its pod's size at its start.
	ungrown atomic.Bool

	mu       sync.Mutex
	answered bool // there was a session
	badCopy  bool // it began as a template, and ended before there was one
	client   *agent.Client
	failure  error         // why the guest is no more
	changed  chan struct{} // closed and replaced when client or failure change

	recent recent

	plug  sync.Mutex        // held while devices are added
	share *qemu.ShareServer // started by this daemon; plug guards it

	ctx    context.Context // ends with the VM, or with Close
	cancel context.CancelFunc
	owned  sync.WaitGroup
	done   chan struct{}
}

// newGuest begins to supervise a VM that runs. began is when this daemon started it, or zero; first is a session with its agent, if there
// is one; call is what it was started for.
func newGuest(call context.Context, p *pod, boot int, vm *qemu.VM, machine *machineParts, began time.Time, first *agent.Client) *guest {
	ctx, cancel := context.WithCancel(p.rt.ctx)
	g := &guest{
		pod: p, boot: boot, vm: vm, machine: machine, began: began, first: first,
		log:     p.log.With("boot", boot),
		changed: make(chan struct{}),
		ctx:     ctx,
		cancel:  cancel,
		done:    make(chan struct{}),
	}
	g.owned.Go(func() {
		select {
		case <-vm.Done():
			g.countEnd()
			cancel()
		case <-ctx.Done():
		}
	})
	if machine != nil {
		g.owned.Go(func() { g.keepAgent(ctx) })
	} else {
		g.owned.Go(func() { g.supervise(ctx, trace.Of(ctx, call)) })
	}
	return g
}

// mayBoot waits until so few guests boot that another one may; whileBooting ends that.
func (rt *Runtime) mayBoot(ctx context.Context) error {
	if rt.boots.TryAcquire(1) {
		return nil
	}
	return trace.Do(ctx, "wait for other guests", func(ctx context.Context) error {
		if err := rt.boots.Acquire(ctx, 1); err != nil {
			return fmt.Errorf("wait for other guests that boot: %w", err)
		}
		return nil
	})
}

// whileBooting has a guest count as one that boots until it is its pod, or will not be. It is nil if none was started.
func (rt *Runtime) whileBooting(g *guest) {
	if g == nil {
		rt.boots.Release(1)
		return
	}
	g.owned.Go(func() {
		defer rt.boots.Release(1)
		_, _ = g.session(g.ctx)
	})
}

// Close ends the supervision. The VM goes on.
func (g *guest) Close() error {
	g.cancel()
	g.owned.Wait()
	g.plug.Lock()
	defer g.plug.Unlock()
	errs := []error{g.vm.Close()}
	if g.share != nil {
		errs = append(errs, g.share.Close())
	}
	if g.machine != nil {
		errs = append(errs, g.machine.close())
	}
	return errors.Join(errs...)
}

// supervise keeps a session with the agent until the VM ends or the daemon does; session is the context in which the first one begins.
func (g *guest) supervise(ctx, session context.Context) {
	defer close(g.done)
	deadline := time.Now().Add(bootTimeout)
	for {
		client, err := g.connect(session, deadline)
		if errdefs.IsUnavailable(err) && time.Now().Before(deadline) && !g.ends(ctx) && ctx.Err() == nil {
			g.log.Debug("the session with the agent was lost as it began", "error", err)
			continue
		}
		if err != nil && g.stopped(ctx) {
			deadline = time.Now().Add(bootTimeout)
			continue
		}
		if err != nil {
			g.endOf(ctx, err)
			return
		}
		g.countBoot(nil)
		g.publish(client, nil)
		session = ctx
		select {
		case <-client.Done():
		case <-ctx.Done():
		}
		g.publish(nil, nil)
		if err := client.Close(); err != nil {
			g.log.Debug("closing the agent session", "error", err)
		}
		deadline = time.Now().Add(bootTimeout)
	}
}

// stopped tells whether the guest does not answer because somebody has stopped it, and it waits to be let go on.
func (g *guest) stopped(ctx context.Context) bool {
	return !g.ends(ctx) && ctx.Err() == nil && slices.Contains([]string{statePaused, stateSaved}, g.state(ctx))
}

// connect begins a session and makes the guest this pod. It fails when the VM ends first.
func (g *guest) connect(ctx context.Context, deadline time.Time) (*agent.Client, error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	client, err := g.first, error(nil)
	if g.first = nil; client == nil {
		dial, answered := trace.Start(ctx, "agent's first answer")
		client, err = agent.Dial(dial, g.vm.AgentSocket())
		answered(err)
	}
	if err != nil {
		return nil, fmt.Errorf("the guest's agent does not answer: %w", err)
	}
	if err := trace.Do(ctx, "configure sandbox", func(ctx context.Context) error { return g.configure(ctx, client) }); err != nil {
		return nil, errors.Join(fmt.Errorf("configure the guest: %w", err), client.Close())
	}
	return client, nil
}

func (g *guest) configure(ctx context.Context, client *agent.Client) error {
	info, err := client.Info(ctx, &agentpb.InfoRequest{})
	if err != nil {
		return err
	}
	if adopted, err := g.pod.adopt(ctx, client); adopted || err != nil {
		return err
	}
	if info.GetConfigured() {
		// The last daemon may have ended before it could. A guest that runs is not given up for it.
		if err := g.pod.applyCPUQuota(); err != nil {
			g.log.Warn("bounding the guest's CPU time", "error", err)
		}
		return g.growFirst(ctx, client)
	}
	req, err := g.pod.sandboxRequest()
	if err != nil {
		return err
	}
	req.Entropy = make([]byte, 64)
	if _, err := rand.Read(req.Entropy); err != nil {
		return err
	}
	req.Restored = g.pod.rec.Status().Guest.Template != ""
	req.TimeUnixNano = time.Now().UnixNano()
	if _, err := client.ConfigureSandbox(ctx, req); err != nil {
		return err
	}
	if err := g.reachSize(ctx, client); err != nil {
		return err
	}
	return g.pod.applyCPUQuota()
}

// endOf records why no session is to be had any more. A VM whose agent stays silent is killed: nothing
// could be told or asked of it.
func (g *guest) endOf(ctx context.Context, err error) {
	level := slog.LevelWarn
	if !g.ends(ctx) {
		if ctx.Err() != nil {
			return // closed; the VM goes on
		}
		g.judgeTemplate() // as long as it has not been told to end
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), plugTimeout)
		defer cancel()
		g.countSilence()
		err = errors.Join(err, g.vm.Kill(kill))
	} else {
		g.judgeTemplate()
		if g.told.Load() {
			level = slog.LevelInfo
		}
		if err = g.end(); err == nil {
			err = errors.New("QEMU was told to quit")
		}
	}
	g.countBoot(err)
	g.log.Log(ctx, level, "the guest ended", "error", err)
	g.publish(nil, err)
}

// errOutOfMemory is in the error of a VM that the node's kernel killed.
var errOutOfMemory = errors.New("the node's kernel killed the VM, as the pod's cgroup or the node had no more memory; " +
	"the pod's limits have to leave room for QEMU, by the overhead of its RuntimeClass")

// end is how the VM ended, once it has; nil if it was told to.
func (g *guest) end() error { return g.pod.explainEnd(g.vm.Err()) }

// explainEnd adds to the error of a VM that ended, not by its guest's doing, whether the node's kernel killed it.
func (p *pod) explainEnd(err error) error {
	if err == nil || errors.Is(err, qemu.ErrGuestFailed) {
		return err
	}
	kills, statErr := p.cgroup().OOMKills()
	if statErr != nil {
		p.log.Warn("asking why the VM ended", "error", statErr)
	}
	if kills > p.rec.Status().Guest.OOMKills {
		return fmt.Errorf("%w: %w", errOutOfMemory, err)
	}
	return err
}

// judgeTemplate gives up the template of a guest that ends without having answered, unless it was told to end; that a guest begins
// with another size than its pod's, if it did not grow. A template whose copy answered while it waited for its pod is good.
func (g *guest) judgeTemplate() {
	record := g.pod.rec.Status().Guest
	key := record.Template
	g.mu.Lock()
	g.badCopy = key != "" && !g.answered && !g.began.IsZero() && !g.told.Load()
	bad := g.badCopy
	g.mu.Unlock()
	switch {
	case bad && g.ungrown.Load():
		g.pod.rt.templates.stopGrowing()
	case bad && !record.Spare:
		g.pod.rt.templates.drop(key)
	}
}

func (g *guest) wasBadCopy() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.badCopy
}

// ends tells whether QEMU is gone, or about to be: its sockets close a moment before its process ends.
func (g *guest) ends(ctx context.Context) bool {
	select {
	case <-g.vm.Done():
		return true
	case <-ctx.Done():
		select {
		case <-g.vm.Done():
			return true
		default:
			return false
		}
	case <-time.After(endGrace):
		return false
	}
}

func (g *guest) publish(c *agent.Client, failure error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.client = c
	g.answered = g.answered || c != nil
	if failure != nil {
		g.failure = failure
	}
	close(g.changed)
	g.changed = make(chan struct{})
}

// errGuestGone says that the VM has ended; what ran in it is over.
type errGuestGone struct{ cause error }

func (e errGuestGone) Error() string { return "the VM has ended: " + e.cause.Error() }
func (e errGuestGone) Unwrap() []error {
	return []error{e.cause, errdefs.ErrUnavailable}
}

// session waits for a session with the agent. It fails with errGuestGone when there will be none.
func (g *guest) session(ctx context.Context) (*agent.Client, error) {
	for {
		g.mu.Lock()
		client, failure, changed := g.client, g.failure, g.changed
		g.mu.Unlock()
		if failure != nil {
			return nil, errGuestGone{failure}
		}
		if client != nil {
			return client, nil
		}
		select {
		case <-changed:
		case <-g.done:
			if failure := g.failed(); failure != nil {
				return nil, errGuestGone{failure}
			}
			return nil, fmt.Errorf("the runtime is stopping: %w", errdefs.ErrUnavailable)
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the guest's agent: %w", ctx.Err())
		}
	}
}

// alive tells whether the VM has not ended.
func (g *guest) alive() bool {
	select {
	case <-g.vm.Done():
		return false
	default:
		return g.failed() == nil
	}
}

func (g *guest) failed() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.failure
}

// plugDisk makes an image's EROFS file or a block volume a disk of the guest, once.
func (g *guest) plugDisk(ctx context.Context, d qemu.Disk) error {
	g.plug.Lock()
	defer g.plug.Unlock()
	if slices.Contains(g.pod.rec.Status().Guest.Disks, d.Serial) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, plugTimeout)
	defer cancel()
	err := trace.Do(ctx, "plug disk", func(ctx context.Context) error {
		return g.vm.AddDisk(ctx, d)
	})
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	return g.pod.update(func(s *podStatus) error {
		s.Guest.Disks = append(s.Guest.Disks, d.Serial)
		return nil
	})
}

// shutdown asks the guest to sync and power off, for a moment: what is left is killed by the caller.
func (g *guest) shutdown(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	g.mu.Lock()
	client := g.client
	g.mu.Unlock()
	if client == nil {
		return
	}
	g.told.Store(true)
	if _, err := client.Shutdown(ctx, &agentpb.ShutdownRequest{}); err != nil {
		g.log.Debug("the guest did not shut down", "error", err)
		return
	}
	select {
	case <-g.vm.Done():
	case <-ctx.Done():
	}
}
