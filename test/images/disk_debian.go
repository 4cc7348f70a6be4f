package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

const (
	debianRootMiB = 2048 // as the cloud image
	debianEFIMiB  = 8
	debianUUID    = "6b6e5f0a-0d5c-4c55-9a4c-0d6b8b5b0d12"
)

// makeDebianDisk makes Debian 12 as its cloud image is, but for a word on the kernel's command line: cloud-init configures
// it at the first boot.
func makeDebianDisk(b *diskBuild, out string) error {
	archive, err := Disk(DebianRoot)
	if err != nil {
		return err
	}
	root, raw := b.path("root"), b.path("disk.raw")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := b.run("", "tar", "-x", "-f", archive, "-C", root, "--numeric-owner", "--xattrs", "--xattrs-include=*"); err != nil {
		return err
	}
	if err := b.configureDebian(root); err != nil {
		return err
	}
	if err := b.assemble(bootDisk{
		root: root, label: "debian", uuid: debianUUID, rootMiB: debianRootMiB, efiMiB: debianEFIMiB,
		grub: "search --no-floppy --fs-uuid --set=root " + debianUUID + "\nconfigfile ($root)/boot/grub/grub.cfg\n",
	}, raw); err != nil {
		return err
	}
	return errors.Join(b.toQCOW2(raw, out), os.RemoveAll(root))
}

// configureDebian does what the makers of the cloud image do after the installation of packages.
func (b *diskBuild) configureDebian(root string) error {
	for name, data := range map[string]string{
		"boot/grub/grub.cfg": `set timeout=0
menuentry 'Debian GNU/Linux' {
	linux /vmlinuz root=UUID=` + debianUUID + ` ro console=tty0 console=ttyS0,115200 earlyprintk=ttyS0,115200 consoleblank=0 ` + noTimerCheck + `
	initrd /initrd.img
}
`,
		"etc/fstab":          "UUID=" + debianUUID + " / ext4 rw,discard,errors=remount-ro,x-systemd.growfs 0 1\n",
		"etc/hostname":       "localhost\n",
		"etc/default/locale": "LANG=C.UTF-8\n",
		"etc/hosts":          "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
		"etc/cloud/cloud.cfg.d/01_debian_cloud.cfg": "apt_preserve_sources_list: true\nmanage_etc_hosts: true\n",
		"etc/machine-id": "", // filled at the first boot
	} {
		if err := writeBelow(root, name, []byte(data)); err != nil {
			return err
		}
	}
	keys, err := filepath.Glob(filepath.Join(root, "etc/ssh/ssh_host_*"))
	if err != nil {
		return err
	}
	if len(keys) == 0 {
		return fmt.Errorf("%s has no SSH host keys that could be removed", root)
	}
	for _, key := range keys { // cloud-init makes others
		if err := os.Remove(key); err != nil {
			return err
		}
	}
	return nil
}
