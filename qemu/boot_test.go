package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sector is a boot sector that is assembled here: a whole operating system that starts in a second. It runs in 16-bit mode.
type sector struct{ code []byte }

func bootSector() *sector {
	// cli; cld; xor ax,ax; mov ds,ax
	return &sector{code: []byte{0xfa, 0xfc, 0x31, 0xc0, 0x8e, 0xd8}}
}

func (s *sector) emit(b ...byte) *sector {
	s.code = append(s.code, b...)
	return s
}

func le16(v uint16) []byte { return binary.LittleEndian.AppendUint16(nil, v) }
func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }

// putc writes what is in CL to the first serial port when that has room.
func (s *sector) putc() *sector {
	s.emit(0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb) // mov dx,3fd; wait: in al,dx; test al,20; jz wait
	return s.emit(0xba, 0xf8, 0x03, 0x88, 0xc8, 0xee)      // mov dx,3f8; mov al,cl; out dx,al
}

// print writes text.
func (s *sector) print(text string) *sector {
	s.emit(0xe8).emit(le16(uint16(len(text) + 1))...) // call behind the text
	s.emit([]byte(text)...).emit(0)
	s.emit(0x5e)                         // pop si
	s.emit(0xac, 0x84, 0xc0, 0x74, 0x12) // next: lodsb; test al,al; jz end
	s.emit(0x88, 0xc1).putc()            // mov cl,al
	return s.emit(0xeb, 0xe9)            // jmp next
}

// count writes numbers of 16 bits, high byte first, without end.
func (s *sector) count() *sector {
	s.emit(0x31, 0xdb)              // xor bx,bx
	s.emit(0x88, 0xf9).putc()       // next: mov cl,bh
	s.emit(0x88, 0xd9).putc()       // mov cl,bl
	return s.emit(0x43, 0xeb, 0xdd) // inc bx; jmp next
}

// echo writes back every byte that comes.
func (s *sector) echo() *sector {
	s.emit(0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8) // next: mov dx,3fd; in al,dx; test al,1; jz next
	s.emit(0xba, 0xf8, 0x03, 0xec, 0x88, 0xc1).putc()      // mov dx,3f8; in al,dx; mov cl,al
	return s.emit(0xeb, 0xe2)                              // jmp next
}

func (s *sector) halt() *sector { return s.emit(0xf4, 0xeb, 0xfd) } // next: hlt; jmp next

func (s *sector) outb(port uint16, v byte) *sector {
	return s.emit(0xba).emit(le16(port)...).emit(0xb0, v, 0xee) // mov dx,port; mov al,v; out dx,al
}

// poweroff writes the sleep state S5 of ACPI to where the BIOS has put the register.
func (s *sector) poweroff() *sector {
	return s.emit(0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef).halt() // mov dx,604; mov ax,2000; out dx,ax
}

func (s *sector) reset() *sector { return s.outb(0xcf9, 6).halt() }

// firstBoot goes on below only in the first boot since the machine was made; later ones do what then has.
func (s *sector) firstBoot(then *sector) *sector {
	s.outb(0x70, 0x50).emit(0xe4, 0x71, 0x3c, 0x5a, 0x75) // in al,71; cmp al,5a; jne behind
	s.emit(byte(len(then.code))).emit(then.code...)
	return s.outb(0x70, 0x50).emit(0xb0, 0x5a, 0xe6, 0x71) // mov al,5a; out 71,al
}

// findPCI leaves in EBX how to address the configuration of a device. It must be there.
func (s *sector) findPCI(vendor, device uint16) *sector {
	s.emit(0x66, 0xbb).emit(le32(1 << 31)...)                             // mov ebx,80000000
	s.emit(0x66, 0x89, 0xd8, 0xba, 0xf8, 0x0c, 0x66, 0xef)                // next: mov eax,ebx; mov dx,cf8; out dx,eax
	s.emit(0xba, 0xfc, 0x0c, 0x66, 0xed)                                  // mov dx,cfc; in eax,dx
	s.emit(0x66, 0x3d).emit(le32(uint32(device)<<16 | uint32(vendor))...) // cmp eax,id
	return s.emit(0x74, 0x09, 0x66, 0x81, 0xc3, 0, 8, 0, 0, 0xeb, 0xe2)   // je end; add ebx,800; jmp next
}

func (s *sector) setPCI(register byte, v uint32) *sector {
	s.emit(0x66, 0x89, 0xd8, 0x04, register, 0xba, 0xf8, 0x0c, 0x66, 0xef)        // mov eax,ebx; add al,register; mov dx,cf8; out dx,eax
	return s.emit(0xba, 0xfc, 0x0c, 0x66, 0xb8).emit(le32(v)...).emit(0x66, 0xef) // mov dx,cfc; mov eax,v; out dx,eax
}

