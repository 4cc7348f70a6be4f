package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	diskfs "github.com/diskfs/go-diskfs"
	"github.com/diskfs/go-diskfs/disk"
	"github.com/diskfs/go-diskfs/filesystem"
	"golang.org/x/sys/unix"
)

// ovmf is the firmware of Debian's ovmf, with variables of the machine's own.
func ovmf(t *testing.T, code, vars string) *Firmware {
	t.Helper()
	const dir = "/usr/share/OVMF"
	template, err := os.ReadFile(filepath.Join(dir, vars))
	if err != nil {
		t.Skipf("needs EFI (Debian's ovmf): %v", err)
	}
	own := filepath.Join(t.TempDir(), "vars")
	if err := os.WriteFile(own, template, 0o600); err != nil {
		t.Fatal(err)
	}
	return &Firmware{Code: filepath.Join(dir, code), Vars: own, Format: "raw", SecureBoot: strings.Contains(code, "secboot")}
}

// espDisk is a disk with the guest's kernel as what EFI boots. Nobody that the firmware knows has signed it, and without a command
// line it says nothing.
func espDisk(t *testing.T, kernel string) Disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "esp")
	d, err := diskfs.Create(path, 64<<20, diskfs.SectorSizeDefault)
	if err != nil {
		t.Fatal(err)
	}
	esp, err := d.CreateFilesystem(disk.FilesystemSpec{FSType: filesystem.TypeFat32})
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/EFI", "/EFI/BOOT"} {
		if err := esp.Mkdir(dir); err != nil {
			t.Fatal(err)
		}
	}
	to, err := esp.OpenFile("/EFI/BOOT/BOOTX64.EFI", os.O_CREATE|os.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	from, err := os.Open(kernel)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	_, err = io.Copy(to, from)
	if err := errors.Join(err, to.Close(), d.Close()); err != nil {
		t.Fatal(err)
	}
	return Disk{Serial: "root", Path: path, Format: "raw", Bus: BusVirtio, BootIndex: 1}
}

func TestEFIBootsDisk(t *testing.T) {
	for name, tc := range map[string]struct {
		code, vars, want, never string
	}{
		"EFI":                   {"OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd", "starting Boot", "Access Denied"},
		"secure boot, no keys":  {"OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.fd", "starting Boot", "Access Denied"},
		"secure boot, its keys": {"OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd", "Access Denied", "starting Boot"},
	} {
		t.Run(name, func(t *testing.T) {
			guest := guestMachine(t)
			m := guest
			m.Type, m.Kernel, m.Initrd, m.Cmdline, m.ConsolePipe, m.ResetInPlace, m.HotplugPorts = TypeX86, "", "", "", true, true, 0
			m.Firmware, m.Disks = ovmf(t, tc.code, tc.vars), []Disk{espDisk(t, guest.Kernel)}
			before := content(m.Firmware.Vars)
			v := start(t, spec(t, m))
			c := follow(t, v.Record())
			c.seek(tc.want, tc.never)
			if content(m.Firmware.Vars) == before {
				t.Error("the firmware has kept no variables")
			}
		})
	}
}

// seek reads until the console has said what is wanted, or fails on what it must never say.
func (c *console) seek(want, never string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Minute)
	defer cancel()
	for !strings.Contains(c.text.String(), want) {
		c.more(ctx, want)
		if strings.Contains(c.text.String(), never) {
			c.t.Fatalf("the console says %q:\n%s", never, c.text.String())
		}
	}
}

