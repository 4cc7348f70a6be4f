package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
)

// A spare is a guest that has begun as a template before its pod is known, and has rehearsed what every pod needs. It has the ID that
// its pod will have, so that whatever it has on the node is already named as it must be:
//
//	spare           its own cgroup, network namespace with a tap, scratch disk, run directory, user ID; no record
//	RunPodSandbox   record with that ID, CNI in that namespace, QEMU into the pod's cgroup, ConfigureSandbox
//
// What a daemon that was killed leaves of one has no record, and is swept away like any orphan.

const (
	// spareQuiet is how long no pod may have started before a spare is made: that takes a processor for seconds.
	spareQuiet = time.Second
	sparePoll  = 100 * time.Millisecond
	// spareAnswer is how long a spare that gets a pod may take to answer. Emulated, on a loaded node, that can be seconds.
	spareAnswer = 5 * time.Second
)

// spare is a guest that waits for its pod.
type spare struct {
	id      string
	uid     uint32
	key     string // of its template
	size    vmSize // what it has begun with
	most    int    // processors that it can come to have before its pod runs
	private bool   // its memory is shared with the template
	scratch string
	vm      *qemu.VM
	client  *agent.Client
	taken   chan struct{} // closed when nobody need watch it any more
}

// wantedSpare is a shape of which there is to be a spare.
type wantedSpare struct {
	key   string
	shape qemu.Machine
	after time.Time // it is not tried before
}

// spares keeps some guests waiting, of the shapes that were asked for last. One goroutine makes and ends them.
type spares struct {
	rt   *Runtime
	most int
	wake chan struct{}
	disk string // the path of what a rehearsal runs, once there is one; run's own
	// make starts one and has it rehearse, end takes away what it has on the node.
	make func(wantedSpare) (*spare, error)
	end  func(*spare)

	mu     sync.Mutex
	wanted []wantedSpare // the latest first
	ready  map[string]*spare
	starts int       // of pods and containers, under way
	quiet  time.Time // when the last one ended
	// noNetwork says that the last pod got no network. Each spare that is taken then would be lost.
	noNetwork bool
}

func (rt *Runtime) newSpares() *spares {
	s := &spares{rt: rt, wake: make(chan struct{}, 1), ready: make(map[string]*spare), end: rt.endSpare}
	s.make = s.makePacked
	if t := rt.cfg.Template; t.Enabled && t.Share != shareNamespace { // whose namespace a spare will be in is not known
		s.most = t.Spares
	}
	return s
}

// want has a spare made of the shape, when nothing else is to be done.
func (s *spares) want(shape qemu.Machine) {
	if s.most == 0 || len(shape.NICs) != 1 {
		return
	}
	key, _, ok := s.rt.templates.find(shape, "")
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	one := wantedSpare{key: key, shape: shape}
	if i := slices.IndexFunc(s.wanted, func(w wantedSpare) bool { return w.key == key }); i >= 0 {
		one = s.wanted[i]
		s.wanted = slices.Delete(s.wanted, i, i+1)
	}
	s.wanted = s.latest(slices.Insert(s.wanted, 0, one))
	s.poke()
}

// latest are the wanted ones that came last. If there can be two, one is of the base size, from which pods of other sizes are grown.
func (s *spares) latest(wanted []wantedSpare) []wantedSpare {
	if len(wanted) <= s.most {
		return wanted
	}
	base := s.rt.cfg.VM.base()
	i := slices.IndexFunc(wanted, func(w wantedSpare) bool { return sizeOf(w.shape) == base })
	if i >= s.most && s.most > 1 {
		wanted[s.most-1] = wanted[i]
	}
	return wanted[:s.most]
}

func (s *spares) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// take gives a spare for a pod, which has its ID from then on; nil if there is none.
func (s *spares) take(ctx context.Context, spec podSpec) *spare {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ready) == 0 || s.noNetwork || spec.HugeBytes > 0 {
		return nil
	}
	for _, begin := range s.rt.beginnings(spec, vmSize{spec.VCPUs, spec.MemoryBytes}) {
		if have := s.readyOf(ctx, spec, begin); have != nil && spec.VCPUs <= have.most {
			delete(s.ready, have.key)
			close(have.taken)
			s.poke()
			return have
		}
	}
	return nil
}

