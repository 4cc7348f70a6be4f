package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/qemu"
	vmruntime "github.com/vmruntime/vmruntime/runtime"
)

// guestManifest is what make guest says about its result.
type guestManifest struct {
	Arch          string `json:"arch"`
	Kernel        string `json:"kernel"`
	Initramfs     string `json:"initramfs"`
	Cmdline       string `json:"cmdline"`
	KernelRelease string `json:"kernelRelease"`
}

func (b *bench) manifest() (m guestManifest, err error) {
	data, err := os.ReadFile(filepath.Join(b.guest, "manifest.json"))
	if err != nil {
		return m, fmt.Errorf("the guest, which make guest builds: %w", err)
	}
	return m, json.Unmarshal(data, &m)
}

// describe says what the figures are taken on.
func (b *bench) describe(ctx context.Context) error {
	if _, err := os.Stat(b.vmruntime); err != nil {
		return fmt.Errorf("vmruntime, which make build builds: %w", err)
	}
	guest, err := b.manifest()
	if err != nil {
		return err
	}
	emulator, err := qemu.Version(ctx, vmruntime.Default().QEMU.Binary)
	if err != nil {
		return err
	}
	var host unix.Utsname
	if err := unix.Uname(&host); err != nil {
		return err
	}
	memory, err := fileValue("/proc/meminfo", "MemTotal:")
	if err != nil {
		return err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	release := string(bytes.TrimRight(host.Release[:], "\x00"))
	b.report.machine = []string{
		fmt.Sprintf("machine: %d cores (%s), %.1f GiB, Linux %s", runtime.NumCPU(), processor(), float64(memory)/(1<<30), release),
		fmt.Sprintf("guests:  QEMU %s, %s, Linux %s", emulator, b.accel, guest.KernelRelease),
		fmt.Sprintf("load before the run: %s", strings.Join(strings.Fields(string(load))[:3], " ")),
	}
	return nil
}

// processor is the name of the first processor.
func processor() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	for line := range strings.Lines(string(data)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH // arm64 has no name there
}

// fileValue reads a line "KEY N kB" of a file in /proc, in bytes.
func fileValue(file, key string) (int64, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			return kilobytes(rest)
		}
	}
	return 0, fmt.Errorf("%s has no line %s", file, key)
}

func kilobytes(text string) (int64, error) {
	n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(text), "kB")), 10, 64)
	return n << 10, err
}
