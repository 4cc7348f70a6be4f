package images

import (
	"errors"
	"os"
)

const fioRootMiB = 384

// makeFioDisk makes the tiny system with fio, which needs a hundred libraries: they come from an archive of all packages
// that it depends on, unpacked but not installed.
func makeFioDisk(b *diskBuild, out string) error {
	archive := b.path("fio.tar")
	if err := b.run("", "mmdebstrap", "--quiet", "--variant=extract", "--components=main", "--include=fio", "bookworm", archive); err != nil {
		return err
	}
	s, err := b.tinySystem(tinyKernelPackage)
	if err != nil {
		return err
	}
	initrd, err := s.initramfs()
	if err != nil {
		return err
	}
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	if err := errors.Join(s.debs.readTar(f), f.Close()); err != nil {
		return err
	}
	raw := b.path("disk.raw")
	if err := b.tinyBoot(s, initrd, fioRootMiB, raw, "usr/sbin/qemu-ga", "usr/sbin/dhcpcd", "usr/bin/fio"); err != nil {
		return err
	}
	return b.toQCOW2(raw, out)
}
