package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Bits of the header's three fields of features.
const (
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	incompatKnown       = 1<<5 - 1
	autoclearBitmaps    = 1 << 0
	autoclearRawData    = 1 << 1
)

// Types of header extensions.
const (
	extensionEnd           = 0
	extensionBackingFormat = 0xe2792aca
	extensionFeatureNames  = 0x6803f857
	extensionBitmaps       = 0x23852875
	extensionEncryption    = 0x0537be77
	extensionDataFile      = 0x44415441
)

const (
	headerSizeV2 = 72
	headerSizeV3 = 104 // the least of version 3
	maxName      = 1023
)

// header is what the first cluster says, after it was checked by itself:
// offsets have not been compared with the file yet.
type header struct {
	version      int
	clusterBits  uint
	clusterSize  int64
	virtualSize  int64
	l1Entries    int64
	l1Offset     uint64
	refOffset    uint64
	refBytes     int64
	refOrder     uint
	snapshots    int
	snapOffset   uint64
	zstd         bool
	extended     bool
	bitmapsValid bool
	bitmaps      *bitmapsExtension
	length       int64
}

type bitmapsExtension struct {
	count  int
	size   int64
	offset uint64
}

// file is an image whose header was read.
type file struct {
	header
	r    io.ReaderAt
	size int64
}

// read fills p from off of the file; what says what is read.
func (f *file) read(what string, p []byte, off int64) error {
	n, err := f.r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("qcow2 image: read %s at offset %d: %w", what, off, err)
}

// open reads the header and checks what can be checked without the tables.
func open(r io.ReaderAt, size int64, l Limits) (*file, error) {
	f := &file{r: r, size: size}
	if size < headerSizeV2 {
		return nil, invalid("file has %d bytes, want at least the header's %d", size, headerSizeV2)
	}
	raw := make([]byte, min(size, headerSizeV3+8))
	if err := f.read("header", raw, 0); err != nil {
		return nil, err
	}
	if string(raw[:4]) != magic {
		return nil, invalid("magic is %q, want %q", raw[:4], magic)
	}
	version := binary.BigEndian.Uint32(raw[4:])
	if version != 2 && version != 3 {
		return nil, invalid("version is %d, want 2 or 3", version)
	}
	f.version = int(version)
	bits := binary.BigEndian.Uint32(raw[20:])
	if bits < minClusterBits || bits > maxClusterBits {
		return nil, invalid("cluster_bits is %d, want %d to %d", bits, minClusterBits, maxClusterBits)
	}
	f.clusterBits, f.clusterSize = uint(bits), 1<<bits
	if err := f.parseFeatures(raw); err != nil {
		return nil, err
	}
	if err := f.refuseOthers(raw); err != nil {
		return nil, err
	}
	if err := f.parseSizes(raw, l); err != nil {
		return nil, err
	}
	return f, f.parseExtensions()
}

// parseFeatures reads the part of the header that version 2 does not have.
func (f *file) parseFeatures(raw []byte) error {
	f.refOrder, f.length = 4, headerSizeV2
	if f.version == 2 {
		return nil
	}
	if len(raw) < headerSizeV3 {
		return invalid("file has %d bytes, want at least the %d of a header of version 3", f.size, headerSizeV3)
	}
	if err := checkIncompatible(binary.BigEndian.Uint64(raw[72:])); err != nil {
		return err
	}
	autoclear := binary.BigEndian.Uint64(raw[88:])
	if autoclear&autoclearRawData != 0 {
		return invalid("autoclear_features 0x%x has bit 1 (raw external data file), want an image that holds its data itself", autoclear)
	}
	f.bitmapsValid = autoclear&autoclearBitmaps != 0
	order := binary.BigEndian.Uint32(raw[96:])
	if order > 6 {
		return invalid("refcount_order is %d, want 0 to 6", order)
	}
	f.refOrder = uint(order)
	f.length = int64(binary.BigEndian.Uint32(raw[100:]))
	if f.length < headerSizeV3 || f.length%8 != 0 || f.length > f.clusterSize || f.length > f.size {
		return invalid("header_length is %d, want a multiple of 8 from %d to the cluster size %d and within the file", f.length, headerSizeV3, f.clusterSize)
	}
	incompatible := binary.BigEndian.Uint64(raw[72:])
	f.extended = incompatible&incompatExtendedL2 != 0
	if f.extended && f.clusterBits < minExtendedBits {
		return invalid("cluster_bits is %d, want at least %d with extended L2 entries", f.clusterBits, minExtendedBits)
	}
	return f.parseCompression(raw, incompatible&incompatCompression != 0)
}

