package runtime

import (
	"context"
	"fmt"
	"time"

	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/trace"
)

// A pod of which there is no template of its own size begins as one of the base size, and is grown before anything of it runs:
//
//	template or spare of the base size, ConfigureSandbox, memory and processors are plugged, the guest's session is there for others
//
// Growing in the record is set from the guest's start until it has grown: a daemon that is killed meanwhile leaves that to the next one. A
// guest that does not grow is of no use, and gives way to one that boots.

// firstGrowTimeout bounds how long a guest may take to grow at its start. Emulated, on a loaded node, a second can take many times that.
const firstGrowTimeout = time.Minute

// base is the size that pods of other sizes begin with: that of a pod without limits.
func (c VMConfig) base() (s vmSize) {
	s.VCPUs, s.MemoryBytes = c.size(nil)
	return s
}

// sizeOf is what a machine begins with.
func sizeOf(m qemu.Machine) vmSize { return vmSize{m.VCPUs, m.MemoryBytes} }

// growsTo tells whether a VM of this size can come to have another one by plugging alone.
func (s vmSize) growsTo(other vmSize) bool {
	return s != other && s.VCPUs <= other.VCPUs && s.MemoryBytes <= other.MemoryBytes
}

// beginnings are the sizes that the pod's guest can begin with as a template, the best first. Whether a VM of the base size has the room to
// come to the pod's follows from the template, which is of that room.
func (rt *Runtime) beginnings(spec podSpec, size vmSize) []vmSize {
	out := []vmSize{size}
	base := rt.cfg.VM.base()
	plugs := rt.guestImage.Arch == qemu.ArchX86 || base.VCPUs == size.VCPUs // see giveRoom
	if base.growsTo(size) && plugs && spec.HugeBytes == 0 && rt.templates.grow() {
		out = append(out, base)
	}
	return out
}

// growing completes the record of a guest that begins with another size than its pod's.
func (p *pod) growing(record *guestRecord, begin vmSize) {
	if begin != p.size() {
		record.GrownFrom, record.Growing = &begin, true
	}
}

// reachSize has a guest that is configured come to its pod's size, and be ready for more. The session is nobody else's yet.
func (g *guest) reachSize(ctx context.Context, client agentClient) error {
	if err := g.growFirst(ctx, client); err != nil {
		return err
	}
	if _, err := plugAhead(ctx, g.vm); err != nil {
		g.log.Debug("processors that the pod may come to have", "error", err)
	}
	return nil
}

// growFirst has a guest that began smaller than its pod come to the pod's size.
func (g *guest) growFirst(ctx context.Context, client agentClient) error {
	p := g.pod
	record := p.rec.Status().Guest
	if !record.Growing {
		return nil
	}
	g.ungrown.Store(false) // it may have been stopped meanwhile
	from, size := *record.GrownFrom, p.size()
	err := trace.Do(ctx, "grow", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, firstGrowTimeout)
		defer cancel()
		return g.growTo(ctx, client, from, size)
	})
	if err != nil {
		g.ungrown.Store(true)
		return fmt.Errorf("grow to %v: %w", size, err)
	}
	return p.update(func(s *podStatus) error { s.Guest.Growing = false; return nil })
}

// mostAhead is how many processors an emulated guest is given ahead of its need at most: each of those that it does not use keeps up to a sixteenth of
// the room for translated code from the others.
const mostAhead = 4

// plugAhead gives an emulated guest the processors that its pod may come to have, and tells how many; it uses as many as before. Later
// there may be no room for their translated code, see qemu.VM.AddVCPUs.
func plugAhead(ctx context.Context, vm *qemu.VM) (int, error) {
	s, err := vm.Size(ctx)
	if err != nil {
		return 0, err
	}
	accel, err := vm.Accel(ctx)
	if err != nil || accel != qemu.AccelTCG {
		return s.MaxVCPUs, err
	}
	most := max(s.VCPUs, min(s.MaxVCPUs, mostAhead))
	if most == s.VCPUs {
		return most, nil
	}
	return most, vm.AddVCPUs(ctx, most)
}

// growTo plugs what is missing, and has the guest use it.
func (g *guest) growTo(ctx context.Context, client agentClient, from, size vmSize) error {
	if err := g.growMemory(ctx, client, size.MemoryBytes); err != nil {
		return err
	}
	if size.VCPUs == from.VCPUs {
		return nil
	}
	return g.growProcessors(ctx, client, size.VCPUs)
}
