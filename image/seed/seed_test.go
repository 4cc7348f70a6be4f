package seed

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
)

var update = flag.Bool("update", false, "write golden files anew")

const (
	userKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE7x4bEXmNHFnVJMoHkMQKXBiFkYQ6Mszq2Q1U4U0fJk someone@example.org"
	podKey  = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDxYsyYkhlbj9WFbiDBcb8ZEBbb8nHPxb6PExHhBV2Hh"
	// A key pair made for this test alone, by ssh-keygen -t ed25519.
	hostPublic  = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBQ65YkSkjxJO2Am9+NbeAKViaN7mzYJ5E2wiROSqzD0"
	hostPrivate = `-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
QyNTUxOQAAACAUOuWJEpI8STtgJvfjW3gClYmje5s2CeRNsIkTkqsw9AAAAIicP7Y4nD+2
OAAAAAtzc2gtZWQyNTUxOQAAACAUOuWJEpI8STtgJvfjW3gClYmje5s2CeRNsIkTkqsw9A
AAAEADgjHwd8i2BsNyJupt5aKyztZSQQ1mmtkq4cR1ECVNhhQ65YkSkjxJO2Am9+NbeAKV
iaN7mzYJ5E2wiROSqzD0AAAAAAECAwQF
-----END OPENSSH PRIVATE KEY-----
`
)

func minimal(d Datasource) Input {
	in := Input{Datasource: d, PodUID: "0f9c1c2e-6a53-4bd2-a4f5-0e7f3a0ab001", Hostname: "small"}
	if d == Ignition {
		in.Ignition = []byte(`{"ignition":{"version":"3.4.0"}}`)
	}
	return in
}

// full has something of everything.
func full(d Datasource) Input {
	in := minimal(d)
	in.PodName, in.PodNamespace, in.Hostname = "web-0", "default", "web-0"
	in.Interfaces = []Interface{
		{
			Name: "eth0", MAC: "02:00:0a:f4:00:07", MTU: 1450,
			Addresses: prefixes("10.244.0.7/24", "fd00:10::7/64"),
			Routes: []Route{
				{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.244.0.1")},
				{To: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("fd00:10::1")},
				{To: netip.MustParsePrefix("10.96.0.0/12")},
			},
		},
		{
			Name: "eth1", MAC: "02:00:0a:f4:00:08", Addresses: prefixes("192.168.7.7/32"),
			Routes: []Route{{To: netip.MustParsePrefix("172.16.0.0/12"), Via: netip.MustParseAddr("169.254.1.1")}},
		},
	}
	in.DNS = DNS{[]netip.Addr{netip.MustParseAddr("10.96.0.10")}, []string{"default.svc.cluster.local", "cluster.local"}}
	in.Env = []EnvVar{{"GREETING", "old"}, {"GREETING", "it's \"$HOME\" \\ `x`\nand more"}, {"PATH", "/opt/bin"}, {"my.name", "x"}}
	in.SSHKeys = "# mine\n" + userKey + "\n"
	in.ExecKey = podKey
	in.HostKeys = []HostKey{{hostPrivate, hostPublic}}
	in.Disks = []Disk{
		{Serial: "vol-data", Bus: "virtio", Link: "/dev/xvda"},
		{Serial: "vol-logs", Bus: "scsi", Link: "/disks/logs", Mount: "/srv/logs", FSType: "ext4", ReadOnly: true},
	}
	in.Shares = []Share{
		{Name: "v2", Path: "/data/nested dir/it's", ReadOnly: true},
		{Name: "v1", Path: "/data"},
		{Name: "v3", Path: "/data-2"},
	}
	if d != Ignition {
		in.Agent = true
		in.UserData = []byte("#!/bin/sh\necho hello\n")
		in.VendorData = []byte("#cloud-config\ntimezone: Europe/Berlin\n")
	}
	return in
}

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestGolden(t *testing.T) {
	for _, d := range []Datasource{NoCloud, ConfigDrive, Ignition} {
		for name, in := range map[string]Input{"minimal": minimal(d), "full": full(d)} {
			t.Run(fmt.Sprint(d, " ", name), func(t *testing.T) {
				s, err := Build(in)
				if err != nil {
					t.Fatal(err)
				}
				archive := &txtar.Archive{Comment: []byte("label " + s.Label + "\n")}
				for _, name := range slices.Sorted(maps.Keys(s.Files)) {
					archive.Files = append(archive.Files, txtar.File{Name: name, Data: s.Files[name]})
				}
				if d == Ignition {
					archive.Files = append(archive.Files, txtar.File{Name: IgnitionName, Data: append(s.Ignition, '\n')})
				}
				golden(t, fmt.Sprintf("%s-%s.txtar", d, name), txtar.Format(archive))
			})
		}
	}
	golden(t, "boothook-minimal.sh", minimal(NoCloud).bootHook())
	golden(t, "boothook-full.sh", full(NoCloud).bootHook())
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (go test -update writes it anew):\n%s", path, diff)
	}
}

