#!/bin/sh
# Made by vmruntime for this pod and run by cloud-init at every boot. What it writes it owns and writes anew each time.
umask 022
changed=

say() { { echo "vmruntime: $*" >/dev/console; } 2>/dev/null || echo "vmruntime: $*" >&2; }

# put PATH MODE TEXT: the file gets the text, if it has another.
put() {
	mkdir -p "${1%/*}"
	if (umask 077 && printf %s "$3" >"$1.vmruntime-new") && chmod "$2" "$1.vmruntime-new"; then
		if cmp -s "$1.vmruntime-new" "$1"; then
			rm -f "$1.vmruntime-new"
		else
			mv -f "$1.vmruntime-new" "$1" && changed=1
			command -v restorecon >/dev/null && restorecon -F "$1"
		fi
	else
		say "cannot write $1"
	fi
}

# drop PATH: removes a file that an earlier pod of this disk had.
drop() { [ ! -e "$1" ] && [ ! -L "$1" ] || { rm -f "$1" && changed=1; }; }

# route FAMILY DESTINATION INTERFACE [via GATEWAY [onlink]]: adds a route that is not there.
route() {
	[ -z "$(ip "$1" route show exact "$2" dev "$3" 2>/dev/null)" ] || return
	family=$1 to=$2 dev=$3
	shift 3
	ip "$family" route add "$to" "$@" dev "$dev" || say "cannot add the route to $to"
}

# attach PATH SOURCE: mounts by /etc/fstab what is not mounted yet. The kernel tells paths without symbolic links, and blanks by their numbers.
attach() {
	if [ -n "$2" ] && [ ! -e "$2" ]; then
		say "cannot mount $1: there is no $2"
		return
	elif [ -f "$2" ]; then
		mkdir -p "${1%/*}" && { [ -e "$1" ] || : >"$1"; }
	else
		mkdir -p "$1"
	fi
	real=$(readlink -f "$1" | sed 's/\\/\\134/g; s/ /\\040/g; s/	/\\011/g')
	cut -d' ' -f5 /proc/self/mountinfo | grep -qxF -- "$real" || mount "$1" || say "cannot mount $1"
}

# kubectl exec
put /var/lib/cloud/scripts/per-boot/vmruntime-exec-key 0755 '#!/bin/sh
# Made by vmruntime: the key by which kubectl exec comes in.
key='\''ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDxYsyYkhlbj9WFbiDBcb8ZEBbb8nHPxb6PExHhBV2Hh vmruntime-exec'\''
file=$(readlink -f /root/.ssh/authorized_keys) || file=/root/.ssh/authorized_keys
umask 077
mkdir -p "${file%/*}"
{
	[ ! -e "$file" ] || grep -v '\'' vmruntime-exec$'\'' "$file"
	[ -z "$key" ] || echo "$key"
} >"$file.vmruntime-new"
if cmp -s "$file.vmruntime-new" "$file"; then
	rm -f "$file.vmruntime-new"
else
	mv -f "$file.vmruntime-new" "$file"
	command -v restorecon >/dev/null && restorecon -RF /root/.ssh
fi
exit 0
'
/var/lib/cloud/scripts/per-boot/vmruntime-exec-key

# routes
route -4 0.0.0.0/0 eth0 via 10.244.0.1
route -6 ::/0 eth0 via fd00:10::1
route -4 10.96.0.0/12 eth0
route -4 169.254.1.1/32 eth1
route -4 172.16.0.0/12 eth1 via 169.254.1.1 onlink

# environment
put /etc/vmruntime/env 0640 '# The environment of the pod'\''s container.
GREETING="it'\''s \"\$HOME\" \\ \`x\`
and more"
PATH="/opt/bin"
# left out, not the name of a variable: "my.name"
'
put /etc/vmruntime/login.env 0640 '# The environment of the pod'\''s container.
GREETING="it'\''s \"\$HOME\" \\ \`x\`
and more"
'
chgrp adm /etc/vmruntime/env /etc/vmruntime/login.env 2>/dev/null
put /etc/profile.d/vmruntime.sh 0644 '# Made by vmruntime: the environment of the pod'\''s container, without what a login has its own values for.
if [ -r /etc/vmruntime/login.env ]; then
	set -a
	. /etc/vmruntime/login.env
	set +a
fi
'

# disks
was=$changed changed=
put /etc/udev/rules.d/99-vmruntime.rules 0644 'SUBSYSTEM=="block", ENV{DEVTYPE}=="disk", ENV{ID_SERIAL}=="vol-data", SYMLINK+="xvda"
SUBSYSTEM=="block", ENV{DEVTYPE}=="disk", ENV{ID_SERIAL_SHORT}=="vol-data", SYMLINK+="xvda"
SUBSYSTEM=="block", ENV{DEVTYPE}=="disk", ENV{ID_SCSI_SERIAL}=="vol-data", SYMLINK+="xvda"
'
[ -z "$changed" ] || { udevadm control --reload && udevadm trigger --subsystem-match=block && udevadm settle --timeout=10; }
changed=$changed$was
if [ -e '/disks/logs' ] && [ ! -L '/disks/logs' ]; then say '/disks/logs is there already'; else mkdir -p '/disks'; ln -sfn /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_vol-logs '/disks/logs'; fi

# mounts, also those that an earlier pod of this disk had
fstab='shares /run/vmruntime/shares virtiofs nofail,x-systemd.before=local-fs.target,x-vmruntime 0 0
/run/vmruntime/shares/v1 /data none bind,nofail,x-systemd.before=local-fs.target,x-vmruntime 0 0
/run/vmruntime/shares/v2 /data/nested\040dir/it'\''s none bind,ro,nofail,x-systemd.before=local-fs.target,x-vmruntime 0 0
/run/vmruntime/shares/v3 /data-2 none bind,nofail,x-systemd.before=local-fs.target,x-vmruntime 0 0
/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_vol-logs /srv/logs ext4 ro,x-systemd.device-timeout=30s,nofail,x-systemd.before=local-fs.target,x-vmruntime 0 0
'
ours='[,[:space:]]x-vmruntime[,[:space:]]'
if [ -n "$fstab" ] || grep -qs "$ours" /etc/fstab; then
	put /etc/fstab 0644 "$(grep -sv "$ours" /etc/fstab; printf %s "$fstab")
"
fi
put /etc/systemd/system/vmagent.service 0644 '[Unit]
Description=vmruntime'\''s agent
RequiresMountsFor=/run/vmruntime/shares
StartLimitIntervalSec=0

[Service]
ExecStart=/run/vmruntime/shares/agent/vmagent machine
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
'
mkdir -p /etc/systemd/system/multi-user.target.wants && ln -sfn ../vmagent.service /etc/systemd/system/multi-user.target.wants/vmagent.service
[ -z "$changed" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
attach '/run/vmruntime/shares' ''
attach '/data' '/run/vmruntime/shares/v1'
attach '/data/nested dir/it'\''s' '/run/vmruntime/shares/v2'
attach '/data-2' '/run/vmruntime/shares/v3'
attach '/srv/logs' ''
[ ! -d /run/systemd/system ] || systemctl start --no-block vmagent.service
exit 0
