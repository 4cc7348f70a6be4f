package runtime

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/qga"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/vmpb"
)

const (
	stateStopped = "stopped"
	// statePaused is QEMU's word for a guest that was told to stand still, stateRunning for one that was not.
	statePaused  = "paused"
	stateRunning = "running"
	// stateSaved is its word for one that stands still since its state was saved, stateSaving until a moment after that.
	stateSaved  = "postmigrate"
	stateSaving = "finish-migrate"
	// clockTick is the unit of times in /proc/PID/stat, 1/USER_HZ, which is the same on all architectures of ours.
	clockTick = 10 * time.Millisecond
)

// summary is what a list tells of a pod.
func (p *pod) summary(ctx context.Context) *vmpb.VM {
	m, size := p.config().GetMetadata(), p.size()
	out := &vmpb.VM{
		PodId: p.id, Namespace: m.GetNamespace(), Name: m.GetName(),
		Form: "containers", State: stateStopped, Vcpus: int32(size.VCPUs), MemoryBytes: size.MemoryBytes,
	}
	if c := p.latestMachine(); c != nil {
		machine := c.rec.Spec().Machine
		out.Form, out.Vcpus, out.MemoryBytes = "machine", int32(machine.VCPUs), machine.MemoryBytes
	}
	if att := p.rec.Status().Network; att != nil {
		for _, a := range att.Addresses() {
			out.Addresses = append(out.Addresses, a.String())
		}
	}
	if g := p.currentGuest(); g != nil && g.alive() {
		out.State = g.state(ctx)
		out.StartedAtUnixNano = startedAt(g.vm.Record()).UnixNano()
	}
	return out
}

// latestMachine is the pod's machine: the one that runs, or else the one made last; nil in a pod of containers.
func (p *pod) latestMachine() *container {
	var latest *container
	for _, c := range p.rt.containersOf(p.id) {
		switch {
		case !c.isMachine():
		case c.rec.Status().running():
			return c
		case latest == nil || c.rec.Spec().CreatedAt.After(latest.rec.Spec().CreatedAt):
			latest = c
		}
	}
	return latest
}

// state is QEMU's run state, or "unknown" if QEMU does not tell.
func (g *guest) state(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	state, err := g.vm.State(ctx)
	if err != nil {
		g.log.Debug("asking QEMU for its state", "error", err)
		return "unknown"
	}
	return state
}

// startedAt is when a QEMU was started.
func startedAt(r qemu.Record) time.Time {
	var uptime unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &uptime); err != nil {
		return time.Time{} // never fails with this clock
	}
	return time.Now().Add(time.Duration(r.StartTime)*clockTick - time.Duration(uptime.Nano()))
}

// describe tells all about a pod and its VM.
func (p *pod) describe(ctx context.Context) (*vmpb.ShowResponse, error) {
	out := &vmpb.ShowResponse{Vm: p.summary(ctx)}
	if att := p.rec.Status().Network; att != nil {
		for _, i := range att.Interfaces {
			f := &vmpb.Interface{Name: i.Name, Mac: i.MAC, Mtu: int32(i.MTU)}
			for _, a := range i.Addresses {
				f.Addresses = append(f.Addresses, a.String())
			}
			out.Interfaces = append(out.Interfaces, f)
		}
	}
	if g := p.currentGuest(); g != nil && g.alive() {
		g.describe(ctx, out)
	}
	return out, p.describeContainers(ctx, out)
}

// describe asks QEMU and the guest, as far as they answer in time.
func (g *guest) describe(ctx context.Context, out *vmpb.ShowResponse) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	out.QemuPid = int32(g.vm.Record().PID)
	var err error
	if out.Acceleration, err = g.vm.Accel(ctx); err != nil {
		g.log.Debug("asking QEMU for its acceleration", "error", err)
	}
	info := g.machineInfo(ctx)
	out.Agent = info.Agent
	for serial, d := range info.Disks {
		out.Disks = append(out.Disks, &vmpb.Disk{Serial: serial, ReadBytes: d.ReadBytes, WriteBytes: d.WriteBytes, Reads: d.Reads, Writes: d.Writes})
	}
	slices.SortFunc(out.GetDisks(), func(a, b *vmpb.Disk) int { return cmp.Compare(a.GetSerial(), b.GetSerial()) })
	if m := info.Memory; m != nil {
		out.Memory = &vmpb.Memory{ActualBytes: m.Actual, TotalBytes: m.Total, FreeBytes: m.Free, AvailableBytes: m.Available}
	}
	if info.GuestOS != nil {
		out.Guest = info.GuestOS.message()
	}
}

