package qemu

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Values of Machine.Accel and Machine.Arch.
const (
	AccelKVM = "kvm"
	AccelTCG = "tcg"

	ArchX86   = "x86_64"
	ArchARM64 = "aarch64"
)

const (
	mib = 1 << 20
	// minMemory is the least a guest kernel and its initramfs unpack in.
	minMemory = 64 * mib
	// HugeNodePage is the size of the pages of Machine.HugeNodeBytes.
	HugeNodePage = 2 * mib
	// maxVCPUs is the limit of q35 in QEMU 7.2 without an interrupt remapping unit.
	maxVCPUs = 255
	// maxPorts keeps the root ports and all other devices within the 32 slots of the root bus.
	maxPorts = 8
	maxNICs  = 8
	// maxSATA is the number of ports of the SATA controller.
	maxSATA = 6
	// maxSlots is how many devices fit on the root bus beside the bridges that are there already.
	maxSlots = 29
)

// Values of Machine.Type: what a guest sees of the machine, whatever QEMU runs it.
const (
	TypeX86   = "pc-q35-7.2"
	TypeARM64 = "virt-7.2"
)

// Values of Machine.Video.
const (
	VideoStd    = "std"    // works without a driver
	VideoVirtio = "virtio" // needs a driver
)

// Values of Machine.Watchdog: what happens when the guest no longer feeds it.
const (
	WatchdogReset    = "reset"      // as the reset button
	WatchdogPoweroff = "poweroff"   // the VM ends
	WatchdogPause    = "pause"      // the guest stands still, for whoever looks into it
	WatchdogNMI      = "inject-nmi" // the guest gets an interrupt that cannot be masked
)

// Values of Machine.Memory.
const (
	MemoryOwn     = ""        // made by QEMU, and gone with it
	MemoryShared  = "shared"  // Spec.Memory itself: what the guest writes is in the file
	MemoryPrivate = "private" // Spec.Memory copy-on-write: what the guest writes is its own. No share can be plugged.
	MemoryCopied  = "copied"  // a copy of Spec.Memory, made in the VM's cgroup before QEMU runs
)

// Values of Disk.Bus.
const (
	BusSCSI   = "" // virtio-scsi
	BusVirtio = "virtio"
	BusSATA   = "sata"
)