// mapPCI puts the device's memory where a card would have its video memory, and DS there.
func (s *sector) mapPCI() *sector {
	s.setPCI(0x10, 0xa0000).setPCI(0x04, 2)
	return s.emit(0xb8, 0x00, 0xa0, 0x8e, 0xd8) // mov ax,a000; mov ds,ax
}

func (s *sector) mov8(at uint16, v byte) *sector { return s.emit(0xc6, 0x06).emit(le16(at)...).emit(v) }

func (s *sector) mov16(at, v uint16) *sector {
	return s.emit(0xc7, 0x06).emit(le16(at)...).emit(le16(v)...)
}

func (s *sector) mov32(at uint16, v uint32) *sector {
	return s.emit(0x66, 0xc7, 0x06).emit(le16(at)...).emit(le32(v)...)
}

// panics tells the panic device.
func (s *sector) panics() *sector { return s.findPCI(0x1b36, 0x0011).mapPCI().mov8(0, 1).halt() }

// starve starts the watchdog and does not feed it.
func (s *sector) starve() *sector {
	s.findPCI(0x8086, 0x25ab).mapPCI()
	for timer := range uint16(2) {
		s.mov16(12, 0x80).mov16(12, 0x86).mov32(4*timer, 200) // unlock; some 200 ms
	}
	// Enabled by a byte, which is set after its register is chosen.
	return s.setPCI(0x68, 0).outb(0xcfc, 2).halt()
}

// image is a disk with the sector at its beginning.
func (s *sector) image(t *testing.T) []byte {
	t.Helper()
	if len(s.code) > 510 {
		t.Fatalf("the boot sector has %d bytes of code", len(s.code))
	}
	disk := make([]byte, 1<<20)
	copy(disk, s.code)
	disk[510], disk[511] = 0x55, 0xaa
	return disk
}

func needQEMU(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest under TCG as root: run by make test")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root for namespaces and the VM's own user")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64 in PATH")
	}
}

// bootable is a machine that boots the sector from a disk.
func bootable(t *testing.T, s *sector) Machine {
	t.Helper()
	needQEMU(t)
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, s.image(t), 0o600); err != nil {
		t.Fatal(err)
	}
	return Machine{
		Name: "vmruntime-test", Arch: ArchX86, Type: TypeX86, Accel: AccelTCG, MemoryBytes: 64 << 20, ConsolePipe: true, ResetInPlace: true,
		Disks: []Disk{{Serial: "root", Path: path, Format: "raw", Bus: BusVirtio, BootIndex: 1}},
	}
}

// console follows a machine's console.
type console struct {
	*Spool
	t    *testing.T
	text bytes.Buffer
}

