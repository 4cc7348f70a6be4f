package qemu

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

func pod() Machine {
	return Machine{
		Name: "vmruntime-0123", UUID: "01234567-89ab-cdef-0123-456789abcdef", Arch: ArchX86, Accel: AccelTCG, VCPUs: 2,
		Kernel: "/k", Initrd: "/i", Cmdline: "console=ttyS0 quiet panic=-1",
		Disks: []Disk{
			{Serial: "scratch", Path: "/s.img", Format: "raw"},
			{Serial: "image-0", Path: "/i.erofs", Format: "raw", ReadOnly: true},
		},
		NICs:         []NIC{{ID: "net0", MAC: "52:54:00:00:00:01", MTU: 1450}, {ID: "net1", MAC: "52:54:00:00:00:02"}},
		HotplugPorts: 2,
	}
}

// disked is a machine that boots its disk, with all that there is.
func disked() Machine {
	return Machine{
		Name: "vmruntime-0123", UUID: "01234567-89ab-cdef-0123-456789abcdef", Serial: "vmr-0123", Arch: ArchX86, Type: TypeX86, Accel: AccelKVM,
		VCPUs: 4, MemoryBytes: 2 << 30, HugePageBytes: 2 << 20, Ignition: "/ignition.json",
		Firmware: &Firmware{Code: "/code.fd", Vars: "/vars.fd", Format: "raw", SecureBoot: true},
		Disks: []Disk{
			{Serial: "root", Path: "/overlay.qcow2", Format: "qcow2", Backing: &Backing{"/disk.qcow2", "qcow2"}, Bus: BusVirtio, BootIndex: 1},
			{Serial: "data", Path: "/dev/sdx", Format: "raw", Bus: BusVirtio},
			{Serial: "old", Path: "/old.img", Format: "raw", Bus: BusSATA, BootIndex: 2},
			{Serial: "seed", Path: "/seed.iso", Format: "raw", Bus: BusSATA, ReadOnly: true, CDROM: true},
		},
		NICs:      []NIC{{ID: "net0", MAC: "52:54:00:00:00:01", MTU: 1450}, {ID: "net1", MAC: "52:54:00:00:00:02"}},
		Shares:    []Share{{Tag: "config", Socket: "/config.sock"}},
		TPMSocket: "/tpm.sock", HotplugPorts: 1, ConsolePipe: true, Video: VideoStd, Watchdog: WatchdogPoweroff, PanicDevice: true,
		Balloon: true, GuestAgent: true, ResetInPlace: true,
	}
}