func checkIncompatible(bits uint64) error {
	switch {
	case bits&incompatDataFile != 0:
		return invalid("incompatible_features 0x%x has bit 2 (external data file), want an image that holds its data itself: convert it with qemu-img", bits)
	case bits&incompatDirty != 0:
		return invalid("incompatible_features 0x%x has bit 0 (dirty), want an image that was closed: repair it with qemu-img check -r all", bits)
	case bits&incompatCorrupt != 0:
		return invalid("incompatible_features 0x%x has bit 1 (corrupt), want an intact image: repair it with qemu-img check -r all", bits)
	case bits&^incompatKnown != 0:
		return invalid("incompatible_features 0x%x has unknown bits 0x%x, want only bits 0 to 4", bits, bits&^incompatKnown)
	}
	return nil
}

func (f *file) parseCompression(raw []byte, flagged bool) error {
	var kind byte // absent is zero
	if f.length > headerSizeV3 {
		if len(raw) <= headerSizeV3 {
			return invalid("file has %d bytes, want at least the header_length %d", f.size, f.length)
		}
		kind = raw[headerSizeV3]
	}
	if kind > 1 {
		return invalid("compression_type is %d, want 0 (zlib) or 1 (zstd)", kind)
	}
	if flagged != (kind != 0) {
		return invalid("compression_type is %d and bit 3 of incompatible_features is %t, want the bit exactly if the type is not 0", kind, flagged)
	}
	f.zstd = kind == 1
	return nil
}

// refuseOthers refuses images that need more than this one file: others, or a key.
func (f *file) refuseOthers(raw []byte) error {
	if off := binary.BigEndian.Uint64(raw[8:]); off != 0 {
		return invalid("backing_file_offset is %d (backing file %s), want 0: an image must be whole by itself, convert it with qemu-img",
			off, f.name(off, binary.BigEndian.Uint32(raw[16:])))
	}
	if crypt := binary.BigEndian.Uint32(raw[32:]); crypt != 0 {
		return invalid("crypt_method is %d, want 0: encrypted images cannot be used", crypt)
	}
	return nil
}

// name is a name within the file, quoted, for messages.
func (f *file) name(off uint64, length uint32) string {
	if length > maxName || off > uint64(f.size) || uint64(length) > uint64(f.size)-off {
		return "whose name is not within the file"
	}
	b := make([]byte, length)
	if err := f.read("name", b, int64(off)); err != nil {
		return "whose name cannot be read"
	}
	return fmt.Sprintf("%q", b)
}

func (f *file) parseSizes(raw []byte, l Limits) error {
	size := binary.BigEndian.Uint64(raw[24:])
	if limit := l.maxVirtualSize(); size == 0 || size > uint64(limit) {
		return invalid("size (of the disk) is %d bytes, want 1 to %d", size, limit)
	}
	if size%sectorSize != 0 {
		return invalid("size (of the disk) is %d bytes, want a multiple of %d", size, sectorSize)
	}
	f.virtualSize = int64(size)
	if n := f.clusters(f.virtualSize); n > maxGuestClusters {
		return invalid("size (of the disk) is %d clusters of %d bytes, want at most %d: convert it to larger clusters", n, f.clusterSize, maxGuestClusters)
	}
	if n := f.clusters(f.size); n > maxFileClusters {
		return invalid("file has %d clusters of %d bytes, want at most %d", n, f.clusterSize, maxFileClusters)
	}
	f.l1Entries, f.l1Offset = int64(binary.BigEndian.Uint32(raw[36:])), binary.BigEndian.Uint64(raw[40:])
	if need := f.l1Needed(); f.l1Entries < need || f.l1Entries > maxL1Bytes/entrySize {
		return invalid("l1_size is %d entries, want %d to %d for a disk of %d bytes", f.l1Entries, need, maxL1Bytes/entrySize, size)
	}
	f.refOffset = binary.BigEndian.Uint64(raw[48:])
	clusters := int64(binary.BigEndian.Uint32(raw[56:]))
	if most := max(1, maxRefTableBytes>>f.clusterBits); clusters < 1 || clusters > int64(most) {
		return invalid("refcount_table_clusters is %d, want 1 to %d", clusters, most)
	}
	f.refBytes = clusters << f.clusterBits
	snapshots := binary.BigEndian.Uint32(raw[60:])
	if snapshots > maxSnapshots {
		return invalid("nb_snapshots is %d, want at most %d", snapshots, maxSnapshots)
	}
	f.snapshots, f.snapOffset = int(snapshots), binary.BigEndian.Uint64(raw[64:])
	return nil
}

