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

// agentFile is the agent as a program, for machines that run an operating system of their own.
const agentFile = "agent/vmagent"

// write puts the files into dir, each whole or not at all, the manifest last.
func (m *manifest) write(dir string, files map[string][]byte) error {
	m.SHA256 = map[string]string{}
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(agentFile)), 0o755); err != nil {
		return err
	}
	for name, data := range files {
		sum := sha256.Sum256(data)
		m.SHA256[name] = hex.EncodeToString(sum[:])
		mode := os.FileMode(0o644)
		if name == agentFile {
			mode = 0o755
		}
		if err := renameio.WriteFile(filepath.Join(dir, name), data, mode); err != nil {
			return err
		}
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	return renameio.WriteFile(filepath.Join(dir, "manifest.json"), append(data, '\n'), 0o644)
}
