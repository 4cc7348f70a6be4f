package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// describe writes a firmware description and, unless missing, its files behind symbolic links.
func describe(t *testing.T, dir, name, arch, machine, features string, missing bool) {
	t.Helper()
	code, vars := filepath.Join(dir, name+".code"), filepath.Join(dir, name+".vars")
	if !missing {
		for _, f := range []string{code, vars} {
			if err := os.WriteFile(f+".real", nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(f+".real", f); err != nil {
				t.Fatal(err)
			}
		}
	}
	text := fmt.Sprintf(`{"mapping": {"device": "flash", "executable": {"filename": %q, "format": "raw"}, "nvram-template": {"filename": %q, "format": "raw"}},
		"targets": [{"architecture": %q, "machines": [%q]}], "features": [%s]}`, code, vars, arch, machine, features)
	if err := os.WriteFile(filepath.Join(dir, name+".json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestFindFirmware(t *testing.T) {
	admin, vendor := t.TempDir(), t.TempDir()
	describe(t, vendor, "40-secure", ArchX86, "pc-q35-*", `"secure-boot", "enrolled-keys", "requires-smm"`, false)
	describe(t, vendor, "45-secure-empty", ArchX86, "pc-q35-*", `"secure-boot", "requires-smm"`, false)
	describe(t, vendor, "50-gone", ArchX86, "pc-q35-*", "", true)
	describe(t, vendor, "55-other", ArchX86, "pc-i440fx-*", "", false)
	describe(t, vendor, "60-plain", ArchX86, "pc-q35-*", "", false)
	describe(t, vendor, "70-later", ArchX86, "pc-q35-*", "", false)
	describe(t, vendor, "60-arm", ArchARM64, "virt-*", "", false)
	dirs := []string{filepath.Join(admin, "none"), admin, vendor}
	for name, tc := range map[string]struct {
		arch   string
		secure bool
		want   string
	}{
		"plain":  {ArchX86, false, "60-plain"},
		"secure": {ArchX86, true, "40-secure"},
		"arm":    {ArchARM64, false, "60-arm"},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := FindFirmware(dirs, tc.arch, tc.secure)
			want := filepath.Join(vendor, tc.want)
			if err != nil || f.Code != want+".code.real" || f.Vars != want+".vars.real" || f.SecureBoot != tc.secure || f.Format != "raw" {
				t.Errorf("%+v, %v; want %s", f, err, want)
			}
		})
	}
	if _, err := FindFirmware(dirs, ArchARM64, true); !errdefs.IsNotFound(err) {
		t.Errorf("Secure Boot for arm64: %v, want ErrNotFound", err)
	}
	// An administrator's empty file hides the vendor's of that name.
	if err := os.WriteFile(filepath.Join(admin, "60-plain.json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := FindFirmware(dirs, ArchX86, false); err != nil || f.Code != filepath.Join(vendor, "70-later.code.real") {
		t.Errorf("with a description hidden: %+v, %v", f, err)
	}
}
