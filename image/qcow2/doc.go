// Package qcow2 checks and reads disk images in the qcow2 format, and writes
// overlays over them. It is written from the format's specification, QEMU's
// docs/interop/qcow2.txt, and takes every image for hostile: it comes from
// whoever made the container image.
//
//	header -> L1 table -> L2 tables -> clusters of guest data
//	       -> refcount table -> refcount blocks
//	       -> snapshots -> their L1 tables -> L2 tables -> clusters
//	       -> bitmaps
//
// Invariants:
//   - An image that Check accepts names no other file, neither a backing file nor
//     an external data file, is not encrypted, and uses only features that
//     the specification names and this package knows.
//   - Every pointer of its tables is aligned, points into the file, and no table
//     lies over another or over guest data.
//   - Memory and time are bounded by the limits below, whatever the file says: no
//     table is believed before its size is checked, tables are read in pieces,
//     and each is read at most twice. Holes of a sparse file cost no memory.
//   - Every refusal is errdefs.ErrInvalidArgument and names the field, its value
//     and what would be right; a file that cannot be read gives the reader's error.
package qcow2

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// The limits of what is taken. Those of tables are QEMU's own: an image over
// them cannot be opened there either.
const (
	defaultMaxVirtualSize = 16 << 40
	minClusterBits        = 9
	maxClusterBits        = 21
	minExtendedBits       = 14        // subclusters have at least 512 bytes
	maxL1Bytes            = 32 << 20  // of one L1 table
	maxRefTableBytes      = 8 << 20   // of the refcount table
	maxSnapshots          = 65536     // in one image
	maxSnapshotExtra      = 1024      // bytes of a snapshot's extra data
	maxSnapshotTable      = 64 << 20  // bytes of the snapshot table
	maxBitmaps            = 65535     // in one image
	maxBitmapDirectory    = 64 << 20  // bytes
	maxBitmapBytes        = 512 << 20 // of one bitmap
	maxBitmapName         = 1023      // bytes
	maxGuestClusters      = 1 << 28   // 16 TiB in clusters of 64 KiB
	maxFileClusters       = 3 << 27   // the same, and half as many for tables and snapshots
	maxEntries            = 1 << 29   // entries of all tables that are read
	hostOffsetLimit       = 1 << 56   // what a table's entry can hold
	sectorSize            = 512       // unit of the length of compressed data
	chunkSize             = 64 << 10  // bytes of a table that are read at once
	entrySize             = 8         // bytes of an entry of any table but an extended L2 table
	magic                 = "QFI\xfb" // first bytes of the file
	flagCompressed        = uint64(1) << 62
	flagCopied            = uint64(1) << 63
)

// Limits bounds what Check and Open accept.
type Limits struct {
	// MaxVirtualSize is the largest size of the disk, in bytes, that is
	// accepted. Zero is 16 TiB.
	MaxVirtualSize int64
}

func (l Limits) maxVirtualSize() int64 {
	if l.MaxVirtualSize <= 0 {
		return defaultMaxVirtualSize
	}
	return l.MaxVirtualSize
}

// Info says what a checked image is.
type Info struct {
	// Version of the format, 2 or 3.
	Version int
	// VirtualSize is the size of the disk in bytes, a multiple of 512.
	VirtualSize int64
	// ClusterSize is the unit of allocation in bytes.
	ClusterSize int64
	// CompressionType is how compressed clusters are packed: "zlib" or "zstd".
	CompressionType string
	// Compressed tells whether there are compressed clusters.
	Compressed bool
	// ExtendedL2 tells whether clusters have subclusters.
	ExtendedL2 bool
	// Allocated is how many bytes of the disk are stored in the image, compressed
	// ones counted before compression. Without subclusters it is a multiple
	// of ClusterSize.
	Allocated int64
	// Snapshots is the number of internal snapshots. They are checked, never read.
	Snapshots int
	// Bitmaps is the number of persistent dirty bitmaps.
	Bitmaps int
}

// invalid is a refusal of the image.
func invalid(format string, args ...any) error {
	return fmt.Errorf("qcow2 image: %s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}
