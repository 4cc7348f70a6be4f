package runtime

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/moby/sys/capability"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/delegate"
)

// checkTimeout bounds all checks together.
const checkTimeout = 30 * time.Second

// CheckState says what a check means for the node.
type CheckState string

// A node with a failed check cannot run VM pods, or not all. A warning is for what it does worse than it could.
const (
	CheckOK   CheckState = "ok"
	CheckWarn CheckState = "warn"
	CheckFail CheckState = "fail"
)

// CheckResult is what one check found on the node.
type CheckResult struct {
	Name  string
	State CheckState
	Found string
	// Fix says how to get what is missing; empty if State is CheckOK.
	Fix string
}

func passed(format string, a ...any) CheckResult {
	return CheckResult{State: CheckOK, Found: fmt.Sprintf(format, a...)}
}

func warned(fix, format string, a ...any) CheckResult {
	return CheckResult{State: CheckWarn, Found: fmt.Sprintf(format, a...), Fix: fix}
}

func failed(fix, format string, a ...any) CheckResult {
	return CheckResult{State: CheckFail, Found: fmt.Sprintf(format, a...), Fix: fix}
}

// Check tells what this node lacks to run VM pods with the configuration of that path, and how to get it. Nothing
// on the node is changed. A configuration that is not valid is the only result, since the others would be about another one.
func Check(ctx context.Context, path string) []CheckResult {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	cfg, err := Load(path)
	if err != nil {
		r := failed("correct the file; docs/configuration.md has every key", "%v", err)
		r.Name = "configuration"
		return []CheckResult{r}
	}
	n := &nodeCheck{cfg: cfg}
	if n.conn, err = delegate.Dial(cfg.Containerd.Address); err == nil {
		defer func() { _ = n.conn.Close() }()
	}
	var results []CheckResult
	for _, c := range []struct {
		name string
		run  func(context.Context) CheckResult
	}{
		{"configuration", func(context.Context) CheckResult { return passed("valid") }},
		{"permissions", n.permissions},
		{"tun", n.tun},
		{"containerd", n.containerd},
		{"image file system", n.fileSystem},
		{"QEMU", n.qemu},
		{"acceleration", n.acceleration},
		{"virtiofsd", n.virtiofsd},
		{"user namespaces", n.userNamespaces},
		{"mke2fs", n.mke2fs},
		{"EFI", n.efi},
		{"swtpm", n.swtpm},
		{"guest", n.guest},
		{"CNI", n.cni},
		{"cgroups", n.cgroups},
	} {
		r := c.run(ctx)
		r.Name = c.name
		results = append(results, r)
	}
	return results
}

// nodeCheck is what the checks share.
type nodeCheck struct {
	cfg  Config
	conn *grpc.ClientConn
}

func (n *nodeCheck) permissions(context.Context) CheckResult {
	const fix = "run vmruntime as root, outside of a user namespace, with these capabilities"
	if uid := os.Geteuid(); uid != 0 {
		return failed(fix, "user ID is %d", uid)
	}
	caps, err := capability.NewPid2(0)
	if err == nil {
		err = caps.Load()
	}
	if err != nil {
		return failed(fix, "own capabilities: %v", err)
	}
	var missing []string
	for _, c := range []capability.Cap{
		capability.CAP_SYS_ADMIN, capability.CAP_NET_ADMIN, capability.CAP_SETUID, capability.CAP_SETGID, capability.CAP_SETPCAP,
		capability.CAP_CHOWN, capability.CAP_DAC_OVERRIDE, capability.CAP_FOWNER, capability.CAP_KILL,
	} {
		if !caps.Get(capability.EFFECTIVE, c) {
			missing = append(missing, "CAP_"+strings.ToUpper(c.String()))
		}
	}
	if len(missing) > 0 {
		return failed(fix, "root lacks %s", strings.Join(missing, ", "))
	}
	return passed("root with all capabilities that are needed")
}

func (n *nodeCheck) tun(context.Context) CheckResult {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return failed("modprobe tun, and allow the device if vmruntime runs in a container", "%v", err)
	}
	_ = f.Close()
	return passed("/dev/net/tun opens")
}

func (n *nodeCheck) containerd(ctx context.Context) CheckResult {
	address := n.cfg.Containerd.Address
	v, err := runtimeapi.NewRuntimeServiceClient(n.conn).Version(ctx, &runtimeapi.VersionRequest{})
	switch {
	case status.Code(err) == codes.Unimplemented:
		return failed(`take "cri" out of disabled_plugins in containerd's configuration`, "containerd at %s serves no CRI", address)
	case err != nil:
		return failed("install and start containerd 1.7 or newer, or set containerd.address", "%s: %s", address, status.Convert(err).Message())
	case !atLeast(v.GetRuntimeVersion(), 1, 7):
		return failed("update it to 1.7 or newer", "%s %s at %s", v.GetRuntimeName(), v.GetRuntimeVersion(), address)
	}
	return passed("%s %s at %s", v.GetRuntimeName(), v.GetRuntimeVersion(), address)
}

