package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"

	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"
)

// buildAgent compiles vmagent, static and stripped of everything that differs from machine to machine.
func buildAgent(ctx context.Context, goarch, version string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "vmruntime-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "vmagent")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -buildid= -X main.version="+version, "-o", file, "github.com/vmruntime/vmruntime/cmd/vmagent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+goarch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build vmagent: %w: %s", err, out)
	}
	return os.ReadFile(file)
}

// packInitramfs writes a newc archive whose bytes follow from its content: records sorted, numbered, of
// root, and of no time.
func packInitramfs(init []byte, programs map[string][]byte, mods *modules) ([]byte, error) {
	list, err := mods.list()
	if err != nil {
		return nil, err
	}
	index, err := mods.auto.list()
	if err != nil {
		return nil, err
	}
	packed, err := packModules(mods.packed)
	if err != nil {
		return nil, err
	}
	records := map[string]cpio.Record{
		// Without these two PID 1 starts with no standard streams.
		"dev/console":               cpio.CharDev("dev/console", 0o600, 5, 1),
		"dev/null":                  cpio.CharDev("dev/null", 0o666, 1, 3),
		"init":                      cpio.StaticFile("init", string(init), 0o755),
		"etc/vmagent/modules.json":  cpio.StaticFile("etc/vmagent/modules.json", string(list), 0o644),
		"etc/vmagent/autoload.json": cpio.StaticFile("etc/vmagent/autoload.json", string(index), 0o644),
		"lib/modules/autoload.zip":  cpio.StaticFile("lib/modules/autoload.zip", string(packed), 0o644),
	}
	for name, data := range programs {
		records[name] = cpio.StaticFile(name, string(data), 0o755)
	}
	for name, data := range mods.files {
		p := path.Join("lib/modules", name)
		records[p] = cpio.StaticFile(p, string(data), 0o644)
	}
	addDirectories(records)
	return writeArchive(records)
}

// addDirectories gives every record its parents.
func addDirectories(records map[string]cpio.Record) {
	for name := range records {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			records[dir] = cpio.Directory(dir, 0o755)
		}
	}
}

func writeArchive(records map[string]cpio.Record) ([]byte, error) {
	names := make([]string, 0, len(records))
	for name := range records {
		names = append(names, name)
	}
	slices.Sort(names)
	var buf bytes.Buffer
	w := cpio.Newc.Writer(&buf)
	for i, name := range names {
		r := records[name]
		r.Ino, r.NLink = uint64(i+1), 1
		if err := w.WriteRecord(r); err != nil {
			return nil, fmt.Errorf("initramfs: %s: %w", name, err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	return compressLZ4(buf.Bytes())
}

// compressLZ4 uses the frame format that the kernel reads, which costs it the least time to undo.
func compressLZ4(data []byte) ([]byte, error) {
	var buf bytes.Buffer
	w := lz4.NewWriter(&buf)
	if err := w.Apply(lz4.LegacyOption(true), lz4.CompressionLevelOption(lz4.Level9)); err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}