// Machine is one virtual machine as plain data. The zero value of a field that Defaults fills means the default.
type Machine struct {
	// Name is shown in the process list; letters, digits, dot, dash and underscore.
	Name string
	// UUID is the guest's SMBIOS UUID.
	UUID string
	// Serial is the guest's SMBIOS serial number: 1 to 64 letters, digits, dots, dashes and underscores, or empty.
	Serial string
	// Arch is ArchX86 (machine q35) or ArchARM64 (machine virt).
	Arch string
	// Type is TypeX86 or TypeARM64 for a guest whose disk outlives its QEMU: the hardware it sees then stays
	// the same under every later QEMU, and its NICs stay in their PCI slots (16 and up) whatever else is plugged. Empty is
	// the newest type of the QEMU, for guests that begin anew each time.
	Type string
	// Accel is AccelKVM or AccelTCG. What works on this node is for the caller to find out.
	Accel string
	// CPUModel is a QEMU CPU model; by default "host" under KVM and "max" under TCG.
	CPUModel string
	// VCPUs is the number of processors, all cores of one socket; 1 by default.
	VCPUs int
	// MaxVCPUs is how many there can come to be with VM.AddVCPUs, on ArchX86; 0 is no more.
	MaxVCPUs int
	// MemoryBytes is the guest's memory at its start, a multiple of 1 MiB; 256 MiB by default. It is shared memory, so that
	// vhost-user devices can be plugged at any time, but with MemoryPrivate.
	MemoryBytes int64
	// MaxMemoryBytes is how much there can come to be with VM.RequestMemory, a multiple of 1 MiB; 0 is no more.
	MaxMemoryBytes int64
	// Memory is MemoryOwn, MemoryShared, MemoryPrivate or MemoryCopied.
	Memory string
	// Incoming begins the machine with Spec.State instead of a boot: saved by SaveState with MemoryOwn, by SaveDevices otherwise. Start
	// returns when it is loaded; the guest goes on with VM.Resume. Accelerator, processors, memory's size and
	// devices have to be as in the machine that was saved; the files behind disks and NICs may be others, and disks on SCSI may be more.
	Incoming bool
	// HugePageBytes is the size of the host's huge pages that the memory is taken from, all of it at the start;
	// 0 takes ordinary pages.
	HugePageBytes int64
	// HugeNodeBytes is memory beside MemoryBytes that is a NUMA node of its own, without processors, taken from the host's huge
	// pages of HugeNodePage bytes, all of it at the start; 0 is none. What the guest makes huge pages of there, are huge pages of the host.
	HugeNodeBytes int64
	// Kernel and Initrd are files on the host; Initrd may be empty. Without a kernel the firmware boots a disk.
	Kernel, Initrd, Cmdline string
	// Firmware is EFI; nil is the BIOS that comes with QEMU, which only ArchX86 has.
	Firmware *Firmware
	// Ignition is a file on the host that the guest finds by fw_cfg as opt/com.coreos/config, or empty.
	Ignition string
	// Disks are there from the start, those on SCSI as LUNs 0, 1, ... in their order; others can be plugged later.
	Disks []Disk
	// NICs are the network interfaces, in the order the guest numbers them.
	NICs []NIC
	// Shares are virtiofs file systems from the start; others can be plugged later.
	Shares []Share
	// HotplugPorts is the number of free PCIe root ports for AddShare.
	HotplugPorts int
	// ConsolePipe has the serial console read from and write to the two FIFOs of VM.ConsoleFIFOs. The guest waits while the
	// one it writes to is full, so nothing is lost as long as somebody reads it in the end. Without it the
	// end of the console is kept in a ring, see VM.Console.
	ConsolePipe bool
	// Video is VideoStd, VideoVirtio or empty for none. With it come VM.VNC, VM.Screenshot, a keyboard and a pointer.
	Video string
	// Watchdog is the action of an i6300esb, or empty for no watchdog.
	Watchdog string
	// PanicDevice is a pvpanic device: a guest with its driver tells of its panic.
	PanicDevice bool
	// Balloon is a virtio balloon that reports statistics and, with ordinary pages, gives unused memory back.
	Balloon bool
	// GuestAgent is the port of qemu-guest-agent, see VM.GuestAgentSocket.
	GuestAgent bool
	// TPMSocket is the path of the control socket of a swtpm that listens; this process connects to it. Empty is no TPM.
	TPMSocket string
	// ResetInPlace lets a guest that resets boot again in the same QEMU. Without it a guest that resets has failed.
	ResetInPlace bool
}

// Firmware is EFI in two flash chips, as files that are opened by the caller's process and handed over as descriptors.
type Firmware struct {
	// Code is the firmware itself, read-only and shared by all. Vars is the machine's own writable copy of the template of
	// variables that belongs to it.
	Code, Vars string
	// Format of both files is "raw" or "qcow2".
	Format string
	// SecureBoot protects the variables from the guest's kernel, which the Code has to be built for; ArchX86 only.
	// Which keys are enrolled is a matter of Vars.
	SecureBoot bool
}

// Disk is a file or a block device as a disk.
type Disk struct {
	// Serial identifies the disk to host and guest: 1 to 20 of a-z, 0-9 and dash. It is what SCSI VPD page 0x80, virtio-blk
	// and ATA's IDENTIFY tell.
	Serial string
	// Path of the file or block device; it is opened by the caller's process, without following a symbolic link, and
	// handed over as a descriptor.
	Path string
	// Format is "raw" or "qcow2"; it is never probed.
	Format string
	// ReadOnly disks are opened for reading only, and can be shared by many machines.
	ReadOnly bool
	// Backing is below a qcow2 overlay whose header names no backing file. It is opened for reading only.
	Backing *Backing
	// Bus is BusSCSI, BusVirtio or BusSATA. Only disks on SCSI can be plugged into a running guest.
	Bus string
	// CDROM makes the disk an optical drive, on BusSCSI or BusSATA, read-only.
	CDROM bool
	// BootIndex orders the disks the firmware tries, the least first; 0 is never tried.
	BootIndex int
}

