package qemu

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

func pod() Machine {
	return Machine{
		Name: "vmruntime-0123", UUID: "01234567-89ab-cdef-0123-456789abcdef", Arch: ArchX86, Accel: AccelTCG, VCPUs: 2,
		Kernel: "/k", Initrd: "/i", Cmdline: "console=ttyS0 quiet panic=-1",
		Disks: []Disk{
			{Serial: "scratch", Path: "/s.img", Format: "raw"},
			{Serial: "image-0", Path: "/i.erofs", Format: "raw", ReadOnly: true},
		},
		NICs:         []NIC{{ID: "net0", MAC: "52:54:00:00:00:01", MTU: 1450}, {ID: "net1", MAC: "52:54:00:00:00:02"}},
		HotplugPorts: 2,
	}
}

func TestArgsGolden(t *testing.T) {
	fds := Descriptors{QMP: 4, Agent: 5, Disks: []int{6, 7}, NICs: []int{8, 9}}
	kvm, arm := pod(), pod()
	kvm.Accel = AccelKVM
	arm.Arch, arm.Cmdline = ArchARM64, "console=ttyAMA0"
	small := Machine{Name: "small", Arch: ArchX86, Accel: AccelTCG, Kernel: "/k"}
	for name, m := range map[string]Machine{"x86_64-tcg": pod(), "x86_64-kvm": kvm, "aarch64-tcg": arm, "small": small} {
		t.Run(name, func(t *testing.T) {
			m = m.Defaults()
			if err := m.Validate(); err != nil {
				t.Fatal(err)
			}
			got := strings.ReplaceAll(strings.Join(m.Args(fds), "\n"), "\n-", "\n\n-") + "\n"
			path := filepath.Join("testdata", name+".args")
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
				t.Errorf("arguments differ; if they should, run the test with -update (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Machine)
		want   []string
	}{
		"valid":  {func(*Machine) {}, nil},
		"name":   {func(m *Machine) { m.Name = "a,b" }, []string{`machine.name is "a,b"`}},
		"uuid":   {func(m *Machine) { m.UUID = "x" }, []string{`machine.uuid is "x"`}},
		"kernel": {func(m *Machine) { m.Kernel = "k" }, []string{`machine.kernel is "k"; it has to be an absolute path`}},
		"cpu":    {func(m *Machine) { m.CPUModel = "max -evil" }, []string{"machine.cpuModel"}},
		"memory": {func(m *Machine) { m.MemoryBytes = 100<<20 + 1 }, []string{"a multiple of 1 MiB"}},
		"serials": {func(m *Machine) { m.Disks[1].Serial = "scratch"; m.Disks[0].Format = "" }, []string{
			`machine.disks[0].format is ""`, `machine.disks[1].serial is "scratch"; it has to be used once`,
		}},
		"long serial": {func(m *Machine) { m.Disks[0].Serial = "abcdefghijklmnopqrstu" }, []string{"machine.disks[0].serial"}},
		"nics": {func(m *Machine) { m.NICs[0].MAC = "01:00:00:00:00:01"; m.NICs[1].ID = "net0"; m.NICs[1].MTU = 5 }, []string{
			"machine.nics[0].mac", "machine.nics[1].id", "machine.nics[1].mtu",
		}},
		"all at once": {func(m *Machine) { *m = Machine{} }, []string{
			"machine.name", "machine.arch", "machine.accel", "machine.cpuModel", "machine.vcpus", "machine.memoryBytes", "machine.kernel",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			m := pod().Defaults()
			tc.change(&m)
			checkErrors(t, m.Validate(), tc.want)
		})
	}
}

// checkErrors holds that err is one invalid argument for each of the wanted texts, and no more.
func checkErrors(t *testing.T, err error, want []string) {
	t.Helper()
	if len(want) == 0 {
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	if !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Fatalf("error %v is no invalid argument", err)
	}
	if n := len(strings.Split(err.Error(), "\n")); n != len(want) {
		t.Errorf("%d errors, want %d: %v", n, len(want), err)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error does not tell %q: %v", w, err)
		}
	}
}

func TestSpecTellsAllErrors(t *testing.T) {
	m := pod()
	m.Name = ""
	_, err := Start(t.Context(), Spec{Machine: m, RunDir: "run"})
	checkErrors(t, err, []string{"uid is", "gid is", "taps is \"0\"; it has to be 2", "runDir is \"run\"", "machine.name"})
}

func TestShareArgs(t *testing.T) {
	for version, want := range map[string]string{
		"virtiofsd version 7.2.22 (Debian 1:7.2)\nCopyright": "-f -o source=/d -o sandbox=namespace -o cache=auto -o announce_submounts -o log_level=err --rlimit-nofile=0",
		"virtiofsd 1.13.2":         "--shared-dir=/d --sandbox=namespace --seccomp=kill --cache=auto --announce-submounts --rlimit-nofile=0 --log-level=error",
		"virtiofsd backend v1.4.0": "--shared-dir=/d --sandbox=namespace --seccomp=kill --cache=auto --announce-submounts --rlimit-nofile=0 --log-level=error",
	} {
		got, err := renderShareArgs(version, "/d")
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: got %q, %v", version, got, err)
		}
	}
	if _, err := renderShareArgs("busybox", "/d"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("another program: %v", err)
	}
}
