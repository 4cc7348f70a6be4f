// Package seed makes what tells the operating system in a machine who it is: a small disk for cloud-init (NoCloud or ConfigDrive), or a
// value for Ignition. Nothing in it depends on the time or on chance: the same Input gives the same bytes.
//
//	user's user-data ----------------------------> user-data, byte for byte
//	user's vendor-data --+
//	boot hook, made here +-> MIME multi-part -----> vendor-data
//	host keys -----------+
//	pod: uid, hostname, SSH keys -----------------> meta-data
//	pod: addresses, routes, DNS (or the user's) --> network-config
//
// Invariants. User-data is never changed, so it means what its author meant; cloud-init lets it win over vendor-data, where all of ours is. What is ours is
// a boot hook, a script that cloud-init runs at every boot, and no cloud-config list, since of those cloud-init would keep only the user's. The boot
// hook owns what it names (files with vmruntime in their name and vmagent.service, lines of /etc/fstab with x-vmruntime, the one key with the comment
// vmruntime-exec), writes it anew each time, and touches nothing else: it may run any number of times, also on a disk that another pod had before. User-data
// that says `vendor_data: {enabled: false}` refuses it all.
//
// cloud-init configures a guest once per instance ID. It is made from the pod's UID: a disk that outlives a container of its pod is not
// configured anew, one that comes to another pod is, and an overlay, which is empty whenever a container starts, always is.
package seed

import (
	"errors"
	"fmt"
	"net/netip"
)

// Where the guest finds what the boot hook writes.
const (
	EnvFile   = "/etc/vmruntime/env"    // the container's environment
	ShareRoot = "/run/vmruntime/shares" // the one virtiofs mount
	ShareTag  = "shares"                // its tag
	AgentPath = ShareRoot + "/agent/vmagent"
)

// IgnitionName is the name under which Ignition looks for Seed.Ignition in QEMU's firmware configuration (fw_cfg).
const IgnitionName = "opt/com.coreos/config"

// MaxData is how many bytes the user's data of one kind may have.
const MaxData = 1 << 20

// Datasource says for whom the seed is.
type Datasource string

// The datasources.
const (
	NoCloud     Datasource = "nocloud"
	ConfigDrive Datasource = "configdrive"
	Ignition    Datasource = "ignition"
)

// Input is all that a seed is made from.
type Input struct {
	Datasource Datasource

	PodUID, PodName, PodNamespace string
	Hostname                      string // a DNS name of at most 64 bytes

	Interfaces []Interface // none: the guest's network is not configured, it may ask for addresses by DHCP
	DNS        DNS
	Env        []EnvVar

	SSHKeys  string    // the user's keys, as lines of authorized_keys: for the image's default user and for root
	ExecKey  string    // the pod's own public key, for root; it is there once, whatever the user's data says
	HostKeys []HostKey // the SSH server's; user-data may have others under ssh_keys, which win

	Disks  []Disk
	Shares []Share
	Agent  bool // run AgentPath in the guest, as a systemd unit

	// The user's, passed on as they are. NetworkConfig replaces the one made from Interfaces and DNS: YAML for NoCloud, OpenStack's
	// network_data.json for ConfigDrive. Ignition is for the datasource of that name, the others are for the other two.
	UserData, VendorData, NetworkConfig, Ignition []byte
}

// Interface is one network card of the guest.
type Interface struct {
	Name      string // as the guest calls it, like eth0
	MAC       string
	MTU       int // 0: the guest's default
	Addresses []netip.Prefix
	Routes    []Route
}

// Route goes out of an interface. Without a gateway the destination is on the link. A gateway need not be in a subnet of the interface.
type Route struct {
	To  netip.Prefix
	Via netip.Addr // may be the zero Addr
}

// DNS is what resolvers are told.
type DNS struct {
	Servers []netip.Addr
	Search  []string
}

// EnvVar is one variable of the container's environment. Where a name comes twice the last one counts.
type EnvVar struct{ Name, Value string }

// HostKey is a key of the guest's SSH server.
type HostKey struct {
	Private string // PEM, in OpenSSH's own form
	Public  string // one line, as in a .pub file
}

// Disk is a block volume. Its serial is how the guest finds it.
type Disk struct {
	Serial string // at most 20 of [a-z0-9-]
	Bus    string // virtio, scsi or sata
	Link   string // path in the guest that shall lead to the disk, the volume's devicePath; may be empty
	Mount  string // path that its file system is mounted at; may be empty
	FSType string // "" lets the guest find out
	// ReadOnly concerns the mount; that the disk itself is not written to is QEMU's to see to.
	ReadOnly bool
}

// Share is a directory or file below ShareRoot that is mounted (bound) to a path.
type Share struct {
	Name     string // its name below ShareRoot
	Path     string
	ReadOnly bool
}

// Seed is what the guest reads.
type Seed struct {
	Label    string            // the disk's; empty for Ignition
	Files    map[string][]byte // by path without leading slash
	Ignition []byte            // the value for IgnitionName; empty for the others
}

// InstanceID is by which cloud-init knows the pod. It is not the machine's UUID: some datasources take one that is to mean that nothing changed,
// and would not read the disk again.
func InstanceID(podUID string) string { return "vmruntime-" + podUID }

// Build makes a seed. All that is wrong with the input is told at once, as errdefs.ErrInvalidArgument.
func Build(in Input) (*Seed, error) {
	if err := errors.Join(in.validate()...); err != nil {
		return nil, err
	}
	var s *Seed
	var err error
	switch in.Datasource {
	case NoCloud:
		s, err = in.noCloud()
	case ConfigDrive:
		s, err = in.configDrive()
	default:
		s, err = in.ignition()
	}
	if err != nil {
		return nil, fmt.Errorf("make the %s data of pod %s: %w", in.Datasource, in.PodUID, err)
	}
	return s, nil
}