// readyOf is the spare that a pod can begin with at a size, nil if there is none. The caller holds mu.
func (s *spares) readyOf(ctx context.Context, spec podSpec, begin vmSize) *spare {
	m, err := s.rt.containerVM(ctx, spec, begin)
	if err != nil {
		return nil
	}
	m.NICs = make([]qemu.NIC, 1)
	key, _, ok := s.rt.templates.find(shape(m), "")
	if !ok {
		return nil
	}
	return s.ready[key]
}

// networked tells whether a pod got its network. Until one did after one that did not, pods get no spares.
func (s *spares) networked(ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noNetwork = !ok
}

// hold keeps spares from being made until what it returns is called.
func (s *spares) hold() (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.starts++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.starts--
		s.quiet = time.Now()
	}
}

// run makes and ends spares until the daemon ends, and then ends all.
func (s *spares) run() {
	again := time.NewTicker(templateRetry) // for those that were put off
	defer again.Stop()
	for {
		select {
		case <-s.rt.ctx.Done():
			s.mu.Lock()
			s.wanted = nil
			s.mu.Unlock()
			s.endUnwanted()
			return
		case <-s.wake:
		case <-again.C:
		}
		s.forgetOutdated()
		s.endUnwanted()
		s.fill()
	}
}

// forgetOutdated drops shapes that a pod would ask for by another key now, as after another QEMU was installed.
func (s *spares) forgetOutdated() {
	s.mu.Lock()
	wanted := slices.Clone(s.wanted)
	s.mu.Unlock()
	for _, w := range wanted {
		if key, _, ok := s.rt.templates.find(w.shape, ""); ok && key != w.key {
			s.forget(w.key)
		}
	}
}

func (s *spares) forget(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wanted = slices.DeleteFunc(s.wanted, func(w wantedSpare) bool { return w.key == key })
}

func (s *spares) endUnwanted() {
	s.mu.Lock()
	var all []*spare
	for key, sp := range s.ready {
		if !slices.ContainsFunc(s.wanted, func(w wantedSpare) bool { return w.key == key }) {
			delete(s.ready, key)
			close(sp.taken)
			all = append(all, sp)
		}
	}
	s.mu.Unlock()
	for _, sp := range all {
		s.end(sp)
	}
}

func (s *spares) fill() {
	for {
		if _, ok := s.missing(); !ok || !s.awaitQuiet() {
			return
		}
		w, ok := s.missing() // another one by now, or none, if one was given back
		if !ok {
			return
		}
		sp, err := s.make(w)
		if err != nil {
			s.rt.log.Warn("no guest can be made ahead of its pod", "template", w.key, "error", err)
			s.forgetOutdated()
			s.putOff(w.key)
			continue
		}
		s.add(sp)
	}
}

// makePacked makes the first one's disk too.
func (s *spares) makePacked(w wantedSpare) (sp *spare, err error) {
	if s.disk == "" {
		if s.disk, err = s.rt.packRehearsal(); err != nil {
			return nil, err
		}
	}
	return s.rt.makeSpare(w)
}

// yield ends a guest that waits, so that a pod may have what it has; false if none waits.
func (s *spares) yield() bool {
	s.mu.Lock()
	var some *spare
	for key, sp := range s.ready {
		some = sp
		delete(s.ready, key)
		close(sp.taken)
		break
	}
	s.mu.Unlock()
	if some != nil {
		s.end(some)
	}
	return some != nil
}

// giveBack has a spare wait again that no pod got after all.
func (s *spares) giveBack(sp *spare) {
	sp.taken = make(chan struct{})
	s.add(sp)
}

// missing is the first that there is to be and is not.
func (s *spares) missing() (wantedSpare, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.wanted {
		if s.ready[w.key] == nil && time.Now().After(w.after) {
			return w, true
		}
	}
	return wantedSpare{}, false
}

func (s *spares) awaitQuiet() bool {
	for {
		s.mu.Lock()
		quiet := s.starts == 0 && time.Since(s.quiet) >= spareQuiet
		s.mu.Unlock()
		if quiet {
			return true
		}
		select {
		case <-s.rt.ctx.Done():
			return false
		case <-time.After(sparePoll):
		}
	}
}

// putOff has no spare of a shape made for some time.
func (s *spares) putOff(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.wanted {
		if s.wanted[i].key == key {
			s.wanted[i].after = time.Now().Add(templateRetry)
		}
	}
}

