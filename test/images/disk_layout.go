package images

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The layout of both bootable disks, Debian's for its cloud images: a partition for GRUB's BIOS form, an EFI system
// partition, and the root at the end, where it can grow. Sectors have 512 bytes; partitions begin at whole MiB.
const (
	mib            = 1 << 20
	sectorSize     = 512
	biosPartition  = 14
	efiPartition   = 15
	rootPartition  = 1
	biosBegin      = 1 // MiB
	biosSize       = 1
	efiBegin       = biosBegin + biosSize
	trailer        = 1 // the second partition table
	biosType       = "21686148-6449-6E6F-744E-656564454649"
	efiType        = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
	rootType       = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709" // x86-64
	diskGUID       = "6B6E5F0A-0D5C-4C55-9A4C-0D6B8B5B0001"
	rootPartitions = "6B6E5F0A-0D5C-4C55-9A4C-0D6B8B5B00" // and two digits
)

// noTimerCheck is on every disk's kernel command line: the kernel believes in its timer. Otherwise it counts ticks for some
// 60 ms of the host's time, and panics when there are too few: on a busy host an emulated processor may not run often
// enough for them. KVM guests skip the check.
const noTimerCheck = "no_timer_check"

// bootPackages hold what boots a disk: GRUB for the BIOS; for EFI the shim and GRUB that Secure Boot accepts.
func bootPackages() []string {
	return []string{"grub-pc-bin", "grub-efi-amd64-signed", "shim-signed"}
}

// bootDisk is what a bootable disk is made of.
type bootDisk struct {
	root    string            // a directory with the files of the root, owners and all
	label   string            // of the root's file system
	uuid    string            // of the root's file system; "" for any
	rootMiB int64             // size of the root partition
	efi     map[string][]byte // files of the EFI system partition besides GRUB
	efiMiB  int64
	grub    string // GRUB's configuration
}

// assemble writes the disk, raw. Nothing is mounted.
func (b *diskBuild) assemble(disk bootDisk, out string) error {
	rootBegin := efiBegin + disk.efiMiB
	rootImage, efiImage := b.path("root.img"), b.path("efi.img")
	if err := b.rootFileSystem(disk, rootImage); err != nil {
		return err
	}
	if err := b.efiFileSystem(disk, efiImage); err != nil {
		return err
	}
	if err := createSparse(out, (rootBegin+disk.rootMiB+trailer)*mib); err != nil {
		return err
	}
	var table strings.Builder
	fmt.Fprintf(&table, "label: gpt\nlabel-id: %s\n", diskGUID)
	for _, p := range []struct {
		number      int
		begin, size int64
		kind        string
	}{
		{biosPartition, biosBegin, biosSize, biosType},
		{efiPartition, efiBegin, disk.efiMiB, efiType},
		{rootPartition, rootBegin, disk.rootMiB, rootType},
	} {
		fmt.Fprintf(&table, "%s%d : start=%dMiB, size=%dMiB, type=%s, uuid=%s%02d\n", out, p.number, p.begin, p.size, p.kind, rootPartitions, p.number)
	}
	if err := b.run(table.String(), "sfdisk", "--quiet", out); err != nil {
		return err
	}
	if err := errors.Join(copyInto(out, efiImage, efiBegin*mib), copyInto(out, rootImage, rootBegin*mib)); err != nil {
		return err
	}
	return errors.Join(b.installBIOS(out), os.Remove(rootImage), os.Remove(efiImage))
}

// rootFileSystem makes an ext4 of a directory.
func (b *diskBuild) rootFileSystem(disk bootDisk, image string) error {
	if err := createSparse(image, disk.rootMiB*mib); err != nil {
		return err
	}
	args := []string{"-q", "-t", "ext4", "-L", disk.label, "-d", disk.root}
	if disk.uuid != "" {
		args = append(args, "-U", disk.uuid)
	}
	return b.run("", "mke2fs", append(args, image)...)
}

