#!/bin/sh
# Installs what building and testing need, from Debian's packages and the Go
# module proxy, on a bare Debian 12 as root. What is there is left alone.
set -eu

here=$(dirname "$0")
case $(dpkg --print-architecture) in
arm64) qemu=qemu-system-arm disks= ;;
*) qemu=qemu-system-x86 disks="mmdebstrap dosfstools mtools fdisk grub-common grub-pc-bin ovmf" ;;
esac
# For each line: building, generated code, VMs, nodes, images of tests, disks of tests (amd64).
packages="ca-certificates git make gcc libc6-dev pkg-config libseccomp-dev
	protobuf-compiler
	$qemu qemu-system-common qemu-block-extra qemu-utils swtpm e2fsprogs erofs-utils crun
	iproute2 iptables nftables util-linux procps kmod
	busybox dpkg-dev xz-utils isc-dhcp-client
	$disks"

missing=
for p in $packages; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
done
# Images and guest are made of packages that apt downloads later: its lists
# have to be there, and not older than a day.
if [ -n "$missing" ] || [ -z "$(find /var/lib/apt/lists -name '*_Packages*' -mtime -1 2>/dev/null)" ]; then
	apt-get update -q
fi
if [ -n "$missing" ]; then
	# shellcheck disable=SC2086 # a list of words
	DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $missing
fi
exec "$here/install-go.sh"
