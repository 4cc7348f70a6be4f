package runtime

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// nodeOf is a configuration whose every path is in a fresh, empty directory.
func nodeOf(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	cfg := Default()
	cfg.Server.Root = filepath.Join(dir, "root")
	cfg.Server.State = filepath.Join(shortDir(t), "state")
	cfg.Server.Socket = filepath.Join(dir, "vmruntime.sock")
	cfg.Containerd.Address = filepath.Join(dir, "containerd.sock")
	cfg.QEMU.Binary = filepath.Join(dir, "qemu")
	cfg.QEMU.Virtiofsd = filepath.Join(dir, "virtiofsd")
	cfg.Guest.Dir = filepath.Join(dir, "guest")
	cfg.Network.ConfDir = filepath.Join(dir, "net.d")
	cfg.Network.BinDirs = []string{filepath.Join(dir, "bin")}
	return cfg
}

func checkOf(t *testing.T, cfg Config) map[string]CheckResult {
	t.Helper()
	text, err := cfg.Text()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	results := map[string]CheckResult{}
	for _, r := range Check(t.Context(), path) {
		results[r.Name] = r
		if (r.State == CheckOK) != (r.Fix == "") {
			t.Errorf("%s is %s, but its fix is %q", r.Name, r.State, r.Fix)
		}
	}
	return results
}

// shortDir is a directory whose path leaves room for sockets' names, which those of t.TempDir may not.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func wantCheck(t *testing.T, results map[string]CheckResult, name string, state CheckState, found string) {
	t.Helper()
	r, there := results[name]
	if !there || r.State != state || !strings.Contains(r.Found, found) {
		t.Errorf("%s: %s, %q; want %s with %q", name, r.State, r.Found, state, found)
	}
}

// On an empty node every part is named, with what was looked for.
func TestCheckEmptyNode(t *testing.T) {
	cfg := nodeOf(t)
	r := checkOf(t, cfg)
	wantCheck(t, r, "configuration", CheckOK, "valid")
	wantCheck(t, r, "containerd", CheckFail, cfg.Containerd.Address)
	wantCheck(t, r, "image file system", CheckWarn, "containerd does not tell")
	wantCheck(t, r, "QEMU", CheckFail, cfg.QEMU.Binary)
	wantCheck(t, r, "virtiofsd", CheckFail, cfg.QEMU.Virtiofsd)
	wantCheck(t, r, "guest", CheckFail, cfg.Guest.Dir)
	wantCheck(t, r, "CNI", CheckFail, cfg.Network.ConfDir)
	wantCheck(t, r, "cgroups", CheckWarn, "does not tell its driver")
	for _, dir := range []string{cfg.Server.Root, cfg.Server.State} {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("the check has made %s", dir)
		}
	}
}

func TestCheckBadConfiguration(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte("[vm]\nmax_vcpus = 0\ncolour = 'red'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := Check(t.Context(), path)
	if len(got) != 1 || got[0].State != CheckFail ||
		!strings.Contains(got[0].Found, "vm.max_vcpus is 0") || !strings.Contains(got[0].Found, "unknown key vm.colour") {
		t.Errorf("%+v", got)
	}
}

// oldCRI forces what a node's own containerd would not answer: an old version, and images elsewhere.
type oldCRI struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	version string
	driver  runtimeapi.CgroupDriver
	images  string
}

func (o oldCRI) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: "containerd", RuntimeVersion: o.version}, nil
}

func (o oldCRI) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: o.driver}}, nil
}

func (o oldCRI) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: o.images}}}}, nil
}

func serveCRI(t *testing.T, socket string, cri oldCRI) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(s, cri)
	runtimeapi.RegisterImageServiceServer(s, cri)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

