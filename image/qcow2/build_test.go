package qcow2

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// The clusters of the small image that buildImage makes, each of 512 bytes.
const (
	smallCluster = 512

	atRefTable = iota * smallCluster
	atRefBlock
	atL1
	atL2
	atOtherL2
	atData
	atPacked
	atSnapshots
	atSnapshotL1
	atSnapshotL2
	atBitmaps
	atBitmapTable
	atBitmapData
	atFree
	smallSize
)

const smallDisk = 100 * smallCluster // two L2 tables

func put32(b []byte, at int, v uint32) { binary.BigEndian.PutUint32(b[at:], v) }
func put64(b []byte, at int, v uint64) { binary.BigEndian.PutUint64(b[at:], v) }

// entry is a 64-bit entry of a table.
func at64(table, index int) int { return table + 8*index }

// buildImage makes a small image that has some of everything: a snapshot that
// shares an L2 table with the disk, a bitmap, data, packed data, zeros.
func buildImage(t testing.TB, zstdPacked bool) []byte {
	t.Helper()
	b := make([]byte, smallSize)
	copy(b, magic)
	put32(b, 4, 3)
	put32(b, 20, 9)
	put64(b, 24, smallDisk)
	put32(b, 36, 2)
	put64(b, 40, atL1)
	put64(b, 48, atRefTable)
	put32(b, 56, 1)
	put32(b, 60, 1)
	put64(b, 64, atSnapshots)
	put64(b, 88, autoclearBitmaps)
	put32(b, 96, 4)
	put32(b, 100, 112)
	if zstdPacked {
		put64(b, 72, incompatCompression)
		b[104] = 1
	}
	put32(b, 112, extensionBitmaps)
	put32(b, 116, 24)
	put32(b, 120, 1)
	put64(b, 128, 32) // length of the directory
	put64(b, 136, atBitmaps)

	put64(b, atRefTable, atRefBlock)
	for i := range atFree / smallCluster {
		count := uint16(1)
		if i*smallCluster == atOtherL2 || i*smallCluster == atPacked {
			count = 2 // the disk's and the snapshot's
		}
		binary.BigEndian.PutUint16(b[atRefBlock+2*i:], count)
	}

	data := packCluster(t, bytes.Repeat([]byte("packed! "), smallCluster/8), zstdPacked)
	copy(b[atPacked+100:], data)
	put64(b, at64(atL1, 0), atL2|flagCopied)
	put64(b, at64(atL1, 1), atOtherL2)
	put64(b, at64(atL2, 0), atData|flagCopied)
	put64(b, at64(atL2, 1), l2Zero)
	copy(b[atData:], bytes.Repeat([]byte("data"), smallCluster/4))
	put64(b, at64(atOtherL2, 3), flagCompressed|atPacked+100)

	put64(b, atSnapshots, atSnapshotL1)
	put32(b, atSnapshots+8, 2)
	b[atSnapshots+13], b[atSnapshots+15] = 1, 4 // lengths of ID and name
	put32(b, atSnapshots+36, 16)
	put64(b, atSnapshots+48, smallDisk)
	copy(b[atSnapshots+56:], "1snap")
	put64(b, at64(atSnapshotL1, 0), atSnapshotL2)
	put64(b, at64(atSnapshotL1, 1), atOtherL2)

	put64(b, atBitmaps, atBitmapTable)
	put32(b, atBitmaps+8, 1)
	put32(b, atBitmaps+12, 2) // auto
	b[atBitmaps+16], b[atBitmaps+17], b[atBitmaps+19] = 1, 16, 4
	copy(b[atBitmaps+24:], "bits")
	put64(b, atBitmapTable, atBitmapData)
	return b
}

func packCluster(t testing.TB, data []byte, zstdPacked bool) []byte {
	t.Helper()
	if zstdPacked {
		w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		return w.EncodeAll(data, nil)
	}
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, 9)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// version2 turns the small image into one of version 2, without what that cannot have.
func version2(b []byte) {
	put32(b, 4, 2)
	clear(b[72:smallCluster])
	put64(b, at64(atL2, 1), 0)
	for _, at := range []int{atBitmaps, atBitmapTable, atBitmapData} {
		b[atRefBlock+2*at/smallCluster+1] = 0
	}
}

// buildExtended makes an image with subclusters: clusters of 16 KiB for header,
// refcount table, refcount block, L1 table, L2 table and data.
func buildExtended() []byte {
	const cluster = 16 << 10
	b := make([]byte, 6*cluster)
	copy(b, magic)
	put32(b, 4, 3)
	put32(b, 20, 14)
	put64(b, 24, 8*cluster)
	put32(b, 36, 1)
	put64(b, 40, 3*cluster)
	put64(b, 48, cluster)
	put32(b, 56, 1)
	put64(b, 72, incompatExtendedL2)
	put32(b, 96, 4)
	put32(b, 100, 104)
	put64(b, cluster, 2*cluster)
	for i := range 6 {
		binary.BigEndian.PutUint16(b[2*cluster+2*i:], 1)
	}
	put64(b, 3*cluster, 4*cluster|flagCopied)
	put64(b, 4*cluster+16, 5*cluster|flagCopied)
	put64(b, 4*cluster+24, 0x0000000f_000000f0) // subclusters 0 to 3 zero, 4 to 7 stored
	for i := range cluster {
		b[5*cluster+i] = byte(i>>9) + 1
	}
	return b
}
