package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// The magic number in the header of an arm64 kernel image (Documentation/arch/arm64/booting.rst).
const (
	arm64Magic       = "ARM\x64"
	arm64MagicOffset = 56
)

// kernelOf gives the kernel to boot and its release.
func kernelOf(tree fileTree, pack func([]byte) ([]byte, error)) ([]byte, string, error) {
	for name, f := range tree {
		release, ok := strings.CutPrefix(name, "boot/vmlinuz-")
		if !ok {
			continue
		}
		kernel, err := pack(f.data)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", name, err)
		}
		return kernel, release, nil
	}
	return nil, "", fmt.Errorf("boot/vmlinuz-*: %w", errNoFile)
}

// asIs is for an image that is small and boots as it is: x86's bzImage.
func asIs(image []byte) ([]byte, error) { return image, nil }

// gzipped is for arm64's plain image, which QEMU takes in this form too.
func gzipped(image []byte) ([]byte, error) {
	if !bytes.HasPrefix(image[min(len(image), arm64MagicOffset):], []byte(arm64Magic)) {
		return image, nil
	}
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(image); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// uncompressModule undoes the compression that newer Debian releases apply to modules.
func uncompressModule(file string, data []byte) ([]byte, error) {
	var r io.Reader
	var err error
	switch path.Ext(file) {
	case ".ko":
		return data, nil
	case ".xz":
		r, err = xz.NewReader(bytes.NewReader(data))
	case ".zst":
		r, err = zstd.NewReader(bytes.NewReader(data))
	case ".gz":
		r, err = gzip.NewReader(bytes.NewReader(data))
	default:
		return nil, fmt.Errorf("suffix of %q: .ko, .ko.xz, .ko.zst or .ko.gz would be right", file)
	}
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

// cmdline is the same under KVM and TCG, and leaves every mitigation of processor bugs at the kernel's
// default. docs/adr/0003-guest-boot.md has the figures.
func cmdline(t target) string {
	args := []string{
		// A panic is printed, since it is graver than quiet hides, and then resets the machine at once.
		"console=" + t.console, "quiet", "panic=-1",
		// Self tests of ciphers, which the kernel's builders have run.
		"cryptomgr.notests", "initcall_blacklist=crypto_kdf108_init",
		// No 64 MiB for devices that cannot reach all memory, which a kernel takes that can come to have more than 4 GiB: there are none.
		"swiotlb=noforce",
	}
	return strings.Join(append(args, t.args...), " ")
}