func (i *guestInfo) message() *vmpb.Guest {
	out := &vmpb.Guest{Hostname: i.Hostname}
	if i.OS != nil {
		out.Os, out.Kernel = cmp.Or(i.OS.PrettyName, i.OS.Name, i.OS.ID), i.OS.KernelRelease
	}
	for _, f := range i.Interfaces {
		nic := &vmpb.Interface{Name: f.Name, Mac: f.HardwareAddress}
		for _, a := range f.Addresses {
			nic.Addresses = append(nic.Addresses, fmt.Sprintf("%s/%d", a.IP, a.Prefix))
		}
		out.Interfaces = append(out.Interfaces, nic)
	}
	for _, u := range i.Users {
		out.Users = append(out.Users, u.Name)
	}
	for _, f := range i.FileSystems {
		out.FileSystems = append(out.FileSystems, &vmpb.FileSystem{
			MountPoint: f.MountPoint, Type: f.Type, UsedBytes: int64(f.UsedBytes), TotalBytes: int64(f.TotalBytes),
		})
	}
	return out
}

// describeContainers adds the containers, and the verbose status of all.
func (p *pod) describeContainers(ctx context.Context, out *vmpb.ShowResponse) error {
	verbose, err := p.verbose(ctx)
	if err != nil {
		return err
	}
	out.Info = map[string]string{"pod": verbose["info"]}
	list := p.rt.containersOf(p.id)
	slices.SortFunc(list, func(a, b *container) int { return a.rec.Spec().CreatedAt.Compare(b.rec.Spec().CreatedAt) })
	for _, c := range list {
		s := c.rec.Status()
		out.Containers = append(out.Containers, &vmpb.Container{
			Id: c.id, Name: c.config().GetMetadata().GetName(), Image: c.rec.Spec().ImageName, State: stateName(s.state()),
			ExitCode: s.ExitCode, Reason: s.Reason, Message: s.Message,
		})
		verbose, err := c.verbose(ctx)
		if err != nil {
			return err
		}
		out.Info[c.id] = verbose["info"]
	}
	return nil
}

// reboot asks whoever can to boot the operating system again, and tells who that was.
func (g *guest) reboot(ctx context.Context) (by string, err error) {
	if state := g.state(ctx); state != stateRunning {
		return "", fmt.Errorf("the machine is %s, and can be asked nothing; resume it first, or reset it: %w", state, errdefs.ErrFailedPrecondition)
	}
	if g.agentNow() != nil {
		code, err := g.agentReboot(ctx)
		if err == nil && code == 0 {
			return "the agent vmagent", nil
		}
		g.log.Info("vmagent does not reboot the guest", "code", code, "error", err)
	}
	ga, err := g.guestAgent(ctx)
	if err == nil {
		if err = g.askReboot(ctx, ga); err == nil {
			return "qemu-guest-agent", nil
		}
		g.log.Info("qemu-guest-agent does not reboot the guest", "error", err)
	}
	// There is no button for this: ACPI knows only one that powers off.
	if keyErr := g.vm.CtrlAltDel(ctx); keyErr != nil {
		return "", fmt.Errorf("no way to ask for a reboot: %w; the machine can be reset", errors.Join(err, keyErr))
	}
	return "Ctrl-Alt-Del on its keyboard: no agent answered", nil
}

func (g *guest) agentReboot(ctx context.Context) (int32, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return g.agentExec(ctx, []string{"reboot"}, execIO{})
}

// rebootTimeout is longer than a guest agent's client waits for the answer of one that the reboot has ended before it could answer, which
// is no error.
const rebootTimeout = 25 * time.Second

func (g *guest) askReboot(ctx context.Context, ga *qga.Client) error {
	ctx, cancel := context.WithTimeout(ctx, rebootTimeout)
	defer cancel()
	return ga.Shutdown(ctx, qga.Reboot)
}

// wake lets a guest go on that an administrator or a checkpoint has stopped: while it stands still it can end nothing in order.
func (p *pod) wake(ctx context.Context) {
	g := p.currentGuest()
	if g == nil || !g.alive() || p.cutCheckpoint() {
		return
	}
	if s := g.state(ctx); s != statePaused && s != stateSaved {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := g.vm.Resume(ctx); err != nil {
		g.log.Warn("resuming the paused VM", "error", err)
		return
	}
	g.log.Info("resumed, to end what runs in it")
}
