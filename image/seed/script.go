package seed

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// The comment at the end of the pod's own key, by which the boot hook finds it again.
const execKeyComment = "vmruntime-exec"

// quote makes one word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// head begins the boot hook. It uses only what POSIX has, and mount(8).
const head = `#!/bin/sh
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
`

// keyScript has the pod's key in root's authorized_keys once, behind whatever else is there. cloud-init runs it once more when the user's own
// files have been written.
const keyScript = `#!/bin/sh
# Made by vmruntime: the key by which kubectl exec comes in.
key=%s
file=$(readlink -f /root/.ssh/authorized_keys) || file=/root/.ssh/authorized_keys
umask 077
mkdir -p "${file%%/*}"
{
	[ ! -e "$file" ] || grep -v ' ` + execKeyComment + `$' "$file"
	[ -z "$key" ] || echo "$key"
} >"$file.vmruntime-new"
if cmp -s "$file.vmruntime-new" "$file"; then
	rm -f "$file.vmruntime-new"
else
	mv -f "$file.vmruntime-new" "$file"
	command -v restorecon >/dev/null && restorecon -RF /root/.ssh
fi
exit 0
`

const keyScriptPath = "/var/lib/cloud/scripts/per-boot/vmruntime-exec-key"

// bootHook is the script that makes the guest what the pod says, at every boot.
func (in Input) bootHook() []byte {
	var b strings.Builder
	b.WriteString(head)
	b.WriteString("\n# kubectl exec\n")
	b.WriteString(put(keyScriptPath, "0755", fmt.Sprintf(keyScript, quote(in.execKeyLine()))))
	b.WriteString(keyScriptPath + "\n")
	b.WriteString("\n# routes\n")
	b.WriteString(in.routeScript())
	b.WriteString("\n# environment\n")
	b.WriteString(put(EnvFile, "0640", environment(in.Env, everywhere)))
	b.WriteString(put("/etc/vmruntime/login.env", "0640", environment(in.Env, forLogins)))
	b.WriteString("chgrp adm /etc/vmruntime/env /etc/vmruntime/login.env 2>/dev/null\n")
	b.WriteString(put("/etc/profile.d/vmruntime.sh", "0644", loginScript))
	b.WriteString("\n# disks\n")
	b.WriteString(in.diskScript())
	b.WriteString("\n# mounts, also those that an earlier pod of this disk had\n")
	b.WriteString("fstab=" + quote(in.fstab()) + "\nours='[,[:space:]]x-vmruntime[,[:space:]]'\n" +
		"if [ -n \"$fstab\" ] || grep -qs \"$ours\" /etc/fstab; then\n" +
		"\tput /etc/fstab 0644 \"$(grep -sv \"$ours\" /etc/fstab; printf %s \"$fstab\")\n\"\nfi\n")
	b.WriteString(in.agentScript())
	b.WriteString("[ -z \"$changed\" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload\n")
	for _, m := range in.mounts() {
		fmt.Fprintf(&b, "attach %s %s\n", quote(m.target), quote(m.below))
	}
	if in.Agent {
		b.WriteString("[ ! -d /run/systemd/system ] || systemctl start --no-block " + agentUnit + "\n")
	}
	b.WriteString("exit 0\n")
	return []byte(b.String())
}

func put(file, mode, text string) string {
	return fmt.Sprintf("put %s %s %s\n", file, mode, quote(text))
}

func (in Input) execKeyLine() string {
	fields := strings.Fields(in.ExecKey)
	if len(fields) < 2 {
		return ""
	}
	return fields[0] + " " + fields[1] + " " + execKeyComment
}

// mount is a line of fstab(5).
type mount struct {
	source, target, fsType, options string
	below                           string // the bound directory or file
}

