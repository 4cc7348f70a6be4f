// Package annotation reads what a pod says about its machine, the operating system that boots from the disk in its image.
//
// All annotations have one prefix and become one typed struct, once. The struct's tags are the rules and the documentation:
// Parse checks by them, and docs/annotations.md is made from them. No annotation names a path of the host, and none is an argument of
// QEMU's. The package is a pure function and imports nothing of ours.
package annotation

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Prefix is what every annotation of ours begins with.
const Prefix = "vmruntime.io/"

// MaxFile is how many bytes a file named by a Source may have: what a ConfigMap or a Secret can hold.
const MaxFile = 1 << 20

// Machine is what the annotations of a pod ask for, with the defaults. A zero value means that nothing was asked and that there is no
// default, or none that is the same for every node.
//
// To add one: a field with the tags key, kind and doc, and where they apply values, default, max; then
// `go test ./runtime/annotation -run TestDocs -update`. The kinds are in kind.go, what concerns more than one field in Validate.
type Machine struct {
	// RootDiskSize is in bytes; 0 is the size of the image's disk.
	RootDiskSize int64  `key:"root-disk-size" kind:"size" group:"Disk and firmware" doc:"How large the root disk is, as a Kubernetes quantity like 20Gi, rounded up to 4 KiB. It has to be at least the size of the image's disk, which it is by default. The guest grows its partition and file system itself, as cloud images do. Not for a block volume at the path /, which has its own size."`
	DiskBus      string `key:"disk-bus" kind:"word" values:"virtio scsi sata" default:"virtio" doc:"How the guest sees its disks. sata needs no driver in the guest and is slow."`
	Firmware     string `key:"firmware" kind:"word" values:"bios efi efi-secure-boot" doc:"What starts the guest. The variables of efi are kept as long as the container, also over reboots of the guest. efi-secure-boot starts only what Microsoft's keys have signed, as the distributions' boot loaders are. By default bios on x86-64 and efi on arm64, which has no bios."`
	TPM          bool   `key:"tpm" kind:"bool" default:"false" doc:"A TPM 2.0, emulated. What it keeps lives as long as the container."`
	Kernel       string `key:"kernel" kind:"path" doc:"Path inside the image of a kernel to boot directly, without boot loader, with the image's disk as first disk."`
	Initrd       string `key:"initrd" kind:"path" doc:"Path inside the image of the initial RAM disk for that kernel."`
	KernelArgs   string `key:"kernel-args" kind:"line" max:"2047" doc:"The command line of that kernel, for example root=/dev/vda1 console=ttyS0."`

	CPUModel string `key:"cpu-model" kind:"name" max:"64" group:"Devices" doc:"The CPU that the guest sees, by QEMU's name of it, for example Skylake-Server-v4. By default all that the node's CPU has under KVM, and all that can be emulated without it."`
	Video    string `key:"video" kind:"word" values:"none std virtio" default:"std" doc:"The graphics card, which vmruntime vm vnc and screenshot show. std works in every guest; virtio needs a driver; none has no VNC."`
	Watchdog string `key:"watchdog" kind:"word" values:"none reset poweroff pause inject-nmi" default:"none" doc:"A watchdog (i6300esb), and what happens when the guest no longer feeds it. poweroff ends the container, so the pod's restart policy decides; pause keeps the guest as it is for whoever looks into it."`

	Datasource        string `key:"datasource" kind:"word" values:"nocloud configdrive ignition none" default:"nocloud" group:"Guest configuration" doc:"How the guest gets its configuration. nocloud and configdrive: a small disk that cloud-init reads. ignition: a firmware value that Ignition reads. none: nothing, the guest gets its addresses by DHCP alone, and exec needs an agent in the image."`
	UserData          Source `key:"user-data" max:"262144" doc:"cloud-init's user-data: cloud-config, a script, MIME multi-part, or anything else that it knows. It is passed on as it is and wins over what the runtime adds."`
	VendorData        Source `key:"vendor-data" max:"262144" doc:"cloud-init's vendor-data, which user-data wins over."`
	NetworkConfig     Source `key:"network-config" max:"65536" doc:"cloud-init's network-config, instead of the one made from the pod's addresses: version 2 or 1 for nocloud, OpenStack's network_data.json for configdrive. The node forwards only the pod's own addresses."`
	Ignition          Source `key:"ignition" max:"262144" doc:"The configuration for Ignition, as JSON. One of specification 3 is merged over what the runtime adds, one of specification 2 is passed on alone. Needs the datasource ignition."`
	SSHKeys           Source `key:"ssh-keys" max:"65536" doc:"Public keys that may log in by SSH, as the image's default user and, unless user-data sets disable_root, as root; one per line, as in authorized_keys. A disk that has them already keeps them when they go."`
	GuestAgentInstall bool   `key:"guest-agent-install" kind:"bool" default:"false" doc:"Run the runtime's own agent in the guest, from a read-only share, as a systemd unit. Exec then needs neither SSH nor the QEMU guest agent. Needs the datasource nocloud or configdrive and a guest with virtiofs."`
}

