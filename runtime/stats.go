package runtime

import (
	"context"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
)

// statsTimeout bounds the wait for one guest's answer: a guest that still boots or hangs has no statistics,
// and must not hold up those of the others.
const statsTimeout = 2 * time.Second

// cpuSample keeps the last reading of a CPU counter, for the rate.
type cpuSample struct {
	mu    sync.Mutex
	usage uint64
	at    time.Time
	rate  uint64
}

// nanoCores is the rate since the last reading in billionths of a core. Readings closer than a second give the
// last rate again.
func (s *cpuSample) nanoCores(usage uint64, at time.Time) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	elapsed := at.Sub(s.at)
	if !s.at.IsZero() && elapsed < time.Second {
		return s.rate
	}
	if !s.at.IsZero() && usage >= s.usage {
		s.rate = uint64(float64(usage-s.usage) / elapsed.Seconds())
	}
	s.usage, s.at = usage, at
	return s.rate
}

// answer is what a pod's guest tells of what it uses, as far as it answers: its agent of its containers, QEMU of a machine.
type answer struct {
	guest  *agentpb.StatsResponse
	at     time.Time // of the guest's figures, by the node's clock: the kubelet compares it with its own
	memory qemu.MemoryStats
	disks  map[string]qemu.DiskStats
}

// detail is how much a guest is asked, and when.
type detail int

const (
	// fewRecent are the usual figures, which may be some seconds old.
	fewRecent detail = iota
	// fewNow are the usual figures of this moment.
	fewNow
	// allNow are open files too, or the work of a machine's disks, which takes longer.
	allNow
)

// ask asks a pod's guest; one that does not run answers nothing.
func (p *pod) ask(ctx context.Context, d detail) (a answer) {
	g := p.currentGuest()
	if g == nil || !g.alive() {
		return a
	}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	switch {
	case g.machine != nil:
		a.memory, a.disks = g.askMachine(ctx, d == allNow)
	case d == fewRecent:
		a.guest, a.at = g.recentStats(ctx, p.runningIDs())
	default:
		a.guest, a.at = g.askContainers(ctx, d == allNow), time.Now()
	}
	return a
}

// runningIDs are the guest's names of the containers that run.
func (p *pod) runningIDs() (ids []string) {
	for _, c := range p.rt.containersOf(p.id) {
		if c.rec.Status().running() {
			ids = append(ids, c.guestID())
		}
	}
	return ids
}

func (g *guest) askContainers(ctx context.Context, descriptors bool) *agentpb.StatsResponse {
	client, err := g.session(ctx)
	if err != nil {
		return nil
	}
	resp, err := client.Stats(ctx, &agentpb.StatsRequest{Descriptors: descriptors})
	if err != nil {
		g.log.Debug("asking the guest for statistics", "error", err)
		return nil
	}
	g.recent.set(resp)
	return resp
}