// clusters is how many clusters hold n bytes.
func (h *header) clusters(n int64) int64 {
	return n>>h.clusterBits + min(1, n&(h.clusterSize-1))
}

// l2Entries is how many guest clusters one L2 table maps.
func (h *header) l2Entries() int64 { return h.clusterSize / h.l2EntrySize() }

func (h *header) l2EntrySize() int64 {
	if h.extended {
		return 2 * entrySize
	}
	return entrySize
}

// l1Needed is how many entries of the L1 table map the disk.
func (h *header) l1Needed() int64 {
	per := h.l2Entries()
	return (h.clusters(h.virtualSize) + per - 1) / per
}

// parseExtensions reads the header's extensions, which end with the first cluster at the latest.
func (f *file) parseExtensions() error {
	raw := make([]byte, min(f.clusterSize, f.size)-f.length)
	if err := f.read("header extensions", raw, f.length); err != nil {
		return err
	}
	seen := map[uint32]bool{}
	for len(raw) >= 8 {
		kind, length := binary.BigEndian.Uint32(raw), int64(binary.BigEndian.Uint32(raw[4:]))
		if kind == extensionEnd {
			break
		}
		if raw = raw[8:]; length > int64(len(raw)) {
			return invalid("header extension 0x%08x has %d bytes, want at most the %d to the end of the first cluster", kind, length, len(raw))
		}
		if seen[kind] {
			return invalid("header extension 0x%08x is there twice, want it once", kind)
		}
		seen[kind] = known(kind)
		if err := f.parseExtension(kind, raw[:length]); err != nil {
			return err
		}
		raw = raw[min((length+7)&^7, int64(len(raw))):]
	}
	if f.bitmapsValid && f.bitmaps == nil {
		return invalid("autoclear_features has bit 0 (bitmaps), want a bitmaps extension with it")
	}
	return nil
}

func known(kind uint32) bool {
	switch kind {
	case extensionBackingFormat, extensionFeatureNames, extensionBitmaps, extensionEncryption, extensionDataFile:
		return true
	}
	return false
}

func (f *file) parseExtension(kind uint32, data []byte) error {
	switch kind {
	case extensionBackingFormat:
		if name := strings.TrimRight(string(data), "\x00"); name != "" {
			return invalid("header extension 0x%08x names the backing format %.64q, want none: an image must be whole by itself", kind, name)
		}
	case extensionDataFile:
		return invalid("header extension 0x%08x names the external data file %.1023q, want none: an image must hold its data itself", kind, data)
	case extensionEncryption:
		return invalid("header extension 0x%08x is an encryption header, want none: encrypted images cannot be used", kind)
	case extensionBitmaps:
		return f.parseBitmaps(data)
	}
	return nil
}

func (f *file) parseBitmaps(data []byte) error {
	if len(data) != 24 {
		return invalid("bitmaps extension has %d bytes, want 24", len(data))
	}
	count, size := binary.BigEndian.Uint32(data), binary.BigEndian.Uint64(data[8:])
	if count < 1 || count > maxBitmaps {
		return invalid("nb_bitmaps is %d, want 1 to %d", count, maxBitmaps)
	}
	if size < 1 || size > maxBitmapDirectory {
		return invalid("bitmap_directory_size is %d bytes, want 1 to %d", size, maxBitmapDirectory)
	}
	f.bitmaps = &bitmapsExtension{count: int(count), size: int64(size), offset: binary.BigEndian.Uint64(data[16:])}
	return nil
}
