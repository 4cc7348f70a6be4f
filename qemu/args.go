package qemu

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
)

const (
	// agentPort is the virtio-serial port that the guest's agent opens.
	agentPort = "org.vmruntime.agent.0"
	// consoleBytes is the size of the ring that keeps the end of the guest's console; a power of two.
	consoleBytes = 64 << 10
	// tcgBuffer bounds the translated code, in MiB, which is the pod's memory; QEMU's default is 1 GiB. Booting takes as
	// much processor time with 64 as with 128, and 6% more with 32. A guest that waits for its pod holds some 60 from its rehearsal; with 64
	// that was dropped when the pod began, as what is at the ends of its regions is lost.
	tcgBuffer = 96

	scsiBus = "scsi0.0"

	codeNode = "firmware-code"
	varsNode = "firmware-vars"

	// The kernel and the initrd as QEMU sees them in its own root.
	kernelPath   = "/boot/kernel"
	initrdPath   = "/boot/initrd"
	ignitionPath = "/boot/ignition"
	// fdPath is where QEMU finds its own descriptors by name.
	fdPath = "/fd"
	// consolePath is what QEMU adds ".in" and ".out" to.
	consolePath = "/console"

	// Descriptor sets are numbered from 1 for Machine.Disks; QEMU itself chooses numbers for those that are plugged.
	backingSet = 1000
	codeSet    = 2001
	varsSet    = 2002
)

// Descriptors are the numbers under which QEMU inherits what it does not open itself.
type Descriptors struct {
	QMP, Agent int   // listening sockets
	Disks      []int // one for each of Machine.Disks
	NICs       []int // taps, one for each of Machine.NICs that is connected

	Memory     int   // a file, unless Machine.Memory is MemoryOwn
	GuestAgent int   // a listening socket, if Machine.GuestAgent
	Backing    []int // one for each of Machine.Disks, 0 where there is none
	Code, Vars int   // if Machine.Firmware
	TPM        int   // a connected socket, if Machine.TPMSocket
	Shares     []int // connected sockets, one for each of Machine.Shares

	// Devices tells which of Machine.Disks are block devices; nil is none of them.
	Devices []bool
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
	if m.Serial != "" {
		add("-smbios", "type=1,serial="+m.Serial)
	}
	add("-machine", m.machineType())
	add("-accel", m.accel())
	add("-cpu", m.CPUModel)
	add("-smp", m.processors())
	add("-m", m.memorySize())
	add("-object", m.memory(fds).String())
	if m.HugeNodeBytes > 0 {
		add("-object", hugeMemory("huge", m.HugeNodeBytes, HugeNodePage).String())
		add("-numa", fmt.Sprintf("node,nodeid=0,cpus=0-%d,memdev=mem", m.VCPUs-1))
		add("-numa", "node,nodeid=1,memdev=huge")
	}
	add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	add("-action", m.actions())
	if m.Incoming {
		add("-incoming", "defer")
		a = append(a, "-S")
	}
	for _, o := range m.boot(fds) {
		add(o.option, o.value)
	}
	add("-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", fds.QMP))
	add("-mon", "chardev=qmp,mode=control")
	if m.ConsolePipe {
		add("-chardev", "pipe,id=console,path="+consolePath)
	} else {
		add("-chardev", fmt.Sprintf("ringbuf,id=console,size=%d", consoleBytes))
	}
	add("-serial", "chardev:console")
	for _, d := range m.devices(fds) {
		add(d.option, d.value)
	}
	return a
}

func (m Machine) machineType() string {
	t := "q35,memory-backend=mem,vmport=off,smbus=off,sata=off"
	if m.Arch == ArchARM64 {
		t = "virt,memory-backend=mem,gic-version=max"
	}
	if m.Type != "" {
		_, options, _ := strings.Cut(t, ",")
		t = m.Type + "," + options
	}
	if m.HugeNodeBytes > 0 { // then the nodes say what the memory is
		t = strings.Replace(t, ",memory-backend=mem", "", 1)
	}
	if f := m.Firmware; f != nil {
		t += ",pflash0=" + codeNode + ",pflash1=" + varsNode
		if f.SecureBoot {
			t += ",smm=on"
		}
	}
	return t
}

