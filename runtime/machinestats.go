package runtime

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/qga"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
)

// askMachine asks QEMU for what the balloon driver tells, and for what the disks have done.
func (g *guest) askMachine(ctx context.Context, all bool) (qemu.MemoryStats, map[string]qemu.DiskStats) {
	memory, err := g.vm.MemoryStats(ctx)
	if err != nil {
		g.log.Debug("asking for the guest's memory", "error", err)
	}
	if !all {
		return memory, nil
	}
	disks, err := g.vm.DiskStats(ctx)
	if err != nil {
		g.log.Debug("asking for the disks' counters", "error", err)
	}
	return memory, disks
}

// machineStats are a machine's numbers: processor time as the node spends it, memory as the guest's balloon driver
// tells it, or else as the node spends it, and what its disks have taken beyond the image.
func (c *container) machineStats(guest qemu.MemoryStats, out *runtimeapi.ContainerStats) {
	g := c.machineGuest()
	if g == nil || !g.alive() {
		return
	}
	now := time.Now()
	host, err := c.pod.cgroup().Stats()
	if err != nil {
		c.log.Debug("reading the pod's cgroup", "error", err)
		return
	}
	out.Cpu = &runtimeapi.CpuUsage{
		Timestamp:            now.UnixNano(),
		UsageCoreNanoSeconds: value(host.CPUUsageNano),
		UsageNanoCores:       value(c.cpu.nanoCores(host.CPUUsageNano, now)),
	}
	out.Memory = machineMemory(guest, host, now)
	if usage, err := c.rt.images.MachineUsage(c.id); err == nil {
		out.WritableLayer = &runtimeapi.FilesystemUsage{
			Timestamp:  now.UnixNano(),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: c.rt.cfg.Server.Root},
			UsedBytes:  value(uint64(usage.Bytes)),
			InodesUsed: value(uint64(usage.Inodes)),
		}
	}
}

func machineMemory(guest qemu.MemoryStats, host cgroup.Stats, now time.Time) *runtimeapi.MemoryUsage {
	m := &runtimeapi.MemoryUsage{
		Timestamp:       now.UnixNano(),
		WorkingSetBytes: value(host.MemoryWorkingSetBytes),
		UsageBytes:      value(host.MemoryUsageBytes),
		RssBytes:        value(host.MemoryRSSBytes),
		PageFaults:      value(host.PageFaults),
		MajorPageFaults: value(host.MajorPageFaults),
	}
	if guest.Updated.IsZero() || guest.Total == 0 {
		return m
	}
	m.UsageBytes = value(uint64(guest.Total - guest.Free))
	m.WorkingSetBytes = value(uint64(guest.Total - guest.Available))
	m.AvailableBytes = value(uint64(guest.Available))
	m.PageFaults = value(uint64(guest.MajorFaults + guest.MinorFaults))
	m.MajorPageFaults = value(uint64(guest.MajorFaults))
	return m
}

// machineInfo is what the verbose status of a machine tells.
type machineInfo struct {
	State   string                    `json:"state"`
	Memory  *qemu.MemoryStats         `json:"memory,omitempty"`
	Disks   map[string]qemu.DiskStats `json:"disks,omitempty"`
	Agent   bool                      `json:"agent"`
	GuestOS *guestInfo                `json:"guest,omitempty"`
}

// guestInfo is what qemu-guest-agent tells.
type guestInfo struct {
	OS          *qga.OSInfo      `json:"os,omitempty"`
	Hostname    string           `json:"hostname,omitempty"`
	Interfaces  []qga.Interface  `json:"interfaces,omitempty"`
	Users       []qga.User       `json:"users,omitempty"`
	FileSystems []qga.FileSystem `json:"fileSystems,omitempty"`
}

// machineInfo asks QEMU and the guest, as far as they answer in time.
func (g *guest) machineInfo(ctx context.Context) *machineInfo {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	info := &machineInfo{Agent: g.agentNow() != nil}
	var err error
	if info.State, err = g.vm.State(ctx); err != nil {
		g.log.Debug("asking QEMU for its state", "error", err)
		return info
	}
	if m, err := g.vm.MemoryStats(ctx); err == nil {
		info.Memory = &m
	}
	if d, err := g.vm.DiskStats(ctx); err == nil {
		info.Disks = d
	}
	if info.State != stateRunning {
		return info // a guest that stands still answers nothing
	}
	if ga, err := g.guestAgent(ctx); err == nil {
		info.GuestOS = askGuest(ctx, ga)
	}
	return info
}

// askGuest asks what it can: an agent may not know, or not be allowed, every question.
func askGuest(ctx context.Context, ga *qga.Client) *guestInfo {
	info := new(guestInfo)
	info.OS, _ = ga.OSInfo(ctx)
	info.Hostname, _ = ga.HostName(ctx)
	info.Interfaces, _ = ga.Interfaces(ctx)
	info.Users, _ = ga.Users(ctx)
	info.FileSystems, _ = ga.FileSystems(ctx)
	return info
}