// ContainerStats reports what one container uses.
func (rt *Runtime) ContainerStats(ctx context.Context, req *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	c, err := rt.containerByID(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ContainerStatsResponse{Stats: c.stats(c.pod.ask(ctx, fewNow))}, nil
}

// ListContainerStats reports what the containers that the filter lets through use. Guests are asked side by side.
func (rt *Runtime) ListContainerStats(ctx context.Context, req *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	f := req.GetFilter()
	selected := make(map[*pod][]*container)
	for _, c := range rt.allContainers() {
		switch {
		case f.GetId() != "" && !rt.containerIDMatches(f.GetId(), c.id):
		case f.GetPodSandboxId() != "" && !rt.podIDMatches(f.GetPodSandboxId(), c.pod.id):
		case !labelsMatch(f.GetLabelSelector(), c.config().GetLabels()):
		case !c.rec.Status().running():
		default:
			selected[c.pod] = append(selected[c.pod], c)
		}
	}
	resp := &runtimeapi.ListContainerStatsResponse{}
	for p, a := range askAll(ctx, selected, fewRecent) {
		for _, c := range selected[p] {
			resp.Stats = append(resp.Stats, c.stats(a))
		}
	}
	return resp, nil
}

func askAll[V any](ctx context.Context, pods map[*pod]V, d detail) map[*pod]answer {
	var mu sync.Mutex
	var asked sync.WaitGroup
	out := make(map[*pod]answer, len(pods))
	for p := range pods {
		asked.Go(func() {
			a := p.ask(ctx, d)
			mu.Lock()
			defer mu.Unlock()
			out[p] = a
		})
	}
	asked.Wait()
	return out
}

// stats are the container's numbers out of its guest's answer.
func (c *container) stats(a answer) *runtimeapi.ContainerStats {
	cfg := c.config()
	out := &runtimeapi.ContainerStats{Attributes: &runtimeapi.ContainerAttributes{
		Id: c.id, Metadata: cfg.GetMetadata(), Labels: cfg.GetLabels(), Annotations: cfg.GetAnnotations(),
	}}
	if c.isMachine() {
		c.machineStats(a.memory, out)
		return out
	}
	for _, s := range a.guest.GetContainers() {
		if s.GetId() != c.guestID() {
			continue
		}
		now := a.at
		out.Cpu = c.cpuUsage(s.GetCgroup(), now)
		out.Memory = memoryUsage(s.GetCgroup(), now)
		out.Swap = &runtimeapi.SwapUsage{
			Timestamp:          now.UnixNano(),
			SwapAvailableBytes: value(s.GetCgroup().GetSwapAvailableBytes()),
			SwapUsageBytes:     value(s.GetCgroup().GetSwapUsageBytes()),
		}
		out.Io = &runtimeapi.IoUsage{Timestamp: now.UnixNano(), Psi: psi(s.GetCgroup().GetIoPressure())}
		out.WritableLayer = &runtimeapi.FilesystemUsage{
			Timestamp:  now.UnixNano(),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: c.rt.cfg.Server.Root},
			UsedBytes:  value(s.GetWritableBytes()),
			InodesUsed: value(s.GetWritableInodes()),
		}
	}
	return out
}

func (c *container) cpuUsage(s *agentpb.CgroupStats, now time.Time) *runtimeapi.CpuUsage {
	return &runtimeapi.CpuUsage{
		Timestamp:            now.UnixNano(),
		UsageCoreNanoSeconds: value(s.GetCpuUsageNano()),
		UsageNanoCores:       value(c.cpu.nanoCores(s.GetCpuUsageNano(), now)),
		Psi:                  psi(s.GetCpuPressure()),
	}
}

func memoryUsage(s *agentpb.CgroupStats, now time.Time) *runtimeapi.MemoryUsage {
	return &runtimeapi.MemoryUsage{
		Timestamp:       now.UnixNano(),
		WorkingSetBytes: value(s.GetMemoryWorkingSetBytes()),
		AvailableBytes:  value(s.GetMemoryAvailableBytes()),
		UsageBytes:      value(s.GetMemoryUsageBytes()),
		RssBytes:        value(s.GetMemoryRssBytes()),
		PageFaults:      value(s.GetPageFaults()),
		MajorPageFaults: value(s.GetMajorPageFaults()),
		Psi:             psi(s.GetMemoryPressure()),
	}
}

func value(v uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: v} }

func psi(p *agentpb.Pressure) *runtimeapi.PsiStats {
	if p == nil {
		return nil
	}
	return &runtimeapi.PsiStats{Full: psiData(p.GetFull()), Some: psiData(p.GetSome())}
}

func psiData(l *agentpb.PressureLine) *runtimeapi.PsiData {
	return &runtimeapi.PsiData{Total: l.GetTotalUsec(), Avg10: l.GetAvg10(), Avg60: l.GetAvg60(), Avg300: l.GetAvg300()}
}