// mounts are in an order such that parents come before what lies below them. The guest goes on without what cannot be mounted, and starts its services
// after the rest.
func (in Input) mounts() []mount {
	const always = "nofail,x-systemd.before=local-fs.target,x-vmruntime"
	mode := map[bool]string{true: "ro,"}
	var list []mount
	for _, d := range in.Disks {
		if d.Mount != "" {
			fsType := d.FSType
			if fsType == "" {
				fsType = "auto"
			}
			list = append(list, mount{d.byID(), d.Mount, fsType, mode[d.ReadOnly] + "x-systemd.device-timeout=30s," + always, ""})
		}
	}
	for _, s := range in.Shares {
		source := path.Join(ShareRoot, s.Name)
		list = append(list, mount{source, s.Path, "none", "bind," + mode[s.ReadOnly] + always, source})
	}
	depth := func(m mount) string { return strings.ReplaceAll(m.target, "/", "\x00") }
	slices.SortStableFunc(list, func(a, b mount) int { return strings.Compare(depth(a), depth(b)) })
	if len(in.Shares) > 0 || in.Agent {
		list = slices.Insert(list, 0, mount{ShareTag, ShareRoot, "virtiofs", always, ""})
	}
	return list
}

func (in Input) fstab() string {
	var b strings.Builder
	for _, m := range in.mounts() {
		fmt.Fprintf(&b, "%s %s %s %s 0 0\n", fstabField(m.source), fstabField(m.target), m.fsType, m.options)
	}
	return b.String()
}

// fstabField writes a path as fstab(5) and /proc/self/mountinfo do.
func fstabField(s string) string {
	return strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`).Replace(s)
}

// byID is the name that udev gives a disk of QEMU's.
func (d Disk) byID() string {
	prefix := map[string]string{"virtio": "virtio-", "scsi": "scsi-0QEMU_QEMU_HARDDISK_", "sata": "ata-QEMU_HARDDISK_"}
	return "/dev/disk/by-id/" + prefix[d.Bus] + d.Serial
}

// diskScript makes the volumes' device paths: below /dev by udev, so that they are there whenever the disk is, elsewhere as symbolic links.
func (in Input) diskScript() string {
	const rulesPath = "/etc/udev/rules.d/99-vmruntime.rules"
	var rules, links strings.Builder
	for _, d := range in.Disks {
		name, dev := strings.CutPrefix(d.Link, "/dev/")
		switch {
		case dev && !strings.ContainsAny(name, "\"$% "):
			for _, property := range []string{"ID_SERIAL", "ID_SERIAL_SHORT", "ID_SCSI_SERIAL"} {
				fmt.Fprintf(&rules, "SUBSYSTEM==\"block\", ENV{DEVTYPE}==\"disk\", ENV{%s}==\"%s\", SYMLINK+=\"%s\"\n", property, d.Serial, name)
			}
		case d.Link != "":
			link := quote(d.Link)
			fmt.Fprintf(&links, "if [ -e %s ] && [ ! -L %s ]; then say %s; else mkdir -p %s; ln -sfn %s %s; fi\n",
				link, link, quote(d.Link+" is there already"), quote(path.Dir(d.Link)), d.byID(), link)
		}
	}
	if rules.Len() == 0 {
		return "drop " + rulesPath + "\n" + links.String()
	}
	return "was=$changed changed=\n" + put(rulesPath, "0644", rules.String()) +
		"[ -z \"$changed\" ] || { udevadm control --reload && udevadm trigger --subsystem-match=block && udevadm settle --timeout=10; }\n" +
		"changed=$changed$was\n" + links.String()
}

const agentUnit = "vmagent.service"

// agentText runs the agent from the share, so that it is always as new as the node's.
const agentText = `[Unit]
Description=vmruntime's agent
RequiresMountsFor=` + ShareRoot + `
StartLimitIntervalSec=0

[Service]
ExecStart=` + AgentPath + ` machine
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
`

func (in Input) agentScript() string {
	const dir = "/etc/systemd/system/"
	const wanted = dir + "multi-user.target.wants/" + agentUnit
	if !in.Agent {
		return "drop " + wanted + "\ndrop " + dir + agentUnit + "\n"
	}
	return put(dir+agentUnit, "0644", agentText) +
		fmt.Sprintf("mkdir -p %smulti-user.target.wants && ln -sfn ../%s %s\n", dir, agentUnit, wanted)
}