// add has a spare wait, or ends it if it is not needed.
func (s *spares) add(sp *spare) {
	if !s.keep(sp) {
		s.end(sp)
		return
	}
	s.rt.log.Info("a guest waits for its pod", "pod", sp.id, "template", sp.key)
	s.poke() // it may not be wanted any more
}

// keep has a spare wait, and given up when it ends by itself. It tells false if another one of its template waits, or nobody would end it any
// more.
func (s *spares) keep(sp *spare) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ready[sp.key] != nil || s.rt.ctx.Err() != nil {
		return false
	}
	s.ready[sp.key] = sp
	taken := sp.taken
	s.rt.owned.Go(func() {
		select {
		case <-taken:
		case <-s.rt.ctx.Done(): // run ends it
		case <-sp.vm.Done():
			s.lost(sp)
		}
	})
	return true
}

func (s *spares) lost(sp *spare) {
	s.mu.Lock()
	mine := s.ready[sp.key] == sp
	if mine {
		delete(s.ready, sp.key)
		close(sp.taken)
	}
	s.mu.Unlock()
	if mine {
		s.rt.log.Warn("a guest that waited for its pod has ended", "pod", sp.id, "error", sp.vm.Err())
		s.putOff(sp.key)
		s.end(sp)
	}
}

// count is how many guests wait.
func (s *spares) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.ready)
}

// makeSpare starts a guest as a copy of its template and has it rehearse.
func (rt *Runtime) makeSpare(w wantedSpare) (sp *spare, err error) {
	ctx, cancel := context.WithTimeout(rt.ctx, templateTimeout)
	defer cancel()
	t := rt.templates.take(w.shape, "")
	if t == nil {
		return nil, fmt.Errorf("the template is not there: %w", errdefs.ErrNotFound)
	}
	defer t.Close()
	if t.key != w.key {
		return nil, fmt.Errorf("the template is %s by now: %w", t.key, errdefs.ErrNotFound)
	}
	uid, err := rt.takeUID()
	if err != nil {
		return nil, err
	}
	sp = &spare{id: newID(), uid: uid, key: w.key, size: sizeOf(w.shape), taken: make(chan struct{})}
	if err := rt.startSpare(ctx, sp, w.shape, t); err != nil {
		rt.endSpare(sp)
		return nil, err
	}
	return sp, nil
}

func (rt *Runtime) startSpare(ctx context.Context, sp *spare, m qemu.Machine, t *template) error {
	dir := rt.runDir(sp.id)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	tap, err := rt.net.Prepare(sp.id)
	if err != nil {
		return err
	}
	defer tap.Close()
	if sp.scratch, err = rt.images.CreateScratch(ctx, sp.id, int64(rt.cfg.VM.ScratchSize)); err != nil {
		return err
	}
	m.Name, m.Disks, m.NICs = vmName(sp.id), scratchDisks(sp.scratch), []qemu.NIC{{ID: "net0", MAC: spareMAC(sp.id)}}
	m = t.clone(m, rt.cfg.Template.Share, false)
	sp.private = m.Memory == qemu.MemoryPrivate
	spec := qemu.Spec{
		Machine: m, Binary: rt.cfg.QEMU.Binary, Launcher: rt.launcher, RunDir: dir, UID: sp.uid, GID: sp.uid,
		Taps: []*os.File{tap}, Place: rt.spareGroup(sp.id).Add,
	}
	t.give(&spec)
	if sp.vm, err = qemu.Start(ctx, spec); err != nil {
		return err
	}
	if sp.most, err = plugAhead(ctx, sp.vm); err != nil {
		return err
	}
	if err := sp.vm.Resume(ctx); err != nil {
		return err
	}
	if sp.client, err = agent.Dial(ctx, sp.vm.AgentSocket()); err != nil {
		return err
	}
	return rt.rehearse(ctx, sp)
}

