package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// manifest is what the daemon reads: the files, how to boot them, and what they were made of.
type manifest struct {
	Kernel        string            `json:"kernel"`
	Initramfs     string            `json:"initramfs"`
	Cmdline       string            `json:"cmdline"`
	Arch          string            `json:"arch"`
	KernelRelease string            `json:"kernelRelease"`
	Packages      []debPackage      `json:"packages"`
	SHA256        map[string]string `json:"sha256"`
}

// write puts the files into dir, each whole or not at all, the manifest last.
func (m *manifest) write(dir string, kernel, initramfs []byte) error {
	m.Kernel, m.Initramfs, m.SHA256 = "kernel", "initramfs", map[string]string{}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, data := range map[string][]byte{m.Kernel: kernel, m.Initramfs: initramfs} {
		sum := sha256.Sum256(data)
		m.SHA256[name] = hex.EncodeToString(sum[:])
		if err := renameio.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	return renameio.WriteFile(filepath.Join(dir, "manifest.json"), append(data, '\n'), 0o644)
}
