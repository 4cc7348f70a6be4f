package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
)

// Recovery assumes:
//   - A record is whole or absent; what is half made has a record without ReadyAt, or none at all.
//   - QEMU, virtiofsd, taps and mounts go on while the daemon is away. After a reboot none of them is there: the run
//     directory is empty, and the recorded process is not found by its number and start time.
//   - The guest keeps output that was not acknowledged and exit codes until the container is removed.
//   - Nobody else makes resources under names that derive from our pod IDs.

// recoverParallel bounds how many pods are recovered side by side; recoverTimeout how long one may take; answerTimeout how
// long one guest may take to answer: all pods wait for the slowest, and a guest that hangs must not keep the node away
// for long. It is followed all the same.
const (
	recoverParallel = 16
	recoverTimeout  = 30 * time.Second
	answerTimeout   = 5 * time.Second
)

// Recover takes up every pod that an earlier daemon left, tears down what is half made, and sweeps away what
// belongs to nobody. A pod that cannot be recovered does not keep the others back.
func (rt *Runtime) Recover(ctx context.Context) error {
	broken, err := rt.loadRecords()
	if err != nil {
		return err
	}
	var work errgroup.Group
	work.SetLimit(recoverParallel)
	for _, p := range rt.allPods() {
		work.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
			defer cancel()
			if err := rt.recoverPod(ctx, p); err != nil {
				p.log.Error("recovering the pod", "error", err)
			}
			return nil
		})
	}
	if err := work.Wait(); err != nil {
		return err
	}
	rt.sweep(ctx, broken)
	if err := rt.sweepTemplates(ctx); err != nil {
		rt.log.Error("sweeping templates", "error", err)
	}
	rt.owned.Go(rt.spares.run)
	rt.owned.Go(rt.firstTemplate)
	return nil
}

// firstTemplate has the template made that pods without limits begin as.
func (rt *Runtime) firstTemplate() {
	accel, err := rt.accel.verdict(rt.ctx)
	if err != nil {
		return // the daemon ends
	}
	m := rt.guestImage.machine(accel.Accel)
	base := rt.cfg.VM.base()
	m.VCPUs, m.MemoryBytes = base.VCPUs, base.MemoryBytes
	maxVCPUs, maxMemory := rt.cfg.VM.room(m.VCPUs, m.MemoryBytes)
	giveRoom(&m, maxVCPUs, maxMemory)
	m.NICs = make([]qemu.NIC, 1)
	rt.templates.want(m, "")
}

// loadRecords reads all records and reserves their names. Broken ones are named.
func (rt *Runtime) loadRecords() ([]string, error) {
	pods, brokenPods, err := rt.podStore.Load()
	if err != nil {
		return nil, err
	}
	var broken []string
	for _, b := range brokenPods {
		rt.log.Error("the record of a sandbox cannot be read; the sandbox is torn down", "pod", b.ID, "error", b.Err)
		broken = append(broken, b.ID)
	}
	for _, rec := range pods {
		p := rt.newPod(rec)
		rt.pods[p.id] = p
		if err := rt.podNames.Reserve(podName(p.config().GetMetadata()), p.id); err != nil {
			p.log.Error("two records have one name", "error", err)
		}
	}
	return broken, errors.Join(rt.loadContainers(), rt.sweepLogRecords())
}

// sweepLogRecords removes what a killed daemon left of log records: temporary files, and those of containers that
// are no more. Nothing writes there yet.
func (rt *Runtime) sweepLogRecords() error {
	dir := filepath.Join(rt.cfg.Server.Root, "logs")
	names, err := dirNames(dir)
	for _, name := range names {
		if rt.containers[strings.TrimSuffix(name, ".json")] == nil {
			err = errors.Join(err, os.Remove(filepath.Join(dir, name)))
		}
	}
	return err
}

func (rt *Runtime) loadContainers() error {
	recs, brokenContainers, err := rt.containerStore.Load()
	if err != nil {
		return err
	}
	var errs []error
	for _, b := range brokenContainers {
		rt.log.Error("the record of a container cannot be read; it is removed", "container", b.ID, "error", b.Err)
		errs = append(errs, rt.containerStore.Remove(b.ID))
	}
	for _, rec := range recs {
		p := rt.pods[rec.Spec().PodID]
		if p == nil {
			rt.log.Warn("a container without a sandbox is removed", "container", rec.ID())
			errs = append(errs, rt.containerStore.Remove(rec.ID()))
			continue
		}
		c := rt.newContainer(p, rec)
		rt.containers[c.id] = c
		if err := rt.containerNames.Reserve(c.name(), c.id); err != nil {
			c.log.Error("two records have one name", "error", err)
		}
	}
	return errors.Join(errs...)
}

