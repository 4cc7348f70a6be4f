package runtime

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/image/seed"
	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/annotation"
)

// Serials of the disks that are not volumes.
const (
	rootSerial = "root"
	seedSerial = "seed"
)

// startMachine boots the machine. A guest of ours that stands by for ordinary containers is thrown away. The caller holds the
// container's life.
func (c *container) startMachine(ctx context.Context) error {
	p := c.pod
	p.life.Lock()
	defer p.life.Unlock()
	if p.state() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return fmt.Errorf("sandbox %s is not ready; it cannot start a machine: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	g := p.currentGuest()
	if g != nil && g.machine != nil && g.machine.container != c.id && g.alive() {
		return fmt.Errorf("sandbox %s runs the machine of container %s; it can have one at a time: %w", p.id, g.machine.container, errdefs.ErrFailedPrecondition)
	}
	if err := p.endGuest(ctx, g); err != nil {
		return fmt.Errorf("clear away the guest that stood by: %w", err)
	}
	if err := p.rt.images.RemoveScratch(p.id); err != nil {
		return err
	}
	files, err := c.makeMachineFiles()
	if err != nil {
		return err
	}
	g, err = c.bootMachine(ctx, files)
	if err == nil {
		err = c.openLog()
	}
	if err == nil {
		err = c.rec.Update(func(s *containerStatus) error {
			s.Boot, s.StartedAt = g.boot, time.Now()
			return nil
		})
	}
	if err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
		defer cancel()
		return errors.Join(err, p.endGuest(end, g))
	}
	c.rt.containerEvent(c, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	c.awaitOutput(ctx)
	c.watchMachine(g)
	return nil
}

// bootMachine fills the machine's files, starts what stands beside QEMU, and QEMU. On error it may return a guest that is to be ended,
// and what else was started is in the pod's cgroup.
func (c *container) bootMachine(ctx context.Context, files machineFiles) (*guest, error) {
	p := c.pod
	asked, err := p.annotations()
	if err != nil {
		return nil, err
	}
	m, err := c.machine(ctx, asked, files)
	if err != nil {
		return nil, err
	}
	m.Incoming = files.there
	if err := c.makeSeed(ctx, asked, files, &m); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(p.runDir(), 0o711); err != nil {
		return nil, err
	}
	parts := newMachineParts(c.id)
	if err := c.startBeside(ctx, asked, files, parts, &m); err != nil {
		return nil, errors.Join(err, parts.close())
	}
	g, err := p.launch(ctx, m, parts, nil)
	if err != nil {
		return nil, errors.Join(err, parts.close())
	}
	return g, p.applyCPUQuota()
}

// machine describes the VM but for what stands beside it.
func (c *container) machine(ctx context.Context, asked *annotation.Machine, files machineFiles) (qemu.Machine, error) {
	p, spec := c.pod, c.rec.Spec().Machine
	accel, err := p.rt.accel.verdict(ctx)
	if err != nil {
		return qemu.Machine{}, err
	}
	arch := p.rt.guestImage.machine(accel.Accel).Arch
	m := qemu.Machine{
		Name:          "vmruntime-" + p.id[:16],
		UUID:          machineUUID(p.config().GetMetadata().GetUid(), p.id),
		Serial:        p.id[:32],
		Arch:          arch,
		Type:          machineType(arch),
		Accel:         accel.Accel,
		CPUModel:      asked.CPUModel,
		VCPUs:         spec.VCPUs,
		MemoryBytes:   spec.MemoryBytes,
		HugePageBytes: spec.HugePageBytes,
		NICs:          nics(p.rec.Status().Network),
		ConsolePipe:   true,
		PanicDevice:   true,
		Balloon:       true,
		GuestAgent:    true,
		ResetInPlace:  true,
		Cmdline:       asked.KernelArgs,
	}
	if asked.Video != "none" {
		m.Video = asked.Video
	}
	if asked.Watchdog != "none" {
		m.Watchdog = asked.Watchdog
	}
	if uid := p.config().GetMetadata().GetUid(); uid != "" {
		m.Serial = uid
	}
	return m, errors.Join(c.addKernel(ctx, asked, &m), addFirmware(asked, files, &m), c.addDisks(ctx, asked, files, &m))
}

func machineType(arch string) string {
	if arch == qemu.ArchARM64 {
		return qemu.TypeARM64
	}
	return qemu.TypeX86
}

func nics(att *network.Attachment) (out []qemu.NIC) {
	for i, nic := range att.Interfaces {
		out = append(out, qemu.NIC{ID: fmt.Sprintf("net%d", i), MAC: nic.MAC, MTU: nic.MTU})
	}
	return out
}

// addKernel finds the kernel that the pod names in its image.
func (c *container) addKernel(ctx context.Context, asked *annotation.Machine, m *qemu.Machine) error {
	for _, f := range []struct {
		path string
		to   *string
	}{{asked.Kernel, &m.Kernel}, {asked.Initrd, &m.Initrd}} {
		if f.path == "" {
			continue
		}
		var err error
		if *f.to, err = c.rt.images.File(ctx, c.rec.Spec().ImageID, c.id, f.path); err != nil {
			return err
		}
	}
	return nil
}

// addFirmware gives the machine EFI if asked, with variables of its own.
func addFirmware(asked *annotation.Machine, files machineFiles, m *qemu.Machine) error {
	kind := asked.Firmware
	if kind == "" && m.Arch == qemu.ArchARM64 && m.Kernel == "" {
		kind = "efi"
	}
	if kind == "" || kind == "bios" {
		return nil
	}
	found, err := qemu.FindFirmware(qemu.FirmwareDirs(), m.Arch, kind == "efi-secure-boot")
	if err != nil {
		return fmt.Errorf("annotation %sfirmware is %q: %w", annotation.Prefix, kind, err)
	}
	if !files.there {
		if err := copyFile(found.Vars, files.vars()); err != nil {
			return err
		}
	}
	found.Vars = files.vars()
	m.Firmware = &found
	return nil
}

// addDisks gives the machine its root disk and the volumes.
func (c *container) addDisks(ctx context.Context, asked *annotation.Machine, files machineFiles, m *qemu.Machine) error {
	spec, bus := c.rec.Spec().Machine, diskBus(asked)
	if spec.Disk && spec.rootVolume() == nil {
		disk, err := c.rt.images.FindDisk(ctx, c.rec.Spec().ImageID, c.id)
		if err != nil {
			return err
		}
		if !files.there {
			if _, err := c.rt.images.CreateRoot(c.id, disk, spec.RootSize); err != nil {
				return err
			}
		}
		m.Disks = append(m.Disks, qemu.Disk{
			Serial: rootSerial, Path: files.root(), Format: "qcow2", Bus: bus, BootIndex: 1,
			Backing: &qemu.Backing{Path: disk.Path, Format: disk.Format},
		})
	}
	if root := spec.rootVolume(); root != nil {
		device, err := root.device()
		if err != nil {
			return err
		}
		if err := c.populate(ctx, root, device); err != nil {
			return err
		}
		m.Disks = append(m.Disks, qemu.Disk{Serial: root.Serial, Path: device, Format: "raw", Bus: bus, BootIndex: 1})
	}
	for _, v := range spec.Volumes {
		if v.isRoot() {
			continue
		}
		device, err := v.device()
		if err != nil {
			return err
		}
		m.Disks = append(m.Disks, qemu.Disk{Serial: v.Serial, Path: device, Format: "raw", Bus: bus, ReadOnly: v.ReadOnly})
	}
	return nil
}

func diskBus(asked *annotation.Machine) string {
	if asked.DiskBus == "scsi" {
		return qemu.BusSCSI
	}
	return asked.DiskBus
}

// makeSeed tells the guest who it is, in the way that the pod asks for.
func (c *container) makeSeed(ctx context.Context, asked *annotation.Machine, files machineFiles, m *qemu.Machine) error {
	if asked.Datasource == "none" {
		return nil
	}
	if files.seeded {
		return files.addSeed(asked, m)
	}
	in, err := c.seedInput(asked)
	if err != nil {
		return err
	}
	s, err := seed.Build(in)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(s.Ignition) > 0 {
		err = os.WriteFile(files.ignition(), s.Ignition, 0o600)
	} else {
		err = s.WriteISO(files.seed())
	}
	return errors.Join(err, files.addSeed(asked, m))
}

// addSeed gives the machine the one that was made.
func (f machineFiles) addSeed(asked *annotation.Machine, m *qemu.Machine) error {
	if _, err := os.Stat(f.ignition()); err == nil {
		m.Ignition = f.ignition()
		return nil
	}
	d := qemu.Disk{Serial: seedSerial, Path: f.seed(), Format: "raw", ReadOnly: true, Bus: diskBus(asked)}
	d.CDROM = d.Bus != qemu.BusVirtio
	m.Disks = append(m.Disks, d)
	return nil
}

func (c *container) seedInput(asked *annotation.Machine) (seed.Input, error) {
	p, cfg := c.pod, c.config()
	keys, err := p.rt.podKeys(p)
	if err != nil {
		return seed.Input{}, err
	}
	meta := p.config().GetMetadata()
	in := seed.Input{
		Datasource:   seed.Datasource(asked.Datasource),
		PodUID:       meta.GetUid(),
		PodName:      meta.GetName(),
		PodNamespace: meta.GetNamespace(),
		Hostname:     p.hostname(),
		Interfaces:   seedInterfaces(p.rec.Status().Network),
		ExecKey:      keys.AuthorizedKey,
		HostKeys:     []seed.HostKey{{Private: keys.HostPrivateKey, Public: keys.HostPublicKey}},
		Agent:        asked.GuestAgentInstall,
	}
	if in.DNS, err = p.seedDNS(); err != nil {
		return in, err
	}
	for _, e := range cfg.GetEnvs() {
		in.Env = append(in.Env, seed.EnvVar{Name: e.GetKey(), Value: string(e.GetValue())})
	}
	for _, v := range c.rec.Spec().Machine.Volumes {
		if !v.isRoot() {
			in.Disks = append(in.Disks, seed.Disk{Serial: v.Serial, Bus: asked.DiskBus, Link: v.Path, ReadOnly: v.ReadOnly})
		}
	}
	for _, m := range c.rec.Spec().Mounts {
		in.Shares = append(in.Shares, seed.Share{Name: m.Name, Path: m.ContainerPath, ReadOnly: m.ReadOnly})
	}
	return in, c.readSources(asked, &in)
}

// readSources reads what the pod gives to its guest, out of annotations or of files in its volumes.
func (c *container) readSources(asked *annotation.Machine, in *seed.Input) error {
	var keys []byte
	var errs []error
	for _, s := range []struct {
		name string
		from annotation.Source
		to   *[]byte
	}{
		{"user-data", asked.UserData, &in.UserData},
		{"vendor-data", asked.VendorData, &in.VendorData},
		{"network-config", asked.NetworkConfig, &in.NetworkConfig},
		{"ignition", asked.Ignition, &in.Ignition},
		{"ssh-keys", asked.SSHKeys, &keys},
	} {
		data, err := c.readSource(s.from)
		if err != nil {
			errs = append(errs, fmt.Errorf("annotation %s%s-from is %q: %w", annotation.Prefix, s.name, s.from.From, err))
		}
		*s.to = data
	}
	in.SSHKeys = string(keys)
	return errors.Join(errs...)
}

func (c *container) readSource(s annotation.Source) ([]byte, error) {
	if s.From == "" {
		return []byte(s.Text), nil
	}
	mounts := c.rec.Spec().Mounts
	best := -1
	for i, m := range mounts {
		if rel, err := filepath.Rel(m.ContainerPath, s.From); err == nil && filepath.IsLocal(rel) &&
			(best < 0 || len(m.ContainerPath) > len(mounts[best].ContainerPath)) {
			best = i
		}
	}
	if best < 0 {
		return nil, fmt.Errorf("it is in none of the container's volumes; it has to be a file in a mounted ConfigMap, Secret or other volume: %w", errdefs.ErrInvalidArgument)
	}
	rel, err := filepath.Rel(mounts[best].ContainerPath, s.From)
	if err != nil {
		return nil, err
	}
	return readInside(mounts[best].HostPath, rel, annotation.MaxFile)
}

func seedInterfaces(att *network.Attachment) (out []seed.Interface) {
	for _, i := range att.Interfaces {
		f := seed.Interface{Name: i.Name, MAC: i.MAC, MTU: i.MTU, Addresses: i.Addresses}
		for _, r := range att.Routes {
			if r.Interface == i.Name && r.Table == mainTable {
				f.Routes = append(f.Routes, seed.Route{To: r.Destination, Via: r.Gateway})
			}
		}
		out = append(out, f)
	}
	return out
}

// mainTable is RT_TABLE_MAIN of rtnetlink(7).
const mainTable = 254

func (p *pod) seedDNS() (seed.DNS, error) {
	servers, search, err := p.resolver()
	if err != nil {
		return seed.DNS{}, err
	}
	out := seed.DNS{Search: search}
	for _, s := range servers {
		if a, err := netip.ParseAddr(s); err == nil {
			out.Servers = append(out.Servers, a)
		}
	}
	return out, nil
}

// startBeside starts what a machine needs beside QEMU: virtiofsd for its volumes, a TPM, and who hands out its addresses.
func (c *container) startBeside(ctx context.Context, asked *annotation.Machine, files machineFiles, parts *machineParts, m *qemu.Machine) error {
	p := c.pod
	if err := c.startMachineShare(ctx, asked, parts, m); err != nil {
		return err
	}
	if asked.TPM {
		// That of a snapshot is in what QEMU saved of its devices.
		if err := errors.Join(os.RemoveAll(files.tpm()), os.Mkdir(files.tpm(), 0o700)); err != nil {
			return err
		}
		uid := p.rec.Spec().UID
		tpm, err := qemu.StartTPM(ctx, qemu.TPMSpec{
			Binary: p.rt.cfg.QEMU.Swtpm, Launcher: p.rt.launcher, StateDir: files.tpm(), RunDir: p.runDir(),
			UID: uid, GID: uid, Place: p.cgroup().Add,
		})
		if err != nil {
			return fmt.Errorf("start the TPM: %w", err)
		}
		parts.tpm, m.TPMSocket = tpm, tpm.Socket()
	}
	return parts.respond(p)
}

// startMachineShare starts the machine's one virtiofsd if it has any volume of files.
func (c *container) startMachineShare(ctx context.Context, asked *annotation.Machine, parts *machineParts, m *qemu.Machine) error {
	mounts := c.rec.Spec().Mounts
	if len(mounts) == 0 && !asked.GuestAgentInstall {
		return nil
	}
	spec, err := c.pod.shareSpec()
	if err != nil {
		return err
	}
	if parts.share, err = qemu.StartShareServer(ctx, spec); err != nil {
		return err
	}
	if asked.GuestAgentInstall {
		if err := parts.share.Add(qemu.ShareMount{Name: "agent", Source: c.rt.guestImage.agentDir(), ReadOnly: true}); err != nil {
			return fmt.Errorf("share the agent with the guest: %w", err)
		}
	}
	for _, r := range mounts {
		if err := parts.share.Add(r.shareMount()); err != nil {
			return fmt.Errorf("share %q with the guest: %w", r.HostPath, err)
		}
	}
	m.Shares = []qemu.Share{{Tag: shareTag, Socket: parts.share.Socket()}}
	return nil
}
