package qemu

import (
	"fmt"
	"maps"
	"strconv"
)

const (
	// guestAgentPort is the virtio-serial port that qemu-guest-agent opens.
	guestAgentPort = "org.qemu.guest_agent.0"
	// nicSlot is the PCI slot of the first NIC of a machine with a fixed type.
	nicSlot = 16

	balloonID = "balloon0"
	videoID   = "video0"
)

type option struct{ option, value string }

// options collects devices and what is behind them. QEMU gives PCI slots in their order.
type options []option

func (o *options) text(name, value string)  { *o = append(*o, option{name, value}) }
func (o *options) add(name string, p props) { o.text(name, p.String()) }

func (m Machine) devices(fds Descriptors) []option {
	var o options
	if m.Type != "" {
		m.addNICs(&o, fds)
	}
	o.add("-object", props{"qom-type": "rng-builtin", "id": "rng"})
	o.add("-device", pciDevice("virtio-rng-pci", "rng0", props{"rng": "rng"}))
	m.addPorts(&o, fds)
	m.addDisks(&o, fds)
	if m.Type == "" {
		m.addNICs(&o, fds)
	}
	m.addVideo(&o)
	m.addWatchers(&o)
	m.addTPM(&o, fds)
	for i, s := range m.Shares {
		o.text("-chardev", fmt.Sprintf("socket,id=%s,fd=%d", s.id(), fds.Shares[i]))
		o.add("-device", s.device("pcie.0"))
	}
	for i := range m.HotplugPorts {
		o.add("-device", props{"driver": "pcie-root-port", "id": portID(i), "bus": "pcie.0", "chassis": i + 1})
	}
	return o
}

// slots is how many slots of the root bus the devices take.
func (m Machine) slots() int {
	n := 2 + m.onBus(BusVirtio) + len(m.NICs) + len(m.Shares) + m.HotplugPorts // 2: random numbers and ports
	for _, there := range []bool{m.hasSCSI(), m.onBus(BusSATA) > 0, m.Watchdog != "", m.PanicDevice, m.Balloon} {
		if there {
			n++
		}
	}
	if m.Video != "" {
		n += 3
	}
	return n
}

// hasSCSI tells whether there is a controller, which disks that are plugged later need too.
func (m Machine) hasSCSI() bool { return m.Type == "" || m.onBus(BusSCSI) > 0 }

// addPorts adds the ports of the agents.
func (m Machine) addPorts(o *options, fds Descriptors) {
	ports := 2 // the first one is for consoles
	if m.GuestAgent {
		ports++
	}
	o.text("-chardev", fmt.Sprintf("socket,id=agent,fd=%d,server=on,wait=off", fds.Agent))
	o.add("-device", pciDevice("virtio-serial-pci", "serial0", props{"max_ports": ports}))
	o.add("-device", props{"driver": "virtserialport", "id": "agent", "bus": "serial0.0", "nr": 1, "chardev": "agent", "name": agentPort})
	if m.GuestAgent {
		o.text("-chardev", fmt.Sprintf("socket,id=guestagent,fd=%d,server=on,wait=off", fds.GuestAgent))
		o.add("-device", props{"driver": "virtserialport", "id": "guestagent", "bus": "serial0.0", "nr": 2, "chardev": "guestagent", "name": guestAgentPort})
	}
}

func (m Machine) addDisks(o *options, fds Descriptors) {
	if m.hasSCSI() {
		o.add("-device", pciDevice("virtio-scsi-pci", "scsi0", nil))
	}
	if m.onBus(BusSATA) > 0 {
		o.add("-device", props{"driver": "ich9-ahci", "id": "sata0", "bus": "pcie.0"})
	}
	next := make(map[string]int) // by bus
	for i, d := range m.Disks {
		if d.Backing != nil {
			o.text("-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", fds.Backing[i], backingSet+i, d.backingID()))
			o.add("-blockdev", fileNode(d.backingID(), d.Backing.Format, backingSet+i, true, false))
		}
		o.text("-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", fds.Disks[i], i+1, d.id()))
		o.add("-blockdev", d.node(i+1, fds.Devices != nil && fds.Devices[i]))
		dev := d.device()
		switch d.Bus {
		case BusSCSI:
			dev["lun"] = next[d.Bus]
		case BusSATA:
			dev["bus"] = fmt.Sprintf("sata0.%d", next[d.Bus])
		}
		next[d.Bus]++
		o.add("-device", dev)
	}
}

func (m Machine) addNICs(o *options, fds Descriptors) {
	taps := fds.NICs
	for i, n := range m.NICs {
		dev := n.device()
		if !n.Unconnected {
			o.add("-netdev", props{"type": "tap", "id": n.ID, "fd": strconv.Itoa(taps[0])})
			dev["netdev"], taps = n.ID, taps[1:]
		}
		if m.Type != "" {
			dev["addr"] = fmt.Sprintf("%x", nicSlot+i)
		}
		o.add("-device", dev)
	}
}

