package runtime

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
	"github.com/vmruntime/vmruntime/runtime/state"
	"github.com/vmruntime/vmruntime/trace"
)

// pod is a sandbox while the daemon runs: its record and, when there is one, its guest.
type pod struct {
	rt  *Runtime
	id  string
	rec *state.Record[podSpec, podStatus]
	log *slog.Logger
	// networkLost says that the network of the record was not there any more when this daemon found it, as after a reboot.
	networkLost bool
	// listed is what never changes of the sandbox in lists.
	listed protoreflect.RawFields

	// life is held by whatever makes or ends the sandbox or its guest: one at a time.
	life sync.Mutex
	// stopping forbids populations, whose lock guards it.
	stopping bool
	// scratch is the disk for the next guest; life guards it.
	scratch string
	// incoming is what the next guest is restored from, until it is this pod; life guards it while it is made.
	incoming atomic.Pointer[incoming]
	// cut ends the checkpoint that is being taken, if one is.
	cut atomic.Pointer[context.CancelCauseFunc]

	mu    sync.Mutex
	guest *guest
	files *projections
	cpu   cpuSample
}

func (rt *Runtime) newPod(rec *state.Record[podSpec, podStatus]) *pod {
	p := &pod{rt: rt, id: rec.ID(), rec: rec, log: rt.log.With("pod", rec.ID())}
	if att := rec.Status().Network; att != nil {
		_, err := os.Stat(att.NetNS)
		p.networkLost = err != nil
	}
	p.listed = frozen(&runtimeapi.PodSandbox{
		Metadata:       p.config().GetMetadata(),
		CreatedAt:      rec.Spec().CreatedAt.UnixNano(),
		Labels:         p.config().GetLabels(),
		Annotations:    p.config().GetAnnotations(),
		RuntimeHandler: rec.Spec().Handler,
	})
	return p
}

func (p *pod) config() *runtimeapi.PodSandboxConfig { return p.rec.Spec().Config.M }

func (p *pod) update(change func(*podStatus) error) error { return p.rec.Update(change) }

// state is READY while the sandbox has not been stopped and its network is there.
func (p *pod) state() runtimeapi.PodSandboxState {
	s := p.rec.Status()
	if s.ReadyAt.IsZero() || !s.StoppedAt.IsZero() || s.Network == nil || p.networkLost {
		return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	return runtimeapi.PodSandboxState_SANDBOX_READY
}

// tag says in the call's span which pod it is about.
func (p *pod) tag(ctx context.Context) {
	meta := p.config().GetMetadata()
	trace.Tag(ctx, "k8s.pod.name", meta.GetName())
	trace.Tag(ctx, "k8s.pod.uid", meta.GetUid())
	trace.Tag(ctx, "k8s.namespace.name", meta.GetNamespace())
	trace.Tag(ctx, "vmruntime.sandbox.id", p.id)
}

func (p *pod) runDir() string { return p.rt.runDir(p.id) }

func (rt *Runtime) runDir(id string) string { return filepath.Join(rt.cfg.Server.State, "pods", id) }

func (p *pod) cgroup() cgroup.Group {
	return cgroup.For(p.config().GetLinux().GetCgroupParent(), p.id)
}

func (p *pod) currentGuest() *guest {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.guest
}

func (p *pod) setGuest(g *guest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.guest = g
}

// prepare gives the sandbox its network and its scratch disk. The caller holds life.
func (p *pod) prepare(ctx context.Context) error {
	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() error { return p.setupNetwork(ctx, false) })
	work.Go(func() error { return trace.Do(ctx, "scratch disk", p.makeScratch) })
	return work.Wait()
}

// setupNetwork makes the pod's network, in a namespace that is there already if it is prepared.
func (p *pod) setupNetwork(ctx context.Context, prepared bool) error {
	req := p.networkRequest()
	req.Prepared = prepared
	var att *network.Attachment
	err := trace.Do(ctx, "network", func(ctx context.Context) (err error) {
		att, err = p.rt.net.Setup(ctx, req)
		return err
	})
	p.rt.spares.networked(err == nil)
	if err != nil {
		return fmt.Errorf("set up the network: %w", err)
	}
	return p.update(func(s *podStatus) error { s.Network = att; return nil })
}

func (p *pod) makeScratch(ctx context.Context) error {
	path, err := p.rt.images.CreateScratch(ctx, p.id, int64(p.rt.cfg.VM.ScratchSize))
	if err != nil {
		return fmt.Errorf("make the scratch disk: %w", err)
	}
	p.scratch = path
	return nil
}

