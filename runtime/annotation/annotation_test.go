package annotation

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write docs/annotations.md anew")

const publicKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE7x4bEXmNHFnVJMoHkMQKXBiFkYQ6Mszq2Q1U4U0fJk someone@example.org"

func defaults() *Machine {
	return &Machine{DiskBus: "virtio", Video: "std", Watchdog: "none", Datasource: "nocloud"}
}

func TestParse(t *testing.T) {
	for name, tc := range map[string]struct {
		in   map[string]string
		want func(*Machine)
	}{
		"nothing": {nil, func(*Machine) {}},
		"others'": {map[string]string{"example.org/disk-bus": "ide", "vmruntime.io": "x", "x.vmruntime.io/y": "z"}, func(*Machine) {}},
		"hardware": {
			map[string]string{
				"root-disk-size": "20Gi", "disk-bus": "scsi", "firmware": "efi-secure-boot", "tpm": "true", "cpu-model": "Skylake-Server-v4",
				"video": "none", "watchdog": "poweroff",
			},
			func(m *Machine) {
				m.RootDiskSize, m.DiskBus, m.Firmware, m.TPM, m.CPUModel = 20<<30, "scsi", "efi-secure-boot", true, "Skylake-Server-v4"
				m.Video, m.Watchdog = "none", "poweroff"
			},
		},
		"sizes are rounded up": {map[string]string{"root-disk-size": "10G"}, func(m *Machine) { m.RootDiskSize = 10_000_003_072 }},
		"direct boot": {
			map[string]string{"kernel": "/boot/vmlinuz", "initrd": "/boot/initrd.img", "kernel-args": "root=/dev/vda1 quiet"},
			func(m *Machine) {
				m.Kernel, m.Initrd, m.KernelArgs = "/boot/vmlinuz", "/boot/initrd.img", "root=/dev/vda1 quiet"
			},
		},
		"cloud-init": {
			map[string]string{
				"datasource": "configdrive", "user-data": "#cloud-config\n{}\n", "vendor-data-from": "/etc/vm/vendor", "network-config": "version: 2",
				"ssh-keys": "# mine\n\n" + publicKey + "\nno-pty " + publicKey + "\r\n", "guest-agent-install": "true",
			},
			func(m *Machine) {
				m.Datasource, m.UserData.Text, m.VendorData.From = "configdrive", "#cloud-config\n{}\n", "/etc/vm/vendor"
				m.NetworkConfig.Text, m.GuestAgentInstall = "version: 2", true
				m.SSHKeys.Text = "# mine\n\n" + publicKey + "\nno-pty " + publicKey + "\r\n"
			},
		},
		"ignition": {
			map[string]string{"datasource": "ignition", "ignition-from": "/etc/vm/config.ign", "ssh-keys-from": "/etc/vm/keys"},
			func(m *Machine) {
				m.Datasource, m.Ignition.From, m.SSHKeys.From = "ignition", "/etc/vm/config.ign", "/etc/vm/keys"
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			want := defaults()
			tc.want(want)
			got, err := Parse(prefixed(tc.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// prefixed puts our prefix before names without a domain.
func prefixed(in map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range in {
		if !strings.Contains(k, "/") && !strings.Contains(k, ".") {
			k = Prefix + k
		}
		out[k] = v
	}
	return out
}

func TestParseErrors(t *testing.T) {
	const cloud = "used with the datasource nocloud or configdrive"
	for name, tc := range map[string]struct {
		in   map[string]string
		want []string // all lines, in order
	}{
		"all at once, in the order of the documentation": {
			map[string]string{"video": "vga", "disk-bus": "ide", "tpm": "yes", "fimware": "efi"},
			[]string{
				`disk-bus is "ide"; it has to be one of virtio, scsi, sata`,
				`tpm is "yes"; it has to be true or false`,
				`video is "vga"; it has to be one of none, std, virtio`,
				`fimware is unknown; did you mean vmruntime.io/firmware?`,
			},
		},
		"unknown and like nothing": {map[string]string{"qemu-args": "-s", "": ""}, []string{
			" is unknown; docs/annotations.md lists them all", "qemu-args is unknown; docs/annotations.md lists them all",
		}},
		"no quantity":             {map[string]string{"root-disk-size": "20 GB"}, []string{`root-disk-size is "20 GB"; it has to be a whole number of bytes as a quantity like 20Gi, from 1Mi to 16Ti`}},
		"a fraction":              {map[string]string{"root-disk-size": "1048576500m"}, []string{"a whole number of bytes"}},
		"negative":                {map[string]string{"root-disk-size": "-1Gi"}, []string{"from 1Mi to 16Ti"}},
		"too small":               {map[string]string{"root-disk-size": "1"}, []string{"from 1Mi to 16Ti"}},
		"too large":               {map[string]string{"root-disk-size": "17Ti"}, []string{"from 1Mi to 16Ti"}},
		"beyond 64 bits":          {map[string]string{"root-disk-size": "99999Ei"}, []string{"from 1Mi to 16Ti"}},
		"no CPU at all":           {map[string]string{"cpu-model": "help"}, []string{"a name of letters"}},
		"a property behind a CPU": {map[string]string{"cpu-model": "host,+vmx"}, []string{"a name of letters"}},
		"long name":               {map[string]string{"cpu-model": strings.Repeat("a", 65)}, []string{`aaa..."; it has to be at most 64 bytes, not 65`}},
		"empty":                   {map[string]string{"cpu-model": "", "kernel": "", "user-data": ""}, []string{"not empty, or left out", "not empty, or left out", "not empty, or left out"}},
		"relative":                {map[string]string{"kernel": "boot/vmlinuz"}, []string{`kernel is "boot/vmlinuz"; it has to be an absolute path of a file, without // or . or .. in it`}},
		"out of the image":        {map[string]string{"kernel": "/../etc/shadow"}, []string{"an absolute path of a file"}},
		"a directory":             {map[string]string{"user-data-from": "/"}, []string{"an absolute path of a file"}},
		"lines":                   {map[string]string{"kernel": "/k", "kernel-args": "a\nb"}, []string{"one line without control characters"}},
		"no text":                 {map[string]string{"user-data": "\xff", "vendor-data": "a\x00b"}, []string{"text in UTF-8", "text in UTF-8"}},
		"long text":               {map[string]string{"network-config": strings.Repeat("a", 65537)}, []string{"at most 65536 bytes, not 65537"}},
		"no key":                  {map[string]string{"ssh-keys": publicKey + "\nssh-rsa AAAA\n"}, []string{"one public key per line, like \"ssh-ed25519 AAAA... name\"; line 2 is none"}},
		"both": {map[string]string{"user-data": "x", "user-data-from": "/x"}, []string{
			`user-data-from is "/x"; it has to be left out where vmruntime.io/user-data is set`,
		}},
		"initrd without kernel": {map[string]string{"initrd": "/i", "kernel-args": "x"}, []string{"initrd is", "kernel-args is"}},
		"secure direct boot":    {map[string]string{"kernel": "/k", "firmware": "efi-secure-boot"}, []string{`kernel is "/k"; it has to be left out with the firmware efi-secure-boot`}},
		"nothing for none": {
			map[string]string{"datasource": "none", "user-data": "x", "network-config-from": "/x", "ssh-keys": publicKey, "guest-agent-install": "true"},
			[]string{"user-data is \"x\"; it has to be " + cloud, "network-config-from is \"/x\"; it has to be " + cloud, "ssh-keys is", "guest-agent-install is"},
		},
		"ignition for cloud-init": {map[string]string{"ignition": "{}"}, []string{`ignition is "{}"; it has to be used with vmruntime.io/datasource=ignition`}},
		"ignition without any":    {map[string]string{"datasource": "ignition"}, []string{`datasource is "ignition"; it has to be used with vmruntime.io/ignition or vmruntime.io/ignition-from`}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse(prefixed(tc.in))
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Fatalf("error %v, want one that is ErrInvalidArgument", err)
			}
			lines := strings.Split(err.Error(), "\n")
			if len(lines) != len(tc.want) {
				t.Fatalf("%d errors, want %d:\n%v", len(lines), len(tc.want), err)
			}
			for i, want := range tc.want {
				if !strings.HasPrefix(lines[i], "annotation "+Prefix) || !strings.Contains(lines[i], want) {
					t.Errorf("error %d is %q, want %q in it", i, lines[i], want)
				}
			}
		})
	}
}

// TestTags holds every field to a kind that there is, and to documentation.
func TestTags(t *testing.T) {
	kinds := map[string]reflect.Kind{
		"size": reflect.Int64, "bool": reflect.Bool, "word": reflect.String, "name": reflect.String,
		"line": reflect.String, "path": reflect.String, "text": reflect.String,
	}
	seen := map[string]bool{}
	for _, k := range new(Machine).keys() {
		if k.name == "" || seen[k.name] || k.doc == "" || k.max <= 0 || kinds[k.kind] != k.target.Kind() {
			t.Errorf("annotation %q: kind %q, doc %q, max %d, stored in a %s", k.name, k.kind, k.doc, k.max, k.target.Kind())
		}
		seen[k.name] = true
		if (k.kind == "word") != (len(k.values) > 0) {
			t.Errorf("annotation %s of kind %s has the values %q", k.name, k.kind, k.values)
		}
	}
}

// TestDocs holds docs/annotations.md to the struct.
func TestDocs(t *testing.T) {
	const path = "../../docs/annotations.md"
	got := document()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s is not what the code makes (go test -update writes it anew):\n%s", path, diff)
	}
}

func document() string {
	var b strings.Builder
	b.WriteString("# Annotations of a machine\n\nMade from the tags in `runtime/annotation/annotation.go`; change it there.\n\n" +
		"Annotations of a pod whose container boots the disk in its image. All begin with `" + Prefix + "`. They are read when the\n" +
		"pod is created; a wrong value or an unknown name fails the pod, and all errors are told at once. A `-from` annotation names\n" +
		"a file inside the container, so that a secret need not lie in an annotation: mount the Secret or ConfigMap and name the\n" +
		"path of its key, like `/etc/vm/user-data`. It is read whenever the container starts. Of an annotation and its `-from` only one may be set.\n")
	for _, k := range new(Machine).keys() {
		if k.group != "" {
			fmt.Fprintf(&b, "\n## %s\n\n| annotation | value | default | |\n|---|---|---|---|\n", k.group)
		}
		def := ""
		if k.def != "" {
			def = "`" + k.def + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", k.name, k.shape(), def, k.doc)
	}
	b.WriteString(added)
	return b.String()
}

// added is what package image/seed puts into a guest, told to its users.
const added = `
## What the guest gets besides

With the datasources nocloud and configdrive, from vendor-data, so that user-data wins; ` + "`vendor_data: {enabled: false}`" + ` in user-data refuses it.
Most is done by a script at every boot, which owns what it names and may run any number of times.

- The pod's hostname, addresses, routes, DNS servers and search domains. cloud-init configures a guest once for every pod: not again
  when a container restarts on a persistent root disk, but again when that disk comes to another pod.
- ` + "`/etc/vmruntime/env`" + `: the container's environment, as lines ` + "`KEY=\"value\"`" + ` that a shell and systemd's ` + "`EnvironmentFile=`" + ` read alike. root and the
  group adm may read it. Logins get it too, except for names like PATH and HOME that a login sets itself. Names that a shell cannot have are left out.
- The SSH host key that the node checks, and root's key for ` + "`kubectl exec`" + ` with the comment ` + "`vmruntime-exec`" + `. Host keys of other types come from
  ` + "`ssh_keys`" + ` in user-data. If user-data has an ed25519 host key of its own, exec by SSH is refused.
- In ` + "`/etc/fstab`" + `, with the option ` + "`x-vmruntime`" + `: the virtiofs mount ` + "`/run/vmruntime/shares`" + ` and from it a bind mount for every volume, at its mount
  path, read-only where the pod says so. The guest boots also without them.
- For a block volume the device path of the pod, by a rule of udev that knows the disk by its serial.

Ignition gets the same but for routes, addresses and device paths; the guest asks for its addresses by DHCP.
`

// shape says in a few words what a value looks like.
func (k key) shape() string {
	switch k.kind {
	case "word":
		return "`" + strings.Join(k.values, "`, `") + "`"
	case "bool":
		return "`true`, `false`"
	case "size":
		return "quantity, 1Mi to 16Ti"
	case "path":
		return "absolute path"
	case "text":
		return fmt.Sprintf("text, at most %d KiB", k.max>>10)
	default:
		return fmt.Sprintf("%s, at most %d bytes", k.kind, k.max)
	}
}