func (rt *Runtime) recoverPod(ctx context.Context, p *pod) error {
	s := p.rec.Status()
	switch {
	case s.ReadyAt.IsZero():
		p.log.Warn("a half-made sandbox is torn down")
		for _, c := range rt.containersOf(p.id) {
			if err := c.forget(ctx); err != nil {
				return err
			}
		}
		return rt.forgetPod(ctx, p)
	case !s.StoppedAt.IsZero():
		rt.endContainers(p, errors.New("the sandbox was stopped"))
		p.life.Lock()
		defer p.life.Unlock()
		return p.teardown(ctx)
	case s.Guest.QEMU == nil:
		return nil
	}
	vm, err := qemu.Attach(ctx, *s.Guest.QEMU)
	if err != nil {
		// One that is there and does not answer is of no use to anyone.
		killed := qemu.KillRecorded(ctx, *s.Guest.QEMU)
		rt.endContainers(p, p.explainEnd(fmt.Errorf("the VM ended while the runtime was away: %w", err)))
		// virtiofsd, or a QEMU that was started just before it could be recorded.
		return errors.Join(killed, p.cgroup().Kill(ctx))
	}
	var parts *machineParts
	if s.Guest.Machine != "" {
		parts = newMachineParts(s.Guest.Machine)
	}
	g := newGuest(ctx, p, s.Guest.Boot, vm, parts, time.Time{}, nil)
	p.setGuest(g)
	if err := g.recoverShare(ctx, s.Guest.Share); err != nil {
		p.log.Error("taking up virtiofsd", "error", err)
	}
	g.releaseLeft()
	g.unfreezeLeft()
	if parts != nil {
		return rt.recoverMachine(ctx, p, g, s.Guest)
	}
	if have, err := vm.Size(ctx); err != nil {
		p.log.Error("asking for the VM's size", "error", err)
	} else if have.VCPUs > p.size().VCPUs || p.size().exceeded(have) {
		rt.owned.Go(g.settle)
	}
	return rt.recoverContainers(ctx, p, g)
}

// recoverContainers takes up following what runs in a guest. A container that the guest has started and whose
// record does not say so was caught between the two: the record is completed.
func (rt *Runtime) recoverContainers(ctx context.Context, p *pod, g *guest) error {
	states := make(map[string]*agentpb.ProcessState)
	ask, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	client, err := g.session(ask)
	if err == nil {
		var list *agentpb.ListResponse
		if list, err = client.List(ask, &agentpb.ListRequest{}); err == nil {
			for _, s := range list.GetProcesses() {
				if s.GetExecId() == "" {
					states[s.GetContainerId()] = s
				} else {
					g.removeExec(&agentpb.ProcessRef{ContainerId: s.GetContainerId(), ExecId: s.GetExecId()})
				}
			}
		}
	}
	if err != nil {
		p.log.Warn("the guest does not answer yet", "error", err)
	}
	for _, c := range rt.containersOf(p.id) {
		if err := c.recover(g, states[c.guestID()], err == nil); err != nil {
			c.log.Error("recovering the container", "error", err)
		}
	}
	return nil
}

// recover takes up one container; listed says that the guest could be asked.
func (c *container) recover(g *guest, state *agentpb.ProcessState, listed bool) error {
	s := c.rec.Status()
	if !s.FinishedAt.IsZero() {
		return nil
	}
	if s.StartedAt.IsZero() {
		if !state.GetStarted() || c.rec.Spec().Restored != nil {
			return nil
		}
		if err := c.rec.Update(func(s *containerStatus) error {
			s.Boot, s.StartedAt = g.boot, time.Unix(0, state.GetStartedAtUnixNano())
			return nil
		}); err != nil {
			return err
		}
	}
	if listed && state == nil {
		c.finish(containerEnd{code: 128 + sigkill, reason: reasonVMFailed, message: "the guest does not know the container any more", at: time.Now()})
		return nil
	}
	if err := c.openLog(); err != nil {
		return err
	}
	c.pod.watchProjections(c)
	c.watch(g)
	return nil
}

// endContainers records the end of what ran in a guest that is no more.
func (rt *Runtime) endContainers(p *pod, cause error) {
	for _, c := range rt.containersOf(p.id) {
		if !c.rec.Status().running() {
			continue
		}
		end := endOfGuest(cause)
		if c.isMachine() {
			c.drainConsole()
			end = endOfMachine(cause)
		}
		if p.networkLost {
			end.reason = reasonNodeReboot
		}
		c.finish(end)
	}
}

// sweep takes away what carries an ID that no record has: it was made just before a crash, or its record was
// broken.
func (rt *Runtime) sweep(ctx context.Context, broken []string) {
	orphans := make(map[string]bool)
	for _, id := range broken {
		orphans[id] = true
	}
	note := func(ids []string, err error) {
		if err != nil {
			rt.log.Warn("looking for orphans", "error", err)
		}
		for _, id := range ids {
			if rt.pods[id] == nil {
				orphans[id] = true
			}
		}
	}
	note(rt.net.List())
	note(dirNames(filepath.Join(rt.cfg.Server.State, "pods")))
	note(rt.images.Scratches())
	for id := range orphans {
		rt.log.Warn("an orphan is swept away", "pod", id)
		if err := rt.sweepPod(ctx, id); err != nil {
			rt.log.Error("sweeping an orphan", "pod", id, "error", err)
		}
	}
	live := make(map[string]bool)
	for id := range rt.containers {
		live[id] = true
	}
	machines, err := rt.images.Machines()
	if err != nil {
		rt.log.Warn("looking for orphans", "error", err)
	}
	for _, id := range machines {
		if !live[id] {
			if err := rt.images.RemoveMachine(id); err != nil {
				rt.log.Error("sweeping an orphan", "container", id, "error", err)
			}
		}
	}
	if err := rt.images.Prune(ctx, live); err != nil {
		rt.log.Warn("sweeping unused images", "error", err)
	}
}

// sweepPod takes away what a pod without a record has left.
func (rt *Runtime) sweepPod(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, teardownTimeout)
	defer cancel()
	dir := filepath.Join(rt.cfg.Server.State, "pods", id)
	return errors.Join(
		cgroup.KillOrphan(ctx, id),
		rt.net.Teardown(ctx, network.Request{ID: id}),
		removeRunDir(dir),
		rt.images.RemoveScratch(id),
		rt.podStore.Remove(id),
	)
}

func dirNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}