func TestCheckContainerd(t *testing.T) {
	for name, tc := range map[string]struct {
		cri    oldCRI
		driver string
		name   string
		state  CheckState
		found  string
	}{
		"new":           {cri: oldCRI{version: "v2.4.2"}, name: "containerd", state: CheckOK, found: "containerd v2.4.2"},
		"oldest":        {cri: oldCRI{version: "1.7.0"}, name: "containerd", state: CheckOK, found: "1.7.0"},
		"too old":       {cri: oldCRI{version: "1.6.20~ds1"}, name: "containerd", state: CheckFail, found: "1.6.20"},
		"same disk":     {cri: oldCRI{images: os.TempDir()}, name: "image file system", state: CheckOK, found: "one file system"},
		"other disk":    {cri: oldCRI{images: "/proc"}, name: "image file system", state: CheckWarn, found: "another file system"},
		"driver":        {cri: oldCRI{driver: runtimeapi.CgroupDriver_CGROUPFS}, name: "cgroups", state: CheckOK, found: "driver cgroupfs"},
		"other drivers": {cri: oldCRI{driver: runtimeapi.CgroupDriver_CGROUPFS}, driver: "systemd", name: "cgroups", state: CheckFail, found: "containerd's is cgroupfs"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := nodeOf(t)
			if tc.driver != "" {
				cfg.Cgroup.Driver = tc.driver
			}
			serveCRI(t, cfg.Containerd.Address, tc.cri)
			wantCheck(t, checkOf(t, cfg), tc.name, tc.state, tc.found)
		})
	}
}

func TestVerifyGuest(t *testing.T) {
	dir := t.TempDir()
	digests := map[string]string{}
	for _, name := range []string{"kernel", "initramfs"} {
		sum := sha256.Sum256([]byte(name))
		digests[name] = hex.EncodeToString(sum[:])
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	manifest := fmt.Sprintf(`{"kernel":"kernel","initramfs":"initramfs","sha256":{"kernel":%q,"initramfs":%q}}`, digests["kernel"], digests["initramfs"])
	if err := os.WriteFile(filepath.Join(dir, "manifest.json"), []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := verifyGuest(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "initramfs"), []byte("cut o"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := verifyGuest(dir); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "initramfs")+" has the SHA-256") {
		t.Errorf("a damaged initramfs: %v", err)
	}
}

func TestCheckAcceleration(t *testing.T) {
	cfg := nodeOf(t)
	cfg.QEMU.Accel = "tcg"
	wantCheck(t, checkOf(t, cfg), "acceleration", CheckOK, "TCG, as configured")
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		cfg.QEMU.Accel = "kvm"
		wantCheck(t, checkOf(t, cfg), "acceleration", CheckFail, "/dev/kvm")
		cfg.QEMU.Accel = "auto"
		wantCheck(t, checkOf(t, cfg), "acceleration", CheckWarn, "/dev/kvm")
		return
	}
	if err := kvm.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.QEMU.Accel = "auto"
	if err := os.MkdirAll(cfg.Server.State, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		verdict accelVerdict
		state   CheckState
		found   string
	}{
		{accelVerdict{Accel: "tcg", Reason: "no guest boots", BootID: nodeBootID()}, CheckWarn, "TCG, which is slow: no guest boots"},
		{accelVerdict{Accel: "kvm", Reason: "a guest booted", BootID: nodeBootID()}, CheckOK, "KVM: a guest booted"},
		{accelVerdict{Accel: "tcg", Reason: "no guest boots", BootID: "of another boot"}, CheckOK, "proves it when it starts"},
	} {
		b, err := json.Marshal(tc.verdict)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(cfg.Server.State, "accel.json"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		wantCheck(t, checkOf(t, cfg), "acceleration", tc.state, tc.found)
	}
}

func TestAtLeast(t *testing.T) {
	for version, ok := range map[string]bool{
		"7.2.19": true, "v7.2": true, "10.0.0": true, "7.1.9": false, "6.9": false, "": false, "7": false, "x.y.z": false, "8.0.0-rc1": true,
	} {
		if got := atLeast(version, 7, 2); got != ok {
			t.Errorf("%q at least 7.2: %v, want %v", version, got, ok)
		}
	}
}
