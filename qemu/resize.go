package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// memoryID names the device that gives a running guest more memory, memoryBackend what is behind it.
	memoryID      = "memory1"
	memoryBackend = "mem1"
	// MemoryBlock is the unit in which memory is plugged: what a virtio-mem device gives at once where pages have 4 KiB.
	MemoryBlock = 2 * mib

	// minRegion is the least that QEMU makes a region for translated code.
	minRegion = 2 * mib

	// sizePoll is how often QEMU is asked how far the guest has come.
	sizePoll = 20 * time.Millisecond
	// sizeStall is how long a guest that gives memory back may do nothing before that was all. Its driver tries again much later.
	sizeStall = 2 * time.Second
)

// Size is what a VM has, as QEMU knows it, and what it can come to have.
type Size struct {
	// VCPUs are the processors that are plugged, BootVCPUs those that it has begun with.
	VCPUs     int `json:"vcpus"`
	BootVCPUs int `json:"bootVCPUs"`
	MaxVCPUs  int `json:"maxVCPUs"`
	// BootBytes is the memory that the VM has begun with, BalloonBytes what the guest has given back of it. PluggedBytes are what the
	// guest has taken beside it, of RequestedBytes that it was last offered.
	BootBytes      int64 `json:"bootBytes"`
	PluggedBytes   int64 `json:"pluggedBytes"`
	RequestedBytes int64 `json:"requestedBytes"`
	BalloonBytes   int64 `json:"balloonBytes"`
	MaxMemoryBytes int64 `json:"maxMemoryBytes"`
}

// Plugged is what a VM has for its size beside what it began with. A machine that is Incoming gets it from Spec.Plugged.
type Plugged struct {
	// VCPUs are all processors, those that it began with too; 0 is no more than these.
	VCPUs int `json:"vcpus,omitempty"`
	// MemoryPort and BalloonPort are the root ports of the devices that give memory and take it back, empty without them.
	MemoryPort  string `json:"memoryPort,omitempty"`
	BalloonPort string `json:"balloonPort,omitempty"`
}

// MemoryBytes is what the guest has now.
func (s Size) MemoryBytes() int64 { return s.BootBytes + s.PluggedBytes - s.BalloonBytes }

// memoryDevice is an entry of query-memory-devices.
type memoryDevice struct {
	Data struct {
		ID        string `json:"id"`
		Size      int64  `json:"size"`
		Requested int64  `json:"requested-size"`
	} `json:"data"`
}

// Size asks QEMU.
func (v *VM) Size(ctx context.Context) (Size, error) {
	var s Size
	var smp struct {
		CPUs    int `json:"cpus"`
		MaxCPUs int `json:"maxcpus"`
	}
	var memory struct {
		Size int64 `json:"size"`
	}
	var cpus []struct{}
	var devices []memoryDevice
	for _, q := range []struct {
		command   string
		args, out any
	}{
		{"qom-get", props{"path": "/machine", "property": "smp"}, &smp},
		{"qom-get", props{"path": "/machine", "property": "memory"}, &memory},
		{"query-cpus-fast", nil, &cpus},
		{"query-memory-devices", nil, &devices},
	} {
		if err := v.mon.Execute(ctx, q.command, q.args, q.out); err != nil {
			return s, err
		}
	}
	s.VCPUs, s.BootVCPUs, s.MaxVCPUs = len(cpus), smp.CPUs, smp.MaxCPUs
	s.BootBytes, s.MaxMemoryBytes = memory.Size, max(memory.Size, v.rec.MaxMemoryBytes)
	for _, d := range devices {
		if d.Data.ID == memoryID {
			s.PluggedBytes, s.RequestedBytes = d.Data.Size, d.Data.Requested
		}
	}
	there, err := v.hasDevice(ctx, balloonID)
	if err != nil || !there {
		return s, err
	}
	var balloon struct {
		Actual int64 `json:"actual"`
	}
	err = v.mon.Execute(ctx, "query-balloon", nil, &balloon)
	s.BalloonBytes = s.BootBytes - balloon.Actual
	return s, err
}

