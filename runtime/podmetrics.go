package runtime

import (
	"context"
	"maps"
	"slices"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
)

// These are the metrics that a kubelet with the feature PodAndContainerStatsFromCRI serves at /metrics/cadvisor, under cAdvisor's names. It
// learns the labels of a name once, from whoever describes it first, so ours are those of containerd, in its order. Numbers are
// integers in the CRI: seconds come without fractions.

// metricLabels are what every metric has.
func metricLabels() []string { return []string{"pod", "namespace", "container", "id", "image"} }

// metricDesc describes a metric, with the labels that it has besides.
type metricDesc struct {
	help string
	more []string
}

const (
	cpuUsage            = "container_cpu_usage_seconds_total"
	cpuUser             = "container_cpu_user_seconds_total"
	cpuSystem           = "container_cpu_system_seconds_total"
	cpuPeriods          = "container_cpu_cfs_periods_total"
	cpuThrottledPeriods = "container_cpu_cfs_throttled_periods_total"
	cpuThrottledSeconds = "container_cpu_cfs_throttled_seconds_total"

	memoryUsageBytes   = "container_memory_usage_bytes"
	memoryMaxUsage     = "container_memory_max_usage_bytes"
	memoryWorkingSet   = "container_memory_working_set_bytes"
	memoryRSS          = "container_memory_rss"
	memoryCache        = "container_memory_cache"
	memoryKernel       = "container_memory_kernel_usage"
	memoryMappedFile   = "container_memory_mapped_file"
	memoryActiveFile   = "container_memory_total_active_file_bytes"
	memoryInactiveFile = "container_memory_total_inactive_file_bytes"
	memorySwap         = "container_memory_swap"
	memoryFailCount    = "container_memory_failcnt"
	memoryFailures     = "container_memory_failures_total"
	oomEvents          = "container_oom_events_total"

	networkReceiveBytes    = "container_network_receive_bytes_total"
	networkReceivePackets  = "container_network_receive_packets_total"
	networkReceiveDropped  = "container_network_receive_packets_dropped_total"
	networkReceiveErrors   = "container_network_receive_errors_total"
	networkTransmitBytes   = "container_network_transmit_bytes_total"
	networkTransmitPackets = "container_network_transmit_packets_total"
	networkTransmitDropped = "container_network_transmit_packets_dropped_total"
	networkTransmitErrors  = "container_network_transmit_errors_total"

	fsUsage       = "container_fs_usage_bytes"
	fsLimit       = "container_fs_limit_bytes"
	fsInodes      = "container_fs_inodes_total"
	fsInodesFree  = "container_fs_inodes_free"
	fsReadBytes   = "container_fs_reads_bytes_total"
	fsReads       = "container_fs_reads_total"
	fsWriteBytes  = "container_fs_writes_bytes_total"
	fsWrites      = "container_fs_writes_total"
	processCount  = "container_processes"
	threadCount   = "container_threads"
	threadsMax    = "container_threads_max"
	openFiles     = "container_file_descriptors"
	openSockets   = "container_sockets"
	ulimitsSoft   = "container_ulimits_soft"
	lastSeen      = "container_last_seen"
	startTime     = "container_start_time_seconds"
	specPeriod    = "container_spec_cpu_period"
	specShares    = "container_spec_cpu_shares"
	specMemory    = "container_spec_memory_limit_bytes"
	specSwap      = "container_spec_memory_swap_limit_bytes"
	cpuWaiting    = "container_pressure_cpu_waiting_seconds_total"
	cpuStalled    = "container_pressure_cpu_stalled_seconds_total"
	memoryWaiting = "container_pressure_memory_waiting_seconds_total"
	memoryStalled = "container_pressure_memory_stalled_seconds_total"
	ioWaiting     = "container_pressure_io_waiting_seconds_total"
	ioStalled     = "container_pressure_io_stalled_seconds_total"
)