// endSpare takes away everything that a spare has on the node. Its user ID is free when its processes are gone.
func (rt *Runtime) endSpare(sp *spare) {
	ctx, cancel := context.WithTimeout(context.Background(), teardownTimeout)
	defer cancel()
	ended := errors.Join(sp.stop(ctx), rt.spareGroup(sp.id).Kill(ctx))
	if err := errors.Join(
		ended, rt.net.Unprepare(sp.id), rt.spareGroup(sp.id).Delete(), removeRunDir(rt.runDir(sp.id)), rt.images.RemoveScratch(sp.id),
	); err != nil {
		rt.log.Error("ending a guest that waited for its pod", "pod", sp.id, "error", err)
	}
	if ended == nil {
		rt.mu.Lock()
		defer rt.mu.Unlock()
		delete(rt.takenUIDs, sp.uid)
	}
}

// stop ends the guest alone.
func (sp *spare) stop(ctx context.Context) error {
	var errs []error
	if sp.client != nil {
		_ = sp.client.Close() // its session ends with the guest
	}
	if sp.vm != nil {
		errs = append(errs, sp.vm.Kill(ctx), sp.vm.Close())
	}
	return errors.Join(errs...)
}

// spareGroup is the cgroup in which a spare begins; what it took there is charged to it as long as it lives.
func (rt *Runtime) spareGroup(id string) cgroup.Group { return cgroup.For("", id) }

// spareMAC is what a spare's network device has for its address until CNI has made the pod's interface.
func spareMAC(id string) string {
	return fmt.Sprintf("02:%s:%s:%s:%s:%s", id[0:2], id[2:4], id[4:6], id[6:8], id[8:10])
}

// startAs makes the sandbox of a spare, which becomes its guest. One that does not fit what CNI has made, or is of no use, gives way to
// another guest. The caller holds life.
func (p *pod) startAs(ctx context.Context, sp *spare) error {
	p.scratch = sp.scratch
	var asked sync.WaitGroup
	var silent error
	asked.Go(func() { silent = sp.answers(ctx) })
	err := p.setupNetwork(ctx, true)
	asked.Wait()
	if err == nil {
		if err = silent; err == nil {
			err = p.takeOver(ctx, sp)
		}
		if err == nil {
			return nil
		}
		p.log.Warn("a guest that waited is of no use for this pod; it gets another one", "error", err)
		err = nil
	}
	kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
	defer cancel()
	if err = errors.Join(err, sp.stop(kill), p.rt.images.RemoveScratch(p.id)); err != nil {
		return err
	}
	if err := p.makeScratch(ctx); err != nil {
		return err
	}
	_, err = p.boot(ctx, false)
	return err
}

// answers fails if the guest's agent does not, for which the pod would wait as long as for a boot.
func (sp *spare) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, spareAnswer)
	defer cancel()
	_, err := sp.client.Info(ctx, &agentpb.InfoRequest{})
	return err
}

// takeOver makes a spare the pod's guest.
func (p *pod) takeOver(ctx context.Context, sp *spare) error {
	began := time.Now()
	if ifs := p.rec.Status().Network.Interfaces; len(ifs) != 1 || ifs[0].Name != network.PreparedInterface {
		return fmt.Errorf("the pod has other interfaces than %s alone: %w", network.PreparedInterface, errdefs.ErrFailedPrecondition)
	}
	process := sp.vm.Record()
	if err := p.cgroup().Add(process.PID); err != nil {
		return err
	}
	kills, err := p.cgroup().OOMKills()
	if err != nil {
		return err
	}
	record := guestRecord{Boot: 1, QEMU: &process, OOMKills: kills, Template: sp.key, PrivateMemory: sp.private, Spare: true}
	p.growing(&record, sp.size)
	if err := p.update(func(s *podStatus) error {
		s.Guest = record
		return nil
	}); err != nil {
		return err
	}
	p.setGuest(newGuest(ctx, p, record.Boot, sp.vm, nil, began, sp.client))
	return nil
}

// hostStats are those of the pod's cgroup, and the memory that its guest took before it was there.
func (p *pod) hostStats() (cgroup.Stats, error) {
	now, err := p.cgroup().Stats()
	if err != nil || !p.rec.Status().Guest.Spare || p.cgroup() == p.rt.spareGroup(p.id) {
		return now, err
	}
	before, err := p.rt.spareGroup(p.id).Stats()
	if err != nil {
		return now, err
	}
	now.MemoryUsageBytes += before.MemoryUsageBytes
	now.MemoryWorkingSetBytes += before.MemoryWorkingSetBytes
	now.MemoryRSSBytes += before.MemoryRSSBytes
	now.MemoryCacheBytes += before.MemoryCacheBytes
	return now, nil
}