// efiFileSystem makes a FAT with shim, GRUB and its configuration. The signed GRUB looks for it in EFI/debian.
func (b *diskBuild) efiFileSystem(disk bootDisk, image string) error {
	d, err := openDebs("grub-efi-amd64-signed", "shim-signed")
	if err != nil {
		return err
	}
	files := map[string][]byte{"EFI/debian/grub.cfg": []byte(disk.grub)}
	for name, source := range map[string]string{
		"EFI/BOOT/BOOTX64.EFI": "usr/lib/shim/shimx64.efi.signed",
		"EFI/BOOT/grubx64.efi": "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
	} {
		n, ok := d.files[source]
		if !ok {
			return fmt.Errorf("no package has the file %q", source)
		}
		files[name] = n.data
	}
	maps.Copy(files, disk.efi)
	dir := b.path("efi")
	for name, data := range files {
		if err := writeBelow(dir, name, data); err != nil {
			return err
		}
	}
	if err := createSparse(image, disk.efiMiB*mib); err != nil {
		return err
	}
	if err := b.run("", "mkfs.vfat", "-i", "7b7795e7", "-n", "EFI", image); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	args := []string{"-s", "-i", image}
	for _, e := range entries {
		args = append(args, filepath.Join(dir, e.Name()))
	}
	return errors.Join(b.run("", "mcopy", append(args, "::")...), os.RemoveAll(dir))
}

// Where GRUB's first sector and the first sector of its core say where the core goes on: 64 bits, little endian.
const (
	bootCoreSector = 0x5c
	coreNextSector = 0x1f4
	bootCodeSize   = 440 // what follows in the sector is the partition table's
)

// installBIOS puts GRUB's first sector and core where grub-bios-setup would put them on a device.
func (b *diskBuild) installBIOS(out string) error {
	const dir = "/usr/lib/grub/i386-pc"
	core := b.path("core.img")
	if err := b.run("", "grub-mkimage", "-O", "i386-pc", "-d", dir, "-o", core, "-p", fmt.Sprintf("(,gpt%d)/EFI/debian", efiPartition),
		"biosdisk", "part_gpt", "fat", "ext2", "normal", "linux", "search", "search_fs_uuid", "configfile", "echo", "test"); err != nil {
		return err
	}
	boot, err := os.ReadFile(filepath.Join(dir, "boot.img"))
	if err != nil {
		return err
	}
	data, err := os.ReadFile(core)
	if err != nil {
		return err
	}
	if len(boot) != sectorSize || len(data) <= sectorSize || len(data) > biosSize*mib {
		return fmt.Errorf("GRUB's first sector has %d bytes and its core %d, want %d and at most %d", len(boot), len(data), sectorSize, biosSize*mib)
	}
	const begin = biosBegin * mib / sectorSize
	binary.LittleEndian.PutUint64(boot[bootCoreSector:], begin)
	binary.LittleEndian.PutUint64(data[coreNextSector:], begin+1)
	f, err := os.OpenFile(out, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, bootErr := f.WriteAt(boot[:bootCodeSize], 0)
	_, coreErr := f.WriteAt(data, biosBegin*mib)
	return errors.Join(bootErr, coreErr, f.Close())
}

// toQCOW2 converts a raw disk, compressed.
func (b *diskBuild) toQCOW2(raw, out string) error {
	return b.run("", "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, out)
}

func createSparse(name string, size int64) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// copyInto copies a file to an offset of another, without its holes of whole blocks.
func copyInto(out, file string, offset int64) error {
	from, err := os.Open(file)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(out, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	block, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(from, block)
		if n > 0 && string(block[:n]) != string(zero[:n]) {
			if _, err := to.WriteAt(block[:n], offset); err != nil {
				return errors.Join(err, to.Close())
			}
		}
		offset += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return to.Close()
		}
		if err != nil {
			return errors.Join(err, to.Close())
		}
	}
}

func writeBelow(dir, name string, data []byte) error {
	file := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o644)
}

// chmod sets permissions with the bits for set-ID and sticky where a file's header has them.
func chmod(name string, mode int64) error { return unix.Chmod(name, uint32(mode)) }
