package qemu

import (
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
)

const (
	// agentPort is the virtio-serial port that the guest's agent opens.
	agentPort = "org.vmruntime.agent.0"
	// consoleBytes is the size of the ring that keeps the end of the guest's console; a power of two.
	consoleBytes = 64 << 10
	// tcgBuffer bounds the translated code, in MiB, which is the pod's memory; QEMU's default is 1 GiB. Booting takes as
	// much processor time with 64 as with 128, and 6% more with 32.
	tcgBuffer = 64

	scsiBus = "scsi0.0"

	// The kernel and the initrd as QEMU sees them in its own root.
	kernelPath = "/boot/kernel"
	initrdPath = "/boot/initrd"
)

// Descriptors are the numbers under which QEMU inherits what it does not open itself.
type Descriptors struct {
	QMP, Agent int   // listening sockets
	Disks      []int // one for each of Machine.Disks
	NICs       []int // taps, one for each of Machine.NICs
}

// props is a device, node or object as the JSON that both the command line and QMP take. Its
// keys are rendered in alphabetical order.
type props map[string]any

func (p props) String() string {
	data, err := json.Marshal(p)
	if err != nil {
		panic(fmt.Sprintf("properties made in this package cannot be marshalled: %v", err))
	}
	return string(data)
}

// Args renders QEMU's arguments for a valid machine. It depends on nothing but its arguments.
func (m Machine) Args(fds Descriptors) []string {
	var a []string
	add := func(option, value string) { a = append(a, option, value) }
	a = append(a, "-no-user-config", "-nodefaults", "-display", "none")
	add("-name", m.Name)
	if m.UUID != "" {
		add("-uuid", m.UUID)
	}
	add("-machine", m.machineType())
	add("-accel", m.accel())
	add("-cpu", m.CPUModel)
	add("-smp", fmt.Sprintf("cpus=%d,sockets=1,cores=%d,threads=1", m.VCPUs, m.VCPUs))
	add("-m", fmt.Sprintf("%dM", m.MemoryBytes/mib))
	add("-object", props{"qom-type": "memory-backend-memfd", "id": "mem", "size": m.MemoryBytes, "share": true}.String())
	add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	// A guest that resets has failed; one that ends is kept paused until that has been seen.
	add("-action", "reboot=shutdown,shutdown=pause")
	add("-kernel", kernelPath)
	if m.Initrd != "" {
		add("-initrd", initrdPath)
	}
	if m.Cmdline != "" {
		add("-append", m.Cmdline)
	}
	add("-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", fds.QMP))
	add("-mon", "chardev=qmp,mode=control")
	add("-chardev", fmt.Sprintf("ringbuf,id=console,size=%d", consoleBytes))
	add("-serial", "chardev:console")
	for _, d := range m.devices(fds) {
		add(d.option, d.value)
	}
	return a
}

func (m Machine) machineType() string {
	if m.Arch == ArchARM64 {
		return "virt,memory-backend=mem,gic-version=max"
	}
	return "q35,memory-backend=mem,vmport=off,smbus=off,sata=off"
}

func (m Machine) accel() string {
	if m.Accel == AccelKVM {
		return "kvm"
	}
	return fmt.Sprintf("tcg,thread=multi,tb-size=%d", tcgBuffer)
}

type option struct{ option, value string }

func (m Machine) devices(fds Descriptors) []option {
	var o []option
	add := func(name string, p props) { o = append(o, option{name, p.String()}) }
	add("-object", props{"qom-type": "rng-builtin", "id": "rng"})
	add("-device", pciDevice("virtio-rng-pci", "rng0", props{"rng": "rng"}))
	o = append(o, option{"-chardev", fmt.Sprintf("socket,id=agent,fd=%d,server=on,wait=off", fds.Agent)})
	add("-device", pciDevice("virtio-serial-pci", "serial0", props{"max_ports": 2}))
	add("-device", props{"driver": "virtserialport", "id": "agent", "bus": "serial0.0", "nr": 1, "chardev": "agent", "name": agentPort})
	add("-device", pciDevice("virtio-scsi-pci", "scsi0", nil))
	for i, d := range m.Disks {
		o = append(o, option{"-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", fds.Disks[i], i+1, d.id())})
		add("-blockdev", d.node(i+1))
		dev := d.device()
		dev["lun"] = i
		add("-device", dev)
	}
	for i, n := range m.NICs {
		add("-netdev", props{"type": "tap", "id": n.ID, "fd": strconv.Itoa(fds.NICs[i])})
		add("-device", n.device())
	}
	for i := range m.HotplugPorts {
		add("-device", props{"driver": "pcie-root-port", "id": portID(i), "bus": "pcie.0", "chassis": i + 1})
	}
	return o
}

// pciDevice is a virtio device of the current standard on the root bus.
func pciDevice(driver, id string, more props) props {
	p := props{"driver": driver, "id": id, "bus": "pcie.0", "disable-legacy": "on"}
	maps.Copy(p, more)
	return p
}

const portPrefix = "hotplug"

func portID(i int) string { return portPrefix + strconv.Itoa(i) }

// id names the disk's device, its block node and its descriptor set.
func (d Disk) id() string { return "disk-" + d.Serial }

// node is the block node on the descriptor set of the given number.
func (d Disk) node(fdset int) props {
	return props{
		"driver": d.Format, "node-name": d.id(), "read-only": d.ReadOnly, "discard": "unmap",
		"file": props{"driver": "file", "filename": fmt.Sprintf("/dev/fdset/%d", fdset), "read-only": d.ReadOnly, "discard": "unmap"},
	}
}

// device is the disk itself. Without a "lun" QEMU takes the first free one.
func (d Disk) device() props {
	return props{"driver": "scsi-hd", "id": d.id(), "drive": d.id(), "serial": d.Serial, "bus": scsiBus, "channel": 0, "scsi-id": 0}
}

func (n NIC) device() props {
	// The option ROM is for booting from the network.
	p := pciDevice("virtio-net-pci", "nic-"+n.ID, props{"netdev": n.ID, "mac": n.MAC, "romfile": ""})
	if n.MTU > 0 {
		p["host_mtu"] = n.MTU
	}
	return p
}