func (p *pod) networkRequest() network.Request {
	cfg := p.config()
	req := network.Request{
		ID:           p.id,
		Name:         cfg.GetMetadata().GetName(),
		Namespace:    cfg.GetMetadata().GetNamespace(),
		UID:          cfg.GetMetadata().GetUid(),
		Annotations:  cfg.GetAnnotations(),
		CgroupParent: cfg.GetLinux().GetCgroupParent(),
		DNS: network.DNS{
			Servers:  cfg.GetDnsConfig().GetServers(),
			Searches: cfg.GetDnsConfig().GetSearches(),
			Options:  cfg.GetDnsConfig().GetOptions(),
		},
	}
	for _, m := range cfg.GetPortMappings() {
		if m.GetHostPort() <= 0 {
			continue
		}
		req.PortMappings = append(req.PortMappings, network.PortMapping{
			Protocol:      m.GetProtocol().String(),
			ContainerPort: m.GetContainerPort(),
			HostPort:      m.GetHostPort(),
			HostIP:        m.GetHostIp(),
		})
	}
	return req
}

// boot starts a guest of ours in the sandbox, as a copy of a template if there is one; sharing says that it will get a shared
// directory. The caller holds life.
func (p *pod) boot(ctx context.Context, sharing bool) (g *guest, err error) {
	if err := p.rt.mayBoot(ctx); err != nil {
		return nil, err
	}
	defer func() { p.rt.whileBooting(g) }()
	// Our guest is told its addresses by its agent. A machine before it may have left its guards.
	if err := p.rt.net.Unguard(p.rec.Status().Network); err != nil {
		return nil, err
	}
	if err := p.makeRunDir(); err != nil {
		return nil, err
	}
	for _, begin := range p.rt.beginnings(p.rec.Spec(), p.size()) {
		if g, err := p.bootTemplate(ctx, begin, sharing); g != nil || err != nil {
			return g, err
		}
	}
	machine, err := p.machine(ctx, p.size())
	if err != nil {
		return nil, err
	}
	return p.launch(ctx, machine, nil, nil)
}

// bootTemplate starts a guest of a size as a copy of a template; nil if there is none, or it is of no use. The caller holds life.
func (p *pod) bootTemplate(ctx context.Context, begin vmSize, sharing bool) (*guest, error) {
	machine, err := p.machine(ctx, begin)
	if err != nil {
		return nil, err
	}
	t := p.rt.templates.take(machine, p.config().GetMetadata().GetNamespace())
	if t == nil {
		return nil, nil
	}
	defer t.Close()
	g, err := p.launch(ctx, t.clone(machine, p.rt.cfg.Template.Share, sharing), nil, t)
	switch {
	case errors.Is(err, errNotPlugged):
		p.log.Warn("the guest boots, as it cannot begin smaller and grow", "template", t.key, "error", err)
		p.rt.templates.stopGrowing()
		return nil, nil
	case err != nil:
		p.log.Warn("no guest begins as this template", "template", t.key, "error", err)
		p.rt.templates.drop(t.key)
		return nil, nil
	}
	return g, nil
}

// wantTemplate has templates made for the next pods like this one, of its size and of that from which it can grow, and a guest wait for
// the next one: now that a container runs, which tells that the pod is none of a machine, and that the guest needs the node's processors no
// more.
func (p *pod) wantTemplate(ctx context.Context) {
	guest, size := p.rec.Status().Guest, p.size()
	for _, begin := range p.rt.beginnings(p.rec.Spec(), size) {
		machine, err := p.machine(ctx, begin)
		if err != nil {
			p.log.Debug("no template is made", "error", err)
			return
		}
		namespace := p.config().GetMetadata().GetNamespace()
		key, _, ok := p.rt.templates.find(shape(machine), namespace)
		began := ok && guest.Template == key
		there := began || p.rt.templates.want(machine, namespace)
		if there && begin == size {
			p.rt.spares.want(shape(machine))
		}
	}
}

func (p *pod) makeRunDir() error { return os.MkdirAll(p.runDir(), 0o711) }