// metricDescs are all metrics of VM pods.
func metricDescs() map[string]metricDesc {
	network, device := []string{"interface"}, []string{"device"}
	return map[string]metricDesc{
		cpuUsage:            {help: "Processor time used, in seconds."},
		cpuUser:             {help: "Processor time used in user mode, in seconds."},
		cpuSystem:           {help: "Processor time used in the kernel, in seconds."},
		cpuPeriods:          {help: "Periods of the CPU limit that have passed."},
		cpuThrottledPeriods: {help: "Periods in which the CPU limit was reached."},
		cpuThrottledSeconds: {help: "How long processes were held back by the CPU limit, in seconds."},

		memoryUsageBytes:   {help: "Memory in use, caches included."},
		memoryMaxUsage:     {help: "The most memory that was ever in use."},
		memoryWorkingSet:   {help: "Memory in use without file contents that were not used of late."},
		memoryRSS:          {help: "Anonymous memory."},
		memoryCache:        {help: "File contents in memory."},
		memoryKernel:       {help: "Memory of the kernel on behalf of the processes."},
		memoryMappedFile:   {help: "Mapped file contents in memory."},
		memoryActiveFile:   {help: "File contents in memory that were used of late."},
		memoryInactiveFile: {help: "File contents in memory that were not used of late."},
		memorySwap:         {help: "Swap in use."},
		memoryFailCount:    {help: "How often the memory limit was reached."},
		memoryFailures:     {help: "Page faults.", more: []string{"failure_type", "scope"}},
		oomEvents:          {help: "Processes killed for want of memory."},

		networkReceiveBytes:    {help: "Bytes received.", more: network},
		networkReceivePackets:  {help: "Packets received.", more: network},
		networkReceiveDropped:  {help: "Packets dropped while receiving.", more: network},
		networkReceiveErrors:   {help: "Errors while receiving.", more: network},
		networkTransmitBytes:   {help: "Bytes sent.", more: network},
		networkTransmitPackets: {help: "Packets sent.", more: network},
		networkTransmitDropped: {help: "Packets dropped while sending.", more: network},
		networkTransmitErrors:  {help: "Errors while sending.", more: network},

		fsUsage:      {help: "Bytes written to the root file system.", more: device},
		fsLimit:      {help: "Size of the file system that holds what is written to the root file system.", more: device},
		fsInodes:     {help: "Inodes of that file system.", more: device},
		fsInodesFree: {help: "Free inodes of that file system.", more: device},
		fsReadBytes:  {help: "Bytes read from disks.", more: device},
		fsReads:      {help: "Reads from disks.", more: device},
		fsWriteBytes: {help: "Bytes written to disks.", more: device},
		fsWrites:     {help: "Writes to disks.", more: device},

		processCount:  {help: "Processes."},
		threadCount:   {help: "Threads."},
		threadsMax:    {help: "The most threads there may be; 0 is no limit."},
		openFiles:     {help: "Open file descriptors."},
		openSockets:   {help: "Open sockets."},
		ulimitsSoft:   {help: "Soft resource limits of the container's first process.", more: []string{"ulimit"}},
		lastSeen:      {help: "When the figures were taken, in seconds since 1970."},
		startTime:     {help: "When it was started, in seconds since 1970."},
		specPeriod:    {help: "Period of the CPU limit in microseconds."},
		specShares:    {help: "CPU shares."},
		specMemory:    {help: "Memory limit."},
		specSwap:      {help: "Limit of memory and swap together."},
		cpuWaiting:    {help: "How long some processes waited for a processor, in seconds."},
		cpuStalled:    {help: "How long all processes waited for a processor, in seconds."},
		memoryWaiting: {help: "How long some processes waited for memory, in seconds."},
		memoryStalled: {help: "How long all processes waited for memory, in seconds."},
		ioWaiting:     {help: "How long some processes waited for disks, in seconds."},
		ioStalled:     {help: "How long all processes waited for disks, in seconds."},
	}
}

// ListMetricDescriptors describes the metrics of VM pods.
func (rt *Runtime) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	resp := &runtimeapi.ListMetricDescriptorsResponse{}
	descs := metricDescs()
	for _, name := range slices.Sorted(maps.Keys(descs)) {
		d := descs[name]
		resp.Descriptors = append(resp.Descriptors, &runtimeapi.MetricDescriptor{Name: name, Help: d.help, LabelKeys: append(metricLabels(), d.more...)})
	}
	return resp, nil
}

// ListPodSandboxMetrics gives the metrics of the VM pods that are ready. A pod's own are what it costs the node, with the label "container"
// empty; a container's are what it uses in its guest.
func (rt *Runtime) ListPodSandboxMetrics(ctx context.Context, _ *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	ready := make(map[*pod]struct{})
	for _, p := range rt.allPods() {
		if p.state() == runtimeapi.PodSandboxState_SANDBOX_READY {
			ready[p] = struct{}{}
		}
	}
	resp := &runtimeapi.ListPodSandboxMetricsResponse{}
	for p, a := range askAll(ctx, ready, allNow) {
		resp.PodMetrics = append(resp.PodMetrics, p.metrics(a))
	}
	return resp, nil
}

func (p *pod) metrics(a answer) *runtimeapi.PodSandboxMetrics {
	s := p.samples("", p.id, "")
	s.seen(p.rec.Spec().CreatedAt)
	host, err := p.hostStats()
	if err != nil {
		p.log.Debug("reading the pod's cgroup", "error", err)
	} else {
		s.host(host)
	}
	p.networkSamples(s)
	out := &runtimeapi.PodSandboxMetrics{PodSandboxId: p.id, Metrics: s.list}
	for _, c := range p.rt.containersOf(p.id) {
		if c.rec.Status().running() {
			out.ContainerMetrics = append(out.ContainerMetrics, c.metrics(a))
		}
	}
	return out
}