func TestArgsGolden(t *testing.T) {
	fds := Descriptors{
		QMP: 4, Agent: 5, Disks: []int{6, 7, 20, 21}, NICs: []int{8, 9}, GuestAgent: 10, Backing: []int{11, 0, 0, 0}, Code: 12, Vars: 13, TPM: 14,
		Shares: []int{15}, Devices: []bool{false, true, false, false},
	}
	podFDs := Descriptors{QMP: 4, Agent: 5, Disks: []int{6, 7}, NICs: []int{8, 9}}
	kvm, arm := pod(), pod()
	kvm.Accel = AccelKVM
	arm.Arch, arm.Cmdline = ArchARM64, "console=ttyAMA0"
	small := Machine{Name: "small", Arch: ArchX86, Accel: AccelTCG, Kernel: "/k"}
	efi := disked()
	efi.Arch, efi.Type, efi.Firmware.SecureBoot, efi.Video = ArchARM64, TypeARM64, false, VideoVirtio
	direct := Machine{
		Name: "direct", Arch: ArchX86, Type: TypeX86, Accel: AccelTCG, Kernel: "/k", Initrd: "/i", Cmdline: "root=/dev/sda1",
		Disks: []Disk{{Serial: "root", Path: "/disk.img", Format: "raw"}, {Serial: "seed", Path: "/seed.iso", Format: "raw", ReadOnly: true, CDROM: true}},
	}
	bios := Machine{
		Name: "bios", Arch: ArchX86, Type: TypeX86, Accel: AccelTCG, Video: VideoVirtio, Watchdog: WatchdogReset, ResetInPlace: true, ConsolePipe: true, Balloon: true,
		Disks: []Disk{{Serial: "root", Path: "/o", Format: "qcow2", Backing: &Backing{"/disk.img", "raw"}, Bus: BusVirtio, BootIndex: 1}},
	}
	roomy, roomyArm := pod(), arm
	roomy.MaxVCPUs, roomy.MaxMemoryBytes, roomyArm.MaxMemoryBytes = 8, 64<<30, 64<<30
	made, clone, restored := pod(), pod(), pod()
	made.Memory, made.NICs[0].Unconnected = MemoryShared, true
	clone.Memory, clone.Incoming = MemoryPrivate, true
	restored.Incoming = true
	huge, armHuge := pod(), arm
	huge.HugeNodeBytes, armHuge.HugeNodeBytes, armHuge.VCPUs = 64<<20, 64<<20, 1
	memoryFDs := podFDs
	memoryFDs.Memory = 10
	for name, tc := range map[string]struct {
		m   Machine
		fds Descriptors
	}{
		"x86_64-template": {made, memoryFDs}, "x86_64-clone": {clone, memoryFDs}, "x86_64-restored": {restored, podFDs},
		"x86_64-tcg": {pod(), podFDs}, "x86_64-kvm": {kvm, podFDs}, "aarch64-tcg": {arm, podFDs}, "small": {small, podFDs},
		"x86_64-huge": {huge, podFDs}, "aarch64-huge": {armHuge, podFDs},
		"x86_64-roomy": {roomy, podFDs}, "aarch64-roomy": {roomyArm, podFDs},
		"x86_64-secureboot": {disked(), fds}, "aarch64-efi": {efi, fds}, "x86_64-direct": {direct, fds}, "x86_64-bios": {bios, fds},
	} {
		t.Run(name, func(t *testing.T) {
			m := tc.m.Defaults()
			if err := m.Validate(); err != nil {
				t.Fatal(err)
			}
			got := strings.ReplaceAll(strings.Join(m.Args(tc.fds), "\n"), "\n-", "\n\n-") + "\n"
			path := filepath.Join("testdata", name+".args")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("arguments differ; if they should, run the test with -update (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Machine)
		want   []string
	}{
		"valid":  {func(*Machine) {}, nil},
		"name":   {func(m *Machine) { m.Name = "a,b" }, []string{`machine.name is "a,b"`}},
		"uuid":   {func(m *Machine) { m.UUID = "x" }, []string{`machine.uuid is "x"`}},
		"kernel": {func(m *Machine) { m.Kernel = "k" }, []string{`machine.kernel is "k"; it has to be an absolute path`}},
		"cpu":    {func(m *Machine) { m.CPUModel = "max -evil" }, []string{"machine.cpuModel"}},
		"memory": {func(m *Machine) { m.MemoryBytes = 100<<20 + 1 }, []string{"a multiple of 1 MiB"}},
		"room": {func(m *Machine) { m.MaxVCPUs, m.MaxMemoryBytes = 1, 1<<20 }, []string{
			`machine.maxVCPUs is "1"; it has to be 0 or, on x86_64, from machine.vcpus to 255`, "machine.maxMemoryBytes",
		}},
		"room of arm":            {func(m *Machine) { m.Arch, m.MaxVCPUs = ArchARM64, 4 }, []string{"machine.maxVCPUs"}},
		"memory's kind":          {func(m *Machine) { m.Memory = "mine" }, []string{`machine.memory is "mine"; it has to be empty, shared, private or copied`}},
		"huge pages handed over": {func(m *Machine) { m.Memory, m.HugePageBytes = MemoryShared, 2<<20 }, []string{"machine.hugePageBytes"}},
		"a node of huge pages": {func(m *Machine) { m.MemoryBytes, m.HugeNodeBytes = 129<<20, 3<<20 }, []string{
			`machine.hugeNodeBytes is "3145728"; it has to be 0 or a multiple of 2 MiB`, `machine.memoryBytes is "135266304"; it has to be a multiple of 2 MiB`,
		}},
		"huge pages beside a copy": {func(m *Machine) { m.Memory, m.HugeNodeBytes = MemoryCopied, 2<<20 }, []string{"machine.hugeNodeBytes"}},
		"share of private memory": {func(m *Machine) { m.Memory, m.Shares = MemoryPrivate, []Share{{Tag: "a", Socket: "/s"}} }, []string{
			`machine.shares is "1"; it has to be none with private memory`,
		}},
		"serials": {func(m *Machine) { m.Disks[1].Serial = "scratch"; m.Disks[0].Format = "" }, []string{
			`machine.disks[0].format is ""`, `machine.disks[1].serial is "scratch"; it has to be used once`,
		}},
		"long serial": {func(m *Machine) { m.Disks[0].Serial = "abcdefghijklmnopqrstu" }, []string{"machine.disks[0].serial"}},
		"nics": {func(m *Machine) { m.NICs[0].MAC = "01:00:00:00:00:01"; m.NICs[1].ID = "net0"; m.NICs[1].MTU = 5 }, []string{
			"machine.nics[0].mac", "machine.nics[1].id", "machine.nics[1].mtu",
		}},
		"all at once": {func(m *Machine) { *m = Machine{} }, []string{
			"machine.name", "machine.arch", "machine.accel", "machine.cpuModel", "machine.vcpus", "machine.memoryBytes", "machine.kernel",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			m := pod().Defaults()
			tc.change(&m)
			checkErrors(t, m.Validate(), tc.want)
		})
	}
}

func TestValidateDisked(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Machine)
		want   []string
	}{
		"valid":           {func(*Machine) {}, nil},
		"nothing to boot": {func(m *Machine) { m.Disks = nil }, []string{`machine.kernel is ""; it has to be an absolute path, or empty if there is a disk`}},
		"no kernel":       {func(m *Machine) { m.Initrd, m.Cmdline = "/i", "quiet" }, []string{"machine.initrd", "machine.cmdline"}},
		"firmware": {func(m *Machine) { m.Firmware = &Firmware{Code: "c", Format: "vmdk"} }, []string{
			`machine.firmware.code is "c"`, "machine.firmware.vars", `machine.firmware.format is "vmdk"; it has to be raw or qcow2`,
		}},
		"arm":                  {func(m *Machine) { m.Arch = ArchARM64 }, []string{`machine.type is "pc-q35-7.2"`, "machine.firmware.secureBoot"}},
		"arm without firmware": {func(m *Machine) { m.Arch, m.Type, m.Firmware = ArchARM64, "", nil }, []string{"machine.firmware is"}},
		"words": {func(m *Machine) { m.Serial, m.Type, m.Video, m.Watchdog = "a,b", "q35", "cirrus", "none" }, []string{
			`machine.serial is "a,b"`, `machine.type is "q35"`, `machine.video is "cirrus"`, `machine.watchdog is "none"`,
		}},
		"huge pages": {func(m *Machine) { m.HugePageBytes, m.MemoryBytes = 1<<30, 3<<29 }, []string{"machine.hugePageBytes"}},
		"paths": {func(m *Machine) { m.TPMSocket, m.Ignition, m.Shares[0].Socket = "t", "i", "s" }, []string{
			"machine.tpmSocket", "machine.ignition", "machine.shares[0].socket",
		}},
		"shares": {func(m *Machine) { m.Shares = append(m.Shares, m.Shares[0]); m.Shares[0].Tag = "Ä" }, []string{`machine.shares[0].tag is "Ä"`}},
		"disks": {func(m *Machine) {
			m.Disks[0].Backing, m.Disks[0].Bus, m.Disks[1].CDROM, m.Disks[2].BootIndex = &Backing{"b", "vdi"}, "ide", true, 1
		}, []string{
			"machine.disks[0].backing.path", "machine.disks[0].backing.format", `machine.disks[0].bus is "ide"`, "machine.disks[1].cdrom", "machine.disks[2].bootIndex",
		}},
		"raw overlay":     {func(m *Machine) { m.Disks[0].Format = "raw" }, []string{`machine.disks[0].format is "raw"; it has to be qcow2 with a backing file`}},
		"read-only SATA":  {func(m *Machine) { m.Disks[2].ReadOnly = true }, []string{"machine.disks[2].readOnly"}},
		"too much SATA":   {func(m *Machine) { fill(m, 7, BusSATA) }, []string{"machine's number of disks on sata"}},
		"too many in all": {func(m *Machine) { fill(m, 20, BusVirtio) }, []string{"machine's number of devices is \"32\"; it has to be at most 29"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := disked().Defaults()
			tc.change(&m)
			checkErrors(t, m.Validate(), tc.want)
		})
	}
}

func fill(m *Machine, n int, bus string) {
	m.Disks = nil
	for i := range n {
		m.Disks = append(m.Disks, Disk{Serial: fmt.Sprint("d", i), Path: "/d", Format: "raw", Bus: bus})
	}
}

// checkErrors holds that err is one invalid argument for each of the wanted texts, and no more.
func checkErrors(t *testing.T, err error, want []string) {
	t.Helper()
	if len(want) == 0 {
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	if !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Fatalf("error %v is no invalid argument", err)
	}
	if n := len(strings.Split(err.Error(), "\n")); n != len(want) {
		t.Errorf("%d errors, want %d: %v", n, len(want), err)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error does not tell %q: %v", w, err)
		}
	}
}

func TestSpecTellsAllErrors(t *testing.T) {
	m := pod()
	m.Name = ""
	_, err := Start(t.Context(), Spec{Machine: m, RunDir: "run"})
	checkErrors(t, err, []string{"uid is", "gid is", "taps is \"0\"; it has to be 2", "runDir is \"run\"", "machine.name"})
}

func TestShareArgs(t *testing.T) {
	for version, want := range map[string]string{
		"virtiofsd version 7.2.22 (Debian 1:7.2)\nCopyright": "-f -o source=/share -o sandbox=namespace -o cache=auto -o announce_submounts -o log_level=err --rlimit-nofile=0",
		"virtiofsd 1.13.2":         "--shared-dir=/share --sandbox=namespace --seccomp=kill --cache=auto --announce-submounts --rlimit-nofile=0 --log-level=error",
		"virtiofsd backend v1.4.0": "--shared-dir=/share --sandbox=namespace --seccomp=kill --cache=auto --announce-submounts --rlimit-nofile=0 --log-level=error",
	} {
		got, err := renderShareArgs(version)
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: got %q, %v", version, got, err)
		}
	}
	if _, err := renderShareArgs("busybox"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("another program: %v", err)
	}
}