// The user's data arrives byte for byte, whatever it is.
func TestUserDataUnchanged(t *testing.T) {
	for _, data := range []string{
		"#cloud-config\nusers: []\n", "#cloud-config\n", "#!/bin/sh\ntrue", "#include\nhttps://example.org/x\n", "## template: jinja\n#cloud-config\n{% if x %}",
		"Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n\n--x--\n", "\x1f\x8b\x08 not even whole", "\xff\xfe\x00anything",
	} {
		for d, name := range map[Datasource]string{NoCloud: "user-data", ConfigDrive: "openstack/latest/user_data"} {
			in := minimal(d)
			in.UserData = []byte(data)
			s, err := Build(in)
			if err != nil {
				t.Fatal(err)
			}
			if got := string(s.Files[name]); got != data {
				t.Errorf("%s: %q became %q", d, data, got)
			}
		}
	}
}

func TestInstanceID(t *testing.T) {
	a, b := minimal(NoCloud), full(NoCloud)
	first, err := Build(a)
	if err != nil {
		t.Fatal(err)
	}
	second, err := Build(b)
	if err != nil {
		t.Fatal(err)
	}
	id := "instance-id: " + InstanceID(a.PodUID) + "\n"
	for _, s := range []*Seed{first, second} {
		if !strings.HasPrefix(string(s.Files["meta-data"]), id) {
			t.Errorf("meta-data of one pod begins with %q, want %q", s.Files["meta-data"], id)
		}
	}
}

func TestErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Input)
		want   []string
	}{
		"nothing": {func(in *Input) { *in = Input{} }, []string{
			`datasource is ""; it has to be nocloud, configdrive or ignition`, "the pod's UID is", "hostname is",
		}},
		"hostname": {func(in *Input) { in.Hostname = "a b" }, []string{`hostname is "a b"; it has to be a DNS name`}},
		"network": {
			func(in *Input) {
				in.Interfaces = []Interface{
					{
						Name: "eth 0", MAC: "x", MTU: 1, Addresses: []netip.Prefix{{}},
						Routes: []Route{{}, {To: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("10.0.0.1")}},
					},
					{Name: "a", MAC: "02:00:00:00:00:01"},
					{Name: "a", MAC: "02:00:00:00:00:01:02:03"},
				}
				in.DNS.Search = []string{"a b"}
			},
			[]string{
				`interface 0's name is "eth 0"`, `interface 0's MAC is "x"`, "interface 0's MTU", "interface 0's address", "interface 0's route",
				`interface 0's gateway is "10.0.0.1"; it has to be of the same family as ::/0`, `interface 2's name is "a"`, "interface 2's MAC", "DNS search domain",
			},
		},
		"keys": {
			func(in *Input) {
				in.SSHKeys, in.ExecKey, in.HostKeys = "x", "no-pty "+podKey, []HostKey{{"x", "y"}}
			},
			[]string{`SSH key 1 is "1 bytes"`, "the pod's SSH key", `SSH host key 0 is "secret"`, `SSH host key 0's public part is "y"`},
		},
		"mounts": {
			func(in *Input) {
				in.Disks = []Disk{{Serial: "A", Bus: "ide", Link: "dev/x", FSType: "a b"}}
				in.Shares = []Share{{Name: "..", Path: "/"}, {Name: "a", Path: "/b"}, {Name: "b", Path: "/b"}, {Name: "c", Path: ShareRoot}}
			},
			[]string{
				`disk serial is "A"`, "bus of disk A", "file system type of disk A", `device path of disk A is "dev/x"`, `share is ".."`, "mount path of share ..",
				`mount path of share b is "/b"; it has to be a path that nothing else is mounted at`, `mount path of share c is "/run/vmruntime/shares"`,
			},
		},
		"data": {
			func(in *Input) {
				in.UserData, in.VendorData = []byte("#cloud-config\na: [\n"), []byte("#cloud-config\r\n- a\r\n")
				in.NetworkConfig, in.Ignition = []byte("just text"), []byte("{}")
			},
			[]string{
				"ignition is \"2 bytes\"; it has to be empty with the datasource nocloud", "user-data is", "vendor-data is", "network-config is \"9 bytes\"; it has to be a mapping in YAML",
			},
		},
		"long":            {func(in *Input) { in.UserData = make([]byte, MaxData+1) }, []string{`user-data is "1048577 bytes"; it has to be at most 1 MiB`}},
		"broken gzip":     {func(in *Input) { in.VendorData = []byte{0x1f, 0x8b, 1} }, []string{"vendor-data is compressed, and wrongly"}},
		"no network_data": {func(in *Input) { in.Datasource, in.NetworkConfig = ConfigDrive, []byte("version: 2") }, []string{"OpenStack's network_data.json"}},
		"no JSON":         {func(in *Input) { *in = minimal(Ignition); in.Ignition = []byte("{") }, []string{"it has to be JSON"}},
		"no version":      {func(in *Input) { *in = minimal(Ignition); in.Ignition = []byte("{}") }, []string{`ignition.version is ""`}},
		"agent":           {func(in *Input) { *in = minimal(Ignition); in.Agent = true }, []string{"agent is"}},
	} {
		t.Run(name, func(t *testing.T) {
			in := minimal(NoCloud)
			tc.change(&in)
			_, err := Build(in)
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Fatalf("error %v, want one that is ErrInvalidArgument", err)
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error lacks %q:\n%v", want, err)
				}
			}
			if got := strings.Count(err.Error(), "it has to be"); len(tc.want) > 1 && got != len(tc.want) {
				t.Errorf("%d errors, want %d:\n%v", got, len(tc.want), err)
			}
		})
	}
}