func (m Machine) processors() string {
	if m.MaxVCPUs <= m.VCPUs {
		return fmt.Sprintf("cpus=%d,sockets=1,cores=%d,threads=1", m.VCPUs, m.VCPUs)
	}
	return fmt.Sprintf("cpus=%d,maxcpus=%d,sockets=1,cores=%d,threads=1", m.VCPUs, m.MaxVCPUs, m.MaxVCPUs)
}

func (m Machine) memorySize() string {
	size := fmt.Sprintf("%dM", (m.MemoryBytes+m.HugeNodeBytes)/mib)
	if m.MaxMemoryBytes > m.MemoryBytes {
		size += fmt.Sprintf(",maxmem=%dM", m.MaxMemoryBytes/mib)
	}
	return size
}

func (m Machine) memory(fds Descriptors) props {
	if m.Memory != MemoryOwn {
		return props{
			"qom-type": "memory-backend-file", "id": "mem", "size": m.MemoryBytes,
			"mem-path": fmt.Sprintf("%s/%d", fdPath, fds.Memory), "share": m.Memory != MemoryPrivate,
		}
	}
	if m.HugePageBytes > 0 {
		return hugeMemory("mem", m.MemoryBytes, m.HugePageBytes)
	}
	return ownMemory("mem", m.MemoryBytes)
}

func ownMemory(id string, bytes int64) props {
	return props{"qom-type": "memory-backend-memfd", "id": id, "size": bytes, "share": true}
}

// hugeMemory is taken now, or else the guest would die of the first page that is not there.
func hugeMemory(id string, bytes, page int64) props {
	p := ownMemory(id, bytes)
	maps.Copy(p, props{"hugetlb": true, "hugetlbsize": page, "prealloc": true})
	return p
}

// actions says what QEMU does when the guest ends: one that ends is kept paused until that has been seen.
func (m Machine) actions() string {
	a := "reboot=shutdown,shutdown=pause"
	if m.ResetInPlace {
		a = "reboot=reset,shutdown=pause"
	}
	switch m.Watchdog {
	case "":
	case WatchdogPoweroff: // of QEMU's own poweroff nobody would see the reason
		a += ",watchdog=pause"
	default:
		a += ",watchdog=" + m.Watchdog
	}
	return a
}

// boot is firmware and kernel.
func (m Machine) boot(fds Descriptors) (o []option) {
	add := func(name, value string) { o = append(o, option{name, value}) }
	if f := m.Firmware; f != nil {
		add("-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", fds.Code, codeSet, codeNode))
		add("-blockdev", fileNode(codeNode, f.Format, codeSet, true, false).String())
		add("-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", fds.Vars, varsSet, varsNode))
		add("-blockdev", fileNode(varsNode, f.Format, varsSet, false, false).String())
		if f.SecureBoot {
			add("-global", "driver=cfi.pflash01,property=secure,value=on")
		}
	}
	if m.Kernel == "" {
		add("-boot", "strict=on") // nothing but what has a boot index
	} else {
		add("-kernel", kernelPath)
	}
	if m.Initrd != "" {
		add("-initrd", initrdPath)
	}
	if m.Cmdline != "" {
		add("-append", m.Cmdline)
	}
	if m.Ignition != "" {
		add("-fw_cfg", "name=opt/com.coreos/config,file="+ignitionPath)
	}
	return o
}

func (m Machine) accel() string {
	if m.Accel == AccelKVM {
		return "kvm"
	}
	return fmt.Sprintf("tcg,thread=multi,tb-size=%d", tcgBuffer)
}