// fileSystem holds that the kubelet sees our files fill a disk: it looks at the file systems of containerd's images and of its own root
// directory, which we do not know.
func (n *nodeCheck) fileSystem(ctx context.Context) CheckResult {
	const fix = "put server.root on the file system of containerd's images, or on that of the kubelet's root directory; the kubelet does not see that any other one fills up"
	info, err := runtimeapi.NewImageServiceClient(n.conn).ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(info.GetImageFilesystems()) == 0 {
		return warned("see containerd", "containerd does not tell where its images are: %s", status.Convert(err).Message())
	}
	theirs := info.GetImageFilesystems()[0].GetFsId().GetMountpoint()
	a, errA := device(theirs)
	b, errB := device(n.cfg.Server.Root)
	if err := errors.Join(errA, errB); err != nil {
		return warned(fix, "%v", err)
	}
	if a != b {
		return warned(fix, "%s is on another file system than containerd's images in %s", n.cfg.Server.Root, theirs)
	}
	return passed("%s and %s are on one file system", n.cfg.Server.Root, theirs)
}

// device is the file system of a path or, if that is not there yet, of the directory it will be made in.
func device(path string) (uint64, error) {
	for {
		var st syscall.Stat_t
		err := syscall.Stat(path, &st)
		if err == nil {
			return st.Dev, nil
		}
		if !errors.Is(err, fs.ErrNotExist) || path == filepath.Dir(path) {
			return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
		}
		path = filepath.Dir(path)
	}
}

func (n *nodeCheck) qemu(ctx context.Context) CheckResult {
	const fix = "install QEMU 7.2 or newer (Debian: apt install qemu-system-x86 or qemu-system-arm), or set qemu.binary"
	v, err := qemu.Version(ctx, n.cfg.QEMU.Binary)
	if err != nil {
		return failed(fix, "%v", err)
	}
	if !atLeast(v, 7, 2) {
		return failed(fix, "QEMU %s at %s", v, n.cfg.QEMU.Binary)
	}
	return passed("QEMU %s at %s", v, n.cfg.QEMU.Binary)
}

func (n *nodeCheck) acceleration(context.Context) CheckResult {
	const fix = "enable virtualization in the firmware (nested, if the node is itself a VM) and load kvm_intel or kvm_amd"
	kvm, kvmErr := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if kvmErr == nil {
		_ = kvm.Close()
	}
	switch {
	case n.cfg.QEMU.Accel == accelTCG:
		return passed("TCG, as configured")
	case n.cfg.QEMU.Accel == accelKVM && kvmErr != nil:
		return failed(fix+`, or set qemu.accel to "auto"`, "qemu.accel is kvm, but %v", kvmErr)
	case n.cfg.QEMU.Accel == accelKVM:
		return passed("KVM, as configured; that a guest boots with it is not proven")
	case kvmErr != nil:
		return warned(fix, "TCG, which is slow: %v", kvmErr)
	}
	v, err := RememberedAccel(filepath.Join(n.cfg.Server.State, "accel.json"))
	if err != nil || v.BootID != nodeBootID() {
		return passed("/dev/kvm opens; vmruntime serve proves it when it starts")
	}
	if v.Accel != accelKVM {
		return warned(fix, "TCG, which is slow: %s", v.Reason)
	}
	return passed("KVM: %s", v.Reason)
}

func (n *nodeCheck) virtiofsd(context.Context) CheckResult {
	path, err := n.cfg.QEMU.FindVirtiofsd()
	if err != nil {
		return failed("install virtiofsd (Debian 12: in qemu-system-common; later: apt install virtiofsd), or set qemu.virtiofsd", "%v", err)
	}
	return passed("%s", path)
}

// userNamespaces are what every virtiofsd needs one of.
func (n *nodeCheck) userNamespaces(context.Context) CheckResult {
	const file = "/proc/sys/user/max_user_namespaces"
	data, err := os.ReadFile(file)
	if err != nil {
		return failed("use a kernel with CONFIG_USER_NS; pods with volumes of files need it", "%v", err)
	}
	limit := strings.TrimSpace(string(data))
	if limit == "0" {
		return failed("set the sysctl user.max_user_namespaces above the number of VM pods; pods with volumes of files need it", "%s is 0", file)
	}
	return passed("%s of them", limit)
}

