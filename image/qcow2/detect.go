package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
)

// signature is how another format's file begins.
type signature struct {
	format string
	offset int
	magic  string
	fix    string
}

// signatures are those of the formats that QEMU, or another program that
// probes, would take a file for, and of packed files that people put in the
// place of a disk.
func signatures() []signature {
	const convert = "convert it to qcow2"
	const unpack = "unpack it"
	return []signature{
		{"vmdk", 0, "KDMV", convert},
		{"vmdk", 0, "COWD", convert},
		{"vmdk descriptor", 0, "# Disk DescriptorFile", "convert the disk that it describes to qcow2"},
		{"vdi", 64, "\x7f\x10\xda\xbe", convert},
		{"vhdx", 0, "vhdxfile", convert},
		{"vhd", 0, "conectix", convert},
		{"luks", 0, "LUKS\xba\xbe", "decrypt it"},
		{"qed", 0, "QED\x00", convert},
		{"parallels", 0, "WithoutFreeSpace", convert},
		{"parallels", 0, "WithouFreSpacExt", convert},
		{"bochs", 0, "Bochs Virtual HD Image", convert},
		{"cow", 0, "OOOM", convert},
		{"cloop", 0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop", convert},
		{"gzip", 0, "\x1f\x8b\x08", unpack},
		{"xz", 0, "\xfd7zXZ\x00", unpack},
		{"zstd", 0, "\x28\xb5\x2f\xfd", unpack},
		{"bzip2", 0, "BZh", unpack},
		{"lz4", 0, "\x04\x22\x4d\x18", unpack},
		{"zip", 0, "PK\x03\x04", unpack},
		{"7z", 0, "7z\xbc\xaf\x27\x1c", unpack},
		{"tar", 257, "ustar", unpack},
	}
}

// Formats that DetectFormat returns.
const (
	FormatQcow2 = "qcow2"
	FormatRaw   = "raw"
)

// DetectFormat tells what the disk r, a file of fileSize bytes, is: FormatQcow2
// or FormatRaw. What begins like another format is refused, as it would be
// taken for that by whoever probes it, and so is a file whose name says
// something else than its bytes do. name is the file's name or path; of it
// only the last element is looked at. Errors are errdefs.ErrInvalidArgument,
// or those of r.
//
// It looks at the first bytes only: Check tells whether a qcow2 image may be used.
func DetectFormat(r io.ReaderAt, fileSize int64, name string) (string, error) {
	base := filepath.Base(name)
	if err := checkName(base); err != nil {
		return "", err
	}
	head := make([]byte, min(sectorSize, max(fileSize, 0)))
	if n, err := r.ReadAt(head, 0); n < len(head) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return "", fmt.Errorf("disk %q: read its beginning: %w", base, err)
	}
	extension := strings.ToLower(filepath.Ext(base))
	if bytes.HasPrefix(head, []byte(magic)) {
		if extension == ".raw" {
			return "", refuse(base, "is named .raw and begins like a qcow2 image, want a name and content that agree")
		}
		return FormatQcow2, nil
	}
	for _, s := range signatures() {
		if s.offset < len(head) && bytes.HasPrefix(head[s.offset:], []byte(s.magic)) {
			return "", refuse(base, "begins like a %s file (%q at offset %d), want a qcow2 or raw disk: %s", s.format, s.magic, s.offset, s.fix)
		}
	}
	switch extension {
	case ".qcow2", ".qcow":
		return "", refuse(base, "is named %s and begins with %q, want the qcow2 magic %q", extension, head[:min(4, len(head))], magic)
	case ".vmdk", ".vdi", ".vhd", ".vhdx", ".qed", ".ova":
		return "", refuse(base, "is named %s, want a qcow2 or raw disk: convert it", extension)
	}
	if fileSize == 0 || fileSize%sectorSize != 0 {
		return "", refuse(base, "has %d bytes, want a multiple of %d that is not 0 for a raw disk", fileSize, sectorSize)
	}
	return FormatRaw, nil
}

// checkName refuses names that QEMU's tools take for something else than a
// file: "json:{...}", "nbd:host:port".
func checkName(base string) error {
	if strings.Contains(base, ":") {
		return refuse(base, "has a colon in its name, want a plain name: QEMU takes what is before it for a protocol")
	}
	if i := strings.IndexFunc(base, func(c rune) bool { return !unicode.IsPrint(c) }); i >= 0 {
		return refuse(base, "has a character in its name that cannot be printed, at %d, want a plain name", i)
	}
	return nil
}

func refuse(name, format string, args ...any) error {
	return fmt.Errorf("disk %q %s: %w", name, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}