// Plugged asks QEMU.
func (v *VM) Plugged(ctx context.Context) (Plugged, error) {
	s, err := v.Size(ctx)
	if err != nil {
		return Plugged{}, err
	}
	ports, err := v.ports(ctx)
	if err != nil {
		return Plugged{}, err
	}
	var p Plugged
	if s.VCPUs > s.BootVCPUs {
		p.VCPUs = s.VCPUs
	}
	for _, port := range ports {
		switch port.device {
		case memoryID:
			p.MemoryPort = port.id
		case balloonID:
			p.BalloonPort = port.id
		}
	}
	return p, nil
}

// plugAll has a VM that waits for a state have what was plugged into the one that was saved. How much memory the devices give and
// take is part of the state.
func (v *VM) plugAll(ctx context.Context, p Plugged) error {
	if p == (Plugged{}) {
		return nil
	}
	if p.VCPUs > 0 {
		if err := v.AddVCPUs(ctx, p.VCPUs); err != nil {
			return err
		}
	}
	v.plug.Lock()
	defer v.plug.Unlock()
	s, err := v.Size(ctx)
	if err != nil {
		return err
	}
	if p.MemoryPort != "" {
		err = v.plugMemory(ctx, p.MemoryPort, s, 0)
	}
	if err == nil && p.BalloonPort != "" {
		err = v.plugBalloon(ctx, p.BalloonPort)
	}
	return err
}

// AddVCPUs plugs processors until there are n. They stay: a guest that is to have less of them takes them offline itself.
func (v *VM) AddVCPUs(ctx context.Context, n int) error {
	v.plug.Lock()
	defer v.plug.Unlock()
	type slot struct {
		Type  string         `json:"type"`
		Props map[string]int `json:"props"`
		Path  string         `json:"qom-path"`
	}
	var slots []slot
	if err := v.mon.Execute(ctx, "query-hotpluggable-cpus", nil, &slots); err != nil {
		return err
	}
	if n > len(slots) {
		return fmt.Errorf("vcpus is %d; it has to be at most %d, what the VM was started for: %w", n, len(slots), errdefs.ErrFailedPrecondition)
	}
	slices.SortFunc(slots, func(a, b slot) int { return cmp.Compare(a.Props["core-id"], b.Props["core-id"]) })
	have := 0
	for _, s := range slots {
		if s.Path != "" {
			have++
		}
	}
	if n > have {
		if err := v.roomForVCPUs(ctx, n, len(slots)); err != nil {
			return err
		}
	}
	for i, s := range slots[:n] {
		if s.Path != "" {
			continue
		}
		dev := props{"driver": s.Type, "id": fmt.Sprintf("cpu%d", i)}
		for name, id := range s.Props {
			dev[name] = id
		}
		if err := v.mon.Execute(ctx, "device_add", dev, nil); err != nil {
			return fmt.Errorf("plug processor %d: %w", i, err)
		}
	}
	return nil
}