// Source is text that comes from an annotation itself or from a file. At most one of both is set.
type Source struct {
	Text string // the annotation's value
	// From is the absolute path, inside the container, of a file in a mounted ConfigMap, Secret or other volume. The runtime reads it
	// when the container starts; it may have MaxFile bytes.
	From string
}

// IsZero tells whether nothing was given.
func (s Source) IsZero() bool { return s == Source{} }

// Parse reads the annotations of a pod, of which those without Prefix are none of ours. All that is wrong is told at once: every error names the annotation,
// its value and what would be right, and is errdefs.ErrInvalidArgument.
func Parse(annotations map[string]string) (*Machine, error) {
	m := new(Machine)
	known := m.keys()
	var errs []error
	for _, k := range known {
		value, given := annotations[Prefix+k.name]
		if !given {
			value = k.def
		}
		if !given && k.def == "" {
			continue
		}
		if err := k.set(value); err != nil {
			errs = append(errs, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		if short, ours := strings.CutPrefix(name, Prefix); ours && !slices.ContainsFunc(known, func(k key) bool { return k.name == short }) {
			errs = append(errs, fmt.Errorf("annotation %s is unknown%s: %w", name, suggest(short, known), errdefs.ErrInvalidArgument))
		}
	}
	if err := errors.Join(append(errs, m.validate(annotations)...)...); err != nil {
		return nil, err
	}
	return m, nil
}

// key is one annotation, as the tags say.
type key struct {
	name, kind, group, doc, def string
	values                      []string
	max                         int
	target                      reflect.Value
}

// keys lists all annotations, bound to the fields of m, in the order of the struct. A Source has two.
func (m *Machine) keys() []key {
	var list []key
	v := reflect.ValueOf(m).Elem()
	for field := range v.Type().Fields() {
		k := tagged(field)
		k.target = v.FieldByIndex(field.Index)
		if source, is := reflect.TypeAssert[*Source](k.target.Addr()); is {
			k.kind, k.target = "text", reflect.ValueOf(&source.Text).Elem()
			from := key{name: k.name + "-from", kind: "path", max: maxPath, target: reflect.ValueOf(&source.From).Elem()}
			from.doc = "The same from a file: its path inside the container, below a mounted ConfigMap, Secret or other volume; at most 1 MiB."
			list = append(list, k, from)
			continue
		}
		list = append(list, k)
	}
	return list
}

// suggest names the nearest known annotation, if one is near.
func suggest(name string, known []key) string {
	best, distance := "", max(2, len(name)/3)+1
	for _, k := range known {
		if d := editDistance(name, k.name); d < distance {
			best, distance = k.name, d
		}
	}
	if best == "" {
		return "; docs/annotations.md lists them all"
	}
	return "; did you mean " + Prefix + best + "?"
}

// editDistance is the number of inserted, deleted or replaced bytes that make a into b (Levenshtein).
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
