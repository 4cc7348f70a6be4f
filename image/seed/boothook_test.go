package seed

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// hookInput mounts into /run alone, which the test has for itself.
func hookInput() Input {
	in := full(NoCloud)
	in.Interfaces = []Interface{{
		Name: "eth0", MAC: "02:00:0a:f4:00:07", Addresses: prefixes("192.168.7.7/32", "fd00:10::7/64"),
		Routes: []Route{
			{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("169.254.1.1")},
			{To: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("fd00:10::1")},
			{To: netip.MustParsePrefix("10.96.0.0/12")},
		},
	}}
	in.Disks = []Disk{{Serial: "vol-data", Bus: "virtio", Link: "/dev/xvda"}, {Serial: "vol-logs", Bus: "scsi", Link: "/run/disks/logs"}}
	in.Shares = []Share{
		{Name: "v2", Path: "/run/t/data/nested dir/it's", ReadOnly: true},
		{Name: "v1", Path: "/run/link/data"}, // /run/link leads to /run/t
		{Name: "v3", Path: "/run/t/file"},
		{Name: "v4", Path: "/run/t/missing"},
	}
	return in
}

// guest runs boot hooks one after the other as root in namespaces of their own, with an /etc, /root, /run and /var/lib of
// their own, and tells what came of it.
func guest(t *testing.T, after string, hooks ...[]byte) string {
	t.Helper()
	if testing.Short() || os.Getuid() != 0 {
		t.Skip("needs root, for namespaces: run by make test")
	}
	for _, program := range []string{"ip", "mount"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s (packages iproute2 and mount)", program)
		}
	}
	dir := t.TempDir()
	files := map[string]string{
		"etc/group":                 "root:x:0:\nadm:x:4:\n",
		"etc/fstab":                 "# the user's\n/dev/vda1 / ext4 defaults 0 1",
		"etc/profile.d/other.sh":    "",
		"etc/udev/rules.d/10.rules": "",
		"root/.ssh/authorized_keys": userKey + "\nssh-ed25519 AAAA vmruntime-exec\nssh-rsa BBBB vmruntime-exec x", // no newline at the end
		"lib/x":                     "",
		"console":                   "",
	}
	var script strings.Builder
	script.WriteString(`set -e
mount --make-rprivate /
mount --bind "$PWD/etc" /etc; mount --bind "$PWD/root" /root; mount --bind "$PWD/lib" /var/lib
[ ! -e /dev/console ] || mount --bind "$PWD/console" /dev/console
HOOKS=$PWD; cd /
mount -t tmpfs tmpfs /run
mkdir -p /run/vmruntime/shares; mount -t tmpfs tmpfs /run/vmruntime/shares
ln -s t /run/link; mkdir /run/t
cd /run/vmruntime/shares; mkdir v1 v2; echo hello >v1/greeting; echo secret >v2/key; echo text >v3; cd /
ip link add eth0 address 02:00:0a:f4:00:07 type veth peer name peer
ip link set peer up; ip link set eth0 up
ip address add 192.168.7.7/32 dev eth0; ip address add fd00:10::7/64 dev eth0 nodad
set +e
`)
	for i, hook := range hooks {
		name := "hook" + string(rune('0'+i))
		files[name] = string(hook)
		script.WriteString("sh \"$HOOKS/" + name + "\" 2>>\"$HOOKS/stderr\" || echo \"hook failed\"\n")
	}
	files["script"] = script.String() + after
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "sh", "script")
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

const report = `
echo "keys:"; cat /root/.ssh/authorized_keys; stat -c '%a %n' /root/.ssh/authorized_keys
echo "fstab:"; cut -d' ' -f1,2 /etc/fstab
echo "mounts:"; grep ' /run/t/' /proc/self/mountinfo | cut -d' ' -f4,5,6
echo "routes:"; ip -4 route; ip -6 route show default
echo "env:"; stat -c '%a %G %n' /etc/vmruntime/*; (set -u; . /etc/vmruntime/env; echo "$GREETING $PATH")
echo "login:"; (. /etc/profile.d/vmruntime.sh; echo "$GREETING"; [ "$PATH" != /opt/bin ] && /bin/sh -c 'echo exported: "$GREETING"')
echo "files:"; cd /; ls /etc/udev/rules.d /etc/systemd/system/multi-user.target.wants; readlink /run/disks/logs
echo "data:"; cat /run/t/data/greeting "/run/t/data/nested dir/it's/key" /run/t/file; (echo x >"/run/t/data/nested dir/it's/key") 2>/dev/null || echo read-only
echo "said:"; grep -h '^vmruntime:' "$HOOKS/stderr" "$HOOKS/console" | sort -u
echo "left:"; find /etc /root /var/lib -name '*vmruntime-new*'
`