// networkSamples are of each interface, as the pod sees it.
func (p *pod) networkSamples(s *samples) {
	att := p.rec.Status().Network
	if att == nil {
		return
	}
	interfaces, err := p.rt.net.Stats(att)
	if err != nil {
		p.log.Debug("reading interface counters", "error", err)
	}
	for _, i := range interfaces {
		s.counter(networkReceiveBytes, i.RxBytes, i.Name)
		s.counter(networkReceivePackets, i.RxPackets, i.Name)
		s.counter(networkReceiveDropped, i.RxDropped, i.Name)
		s.counter(networkReceiveErrors, i.RxErrors, i.Name)
		s.counter(networkTransmitBytes, i.TxBytes, i.Name)
		s.counter(networkTransmitPackets, i.TxPackets, i.Name)
		s.counter(networkTransmitDropped, i.TxDropped, i.Name)
		s.counter(networkTransmitErrors, i.TxErrors, i.Name)
	}
}

func (c *container) metrics(a answer) *runtimeapi.ContainerMetrics {
	s := c.pod.samples(c.config().GetMetadata().GetName(), c.id, c.config().GetImage().GetUserSpecifiedImage())
	s.seen(c.rec.Status().StartedAt)
	s.spec(c.resources())
	if oci := c.rec.Spec().OCI; oci != nil && oci.Process != nil {
		for _, l := range oci.Process.Rlimits {
			s.gauge(ulimitsSoft, l.Soft, l.Type)
		}
	}
	if c.isMachine() {
		c.machineSamples(a, s)
	}
	for _, g := range a.guest.GetContainers() {
		if g.GetId() == c.guestID() {
			s.guest(g)
		}
	}
	return &runtimeapi.ContainerMetrics{ContainerId: c.id, Metrics: s.list}
}

// machineSamples are of a guest that has no containers of ours: its statistics, and what its disks have done.
func (c *container) machineSamples(a answer, s *samples) {
	st := &runtimeapi.ContainerStats{}
	c.machineStats(a.memory, st)
	if st.GetCpu() == nil {
		return // it does not run
	}
	s.counter(cpuUsage, seconds(st.GetCpu().GetUsageCoreNanoSeconds().GetValue()))
	s.gauge(memoryUsageBytes, st.GetMemory().GetUsageBytes().GetValue())
	s.gauge(memoryWorkingSet, st.GetMemory().GetWorkingSetBytes().GetValue())
	s.gauge(memoryRSS, st.GetMemory().GetRssBytes().GetValue())
	s.counter(memoryFailures, st.GetMemory().GetPageFaults().GetValue(), "pgfault", "container")
	s.counter(memoryFailures, st.GetMemory().GetMajorPageFaults().GetValue(), "pgmajfault", "container")
	s.gauge(fsUsage, st.GetWritableLayer().GetUsedBytes().GetValue(), "/")
	for serial, d := range a.disks {
		s.disk(&agentpb.DiskIO{
			Device: serial, ReadBytes: uint64(d.ReadBytes), Reads: uint64(d.Reads), WriteBytes: uint64(d.WriteBytes), Writes: uint64(d.Writes),
		})
	}
}

// samples are the metrics of one pod or container.
type samples struct {
	labels []string
	at     time.Time
	list   []*runtimeapi.Metric
}

func (p *pod) samples(container, id, image string) *samples {
	m := p.config().GetMetadata()
	return &samples{labels: []string{m.GetName(), m.GetNamespace(), container, id, image}, at: time.Now()}
}

func (s *samples) add(kind runtimeapi.MetricType, name string, v uint64, more []string) {
	s.list = append(s.list, &runtimeapi.Metric{
		Name: name, Timestamp: s.at.UnixNano(), MetricType: kind, LabelValues: append(slices.Clone(s.labels), more...), Value: value(v),
	})
}

func (s *samples) counter(name string, v uint64, more ...string) {
	s.add(runtimeapi.MetricType_COUNTER, name, v, more)
}

func (s *samples) gauge(name string, v uint64, more ...string) {
	s.add(runtimeapi.MetricType_GAUGE, name, v, more)
}

func seconds(nano uint64) uint64 { return nano / uint64(time.Second) }

func (s *samples) seen(start time.Time) {
	s.gauge(lastSeen, uint64(s.at.Unix()))
	s.gauge(startTime, uint64(start.Unix()))
}

