package runtime

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const testContainerID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestResolveMountsChoosesTheWay(t *testing.T) {
	dir := t.TempDir()
	configMap := filepath.Join(dir, "volumes/kubernetes.io~configmap/cfg")
	big := filepath.Join(dir, "volumes/kubernetes.io~secret/big")
	for _, d := range []string{configMap, big, filepath.Join(dir, "plain")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(path string, size int) string {
		if err := os.WriteFile(path, make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write(filepath.Join(configMap, "key"), 10)
	write(filepath.Join(big, "key"), maxPushedBytes+1)
	hosts, log, file := write(filepath.Join(dir, "hosts"), 20), write(filepath.Join(dir, "log"), 0), write(filepath.Join(dir, "file"), 5)

	cfg := &runtimeapi.ContainerConfig{
		Annotations: map[string]string{terminationPathAnnotation: "/dev/termination-log"},
		Mounts: []*runtimeapi.Mount{
			{ContainerPath: "/cfg", HostPath: configMap, Readonly: true},
			{ContainerPath: "/big", HostPath: big},
			{ContainerPath: "/plain", HostPath: filepath.Join(dir, "plain")},
			{ContainerPath: "/made", HostPath: filepath.Join(dir, "made")},
			{ContainerPath: "/etc/hosts", HostPath: hosts},
			{ContainerPath: "/dev/termination-log", HostPath: log},
			{ContainerPath: "/file", HostPath: file},
			{ContainerPath: "/img", Image: &runtimeapi.ImageSpec{Image: "x"}, ImageSubPath: "sub"},
		},
	}
	got, err := resolveMounts(testContainerID, cfg)
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		via, guest string
		writeBack  bool
	}{
		{viaFiles, "/run/vm/files/0123456789abcdef-0", false},
		{viaShare, "/run/vm/shares/0123456789abcdef-1", false},
		{viaShare, "/run/vm/shares/0123456789abcdef-2", false},
		{viaShare, "/run/vm/shares/0123456789abcdef-3", false},
		{viaFile, "/run/vm/files/0123456789abcdef-4/file", false},
		{viaFile, "/run/vm/files/0123456789abcdef-5/file", true},
		{viaShare, "/run/vm/shares/0123456789abcdef-6", false},
		{viaImage, "/run/vm/images/0123456789abcdef-7/sub", false},
	}
	for i, w := range want {
		if g := got[i]; g.Via != w.via || g.GuestPath != w.guest || g.WriteBack != w.writeBack {
			t.Errorf("mount %d = %+v, want %+v", i, g, w)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "made")); err != nil || !info.IsDir() {
		t.Errorf("a missing host directory was not made: %v", err)
	}
}

func TestResolveMountsRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for want, m := range map[string]*runtimeapi.Mount{
		"is a FIFO":        {ContainerPath: "/x", HostPath: fifo},
		"is a socket":      {ContainerPath: "/x", HostPath: socket},
		"is a device":      {ContainerPath: "/x", HostPath: "/dev/null"},
		"not absolute":     {ContainerPath: "/x", HostPath: "relative"},
		"host_path is":     {ContainerPath: "/x"},
		"Bidirectional":    {ContainerPath: "/x", HostPath: dir, Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
		"leaves the image": {ContainerPath: "/x", Image: &runtimeapi.ImageSpec{Image: "x"}, ImageSubPath: "../y"},
	} {
		_, err := resolveMounts(testContainerID, &runtimeapi.ContainerConfig{Mounts: []*runtimeapi.Mount{m}})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "mounts[0]") {
			t.Errorf("%v: error = %v, want InvalidArgument naming mounts[0] and %q", m, err, want)
		}
	}
}

func TestVMSize(t *testing.T) {
	const mib = 1 << 20
	cfg := VMConfig{DefaultMemory: 256 * mib, GuestOverhead: 64 * mib, MinMemory: 128 * mib, MaxMemory: 1024 * mib, DefaultVCPUs: 1, MaxVCPUs: 4}
	for _, c := range []struct {
		res    *runtimeapi.LinuxContainerResources
		vcpus  int
		memory int64
	}{
		{nil, 1, 320 * mib},
		{&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 100*mib + 1}, 1, 165 * mib},
		{&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1}, 1, 128 * mib},
		{&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 40}, 1, 1024 * mib},
		{&runtimeapi.LinuxContainerResources{CpuQuota: 150000, CpuPeriod: 100000}, 2, 320 * mib},
		{&runtimeapi.LinuxContainerResources{CpuQuota: 900000, CpuPeriod: 100000}, 4, 320 * mib},
		{&runtimeapi.LinuxContainerResources{CpuQuota: -1, CpuPeriod: 100000}, 1, 320 * mib},
	} {
		vcpus, memory := cfg.size(&runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{Resources: c.res}})
		if vcpus != c.vcpus || memory != c.memory {
			t.Errorf("size(%v) = %d, %d; want %d, %d", c.res, vcpus, memory, c.vcpus, c.memory)
		}
	}
}

func TestVMSizeCountsOnNoMoreThanThePodsOverhead(t *testing.T) {
	const mib = 1 << 20
	cfg := VMConfig{DefaultMemory: 256 * mib, GuestOverhead: 64 * mib, MinMemory: 128 * mib, MaxMemory: 1024 * mib, DefaultVCPUs: 1, MaxVCPUs: 4}
	for overhead, want := range map[int64]int64{0: 264 * mib, 32 * mib: 232 * mib, 240 * mib: 264 * mib} {
		_, memory := cfg.size(&runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
			Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 200 * mib},
			Overhead:  &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: overhead},
		}})
		if memory != want {
			t.Errorf("overhead %d: memory %d, want %d", overhead, memory, want)
		}
	}
}
