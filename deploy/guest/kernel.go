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

// kernelOf gives the kernel to boot and its release.
func kernelOf(tree fileTree, extract func([]byte) ([]byte, error)) ([]byte, string, error) {
	for name, f := range tree {
		release, ok := strings.CutPrefix(name, "boot/vmlinuz-")
		if !ok {
			continue
		}
		kernel, err := extract(f.data)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", name, err)
		}
		return kernel, release, nil
	}
	return nil, "", fmt.Errorf("boot/vmlinuz-*: %w", errNoFile)
}

func bzImageKernel(image []byte) ([]byte, error) { return image, nil }
func plainKernel(image []byte) ([]byte, error)   { return image, nil }

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

func cmdline(console string) string {
	return "console=" + console + " quiet panic=-1"
}
