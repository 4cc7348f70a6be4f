package runtime

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/qemu"
)

// platform is what has to be the same where a checkpoint is restored.
type platform struct {
	Arch  string `json:"arch"`
	Accel string `json:"accel"`
	QEMU  string `json:"qemu"`
	// CPU is empty where QEMU's version tells all of the processor.
	CPU       string `json:"cpu,omitempty"`
	Kernel    string `json:"kernel"`
	Initramfs string `json:"initramfs"`
	Cmdline   string `json:"cmdline"`
}

// fits refuses what was saved on a node that differs from this one. A machine has a kernel of its own.
func (was *platform) fits(here platform, machine bool) error {
	var errs []error
	for _, f := range []struct{ what, was, is string }{
		{"architecture", was.Arch, here.Arch},
		{"acceleration", was.Accel, here.Accel},
		{"version of QEMU", was.QEMU, here.QEMU},
		{"processor", was.CPU, here.CPU},
		{"guest kernel's SHA-256", was.Kernel, here.Kernel},
		{"guest initramfs' SHA-256", was.Initramfs, here.Initramfs},
		{"guest kernel's command line", was.Cmdline, here.Cmdline},
	} {
		if f.was != f.is && !(machine && strings.HasPrefix(f.what, "guest")) {
			errs = append(errs, fmt.Errorf("the checkpoint's %s is %q, this node's is %q: %w", f.what, f.was, f.is, errdefs.ErrFailedPrecondition))
		}
	}
	return errors.Join(errs...)
}

// platform tells what this node restores, and saves under its present QEMU.
func (rt *Runtime) platform(accel string) (platform, error) {
	img := rt.guestImage
	out := platform{Arch: img.Arch, Accel: accel, Cmdline: img.Cmdline}
	var err error
	if out.Kernel, err = hashFile(filepath.Join(img.dir, img.Kernel)); err != nil {
		return out, err
	}
	if out.Initramfs, err = hashFile(filepath.Join(img.dir, img.Initramfs)); err != nil {
		return out, err
	}
	if accel == qemu.AccelKVM {
		out.CPU, err = hostCPU()
	}
	return out, err
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	_, err = io.Copy(sum, f)
	return hex.EncodeToString(sum.Sum(nil)), err
}

// hostCPU is what a guest sees of the node's processor under KVM: model and features of the first one.
func hostCPU() (string, error) {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	var out []string
	first, _, _ := strings.Cut(string(data), "\n\n")
	for line := range strings.Lines(first) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "model name", "flags", "Features", "CPU part":
			out = append(out, strings.TrimSpace(value))
		}
	}
	sum := sha256.Sum256([]byte(strings.Join(out, "\n")))
	return out[0] + " " + hex.EncodeToString(sum[:8]), nil
}

func runningQEMU(ctx context.Context, vm *qemu.VM) (string, error) {
	var v struct {
		QEMU struct{ Major, Minor, Micro int } `json:"qemu"`
	}
	if err := vm.Monitor().Execute(ctx, "query-version", nil, &v); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d.%d.%d", v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro), nil
}

var qemuVersion = regexp.MustCompile(`version (\d+\.\d+\.\d+)`)

// installedQEMU is the version that the next VM will have.
func (rt *Runtime) installedQEMU(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, rt.cfg.QEMU.Binary, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", rt.cfg.QEMU.Binary, err)
	}
	m := qemuVersion.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("%s --version tells no version: %q", rt.cfg.QEMU.Binary, out)
	}
	return string(m[1]), nil
}
