package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// memoryID names the device that gives a running guest more memory, memoryBackend what is behind it.
	memoryID      = "memory1"
	memoryBackend = "mem1"
	// MemoryBlock is the unit in which memory is plugged: what a virtio-mem device gives at once where pages have 4 KiB.
	MemoryBlock = 2 * mib

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
	// Devices is how many devices there are that give memory or take it back.
	Devices int `json:"devices"`
}

// Plugged tells whether the VM has, or ever had, anything that it did not begin with.
func (s Size) Plugged() bool { return s.VCPUs != s.BootVCPUs || s.Devices > 0 }

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
			s.Devices++
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
	s.Devices++
	return s, err
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
		return v.plugMemory(ctx, (s.MaxMemoryBytes-s.BootBytes)/MemoryBlock*MemoryBlock, bytes)
	}
	return v.mon.Execute(ctx, "qom-set", props{"path": "/machine/peripheral/" + memoryID, "property": "requested-size", "value": bytes}, nil)
}

// plugMemory plugs a device that can give up to size bytes. They are memory of the node only as far as the guest has touched them.
func (v *VM) plugMemory(ctx context.Context, size, requested int64) error {
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
	port, err := v.freePort(ctx)
	if err != nil {
		return err
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
		if err := v.mon.Execute(ctx, "device_add", pciDevice("virtio-balloon-pci", balloonID, props{"bus": port}), nil); err != nil {
			return err
		}
	}
	return v.SetMemory(ctx, bytes)
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