func follow(t *testing.T, r Record) *console {
	t.Helper()
	_, out, err := r.ConsoleFIFOs()
	if err != nil {
		t.Fatal(err)
	}
	s, err := OpenSpool(out, filepath.Join(t.TempDir(), "spool"), slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &console{Spool: s, t: t}
}

// until reads until the console has said something new.
func (c *console) until(what string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	for !strings.Contains(c.text.String(), what) {
		c.more(ctx, what)
	}
	_, rest, _ := strings.Cut(c.text.String(), what)
	read := c.text.Len()
	c.text.Reset()
	c.text.WriteString(rest)
	c.t.Logf("%d bytes of console to %.40q", read, what)
}

func (c *console) more(ctx context.Context, what string) {
	c.t.Helper()
	begin, _ := c.Bounds()
	chunk, err := c.Next(ctx, begin)
	if err != nil {
		c.t.Fatalf("waiting for %q: %v; the console says:\n%s", what, err, c.text.String())
	}
	c.text.Write(chunk.Data)
	if err := c.Forget(chunk.Offset + int64(len(chunk.Data))); err != nil {
		c.t.Fatal(err)
	}
}

func TestBootsFromEveryBus(t *testing.T) {
	boot := bootSector().print("booted\n").halt()
	for _, tc := range []struct {
		name, bus, machineType string
	}{{"virtio", BusVirtio, TypeX86}, {"scsi", BusSCSI, TypeX86}, {"sata", BusSATA, TypeX86}, {"newest type", BusVirtio, ""}} {
		t.Run(tc.name, func(t *testing.T) {
			m := bootable(t, boot)
			m.Type, m.Disks[0].Bus = tc.machineType, tc.bus
			// What has no boot index is not tried.
			other := filepath.Join(t.TempDir(), "other")
			if err := os.WriteFile(other, bootSector().print("wrong disk\n").halt().image(t), 0o600); err != nil {
				t.Fatal(err)
			}
			m.Disks = append([]Disk{{Serial: "other", Path: other, Format: "raw", Bus: tc.bus}}, m.Disks...)
			v := start(t, spec(t, m))
			c := follow(t, v.Record())
			c.until("booted\n")
		})
	}
}

func TestBootsOverlay(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			m := bootable(t, bootSector().print("booted\n").halt())
			dir := t.TempDir()
			backing, overlay := m.Disks[0].Path, filepath.Join(dir, "overlay")
			if format == "qcow2" {
				backing = filepath.Join(dir, "backing")
				qemuImg(t, "convert", "-f", "raw", "-O", "qcow2", m.Disks[0].Path, backing)
			}
			if err := os.Chmod(backing, 0o444); err != nil {
				t.Fatal(err)
			}
			// The header names no backing file.
			qemuImg(t, "create", "-q", "-f", "qcow2", overlay, "1M")
			m.Disks[0].Path, m.Disks[0].Format, m.Disks[0].Backing = overlay, "qcow2", &Backing{Path: backing, Format: format}
			v := start(t, spec(t, m))
			follow(t, v.Record()).until("booted\n")
			stats, err := v.DiskStats(t.Context())
			if err != nil || stats["root"].ReadBytes == 0 || stats["root"].Reads == 0 || len(stats) != 1 {
				t.Errorf("%+v, %v", stats, err)
			}
			// Another machine on the same backing file.
			m.Disks[0].Path = filepath.Join(dir, "overlay2")
			qemuImg(t, "create", "-q", "-f", "qcow2", m.Disks[0].Path, "1M")
			follow(t, start(t, spec(t, m)).Record()).until("booted\n")
		})
	}
}

func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("needs qemu-img in PATH")
	}
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func TestBootsBlockDevice(t *testing.T) {
	m := bootable(t, bootSector().print("booted\n").halt())
	out, err := exec.Command("losetup", "--find", "--show", m.Disks[0].Path).CombinedOutput()
	if err != nil {
		t.Skipf("needs a loop device: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	m.Disks[0].Path = device
	follow(t, start(t, spec(t, m)).Record()).until("booted\n")
}

// A guest that writes without end waits for its reader, and the reader gets every byte.
func TestConsoleWaits(t *testing.T) {
	v := start(t, spec(t, bootable(t, bootSector().print("go\n").count())))
	_, out, err := v.Record().ConsoleFIFOs()
	if err != nil {
		t.Fatal(err)
	}
	fifo, err := openFIFO(out)
	if err != nil {
		t.Fatal(err)
	}
	queued := func() int {
		n := -1
		conn, err := fifo.SyscallConn()
		if err == nil {
			err = conn.Control(func(fd uintptr) { n, err = ioctlQueued(fd) })
		}
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	last := -1
	within(t, 2*time.Minute, "the pipe is full", func() bool {
		time.Sleep(200 * time.Millisecond)
		n := queued()
		still := n == last && n > fifoBytes/2
		last = n
		return still
	})
	t.Logf("%d bytes wait in the pipe", last)
	// QEMU answers, and no reader's coming and going ends it.
	if state, err := v.State(t.Context()); err != nil || state != "running" {
		t.Errorf("%s, %v", state, err)
	}
	if err := fifo.Close(); err != nil {
		t.Error(err)
	}
	c := follow(t, v.Record())
	c.until("go\n")
	want := 3 * fifoBytes
	for read := 0; read < want; {
		for c.text.Len() < 2 {
			c.more(t.Context(), "numbers")
		}
		for c.text.Len() >= 2 {
			got := binary.BigEndian.Uint16(c.text.Next(2))
			if got != uint16(read/2) {
				t.Fatalf("after %d bytes: %d", read, got)
			}
			read += 2
		}
	}
}

func TestConsoleInput(t *testing.T) {
	v := start(t, spec(t, bootable(t, bootSector().print("ready\n").echo())))
	in, _, err := v.Record().ConsoleFIFOs()
	if err != nil {
		t.Fatal(err)
	}
	c := follow(t, v.Record())
	c.until("ready\n")
	for i := range 3 { // writers come and go
		f, err := os.OpenFile(in, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("line %d %s\n", i, strings.Repeat("x", 1000))
		if _, err := f.WriteString(text); err != nil {
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		c.until(text)
	}
}

// ioctlQueued is how many bytes are in a pipe.
func ioctlQueued(fd uintptr) (int, error) { return unix.IoctlGetInt(int(fd), unix.TIOCINQ) }