// TestMachineDevices boots a kernel with all devices and asks the guest for them.
func TestMachineDevices(t *testing.T) {
	server := startShare(t, nil)
	if err := server.Add(ShareMount{Name: "etc", Source: "/etc", ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	tpm := startSWTPM(t)
	tap := testTap(t)
	seed := diskFile(t, "the seed")
	data := diskFile(t, "data")
	g := boot(t, func(s *Spec) {
		m := &s.Machine
		m.Type, m.Serial, m.UUID = TypeX86, "vmr-42", "01234567-89ab-cdef-0123-456789abcdef"
		m.Firmware = ovmf(t, "OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd")
		m.Shares = []Share{{Tag: "config", Socket: server.Socket()}}
		m.TPMSocket, m.GuestAgent, m.Balloon, m.PanicDevice, m.Video, m.Watchdog = tpm, true, true, true, VideoStd, WatchdogReset
		m.Disks = []Disk{{Serial: "data", Path: data, Format: "raw"}, {Serial: "seed", Path: seed, Format: "raw", ReadOnly: true, CDROM: true, Bus: BusSATA}}
		m.NICs, s.Taps = []NIC{{ID: "net0", MAC: "52:54:00:00:00:01"}}, []*os.File{tap}
	})
	for file, want := range map[string]string{
		"/sys/class/dmi/id/product_serial":        "vmr-42\n",
		"/sys/class/dmi/id/product_uuid":          "01234567-89ab-cdef-0123-456789abcdef\n",
		"/sys/firmware/efi/fw_platform_size":      "64\n",
		"/sys/class/tpm/tpm0/tpm_version_major":   "2\n",
		"/sys/class/virtio-ports/vport1p2/name":   guestAgentPort + "\n",
		"/sys/class/net/eth0/address":             "52:54:00:00:00:01\n",
		"/sys/bus/pci/devices/0000:00:10.0/class": "0x020000\n",
	} {
		if got := g.do("head " + file); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
	if got := g.do("mount config /mnt/config"); got != "" {
		t.Errorf("mount: %s", got)
	}
	if got, want := g.do("head /mnt/config/etc/hostname"), content("/etc/hostname"); got != want {
		t.Errorf("through the share: %q, want %q", got, want)
	}
	conn, err := net.Dial("unix", g.GuestAgentSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := g.do("write /dev/vport1p2 ping"); got != "" {
		t.Errorf("write: %s", got)
	}
	answer := make([]byte, 4)
	if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "ping" {
		t.Errorf("the guest agent's port says %q, %v", answer, err)
	}
	if s, err := g.MemoryStats(t.Context()); err != nil || s.Actual != 256<<20 || !s.Updated.IsZero() {
		t.Errorf("without a driver: %+v, %v", s, err)
	}
	if s, err := g.DiskStats(t.Context()); err != nil || s["data"].Reads == 0 || len(s) != 2 {
		t.Errorf("%+v, %v", s, err)
	}
}

func startSWTPM(t *testing.T) (socket string) {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("needs swtpm in PATH")
	}
	dir := runDir(t)
	socket = filepath.Join(dir, "tpm.sock")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--ctrl", "type=unixio,path="+socket, "--terminate")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("swtpm: %s", out.String())
		}
	})
	within(t, 5*time.Second, "swtpm listens", func() bool { _, err := os.Stat(socket); return err == nil })
	return socket
}

// testTap is a tap of nobody's, which is gone when it is closed.
func testTap(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("needs taps: %v", err)
	}
	tap := os.NewFile(uintptr(fd), "tap")
	t.Cleanup(func() { _ = tap.Close() })
	request, err := unix.NewIfreq(fmt.Sprintf("vmt%d", os.Getpid()%100000))
	if err != nil {
		t.Fatal(err)
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		t.Skipf("needs taps: %v", err)
	}
	return tap
}

// Memory of huge pages that are not there is an error at the start.
func TestHugePages(t *testing.T) {
	m := bootable(t, bootSector().print("up\n").halt())
	m.HugePageBytes = 2 << 20
	if strings.TrimSpace(content("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")) == "0" {
		v, err := Start(t.Context(), spec(t, m))
		if err == nil {
			t.Fatal(v.Kill(t.Context()), v.Close(), "it started without huge pages")
		}
		if !strings.Contains(err.Error(), "memory") {
			t.Errorf("error %v", err)
		}
		return
	}
	v := start(t, spec(t, m))
	follow(t, v.Record()).until("up\n")
	if !strings.Contains(content(fmt.Sprintf("/proc/%d/smaps", v.Record().PID)), "KernelPageSize:     2048 kB") {
		t.Error("no memory in huge pages")
	}
}

// The machine of arm64 with its devices, as far as its firmware goes.
func TestEFIOfARM64(t *testing.T) {
	needQEMU(t)
	if _, err := exec.LookPath("qemu-system-aarch64"); err != nil {
		t.Skip("needs qemu-system-aarch64 in PATH")
	}
	const dir = "/usr/share/AAVMF"
	template, err := os.ReadFile(filepath.Join(dir, "AAVMF_VARS.fd"))
	if err != nil {
		t.Skipf("needs EFI of arm64 (Debian's qemu-efi-aarch64): %v", err)
	}
	vars := filepath.Join(t.TempDir(), "vars")
	if err := os.WriteFile(vars, template, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, video := range []string{VideoStd, VideoVirtio} {
		t.Run(video, func(t *testing.T) {
			m := Machine{
				Name: "vmruntime-test", Serial: "vmr-42", Arch: ArchARM64, Type: TypeARM64, Accel: AccelTCG, CPUModel: "cortex-a57", VCPUs: 2,
				Firmware: &Firmware{Code: filepath.Join(dir, "AAVMF_CODE.fd"), Vars: vars, Format: "raw"},
				Disks: []Disk{
					{Serial: "root", Path: diskFile(t, "no system"), Format: "raw", Bus: BusVirtio, BootIndex: 1},
					{Serial: "seed", Path: diskFile(t, "no seed"), Format: "raw", Bus: BusSATA, ReadOnly: true, CDROM: true},
				},
				TPMSocket: startSWTPM(t), ConsolePipe: true, ResetInPlace: true, Video: video, Watchdog: WatchdogReset, PanicDevice: true, Balloon: true,
				GuestAgent: true, HotplugPorts: 1,
			}
			s := spec(t, m)
			s.Binary = "qemu-system-aarch64"
			v := start(t, s)
			follow(t, v.Record()).seek("BdsDxe", "Exception")
			if _, err := v.Screenshot(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