// addVideo adds the card, and VNC that listens nowhere: connections are handed over by QMP.
func (m Machine) addVideo(o *options) {
	if m.Video == "" {
		return
	}
	card := map[string]string{
		ArchX86 + VideoStd: "VGA", ArchX86 + VideoVirtio: "virtio-vga",
		ArchARM64 + VideoStd: "bochs-display", ArchARM64 + VideoVirtio: "virtio-gpu-pci",
	}[m.Arch+m.Video]
	o.text("-vnc", "none")
	o.add("-device", props{"driver": card, "id": videoID, "bus": "pcie.0"})
	o.add("-device", pciDevice("virtio-keyboard-pci", "keyboard0", nil))
	o.add("-device", pciDevice("virtio-tablet-pci", "tablet0", nil))
}

// addWatchers adds what tells of the guest's state.
func (m Machine) addWatchers(o *options) {
	if m.Watchdog != "" {
		o.add("-device", props{"driver": "i6300esb", "id": "watchdog0", "bus": "pcie.0"})
	}
	if m.PanicDevice {
		o.add("-device", props{"driver": "pvpanic-pci", "id": "panic0", "bus": "pcie.0"})
	}
	if m.Balloon {
		// Huge pages are not given back in parts.
		o.add("-device", pciDevice("virtio-balloon-pci", balloonID, props{"deflate-on-oom": true, "free-page-reporting": m.HugePageBytes == 0}))
	}
}

func (m Machine) addTPM(o *options, fds Descriptors) {
	if m.TPMSocket == "" {
		return
	}
	driver := "tpm-crb"
	if m.Arch == ArchARM64 {
		driver = "tpm-tis-device"
	}
	o.text("-chardev", fmt.Sprintf("socket,id=tpm,fd=%d", fds.TPM))
	o.text("-tpmdev", "emulator,id=tpm0,chardev=tpm")
	o.add("-device", props{"driver": driver, "id": "tpm", "tpmdev": "tpm0"})
}

// pciDevice is a virtio device of the current standard on the root bus.
func pciDevice(driver, id string, more props) props {
	p := props{"driver": driver, "id": id, "bus": "pcie.0", "disable-legacy": "on"}
	maps.Copy(p, more)
	return p
}

const portPrefix = "hotplug"

func portID(i int) string { return portPrefix + strconv.Itoa(i) }

const diskPrefix = "disk-"

// id names the disk's device, its block node and its descriptor set.
func (d Disk) id() string { return diskPrefix + d.Serial }

// backingID names the block node below the disk's own, and its descriptor set.
func (d Disk) backingID() string { return "backing-" + d.Serial }

// fileNode is a block node on a descriptor set. A header that names other files is not followed.
func fileNode(name, format string, fdset int, readOnly, device bool) props {
	driver := "file"
	if device {
		driver = "host_device"
	}
	p := props{
		"driver": format, "node-name": name, "read-only": readOnly, "discard": "unmap",
		"file": props{"driver": driver, "filename": fmt.Sprintf("/dev/fdset/%d", fdset), "read-only": readOnly, "discard": "unmap"},
	}
	if format == "qcow2" {
		p["backing"] = nil
	}
	return p
}

// node is the disk's block node on the descriptor set of the given number.
func (d Disk) node(fdset int, device bool) props {
	p := fileNode(d.id(), d.Format, fdset, d.ReadOnly, device)
	if d.Backing != nil {
		p["backing"] = d.backingID()
	}
	return p
}

// device is the disk itself. On SCSI, without a "lun" QEMU takes the first free one.
func (d Disk) device() props {
	p := props{"id": d.id(), "drive": d.id(), "serial": d.Serial}
	kind := "hd"
	if d.CDROM {
		kind = "cd"
	}
	switch d.Bus {
	case BusVirtio:
		maps.Copy(p, pciDevice("virtio-blk-pci", d.id(), nil))
	case BusSATA:
		p["driver"] = "ide-" + kind
	default:
		maps.Copy(p, props{"driver": "scsi-" + kind, "bus": scsiBus, "channel": 0, "scsi-id": 0})
	}
	if d.BootIndex > 0 {
		p["bootindex"] = d.BootIndex
	}
	return p
}

func (n NIC) device() props {
	// The option ROM is for booting from the network. A guest that is restored announces nothing, see prepareMigration; QEMU 7.2 would
	// look for the timer of such announcements when the guest resets the device, and end by a signal.
	p := pciDevice("virtio-net-pci", "nic-"+n.ID, props{"mac": n.MAC, "romfile": "", "guest_announce": false})
	if n.MTU > 0 {
		p["host_mtu"] = n.MTU
	}
	return p
}

// id names the share's device and its connection.
func (s Share) id() string { return "share-" + s.Tag }

func (s Share) device(bus string) props {
	return props{"driver": "vhost-user-fs-pci", "id": s.id(), "chardev": s.id(), "tag": s.Tag, "bus": bus}
}