// Backing is the file below an overlay, as Disk.Path and Disk.Format.
type Backing struct{ Path, Format string }

// NIC is a virtio network interface on a tap.
type NIC struct {
	// ID names the interface's device; as for Machine.Name.
	ID string
	// MAC is the guest's hardware address.
	MAC string
	// MTU is told to the guest; 0 tells none.
	MTU int
	// Unconnected interfaces have no tap.
	Unconnected bool
}

// connected counts the interfaces that have a tap.
func (m Machine) connected() (n int) {
	for _, nic := range m.NICs {
		if !nic.Unconnected {
			n++
		}
	}
	return n
}

// Defaults returns the machine with empty fields filled.
func (m Machine) Defaults() Machine {
	if m.CPUModel == "" {
		m.CPUModel = "max"
		if m.Accel == AccelKVM {
			m.CPUModel = "host"
		}
	}
	if m.VCPUs == 0 {
		m.VCPUs = 1
	}
	if m.MemoryBytes == 0 {
		m.MemoryBytes = 256 * mib
	}
	return m
}

var (
	nameRE   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	cpuRE    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._,=+-]*$`)
	uuidRE   = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	smbiosRE = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	serialRE = regexp.MustCompile(`^[a-z0-9-]{1,20}$`)
)

// problems collects what is wrong with a value, one error for each field.
type problems []error

func (p *problems) rule(ok bool, field string, value any, want string) {
	if !ok {
		*p = append(*p, fmt.Errorf("%s is %q; it has to be %s: %w", field, fmt.Sprint(value), want, errdefs.ErrInvalidArgument))
	}
}

// Validate tells everything that is wrong with a machine whose defaults are filled, as errdefs.ErrInvalidArgument.
func (m Machine) Validate() error {
	var p problems
	p.rule(nameRE.MatchString(m.Name), "machine.name", m.Name, "1 to 63 letters, digits, dots, dashes or underscores")
	p.rule(m.UUID == "" || uuidRE.MatchString(m.UUID), "machine.uuid", m.UUID, "empty or a UUID in lower case")
	p.rule(m.Arch == ArchX86 || m.Arch == ArchARM64, "machine.arch", m.Arch, "x86_64 or aarch64")
	p.rule(m.Accel == AccelKVM || m.Accel == AccelTCG, "machine.accel", m.Accel, "kvm or tcg")
	p.rule(cpuRE.MatchString(m.CPUModel), "machine.cpuModel", m.CPUModel, "a CPU model of QEMU")
	p.rule(m.VCPUs >= 1 && m.VCPUs <= maxVCPUs, "machine.vcpus", m.VCPUs, "from 1 to 255")
	p.rule(m.MemoryBytes >= minMemory && m.MemoryBytes%mib == 0, "machine.memoryBytes", m.MemoryBytes, "a multiple of 1 MiB, at least 64 MiB")
	p.rule(m.MaxVCPUs == 0 || m.Arch == ArchX86 && m.MaxVCPUs >= m.VCPUs && m.MaxVCPUs <= maxVCPUs,
		"machine.maxVCPUs", m.MaxVCPUs, "0 or, on x86_64, from machine.vcpus to 255")
	p.rule(m.MaxMemoryBytes == 0 || m.MaxMemoryBytes >= m.MemoryBytes && m.MaxMemoryBytes%mib == 0,
		"machine.maxMemoryBytes", m.MaxMemoryBytes, "0 or a multiple of 1 MiB, at least machine.memoryBytes")
	m.validateSystem(&p)
	m.validateBoot(&p)
	p.rule(m.HotplugPorts >= 0 && m.HotplugPorts <= maxPorts, "machine.hotplugPorts", m.HotplugPorts, "from 0 to 8")
	p.rule(len(m.NICs) <= maxNICs, "machine.nics", len(m.NICs), "at most 8")
	m.validateDisks(&p)
	m.validateNICs(&p)
	m.validateShares(&p)
	p.rule(m.slots() <= maxSlots, "machine's number of devices", m.slots(), "at most 29")
	return errors.Join(p...)
}

func (m Machine) validateSystem(p *problems) {
	p.rule(m.Serial == "" || smbiosRE.MatchString(m.Serial), "machine.serial", m.Serial, "empty or 1 to 64 letters, digits, dots, dashes and underscores")
	p.rule(m.Type == "" || m.Arch == ArchX86 && m.Type == TypeX86 || m.Arch == ArchARM64 && m.Type == TypeARM64,
		"machine.type", m.Type, "empty, "+TypeX86+" on x86_64 or "+TypeARM64+" on aarch64")
	huge := m.HugePageBytes
	p.rule(huge == 0 || huge >= 64<<10 && huge&(huge-1) == 0 && m.MemoryBytes%huge == 0,
		"machine.hugePageBytes", huge, "0 or a size of huge pages that the memory is a multiple of")
	p.rule(m.HugeNodeBytes >= 0 && m.HugeNodeBytes%HugeNodePage == 0, "machine.hugeNodeBytes", m.HugeNodeBytes, "0 or a multiple of 2 MiB")
	p.rule(m.HugeNodeBytes == 0 || m.Memory == MemoryOwn && huge == 0, "machine.hugeNodeBytes", m.HugeNodeBytes, "0 with memory that is handed over or consists of huge pages")
	p.rule(m.HugeNodeBytes == 0 || m.MemoryBytes%HugeNodePage == 0, "machine.memoryBytes", m.MemoryBytes, "a multiple of 2 MiB with huge pages beside it")
	p.rule(slices.Contains([]string{"", VideoStd, VideoVirtio}, m.Video), "machine.video", m.Video, "empty, std or virtio")
	p.rule(slices.Contains([]string{"", WatchdogReset, WatchdogPoweroff, WatchdogPause, WatchdogNMI}, m.Watchdog),
		"machine.watchdog", m.Watchdog, "empty, reset, poweroff, pause or inject-nmi")
	p.rule(slices.Contains([]string{MemoryOwn, MemoryShared, MemoryPrivate, MemoryCopied}, m.Memory),
		"machine.memory", m.Memory, "empty, shared, private or copied")
	p.rule(m.Memory == MemoryOwn || huge == 0, "machine.hugePageBytes", huge, "0 with memory that is handed over")
	p.rule(m.Memory != MemoryPrivate || len(m.Shares) == 0, "machine.shares", len(m.Shares), "none with private memory")
	p.rule(m.TPMSocket == "" || filepath.IsAbs(m.TPMSocket), "machine.tpmSocket", m.TPMSocket, "empty or an absolute path")
}

func (m Machine) validateBoot(p *problems) {
	p.rule(m.Kernel == "" && len(m.Disks) > 0 || filepath.IsAbs(m.Kernel), "machine.kernel", m.Kernel, "an absolute path, or empty if there is a disk to boot")
	p.rule(m.Initrd == "" || filepath.IsAbs(m.Initrd), "machine.initrd", m.Initrd, "empty or an absolute path")
	p.rule(!strings.ContainsAny(m.Cmdline, "\n\x00"), "machine.cmdline", m.Cmdline, "one line")
	p.rule(m.Kernel != "" || m.Initrd == "", "machine.initrd", m.Initrd, "empty without a kernel")
	p.rule(m.Kernel != "" || m.Cmdline == "", "machine.cmdline", m.Cmdline, "empty without a kernel")
	p.rule(m.Ignition == "" || filepath.IsAbs(m.Ignition), "machine.ignition", m.Ignition, "empty or an absolute path")
	p.rule(m.Kernel != "" || m.Firmware != nil || m.Arch != ArchARM64, "machine.firmware", "none", "EFI, for aarch64 has no BIOS")
	f := m.Firmware
	if f == nil {
		return
	}
	p.rule(filepath.IsAbs(f.Code), "machine.firmware.code", f.Code, "an absolute path")
	p.rule(filepath.IsAbs(f.Vars), "machine.firmware.vars", f.Vars, "an absolute path")
	p.rule(f.Format == "raw" || f.Format == "qcow2", "machine.firmware.format", f.Format, "raw or qcow2")
	p.rule(!f.SecureBoot || m.Arch == ArchX86, "machine.firmware.secureBoot", f.SecureBoot, "false but on x86_64")
}

func (m Machine) validateShares(p *problems) {
	seen := make(map[string]bool)
	for i, s := range m.Shares {
		field := fmt.Sprintf("machine.shares[%d]", i)
		s.validate(p, field)
		p.rule(!seen[s.Tag], field+".tag", s.Tag, "used once")
		seen[s.Tag] = true
	}
}

func (m Machine) validateDisks(p *problems) {
	seen, boot := make(map[string]bool), make(map[int]bool)
	for i, d := range m.Disks {
		field := fmt.Sprintf("machine.disks[%d]", i)
		d.validate(p, field)
		p.rule(!seen[d.Serial], field+".serial", d.Serial, "used once")
		seen[d.Serial] = true
		p.rule(d.BootIndex == 0 || !boot[d.BootIndex], field+".bootIndex", d.BootIndex, "0 or used once")
		boot[d.BootIndex] = true
	}
	p.rule(m.onBus(BusSATA) <= maxSATA, "machine's number of disks on sata", m.onBus(BusSATA), "at most 6")
}

// onBus counts the disks on a bus.
func (m Machine) onBus(bus string) (n int) {
	for _, d := range m.Disks {
		if d.Bus == bus {
			n++
		}
	}
	return n
}

func (d Disk) validate(p *problems, field string) {
	p.rule(serialRE.MatchString(d.Serial), field+".serial", d.Serial, "1 to 20 of a-z, 0-9 and dash")
	p.rule(filepath.IsAbs(d.Path), field+".path", d.Path, "an absolute path")
	p.rule(d.Format == "raw" || d.Format == "qcow2", field+".format", d.Format, "raw or qcow2")
	p.rule(d.Bus == BusSCSI || d.Bus == BusVirtio || d.Bus == BusSATA, field+".bus", d.Bus, "empty, virtio or sata")
	p.rule(!d.CDROM || d.ReadOnly && d.Bus != BusVirtio, field+".cdrom", d.CDROM, "false but for a read-only disk on SCSI or SATA")
	p.rule(!d.ReadOnly || d.CDROM || d.Bus != BusSATA, field+".readOnly", d.ReadOnly, "false on SATA, where only optical drives are read-only")
	p.rule(d.BootIndex >= 0, field+".bootIndex", d.BootIndex, "0 or more")
	if b := d.Backing; b != nil {
		p.rule(d.Format == "qcow2", field+".format", d.Format, "qcow2 with a backing file")
		p.rule(filepath.IsAbs(b.Path), field+".backing.path", b.Path, "an absolute path")
		p.rule(b.Format == "raw" || b.Format == "qcow2", field+".backing.format", b.Format, "raw or qcow2")
	}
}

func (m Machine) validateNICs(p *problems) {
	seen := make(map[string]bool)
	for i, n := range m.NICs {
		field := fmt.Sprintf("machine.nics[%d]", i)
		p.rule(nameRE.MatchString(n.ID), field+".id", n.ID, "letters, digits, dots, dashes or underscores")
		p.rule(!seen[n.ID], field+".id", n.ID, "used once")
		mac, err := net.ParseMAC(n.MAC)
		p.rule(err == nil && len(mac) == 6 && mac[0]&1 == 0, field+".mac", n.MAC, "a unicast hardware address of 6 bytes")
		p.rule(n.MTU == 0 || n.MTU >= 68 && n.MTU <= 65535, field+".mtu", n.MTU, "0 or from 68 to 65535")
		seen[n.ID] = true
	}
}