// roomForVCPUs refuses processors for whose translated code there may be no room just now. QEMU divides the room among all processors that
// can come, in regions. Each processor takes one after the other, the first when it is plugged: if there is none then, QEMU aborts
// (tcg_region_initial_alloc). When all are taken and another one is needed, they are all free again.
func (v *VM) roomForVCPUs(ctx context.Context, n, most int) error {
	accel, err := v.Accel(ctx)
	if err != nil || accel != AccelTCG {
		return err
	}
	var jit struct {
		Text string `json:"human-readable-text"`
	}
	if err := v.mon.Execute(ctx, "x-query-jit", nil, &jit); err != nil {
		return err
	}
	_, sizes, _ := strings.Cut(jit.Text, "gen code size")
	var used, room int64
	if _, err := fmt.Sscanf(strings.TrimSpace(sizes), "%d/%d", &used, &room); err != nil {
		return fmt.Errorf("x-query-jit says %.200q: %w", jit.Text, err)
	}
	if !regionFree(used, room, n, most) {
		return fmt.Errorf("vcpus is %d; translated code takes %d of %d bytes, which leaves no room for another processor until the guest has run more: %w", n, used, room, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// regionFree tells whether n processors can have a region each to begin with.
func regionFree(used, room int64, n, most int) bool {
	const waste = mib                                                 // at the ends of regions, and what is translated meanwhile
	regions := int64(max(most, min(tcgBuffer*mib/minRegion, most*8))) // tcg_n_regions
	return (used+waste)*regions/room+int64(n) <= regions
}

// RequestMemory asks the guest to have so many bytes, rounded up to MemoryBlock beyond those that it has begun with, and does not
// wait. The devices for that are plugged into free root ports when they are first needed.
func (v *VM) RequestMemory(ctx context.Context, bytes int64) error {
	v.plug.Lock()
	defer v.plug.Unlock()
	s, err := v.Size(ctx)
	if err != nil {
		return err
	}
	plugged := (max(0, bytes-s.BootBytes) + MemoryBlock - 1) / MemoryBlock * MemoryBlock
	if room := s.MaxMemoryBytes - s.BootBytes; plugged > room {
		return fmt.Errorf("memory is %d; it has to be at most %d, what the VM was started for: %w", bytes, s.MaxMemoryBytes, errdefs.ErrFailedPrecondition)
	}
	return errors.Join(v.requestPlugged(ctx, s, plugged), v.requestBalloon(ctx, s, min(bytes, s.BootBytes)))
}

func (v *VM) requestPlugged(ctx context.Context, s Size, bytes int64) error {
	there, err := v.hasDevice(ctx, memoryID)
	if err != nil {
		return err
	}
	if !there {
		if bytes == 0 {
			return nil
		}
		port, err := v.freePort(ctx)
		if err != nil {
			return err
		}
		return v.plugMemory(ctx, port, s, bytes)
	}
	return v.mon.Execute(ctx, "qom-set", props{"path": "/machine/peripheral/" + memoryID, "property": "requested-size", "value": bytes}, nil)
}

// plugMemory plugs a device that can give all that there can come to be. It is memory of the node only as far as the guest has touched it.
func (v *VM) plugMemory(ctx context.Context, port string, s Size, requested int64) error {
	size := (s.MaxMemoryBytes - s.BootBytes) / MemoryBlock * MemoryBlock
	there, err := v.has(ctx, "qom-list", props{"path": "/objects"}, memoryBackend)
	if err != nil {
		return err
	}
	if !there {
		backend := props{"qom-type": "memory-backend-memfd", "id": memoryBackend, "size": size, "share": true}
		if err := v.mon.Execute(ctx, "object-add", backend, nil); err != nil {
			return err
		}
	}
	return v.mon.Execute(ctx, "device_add", pciDevice("virtio-mem-pci", memoryID, props{
		"bus": port, "memdev": memoryBackend, "requested-size": requested, "block-size": MemoryBlock,
	}), nil)
}

func (v *VM) requestBalloon(ctx context.Context, s Size, bytes int64) error {
	there, err := v.hasDevice(ctx, balloonID)
	if err != nil {
		return err
	}
	if !there {
		if bytes >= s.BootBytes {
			return nil
		}
		port, err := v.freePort(ctx)
		if err != nil {
			return err
		}
		if err := v.plugBalloon(ctx, port); err != nil {
			return err
		}
	}
	return v.SetMemory(ctx, bytes)
}

func (v *VM) plugBalloon(ctx context.Context, port string) error {
	return v.mon.Execute(ctx, "device_add", pciDevice("virtio-balloon-pci", balloonID, props{"bus": port}), nil)
}

// AwaitMemory waits until the guest has so many bytes, rounded as in RequestMemory, or has given back as much as it can. It tells what
// it has; an error is only that QEMU cannot be asked, or that the context has ended.
func (v *VM) AwaitMemory(ctx context.Context, bytes int64) (Size, error) {
	var last int64
	var since time.Time
	for {
		s, err := v.Size(ctx)
		if err != nil {
			return s, err
		}
		if have := s.MemoryBytes(); have >= bytes && have < bytes+MemoryBlock {
			return s, nil
		} else if have != last {
			last, since = have, time.Now()
		} else if have > bytes && time.Since(since) > sizeStall {
			return s, nil
		}
		select {
		case <-time.After(sizePoll):
		case <-ctx.Done():
			return s, ctx.Err()
		}
	}
}
