package main

import (
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"

	"github.com/vmruntime/vmruntime/agent"
)

func TestTargetOf(t *testing.T) {
	for goarch, want := range map[string]string{"amd64": "x86_64", "arm64": "aarch64"} {
		got, err := targetOf(goarch)
		if err != nil || got.arch != want {
			t.Errorf("targetOf(%q) = %q, %v; want %q", goarch, got.arch, err, want)
		}
	}
	if _, err := targetOf("riscv64"); err == nil || !strings.Contains(err.Error(), `"riscv64": amd64 or arm64`) {
		t.Errorf("targetOf(riscv64): %v", err)
	}
}

func TestCmdline(t *testing.T) {
	for goarch, want := range map[string]string{
		"amd64": "console=ttyS0 quiet panic=-1 cryptomgr.notests initcall_blacklist=crypto_kdf108_init swiotlb=noforce no_timer_check",
		"arm64": "console=ttyAMA0 quiet panic=-1 cryptomgr.notests initcall_blacklist=crypto_kdf108_init swiotlb=noforce",
	} {
		tg, err := targetOf(goarch)
		if err != nil {
			t.Fatal(err)
		}
		if got := cmdline(tg); got != want {
			t.Errorf("%s: %q, want %q", goarch, got, want)
		}
	}
}

func TestKernelDependency(t *testing.T) {
	got, err := kernelDependency("Package: m\nVersion: 6.1\nDepends: kmod, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n")
	if err != nil || got != "linux-image-6.1.0-56-cloud-amd64" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := kernelDependency("Package: m\nDepends: kmod\n"); err == nil || !strings.Contains(err.Error(), "kmod") {
		t.Errorf("without a kernel: %v", err)
	}
}

func TestParseInst(t *testing.T) {
	tests := []struct {
		line string
		want [3]string
		ok   bool
	}{
		{"Inst crun (1.8.1-1+deb12u1 Debian:12.15/oldstable [amd64])\n", [3]string{"crun", "1.8.1-1+deb12u1", "amd64"}, true},
		{"Inst libgcc-s1 (12.2.0-14 Debian:12.15/oldstable [amd64]) []\n", [3]string{"libgcc-s1", "12.2.0-14", "amd64"}, true},
		{"Inst libcap2:arm64 (1:2.66-4 Debian:12, Debian-Security:12 [arm64])\n", [3]string{"libcap2", "1:2.66-4", "arm64"}, true},
		{"Conf crun (1.8.1-1 Debian:12 [amd64])\n", [3]string{}, false},
		{"Reading package lists...\n", [3]string{}, false},
	}
	for _, tt := range tests {
		name, version, arch, ok := parseInst(tt.line)
		if ok != tt.ok || ok && [3]string{name, version, arch} != tt.want {
			t.Errorf("parseInst(%q) = %q, %q, %q, %t", tt.line, name, version, arch, ok)
		}
	}
}

func TestResolve(t *testing.T) {
	tree := fileTree{
		"lib64/ld.so":      {link: "/lib/x/ld.so"},
		"lib/x/ld.so":      {link: "ld-2.36.so"},
		"lib/x/ld-2.36.so": {data: []byte("loader")},
		"loop":             {link: "loop"},
		"dangling":         {link: "nowhere"},
	}
	name, f, err := tree.resolve("lib64/ld.so")
	if err != nil || name != "lib/x/ld-2.36.so" || string(f.data) != "loader" {
		t.Errorf("got %q, %q, %v", name, f.data, err)
	}
	if _, _, err := tree.resolve("dangling"); !errors.Is(err, errNoFile) {
		t.Errorf("dangling: %v", err)
	}
	if _, _, err := tree.resolve("loop"); err == nil {
		t.Error("loop: no error")
	}
}