// host is what the node spends.
func (s *samples) host(h cgroup.Stats) {
	s.counter(cpuUsage, seconds(h.CPUUsageNano))
	s.counter(cpuUser, seconds(h.CPUUserNano))
	s.counter(cpuSystem, seconds(h.CPUSystemNano))
	s.counter(cpuPeriods, h.CPUPeriods)
	s.counter(cpuThrottledPeriods, h.CPUThrottledPeriods)
	s.counter(cpuThrottledSeconds, seconds(h.CPUThrottledNano))
	s.gauge(memoryUsageBytes, h.MemoryUsageBytes)
	s.gauge(memoryWorkingSet, h.MemoryWorkingSetBytes)
	s.gauge(memoryRSS, h.MemoryRSSBytes)
	s.gauge(memoryCache, h.MemoryCacheBytes)
	s.counter(memoryFailures, h.PageFaults, "pgfault", "container")
	s.counter(memoryFailures, h.MajorPageFaults, "pgmajfault", "container")
	s.gauge(threadCount, h.Processes)
}

// guest is what a container uses in its guest.
func (s *samples) guest(g *agentpb.ContainerStats) {
	c := g.GetCgroup()
	s.counter(cpuUsage, seconds(c.GetCpuUsageNano()))
	s.counter(cpuUser, seconds(c.GetCpuUserNano()))
	s.counter(cpuSystem, seconds(c.GetCpuSystemNano()))
	s.counter(cpuPeriods, c.GetCpuPeriods())
	s.counter(cpuThrottledPeriods, c.GetCpuThrottledPeriods())
	s.counter(cpuThrottledSeconds, seconds(c.GetCpuThrottledNano()))
	s.guestMemory(c)
	s.gauge(fsUsage, g.GetWritableBytes(), "/")
	s.gauge(fsLimit, g.GetWritableSizeBytes(), "/")
	s.gauge(fsInodes, g.GetWritableInodesTotal(), "/")
	s.gauge(fsInodesFree, g.GetWritableInodesFree(), "/")
	for _, d := range c.GetDisks() {
		s.disk(d)
	}
	s.gauge(processCount, c.GetProcessCount())
	s.gauge(threadCount, c.GetThreadCount())
	s.gauge(threadsMax, c.GetThreadLimit())
	s.gauge(openFiles, g.GetFileDescriptors())
	s.gauge(openSockets, g.GetSockets())
	s.pressure(cpuWaiting, cpuStalled, c.GetCpuPressure())
	s.pressure(memoryWaiting, memoryStalled, c.GetMemoryPressure())
	s.pressure(ioWaiting, ioStalled, c.GetIoPressure())
}

func (s *samples) guestMemory(c *agentpb.CgroupStats) {
	s.gauge(memoryUsageBytes, c.GetMemoryUsageBytes())
	s.gauge(memoryMaxUsage, c.GetMemoryMaxUsageBytes())
	s.gauge(memoryWorkingSet, c.GetMemoryWorkingSetBytes())
	s.gauge(memoryRSS, c.GetMemoryRssBytes())
	s.gauge(memoryCache, c.GetMemoryCacheBytes())
	s.gauge(memoryKernel, c.GetMemoryKernelBytes())
	s.gauge(memoryMappedFile, c.GetMemoryMappedFileBytes())
	s.gauge(memoryActiveFile, c.GetMemoryActiveFileBytes())
	s.gauge(memoryInactiveFile, c.GetMemoryInactiveFileBytes())
	s.gauge(memorySwap, c.GetSwapUsageBytes())
	s.counter(memoryFailCount, c.GetMemoryLimitHits())
	s.counter(memoryFailures, c.GetPageFaults(), "pgfault", "container")
	s.counter(memoryFailures, c.GetMajorPageFaults(), "pgmajfault", "container")
	s.counter(oomEvents, c.GetOomKills())
}

func (s *samples) disk(d *agentpb.DiskIO) {
	s.counter(fsReadBytes, d.GetReadBytes(), d.GetDevice())
	s.counter(fsReads, d.GetReads(), d.GetDevice())
	s.counter(fsWriteBytes, d.GetWriteBytes(), d.GetDevice())
	s.counter(fsWrites, d.GetWrites(), d.GetDevice())
}

// pressure is there where the guest's kernel tells it.
func (s *samples) pressure(waiting, stalled string, p *agentpb.Pressure) {
	if p == nil {
		return
	}
	const second = uint64(time.Second / time.Microsecond)
	s.counter(waiting, p.GetSome().GetTotalUsec()/second)
	s.counter(stalled, p.GetFull().GetTotalUsec()/second)
}

// spec are the limits that are set.
func (s *samples) spec(r *runtimeapi.LinuxContainerResources) {
	for name, v := range map[string]int64{
		specPeriod: r.GetCpuPeriod(), specShares: r.GetCpuShares(), specMemory: r.GetMemoryLimitInBytes(), specSwap: r.GetMemorySwapLimitInBytes(),
	} {
		if v > 0 {
			s.gauge(name, uint64(v))
		}
	}
}
