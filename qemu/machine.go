package qemu

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
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
	// maxVCPUs is the limit of q35 in QEMU 7.2 without an interrupt remapping unit.
	maxVCPUs = 255
	// maxPorts keeps the root ports and all other devices within the 32 slots of the root bus.
	maxPorts = 8
	maxNICs  = 8
)

// Machine is one virtual machine as plain data. The zero value of a field that Defaults fills means the default.
type Machine struct {
	// Name is shown in the process list; letters, digits, dot, dash and underscore.
	Name string
	// UUID is the guest's SMBIOS UUID.
	UUID string
	// Arch is ArchX86 (machine q35) or ArchARM64 (machine virt).
	Arch string
	// Accel is AccelKVM or AccelTCG. What works on this node is for the caller to find out.
	Accel string
	// CPUModel is a QEMU CPU model; by default "host" under KVM and "max" under TCG.
	CPUModel string
	// VCPUs is the number of processors; 1 by default.
	VCPUs int
	// MemoryBytes is the guest's memory, a multiple of 1 MiB; 256 MiB by default. It is a shared memfd, so that
	// vhost-user devices can be plugged at any time.
	MemoryBytes int64
	// Kernel and Initrd are files on the host that every user may read; Initrd may be empty.
	Kernel, Initrd, Cmdline string
	// Disks are LUNs 0, 1, ... of the SCSI controller from the start; others can be plugged later.
	Disks []Disk
	// NICs are the network interfaces, in the order the guest numbers them.
	NICs []NIC
	// HotplugPorts is the number of free PCIe root ports for AddShare.
	HotplugPorts int
}

// Disk is a file as a SCSI disk.
type Disk struct {
	// Serial identifies the disk to host and guest: 1 to 20 of a-z, 0-9 and dash. It is what SCSI VPD page 0x80 tells.
	Serial string
	// Path of the file; it is opened by the caller's process, without following a symbolic link, and
	// handed over as a descriptor.
	Path string
	// Format is "raw" or "qcow2"; it is never probed.
	Format string
	// ReadOnly disks are opened for reading only, and can be shared by many machines.
	ReadOnly bool
}

// NIC is a virtio network interface on a tap.
type NIC struct {
	// ID names the interface's device; as for Machine.Name.
	ID string
	// MAC is the guest's hardware address.
	MAC string
	// MTU is told to the guest; 0 tells none.
	MTU int
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
	p.rule(filepath.IsAbs(m.Kernel), "machine.kernel", m.Kernel, "an absolute path")
	p.rule(m.Initrd == "" || filepath.IsAbs(m.Initrd), "machine.initrd", m.Initrd, "empty or an absolute path")
	p.rule(!strings.ContainsAny(m.Cmdline, "\n\x00"), "machine.cmdline", m.Cmdline, "one line")
	p.rule(m.HotplugPorts >= 0 && m.HotplugPorts <= maxPorts, "machine.hotplugPorts", m.HotplugPorts, "from 0 to 8")
	p.rule(len(m.NICs) <= maxNICs, "machine.nics", len(m.NICs), "at most 8")
	m.validateDisks(&p)
	m.validateNICs(&p)
	return errors.Join(p...)
}

func (m Machine) validateDisks(p *problems) {
	seen := make(map[string]bool)
	for i, d := range m.Disks {
		field := fmt.Sprintf("machine.disks[%d]", i)
		d.validate(p, field)
		p.rule(!seen[d.Serial], field+".serial", d.Serial, "used once")
		seen[d.Serial] = true
	}
}

func (d Disk) validate(p *problems, field string) {
	p.rule(serialRE.MatchString(d.Serial), field+".serial", d.Serial, "1 to 20 of a-z, 0-9 and dash")
	p.rule(filepath.IsAbs(d.Path), field+".path", d.Path, "an absolute path")
	p.rule(d.Format == "raw" || d.Format == "qcow2", field+".format", d.Format, "raw or qcow2")
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