// moduleFile makes the smallest ELF file that has a .modinfo.
func moduleFile(t *testing.T, modinfo string) []byte {
	t.Helper()
	const names = "\x00.modinfo\x00.shstrtab\x00"
	headerSize, body := 64, modinfo+names
	h := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64,
		Shoff: uint64(headerSize + len(body)), Shentsize: 64, Shnum: 3, Shstrndx: 2,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	sections := []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: uint64(headerSize), Size: uint64(len(modinfo))},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(headerSize + len(modinfo)), Size: uint64(len(names))},
	}
	var buf bytes.Buffer
	for _, part := range []any{h, []byte(body), sections} {
		if err := binary.Write(&buf, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	return buf.Bytes()
}

func moduleTree(t *testing.T) fileTree {
	module := func(depends string) treeFile {
		return treeFile{data: moduleFile(t, "license=GPL\x00depends="+depends+"\x00name=x\x00")}
	}
	return fileTree{
		"lib/modules/6/modules.builtin":                  {data: []byte("kernel/fs/ext4/ext4.ko\nkernel/lib/crc-t10dif.ko\n")},
		"lib/modules/6/kernel/drivers/virtio/virtio.ko":  module("virtio_ring"),
		"lib/modules/6/kernel/drivers/virtio_ring.ko":    module(""),
		"lib/modules/6/kernel/drivers/virtio-rng.ko":     module("virtio,virtio_ring"),
		"lib/modules/6/kernel/drivers/sd_mod.ko":         module("crc_t10dif,scsi_mod"),
		"lib/modules/6/kernel/drivers/scsi_mod.ko":       module(""),
		"lib/modules/6/kernel/fs/fuse/fuse.ko":           module(""),
		"lib/modules/6/kernel/fs/fuse/virtiofs.ko":       module("fuse,virtio"),
		"lib/modules/6/kernel/net/bridge.ko":             module("llc\x00alias=rtnl-link-bridge"),
		"lib/modules/6/kernel/net/llc.ko":                module("scsi_mod"),
		"lib/modules/6/kernel/drivers/tun.ko":            module("\x00alias=devname:net/tun\x00alias=char-major-10-200"),
		"lib/modules/6/kernel/net/xt/xt_LOG.ko":          module("\x00softdep=pre: nf-log crc32c post: llc\x00alias=ipt_LOG\x00alias=ip6t_LOG"),
		"lib/modules/6/kernel/net/xt/xt_log2.ko":         module("\x00alias=ipt_LOG"),
		"lib/modules/6/kernel/net/nf-log.ko":             module(""),
		"lib/modules/6/kernel/drivers/broken.ko":         {data: []byte("text")},
		"lib/modules/6/kernel/drivers/needs_a_ghost.ko":  module("ghost"),
		"lib/modules/6/kernel/drivers/odd.ko.lzma":       module(""),
		"lib/modules/6/modules.order":                    {},
		"lib/modules/6/kernel/drivers/nobody_asks_me.ko": module(""),
	}
}

func TestResolveModules(t *testing.T) {
	m, err := resolveModules(moduleTree(t), "lib/modules/6", moduleSet{
		Boot: []string{"virtio", "sd_mod", "ext4", "virtio_rng"},
		Lazy: map[string][]string{"virtiofs": {"virtiofs"}, "none": {"ext4"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"virtio_ring.ko", "virtio.ko", "scsi_mod.ko", "sd_mod.ko", "virtio_rng.ko"}, m.Boot); d != "" {
		t.Errorf("boot (-want +got):\n%s", d)
	}
	if d := cmp.Diff(map[string][]string{"virtiofs": {"fuse.ko", "virtiofs.ko"}, "none": {}}, m.Lazy); d != "" {
		t.Errorf("lazy (-want +got):\n%s", d)
	}
	if len(m.files) != 7 {
		t.Errorf("%d files, want the 7 that load", len(m.files))
	}
}

func TestAutoload(t *testing.T) {
	m, err := resolveModules(moduleTree(t), "lib/modules/6", moduleSet{
		Boot: []string{"scsi_mod"},
		Lazy: map[string][]string{"virtiofs": {"virtiofs"}},
		Auto: []string{"bridge", "tun", "net/xt/*", "fuse", "ext4"},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := autoload{
		Modules: map[string][]string{
			"bridge": {"llc.ko", "bridge.ko"}, "llc": {"llc.ko"}, "tun": {"tun.ko"}, "fuse": {"fuse.ko"},
			"xt_LOG": {"nf_log.ko", "xt_LOG.ko"}, "xt_log2": {"xt_log2.ko"}, "nf_log": {"nf_log.ko"},
		},
		Aliases: map[string][]string{
			"rtnl_link_bridge": {"bridge"}, "char_major_10_200": {"tun"}, "ipt_LOG": {"xt_LOG", "xt_log2"}, "ip6t_LOG": {"xt_LOG"},
		},
	}
	if d := cmp.Diff(want, m.auto); d != "" {
		t.Errorf("index (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]deviceNode{{Path: "net/tun", Major: 10, Minor: 200}}, m.Nodes); d != "" {
		t.Errorf("nodes (-want +got):\n%s", d)
	}
	// fuse is loose already.
	if d := cmp.Diff([]string{"bridge.ko", "llc.ko", "nf_log.ko", "tun.ko", "xt_LOG.ko", "xt_log2.ko"}, slices.Sorted(maps.Keys(m.packed))); d != "" {
		t.Errorf("packed (-want +got):\n%s", d)
	}
	_, err = resolveModules(moduleTree(t), "lib/modules/6", moduleSet{Auto: []string{"net/none/*"}})
	if err == nil || !strings.Contains(err.Error(), "net/none/*") {
		t.Errorf("a directory without modules: %v", err)
	}
}

func TestPackModules(t *testing.T) {
	content := map[string][]byte{"b.ko": bytes.Repeat([]byte("b"), 5000), "a.ko": []byte("a")}
	data, err := packModules(content)
	if err != nil {
		t.Fatal(err)
	}
	r, err := zip.NewReader(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	if len(data) > 1000 || len(r.File) != 2 || r.File[0].Name != "a.ko" {
		t.Errorf("%d bytes, %d files", len(data), len(r.File))
	}
	for name, want := range content {
		if got, err := fs.ReadFile(r, name); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestResolveModulesErrors(t *testing.T) {
	for name, want := range map[string]string{
		"absent": "module absent is neither", "needs_a_ghost": "module ghost is neither",
		"broken": "module broken", "odd": `"odd.ko.lzma"`,
	} {
		_, err := resolveModules(moduleTree(t), "lib/modules/6", moduleSet{Boot: []string{name}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	if _, err := resolveModules(fileTree{}, "lib/modules/6", moduleSet{}); !errors.Is(err, errNoFile) {
		t.Errorf("no tree: %v", err)
	}
}

func TestInitramfs(t *testing.T) {
	pack := func() []byte {
		data, err := packInitramfs([]byte("agent"),
			map[string][]byte{"usr/bin/crun": []byte("crun"), "lib64/ld.so": []byte("ld")},
			&modules{files: map[string][]byte{"a.ko": []byte("a")}, packed: map[string][]byte{"b.ko": []byte("b")}, Boot: []string{"a.ko"}, Lazy: map[string][]string{}})
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	data := pack()
	if !bytes.Equal(data, pack()) {
		t.Error("the same content gave other bytes")
	}
	plain, err := io.ReadAll(lz4.NewReader(bytes.NewReader(data)))
	if err != nil {
		t.Fatal(err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(plain)))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for i, r := range records {
		if r.MTime != 0 || r.UID != 0 || r.GID != 0 || r.Ino != uint64(i+1) {
			t.Errorf("%s carries %+v", r.Name, r.Info)
		}
		names = append(names, r.Name)
	}
	want := []string{
		"dev", "dev/console", "dev/null", "etc", "etc/vmagent", "etc/vmagent/autoload.json", "etc/vmagent/modules.json", "init",
		"lib", "lib/modules", "lib/modules/a.ko", "lib/modules/autoload.zip", "lib64", "lib64/ld.so", "usr", "usr/bin", "usr/bin/crun",
	}
	if d := cmp.Diff(want, names); d != "" {
		t.Errorf("records (-want +got):\n%s", d)
	}
}

func TestGzipped(t *testing.T) {
	image := append(make([]byte, arm64MagicOffset), arm64Magic+"rest"...)
	packed, err := gzipped(image)
	if err != nil {
		t.Fatal(err)
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, image) {
		t.Errorf("unpacked %d bytes, %v", len(got), err)
	}
	for _, other := range [][]byte{nil, []byte("MZ, compressed already"), bytes.Repeat([]byte("x"), 100)} {
		if got, err := gzipped(other); err != nil || !bytes.Equal(got, other) {
			t.Errorf("%q: %q, %v", other, got, err)
		}
	}
}

// TestBuild builds the real thing twice and boots it to the agent's handshake.
func TestBuild(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Debian's package archive and boots QEMU: run by make test")
	}
	for _, tool := range []string{"apt-get", "dpkg-deb", "qemu-system-x86_64"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	dir := t.TempDir()
	outs := []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}
	for _, out := range outs {
		b := builder{log: slog.New(slog.DiscardHandler), out: out, cache: filepath.Join(dir, "cache"), version: "test"}
		if err := b.run(t.Context(), "amd64"); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"kernel", "initramfs", "manifest.json"} {
		a, b := mustRead(t, filepath.Join(outs[0], name)), mustRead(t, filepath.Join(outs[1], name))
		if !bytes.Equal(a, b) {
			t.Errorf("%s differs from build to build", name)
		}
	}
	m := checkManifest(t, outs[0])
	boot(t, outs[0], m.Cmdline)
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func checkManifest(t *testing.T, dir string) manifest {
	t.Helper()
	var m manifest
	if err := json.Unmarshal(mustRead(t, filepath.Join(dir, "manifest.json")), &m); err != nil {
		t.Fatal(err)
	}
	size := 0
	for _, name := range []string{m.Kernel, m.Initramfs} {
		data := mustRead(t, filepath.Join(dir, name))
		size += len(data)
		if sum := sha256.Sum256(data); m.SHA256[name] != hex.EncodeToString(sum[:]) {
			t.Errorf("manifest has %q for %s", m.SHA256[name], name)
		}
	}
	if size > sizeLimit {
		t.Errorf("%d bytes", size)
	}
	used := map[string]bool{}
	for _, p := range m.Packages {
		used[p.Name] = p.Version != ""
	}
	if !used["crun"] || !used["libc6"] || !used["linux-image-"+m.KernelRelease] || used["gcc-12-base"] {
		t.Errorf("packages %v of release %q", m.Packages, m.KernelRelease)
	}
	return m
}

func boot(t *testing.T, dir, cmdline string) {
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	socket, console := filepath.Join(t.TempDir(), "agent"), filepath.Join(t.TempDir(), "console")
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256M",
		"-kernel", filepath.Join(dir, "kernel"), "-initrd", filepath.Join(dir, "initramfs"), "-append", cmdline,
		"-serial", "file:"+console, "-device", "virtio-scsi-pci", "-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,path="+socket+",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name="+agent.PortName)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	for ctx.Err() == nil {
		if client, err := agent.Dial(ctx, socket); err == nil {
			_ = client.Close()
			return
		}
		time.Sleep(10 * time.Millisecond) // until QEMU listens
	}
	t.Fatalf("no agent: %v; console:\n%s", ctx.Err(), mustRead(t, console))
}
