package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
)

// FirmwareDirs is where distributions and administrators describe the firmware that is installed, as firmware.json in
// QEMU's documentation of interoperability says; a file in the first hides one of the same name in the second.
func FirmwareDirs() []string { return []string{"/etc/qemu/firmware", "/usr/share/qemu/firmware"} }

// firmwareDescriptor is what is needed of such a description.
type firmwareDescriptor struct {
	Mapping struct {
		Device     string        `json:"device"`
		Executable firmwareImage `json:"executable"`
		NVRAM      firmwareImage `json:"nvram-template"`
	} `json:"mapping"`
	Targets []struct {
		Architecture string   `json:"architecture"`
		Machines     []string `json:"machines"`
	} `json:"targets"`
	Features []string `json:"features"`
}

type firmwareImage struct {
	Filename string `json:"filename"`
	Format   string `json:"format"`
}

// FindFirmware finds EFI that is installed on the host, by its descriptions in dirs: the first by the files' names that fits. Vars of
// the result is the template of the variables, which the caller copies. With secureBoot it is firmware that checks
// signatures, with Microsoft's keys enrolled. errdefs.ErrNotFound says that there is none, and what to install.
func FindFirmware(dirs []string, arch string, secureBoot bool) (Firmware, error) {
	machine := map[string]string{ArchX86: TypeX86, ArchARM64: TypeARM64}[arch]
	files, err := descriptorFiles(dirs)
	if err != nil {
		return Firmware{}, err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		d, err := readDescriptor(files[name])
		if err != nil {
			return Firmware{}, err
		}
		if d.fits(arch, machine, secureBoot) && d.installed() {
			return d.firmware(secureBoot)
		}
	}
	kind := "EFI"
	if secureBoot {
		kind = "EFI with Secure Boot and enrolled keys"
	}
	return Firmware{}, fmt.Errorf("no %s for %s is described in %q; on Debian it is in the package ovmf or qemu-efi-aarch64: %w", kind, arch, dirs, errdefs.ErrNotFound)
}

// descriptorFiles are the paths of all descriptions by name.
func descriptorFiles(dirs []string) (map[string]string, error) {
	files := make(map[string]string)
	for _, dir := range slices.Backward(dirs) {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if filepath.Ext(e.Name()) == ".json" {
				files[e.Name()] = filepath.Join(dir, e.Name())
			}
		}
	}
	return files, nil
}

func readDescriptor(path string) (*firmwareDescriptor, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	d := new(firmwareDescriptor)
	if err := json.Unmarshal(data, d); err != nil && len(data) > 0 { // an empty file hides one of the same name
		return nil, fmt.Errorf("firmware description %s: %w", path, err)
	}
	return d, nil
}

func (d *firmwareDescriptor) fits(arch, machine string, secureBoot bool) bool {
	m := d.Mapping
	sameFormat := m.Executable.Format == m.NVRAM.Format && (m.Executable.Format == "raw" || m.Executable.Format == "qcow2")
	if m.Device != "flash" || !sameFormat || !filepath.IsAbs(m.Executable.Filename) || !filepath.IsAbs(m.NVRAM.Filename) {
		return false
	}
	has := func(feature string) bool { return slices.Contains(d.Features, feature) }
	if secureBoot != has("secure-boot") || secureBoot && !has("enrolled-keys") || has("amd-sev-es") {
		return false
	}
	for _, t := range d.Targets {
		for _, pattern := range t.Machines {
			if ok, err := filepath.Match(pattern, machine); t.Architecture == arch && err == nil && ok {
				return true
			}
		}
	}
	return false
}

// firmware names the files themselves: distributions describe them by symbolic links, which Start does not follow.
func (d *firmwareDescriptor) firmware(secureBoot bool) (Firmware, error) {
	f := Firmware{Format: d.Mapping.Executable.Format, SecureBoot: secureBoot}
	var err error
	if f.Code, err = filepath.EvalSymlinks(d.Mapping.Executable.Filename); err != nil {
		return f, err
	}
	f.Vars, err = filepath.EvalSymlinks(d.Mapping.NVRAM.Filename)
	return f, err
}

func (d *firmwareDescriptor) installed() bool {
	for _, f := range []string{d.Mapping.Executable.Filename, d.Mapping.NVRAM.Filename} {
		if info, err := os.Stat(f); err != nil || !info.Mode().IsRegular() {
			return false
		}
	}
	return true
}