// PodSandboxStats reports what one pod costs the node, and what its containers use in the guest.
func (rt *Runtime) PodSandboxStats(ctx context.Context, req *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	p, err := rt.podByID(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxStatsResponse{Stats: p.stats(p.ask(ctx, fewNow))}, nil
}

// ListPodSandboxStats reports the pods that the filter lets through and that have not been stopped.
func (rt *Runtime) ListPodSandboxStats(ctx context.Context, req *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	f := req.GetFilter()
	selected := make(map[*pod]struct{})
	for _, p := range rt.allPods() {
		switch {
		case f.GetId() != "" && !rt.podIDMatches(f.GetId(), p.id):
		case !labelsMatch(f.GetLabelSelector(), p.config().GetLabels()):
		case p.state() != runtimeapi.PodSandboxState_SANDBOX_READY:
		default:
			selected[p] = struct{}{}
		}
	}
	resp := &runtimeapi.ListPodSandboxStatsResponse{}
	for p, a := range askAll(ctx, selected, fewRecent) {
		resp.Stats = append(resp.Stats, p.stats(a))
	}
	return resp, nil
}

func (p *pod) stats(a answer) *runtimeapi.PodSandboxStats {
	cfg, now := p.config(), time.Now()
	linux := &runtimeapi.LinuxPodSandboxStats{Network: p.networkUsage(now)}
	if host, err := p.hostStats(); err == nil {
		linux.Cpu = &runtimeapi.CpuUsage{
			Timestamp:            now.UnixNano(),
			UsageCoreNanoSeconds: value(host.CPUUsageNano),
			UsageNanoCores:       value(p.cpu.nanoCores(host.CPUUsageNano, now)),
		}
		linux.Memory = &runtimeapi.MemoryUsage{
			Timestamp:       now.UnixNano(),
			WorkingSetBytes: value(host.MemoryWorkingSetBytes),
			UsageBytes:      value(host.MemoryUsageBytes),
			RssBytes:        value(host.MemoryRSSBytes),
			PageFaults:      value(host.PageFaults),
			MajorPageFaults: value(host.MajorPageFaults),
			AvailableBytes:  p.memoryAvailable(host),
		}
	}
	if a.guest != nil {
		linux.Process = &runtimeapi.ProcessUsage{Timestamp: a.at.UnixNano(), ProcessCount: value(a.guest.GetGuest().GetProcessCount())}
		linux.Io = &runtimeapi.IoUsage{Timestamp: a.at.UnixNano(), Psi: psi(a.guest.GetGuest().GetIoPressure())}
	}
	for _, c := range p.rt.containersOf(p.id) {
		if c.rec.Status().running() {
			linux.Containers = append(linux.Containers, c.stats(a))
		}
	}
	return &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{
			Id: p.id, Metadata: cfg.GetMetadata(), Labels: cfg.GetLabels(), Annotations: cfg.GetAnnotations(),
		},
		Linux: linux,
	}
}

// memoryAvailable is what the pod may still use on the node; nil if it has no limit.
func (p *pod) memoryAvailable(host cgroup.Stats) *runtimeapi.UInt64Value {
	linux := p.limits()
	limit := linux.GetResources().GetMemoryLimitInBytes()
	if limit <= 0 {
		return nil
	}
	limit += linux.GetOverhead().GetMemoryLimitInBytes()
	return value(uint64(max(0, limit-int64(host.MemoryWorkingSetBytes))))
}

func (p *pod) networkUsage(now time.Time) *runtimeapi.NetworkUsage {
	att := p.rec.Status().Network
	if att == nil {
		return nil
	}
	interfaces, err := p.rt.net.Stats(att)
	if err != nil {
		p.log.Debug("reading interface counters", "error", err)
	}
	if len(interfaces) == 0 {
		return nil // the kubelet takes it that usage of the network has a default interface
	}
	out := &runtimeapi.NetworkUsage{Timestamp: now.UnixNano()}
	for i, s := range interfaces {
		u := &runtimeapi.NetworkInterfaceUsage{
			Name: s.Name, RxBytes: value(s.RxBytes), RxErrors: value(s.RxErrors), TxBytes: value(s.TxBytes), TxErrors: value(s.TxErrors),
		}
		if i == 0 {
			out.DefaultInterface = u
		} else {
			out.Interfaces = append(out.Interfaces, u)
		}
	}
	return out
}
