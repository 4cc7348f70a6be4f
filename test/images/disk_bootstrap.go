package images

import "strings"

// debianPackages are those of Debian's cloud image that matter to a VM, with qemu-guest-agent, which it lacks.
func debianPackages() []string {
	return []string{
		"linux-image-cloud-amd64", "initramfs-tools", "e2fsprogs", "systemd", "systemd-sysv", "systemd-resolved", "libpam-systemd",
		"udev", "dbus", "cloud-init", "cloud-guest-utils", "netplan.io", "openssh-server", "qemu-guest-agent", "sudo",
		"iproute2", "iputils-ping", "procps", "kmod", "less", "ca-certificates", "curl",
	}
}

// makeDebianRoot installs Debian 12 into a tar archive.
func makeDebianRoot(b *diskBuild, out string) error {
	return b.run("", "mmdebstrap", "--quiet", "--variant=minbase", "--components=main", "--include="+strings.Join(debianPackages(), ","),
		// Nobody reads these in a test.
		"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
		"bookworm", out)
}
