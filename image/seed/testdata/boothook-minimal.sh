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
key='\'''\''
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

# environment
put /etc/vmruntime/env 0640 '# The environment of the pod'\''s container.
'
put /etc/vmruntime/login.env 0640 '# The environment of the pod'\''s container.
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
drop /etc/udev/rules.d/99-vmruntime.rules

# mounts, also those that an earlier pod of this disk had
fstab=''
ours='[,[:space:]]x-vmruntime[,[:space:]]'
if [ -n "$fstab" ] || grep -qs "$ours" /etc/fstab; then
	put /etc/fstab 0644 "$(grep -sv "$ours" /etc/fstab; printf %s "$fstab")
"
fi
drop /etc/systemd/system/multi-user.target.wants/vmagent.service
drop /etc/systemd/system/vmagent.service
[ -z "$changed" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
exit 0