const configured = `keys:
` + userKey + `
ssh-rsa BBBB vmruntime-exec x
` + podKey + ` vmruntime-exec
600 /root/.ssh/authorized_keys
fstab:
# the
/dev/vda1 /
shares /run/vmruntime/shares
/run/vmruntime/shares/v1 /run/link/data
/run/vmruntime/shares/v2 /run/t/data/nested\040dir/it's
/run/vmruntime/shares/v3 /run/t/file
/run/vmruntime/shares/v4 /run/t/missing
mounts:
/v1 /run/t/data rw,relatime
/v2 /run/t/data/nested\040dir/it's ro,relatime
/v3 /run/t/file rw,relatime
routes:
default via 169.254.1.1 dev eth0 onlink 
10.96.0.0/12 dev eth0 scope link 
169.254.1.1 dev eth0 scope link 
default via fd00:10::1 dev eth0 metric 1024 pref medium
env:
640 adm /etc/vmruntime/env
640 adm /etc/vmruntime/login.env
it's "$HOME" \ ` + "`x`" + `
and more /opt/bin
login:
it's "$HOME" \ ` + "`x`" + `
and more
exported: it's "$HOME" \ ` + "`x`" + `
and more
files:
/etc/systemd/system/multi-user.target.wants:
vmagent.service

/etc/udev/rules.d:
10.rules
99-vmruntime.rules
/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_vol-logs
data:
hello
secret
text
read-only
said:
vmruntime: cannot mount /run/t/missing: there is no /run/vmruntime/shares/v4
left:
`

func TestBootHook(t *testing.T) {
	hook := hookInput().bootHook()
	if diff := cmp.Diff(configured, guest(t, report, hook)); diff != "" {
		t.Error(diff)
	}
}

// A second boot changes nothing, and writes no file.
func TestBootHookTwice(t *testing.T) {
	hook := hookInput().bootHook()
	const again = `
list() { find /etc /root /var/lib -type f -printf '%T@ %i %p\n' | sort; grep /run/ /proc/self/mountinfo; }
before=$(list); sh "$HOOKS/hook0"; [ "$before" = "$(list)" ] || { echo "written again:"; echo "$before"; list; }
`
	if diff := cmp.Diff(configured, guest(t, again+report, hook)); diff != "" {
		t.Error(diff)
	}
}

// A disk that comes to another pod keeps nothing of the first one's.
func TestBootHookOtherPod(t *testing.T) {
	const left = `
cat /root/.ssh/authorized_keys /etc/fstab /etc/vmruntime/env
find /etc /var/lib -name '*vmruntime*' -o -name '*vmagent*' | sort
`
	const want = userKey + "\nssh-rsa BBBB vmruntime-exec x\n# the user's\n/dev/vda1 / ext4 defaults 0 1\n# The environment of the pod's container.\n" +
		"/etc/profile.d/vmruntime.sh\n/etc/vmruntime\n/var/lib/cloud/scripts/per-boot/vmruntime-exec-key\n"
	if diff := cmp.Diff(want, guest(t, left, hookInput().bootHook(), minimal(NoCloud).bootHook())); diff != "" {
		t.Error(diff)
	}
}

// A shell reads what was put in.
func TestEnvironmentInShell(t *testing.T) {
	const nasty = "'\"$HOME`id`\\ \\n!# \t\n\nend\\"
	path := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(path, []byte(environment([]EnvVar{{"NASTY", nasty}}, everywhere)), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("sh", "-c", `. "$1"; printf %s "$NASTY"`, "sh", path).CombinedOutput()
	if err != nil || string(out) != nasty {
		t.Errorf("the shell read %q, %v; want %q", out, err, nasty)
	}
}