// launch runs QEMU; parts are what stands beside it, nil for a guest of ours, which may begin as a template. On error they stay
// the caller's. The caller holds life.
func (p *pod) launch(ctx context.Context, machine qemu.Machine, parts *machineParts, from *template) (g *guest, err error) {
	began := time.Now()
	defer func() { p.rt.metrics.launched(parts, began, err) }()
	if err := enoughHugePages(machine); err != nil {
		return nil, err
	}
	taps, err := p.rt.net.OpenTaps(p.rec.Status().Network)
	if err != nil {
		return nil, fmt.Errorf("open the taps: %w", err)
	}
	defer func() {
		for _, t := range taps {
			_ = t.Close()
		}
	}()
	kills, err := p.cgroup().OOMKills()
	if err != nil {
		return nil, err
	}
	spec := qemu.Spec{
		Machine:  machine,
		Binary:   p.rt.cfg.QEMU.Binary,
		Launcher: p.rt.launcher,
		RunDir:   p.runDir(),
		UID:      p.rec.Spec().UID,
		GID:      p.rec.Spec().UID,
		Taps:     taps,
		Place:    p.cgroup().Add,
	}
	p.incoming.Load().give(&spec)
	from.give(&spec)
	vm, err := qemu.Start(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	if from != nil {
		if err := p.resume(ctx, vm, machine); err != nil {
			return nil, errors.Join(fmt.Errorf("let the guest go on: %w", err), p.killVM(vm))
		}
	}
	qemuRecord := vm.Record()
	p.rt.metrics.restarted(p.rec.Status().Guest, parts)
	record := guestRecord{Boot: p.rec.Status().Guest.Boot + 1, QEMU: &qemuRecord, OOMKills: kills}
	parts.record(&record)
	if from != nil {
		record.Template, record.PrivateMemory = from.key, machine.Memory == qemu.MemoryPrivate
		p.growing(&record, sizeOf(machine))
	}
	if err := p.update(func(s *podStatus) error {
		s.Guest = record
		s.Capturing = s.Capturing && p.incoming.Load() != nil // else that was said of a guest before
		return nil
	}); err != nil {
		return nil, errors.Join(err, p.killVM(vm))
	}
	g = newGuest(ctx, p, record.Boot, vm, parts, began, nil)
	if share := parts.handOver(); share != nil {
		g.followShare(share)
	}
	p.setGuest(g)
	return g, nil
}

// errNotPlugged is a copy of a template, which is as good as before, that did not get the processors of its pod.
var errNotPlugged = errors.New("plug the pod's processors")

// resume lets a copy of a template go on, with the processors that it is to have: see plugAhead.
func (p *pod) resume(ctx context.Context, vm *qemu.VM, m qemu.Machine) error {
	if size := p.size(); size.VCPUs > m.VCPUs {
		if err := vm.AddVCPUs(ctx, size.VCPUs); err != nil {
			return fmt.Errorf("%w: %w", errNotPlugged, err)
		}
	}
	return trace.Do(ctx, "resume", vm.Resume)
}

func (p *pod) killVM(vm *qemu.VM) error {
	ctx, cancel := context.WithTimeout(context.Background(), teardownTimeout)
	defer cancel()
	return errors.Join(vm.Kill(ctx), vm.Close())
}

// machine describes the pod's VM, which begins with a size.
func (p *pod) machine(ctx context.Context, begin vmSize) (qemu.Machine, error) {
	m, err := p.rt.containerVM(ctx, p.rec.Spec(), begin)
	m.Name, m.Disks, m.NICs = vmName(p.id), scratchDisks(p.scratch), nics(p.rec.Status().Network)
	return m, err
}

// containerVM is a container VM of such a size, without what is one pod's own.
func (rt *Runtime) containerVM(ctx context.Context, spec podSpec, size vmSize) (qemu.Machine, error) {
	accel, err := rt.accel.verdict(ctx)
	if err != nil {
		return qemu.Machine{}, err
	}
	m := rt.guestImage.machine(accel.Accel)
	m.VCPUs = size.VCPUs
	m.MemoryBytes, m.HugeNodeBytes = size.MemoryBytes, spec.HugeBytes
	giveRoom(&m, max(size.VCPUs, spec.MaxVCPUs), max(size.MemoryBytes, spec.MaxMemoryBytes))
	return m, nil
}

func vmName(id string) string { return "vmruntime-" + id[:16] }

func scratchDisks(path string) []qemu.Disk {
	return []qemu.Disk{{Serial: scratchSerial, Path: path, Format: "raw"}}
}

const (
	scratchSerial = "scratch"
	shmSize       = 64 << 20 // of /dev/shm, as containerd has it
)

// runningGuest returns the guest, booting another where the last one has ended: the sandbox and its
// network outlive a guest, so the kubelet restarts containers without a new sandbox. One that cannot get the shared directory that is
// needed gives way to another one, unless a container has begun to run in it.
func (p *pod) runningGuest(ctx context.Context, sharing bool) (*guest, error) {
	p.life.Lock()
	defer p.life.Unlock()
	g := p.currentGuest()
	if g != nil && g.machine == nil && g.alive() {
		if !sharing || !p.rec.Status().Guest.PrivateMemory {
			return g, nil
		}
		if p.started(g.boot) {
			return nil, fmt.Errorf("template.share is %q, so the VM of sandbox %s, in which containers have started, can get no shared directory; "+
				"set template.share to off, or give the pod's first container a volume too: %w", p.rt.cfg.Template.Share, p.id, errdefs.ErrFailedPrecondition)
		}
	}
	if p.state() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return nil, fmt.Errorf("sandbox %s is not ready; it cannot start a guest: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	if err := p.endGuest(ctx, g); err != nil {
		return nil, fmt.Errorf("clear away the guest that ended: %w", err)
	}
	if err := p.rt.images.RemoveScratch(p.id); err != nil {
		return nil, err
	}
	if err := p.makeScratch(ctx); err != nil {
		return nil, err
	}
	return p.boot(ctx, sharing)
}

// started tells whether a container has begun to run in the guest of this number.
func (p *pod) started(boot int) bool {
	return slices.ContainsFunc(p.rt.containersOf(p.id), func(c *container) bool { return c.rec.Status().Boot == boot })
}

// endGuest ends QEMU and virtiofsd and forgets the guest. The caller holds life.
func (p *pod) endGuest(ctx context.Context, g *guest) error {
	var errs []error
	if g != nil {
		g.told.Store(true)
		errs = append(errs, g.vm.Kill(ctx), g.Close())
		p.setGuest(nil)
	}
	errs = append(errs, p.cgroup().Kill(ctx), p.rt.spareGroup(p.id).Kill(ctx), p.letNetworkGo())
	return errors.Join(errs...)
}

// sandboxRequest is what makes a fresh guest this pod.
func (p *pod) sandboxRequest() (*agentpb.ConfigureSandboxRequest, error) {
	cfg, s := p.config(), p.rec.Status()
	resolv, err := p.resolvConf()
	if err != nil {
		return nil, err
	}
	req := &agentpb.ConfigureSandboxRequest{
		Hostname:        p.hostname(),
		ResolvConf:      resolv,
		Hosts:           p.hosts(s.Network),
		Sysctls:         cfg.GetLinux().GetSysctls(),
		ScratchDisk:     scratchSerial,
		ShmSizeBytes:    shmSize,
		HugePages:       p.rec.Spec().HugeBytes / qemu.HugeNodePage,
		PodPidNamespace: cfg.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_POD,
	}
	if uids, gids := ocispec.Users(cfg); uids != nil {
		req.Users = &agentpb.IDRange{First: uids.GetHostId(), Count: uids.GetLength()}
		req.Groups = &agentpb.IDRange{First: gids.GetHostId(), Count: gids.GetLength()}
	}
	for _, nic := range s.Network.Interfaces {
		i := &agentpb.Interface{Name: nic.Name, Mac: nic.MAC, Mtu: int32(nic.MTU)}
		for _, a := range nic.Addresses {
			i.Addresses = append(i.Addresses, a.String())
		}
		req.Interfaces = append(req.Interfaces, i)
	}
	if s.Guest.Spare {
		req.Hardware = []*agentpb.HardwareAddress{{Old: spareMAC(p.id), New: s.Network.Interfaces[0].MAC}}
	}
	for _, r := range s.Network.Routes {
		req.Routes = append(req.Routes, routeOf(r))
	}
	for _, n := range s.Network.Neighbors {
		req.Neighbors = append(req.Neighbors, &agentpb.Neighbor{Address: n.Address.String(), Mac: n.MAC, Interface: n.Interface})
	}
	return req, nil
}

// hostname is what the kubelet asks, or the node's, as with containerd.
func (p *pod) hostname() string {
	if h := p.config().GetHostname(); h != "" {
		return h
	}
	h, err := os.Hostname()
	if err != nil {
		return "localhost"
	}
	return h
}

// applyCPUQuota bounds QEMU to what the pod may use, once the guest is up: a quota during the boot
// would only make it longer.
func (p *pod) applyCPUQuota() error {
	res := p.limits().GetResources()
	if res.GetCpuQuota() <= 0 || res.GetCpuPeriod() <= 0 {
		return nil
	}
	quota := res.GetCpuQuota()
	if o := p.limits().GetOverhead(); o.GetCpuQuota() > 0 && o.GetCpuPeriod() > 0 {
		quota += o.GetCpuQuota() * res.GetCpuPeriod() / o.GetCpuPeriod()
	}
	return p.cgroup().SetCPUQuota(quota, uint64(res.GetCpuPeriod()))
}

// teardownTimeout bounds one teardown: every step has to end, whatever hangs.
const teardownTimeout = 60 * time.Second

// teardown takes away everything that a pod has on the node but its record. All steps run, in an order that
// nothing is used after it is gone; each succeeds when there is nothing to do, so that it serves a failed
// start, stop, removal and recovery alike. The caller holds life.
func (p *pod) teardown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
	defer cancel()
	p.stopProjections()
	p.rt.populations.stop(p)
	return errors.Join(
		p.endGuest(ctx, p.currentGuest()),
		p.rt.net.Teardown(ctx, p.networkRequest()),
		removeRunDir(p.runDir()),
		p.rt.images.RemoveScratch(p.id),
		p.cgroup().Delete(),
		p.rt.spareGroup(p.id).Delete(),
	)
}