func (n *nodeCheck) efi(context.Context) CheckResult {
	const fix = "install ovmf (arm64: qemu-efi-aarch64); only machines that ask for EFI need it"
	arch := qemu.ArchX86
	if goruntime.GOARCH == "arm64" {
		arch = qemu.ArchARM64
	}
	found, err := qemu.FindFirmware(qemu.FirmwareDirs(), arch, false)
	if err != nil {
		return warned(fix, "%v", err)
	}
	if _, err := qemu.FindFirmware(qemu.FirmwareDirs(), arch, true); err != nil {
		return passed("%s, without Secure Boot", found.Code)
	}
	return passed("%s, and with Secure Boot", found.Code)
}

func (n *nodeCheck) swtpm(context.Context) CheckResult {
	path, err := exec.LookPath(n.cfg.QEMU.Swtpm)
	if err != nil {
		return warned("install swtpm, or set qemu.swtpm; only machines that ask for a TPM need it", "%v", err)
	}
	return passed("%s", path)
}

func (n *nodeCheck) mke2fs(context.Context) CheckResult {
	path, err := exec.LookPath("mke2fs")
	if err != nil {
		return failed("install e2fsprogs, and have its directory, often /usr/sbin, in PATH", "%v", err)
	}
	return passed("%s", path)
}

func (n *nodeCheck) guest(context.Context) CheckResult {
	const fix = "run make guest and install what it built, or set guest.dir"
	g, err := loadGuestImage(n.cfg.Guest.Dir)
	if err != nil {
		return failed(fix, "%v", err)
	}
	if err := verifyGuest(n.cfg.Guest.Dir); err != nil {
		return failed(fix, "%v", err)
	}
	return passed("Linux %s in %s, as its manifest says", g.KernelRelease, n.cfg.Guest.Dir)
}

// verifyGuest compares the files with the manifest's digests.
func verifyGuest(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err != nil {
		return err
	}
	var manifest struct {
		Kernel    string            `json:"kernel"`
		Initramfs string            `json:"initramfs"`
		SHA256    map[string]string `json:"sha256"`
	}
	if err := json.Unmarshal(b, &manifest); err != nil {
		return fmt.Errorf("manifest.json: %w", err)
	}
	var errs []error
	for _, name := range []string{manifest.Kernel, manifest.Initramfs} {
		got, err := sha256Of(filepath.Join(dir, name))
		switch want := manifest.SHA256[name]; {
		case err != nil:
			errs = append(errs, err)
		case got != want:
			errs = append(errs, fmt.Errorf("%s has the SHA-256 %s, but manifest.json says %q", filepath.Join(dir, name), got, want))
		}
	}
	return errors.Join(errs...)
}

func sha256Of(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func (n *nodeCheck) cni(ctx context.Context) CheckResult {
	const fix = "install the cluster's network plugin, or set network.conf_dir and network.bin_dirs as containerd has them"
	// Ready needs no directory of network namespaces; one that is there keeps the check from making any.
	m, err := network.New(network.Options{ConfDir: n.cfg.Network.ConfDir, BinDirs: n.cfg.Network.BinDirs, NetNSDir: os.TempDir()})
	if err == nil {
		err = m.Ready(ctx)
	}
	if err != nil {
		return failed(fix, "%v", err)
	}
	return passed("the configuration in %s and its plugins are there", n.cfg.Network.ConfDir)
}

func (n *nodeCheck) cgroups(ctx context.Context) CheckResult {
	version := "v1"
	switch cgroups.Mode() {
	case cgroups.Unified:
		version = "v2"
	case cgroups.Unavailable:
		return failed("mount cgroups at /sys/fs/cgroup", "no cgroups")
	}
	driver := n.cfg.Cgroup.Driver
	c, err := runtimeapi.NewRuntimeServiceClient(n.conn).RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
	if err == nil {
		theirs := strings.ToLower(c.GetLinux().GetCgroupDriver().String())
		if driver != "auto" && driver != theirs {
			return failed("let both be the same, and the kubelet's too", "cgroup.driver is %s, containerd's is %s", driver, theirs)
		}
		driver = theirs
	}
	_, noSystemd := os.Stat("/run/systemd/system")
	switch {
	case driver == "auto":
		return warned("set cgroup.driver to what containerd and kubelet use", "cgroup %s; containerd does not tell its driver", version)
	case driver == "systemd" && noSystemd != nil:
		return failed("use the driver cgroupfs in kubelet and containerd", "the driver is systemd, but systemd does not run here")
	}
	return passed("cgroup %s, driver %s", version, driver)
}

// atLeast compares a version like v2.4.2-rc1 by its first two numbers.
func atLeast(version string, major, minor int) bool {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 2 {
		return false
	}
	gotMajor, errMajor := strconv.Atoi(parts[0])
	gotMinor, errMinor := strconv.Atoi(parts[1])
	if errMajor != nil || errMinor != nil {
		return false
	}
	return gotMajor > major || gotMajor == major && gotMinor >= minor
}
