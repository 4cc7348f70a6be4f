package qcow2

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func checkBytes(b []byte) (*Info, error) {
	return Check(bytes.NewReader(b), int64(len(b)), Limits{})
}

func TestCheckSmallImages(t *testing.T) {
	v2 := buildImage(t, false)
	version2(v2)
	for name, b := range map[string][]byte{
		"deflate": buildImage(t, false), "zstd": buildImage(t, true), "version 2": v2, "extended": buildExtended(),
	} {
		if _, err := checkBytes(b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		needTools(t, "qemu-img")
		path := filepath.Join(t.TempDir(), "small.qcow2")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if out := qemuImg(t, "check", "-f", "qcow2", path); !strings.Contains(out, "No errors") {
			t.Errorf("%s: qemu-img check says %s", name, out)
		}
	}
	info, err := checkBytes(buildImage(t, false))
	want := Info{
		Version: 3, VirtualSize: smallDisk, ClusterSize: 512, CompressionType: "zlib", Compressed: true,
		Allocated: 1024, Snapshots: 1, Bitmaps: 1,
	}
	if err != nil || *info != want {
		t.Errorf("info is %+v, %v, want %+v", info, err, want)
	}
}

// What is wrong with an image is named with its value and what would be right.
func TestCheckRefuses(t *testing.T) {
	for _, c := range refusals() {
		t.Run(c.want, func(t *testing.T) {
			b := buildImage(t, false)
			if _, err := checkBytes(b); err != nil {
				t.Fatalf("before: %v", err)
			}
			_, err := checkBytes(c.change(b))
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), ", want ") {
				t.Errorf("got %v, want a refusal with %q", err, c.want)
			}
		})
	}
}

type refusal struct {
	want   string
	change func(b []byte) []byte
}

func set64(at int, v uint64) func([]byte) []byte {
	return func(b []byte) []byte { put64(b, at, v); return b }
}

func set32(at int, v uint32) func([]byte) []byte {
	return func(b []byte) []byte { put32(b, at, v); return b }
}

func refusals() []refusal {
	extension := func(kind uint32, data string) func(b []byte) []byte {
		return func(b []byte) []byte {
			put32(b, 144, kind)
			put32(b, 148, uint32(len(data)))
			copy(b[152:], data)
			return b
		}
	}
	twice := func(b []byte) []byte { copy(b[144:176], b[112:144]); return b }
	backing := func(name string) func(b []byte) []byte {
		return func(b []byte) []byte {
			put64(b, 8, 300)
			put32(b, 16, uint32(len(name)))
			copy(b[300:], name)
			return b
		}
	}
	v2 := func(b []byte) []byte { version2(b); put64(b, at64(atL2, 1), l2Zero); return b }
	data := at64(atL2, 0)
	packedAt := at64(atOtherL2, 3)
	return append([]refusal{
		{"magic is \"QFI\\xfa\"", func(b []byte) []byte { b[3]--; return b }},
		{"file has 71 bytes", func(b []byte) []byte { return b[:71] }},
		{"file has 103 bytes", func(b []byte) []byte { return b[:103] }},
		{"version is 1", set32(4, 1)},
		{"version is 4", set32(4, 4)},
		{"cluster_bits is 8", set32(20, 8)},
		{"cluster_bits is 22", set32(20, 22)},
		{"cluster_bits is 4294967295", set32(20, 1<<32-1)},
		{`backing file "/etc/shadow"`, backing("/etc/shadow")},
		{`backing file "json:{\"driver\":\"nbd\"}"`, backing(`json:{"driver":"nbd"}`)},
		{"backing file whose name is not within the file", set64(8, 1<<63)},
		{"crypt_method is 1", set32(32, 1)},
		{"crypt_method is 2", set32(32, 2)},
		{"size (of the disk) is 0", set64(24, 0)},
		{"size (of the disk) is 51201", set64(24, smallDisk+1)},
		{"size (of the disk) is 18446744073709551104", set64(24, 1<<64-512)},
		{"size (of the disk) is 17592186044928", set64(24, 16<<40+512)},
		{"size (of the disk) is 34359738368 clusters", set64(24, 16<<40)},
		{"l1_size is 1 entries", set32(36, 1)},
		{"l1_size is 4294967295", set32(36, 1<<32-1)},
		{"L1 table (l1_table_offset) is at offset 1537", set64(40, atL1+1)},
		{"L1 table (l1_table_offset) at offset 0", set64(40, 0)},
		{"L1 table (l1_table_offset) is at offset 18446744073709551104", set64(40, 1<<64-512)},
		{"L1 table (l1_table_offset) is at offset 9223372036854775808", set64(40, 1<<63)},
		{"L1 table (l1_table_offset) at offset 512", set64(40, atRefTable)},
		{"refcount table (refcount_table_offset) is at offset 513", set64(48, 513)},
		{"refcount table (refcount_table_offset) is at offset 8192", set64(48, 8192)},
		{"refcount table (refcount_table_offset) at offset 0", set64(48, 0)},
		{"refcount_table_clusters is 0", set32(56, 0)},
		{"refcount_table_clusters is 16385", set32(56, 16385)},
		{"refcount table (refcount_table_offset) is at offset 512 with 8388608 bytes", set32(56, 16384)},
		{"entry 0 of the refcount table is 0x0000000000000401", set64(atRefTable, atRefBlock+1)},
		{"entry 1 of the refcount table is 0x0000000000002000", set64(atRefTable+8, 8192)},
		{"refcount block at offset 1024", set64(atRefTable+8, atRefBlock)},
		{"entry 0 of the refcount table is not there or 0", set64(atRefTable, 0)},
		{"refcount of the cluster at offset 3072 is 0, want at least 1", func(b []byte) []byte { b[atRefBlock+2*6+1] = 0; return b }},
		{"refcount of the cluster at offset 2560 is 1, want at least 2", func(b []byte) []byte { b[atRefBlock+2*5+1] = 1; return b }},
		{"refcount of the cluster at offset 3072 is 1, want at least 2", set64(at64(atL2, 9), atData)},
		{"nb_snapshots is 65537", set32(60, 65537)},
		{"entry 1 of the snapshot table", set32(60, 2)},
		{"snapshots_offset is 9223372036854775808", set64(64, 1<<63)},
		{"snapshot table (snapshots_offset) is at offset 4104", func(b []byte) []byte {
			copy(b[atSnapshots+8:], bytes.Clone(b[atSnapshots:atSnapshots+64]))
			return set64(64, atSnapshots+8)(b)
		}},
		{"snapshot table (snapshots_offset) at offset 2560", func(b []byte) []byte {
			copy(b[atOtherL2:], b[atSnapshots:atSnapshots+64])
			return set64(64, atOtherL2)(b)
		}},
		{"entry 0 of the snapshot table has 15 bytes of extra data", set32(atSnapshots+36, 15)},
		{"entry 0 of the snapshot table has 4294967295 bytes of extra data", set32(atSnapshots+36, 1<<32-1)},
		{"entry 0 of the snapshot table has an L1 table of 4194305 entries", set32(atSnapshots+8, 4<<20+1)},
		{"entry 0 of the snapshot table has its L1 table at offset 9223372036854775808", set64(atSnapshots, 1<<63)},
		{"L1 table of snapshot 0 is at offset 4609", set64(atSnapshots, atSnapshotL1+1)},
		{"L1 table of snapshot 0 at offset 1536", set64(atSnapshots, atL1)},
		{"entry 0 of the L1 table of snapshot 0 is 0x0000000000000200", set64(atSnapshotL1, atRefTable)},
		{"L2 table at offset 5120: entry 0", set64(atSnapshotL2, 1<<56)},
		{"autoclear_features has bit 0", set32(112, 0x12345678)},
		{"autoclear_features 0x3", set64(88, 3)},
		{"refcount_order is 7", set32(96, 7)},
		{"header_length is 96", set32(100, 96)},
		{"header_length is 113", set32(100, 113)},
		{"header_length is 4294967288", set32(100, 1<<32-8)},
		{"incompatible_features 0x1 has bit 0 (dirty)", set64(72, 1)},
		{"incompatible_features 0x2 has bit 1 (corrupt)", set64(72, 2)},
		{"incompatible_features 0x4 has bit 2 (external data file)", set64(72, 4)},
		{"compression_type is 0 and bit 3", set64(72, 8)},
		{"compression_type is 1 and bit 3", func(b []byte) []byte { b[104] = 1; return b }},
		{"compression_type is 2", func(b []byte) []byte { b[104] = 2; return set64(72, 8)(b) }},
		{"cluster_bits is 9, want at least 14 with extended L2", set64(72, 16)},
		{"unknown bits 0x20", set64(72, 32)},
		{"unknown bits 0x8000000000000000", set64(72, 1<<63)},
		{"header extension 0x23852875 has 4294967295 bytes", set32(116, 1<<32-1)},
		{"header extension 0x23852875 is there twice", twice},
		{`header extension 0xe2792aca names the backing format "raw"`, extension(extensionBackingFormat, "raw")},
		{`header extension 0x44415441 names the external data file "nbd://host"`, extension(extensionDataFile, "nbd://host")},
		{"header extension 0x0537be77 is an encryption header", extension(extensionEncryption, "0123456789abcdef")},
		{"entry 0 of the L1 table is 0x0000000000000801", set64(atL1, atL2|1)},
		{"entry 0 of the L1 table is 0x0100000000000800", set64(atL1, atL2|1<<56)},
		{"entry 0 of the L1 table is 0x8000000000000000", set64(atL1, flagCopied)},
		{"entry 0 of the L1 table is 0x0000000000002000", set64(atL1, 8192)},
		{"entry 0 of the L1 table is 0x0000000000000200", set64(atL1, atRefTable)},
		{"entry 1 of the L1 table is 0x0000000000000800", set64(atL1+8, atL2)},
		{"entry 0 is 0x0000000000000c02, want the reserved bits", set64(data, atData|2)},
		{"entry 0 is 0x8000000000000000, want bit 63", set64(data, flagCopied)},
		{"entry 0 has 512 bytes at offset 8192", set64(data, 8192)},
		{"entry 0 has 512 bytes at offset 2048, want data that does not overlap a table", set64(data, atL2)},
		{"entry 0 has 512 bytes at offset 5120, want data that does not overlap a table", set64(data, atSnapshotL2)},
		{"entry 1 is 0x0000000000000001, want the reserved bits", v2},
		{"entry 3 is 0xc000000000000e00, want bit 63", set64(packedAt, flagCompressed|flagCopied|atPacked)},
		{"entry 3 has 1024 bytes at offset 3584, want data that does not overlap a table", set64(packedAt, flagCompressed|1<<61|atPacked)},
		{"entry 3 has 1 bytes at offset 8191", set64(packedAt, flagCompressed|8191)},
		{"entry 3 is 0x4100000000000000, want bits 56 to 60 clear", set64(packedAt, flagCompressed|1<<56)},
	}, bitmapRefusals()...)
}

func bitmapRefusals() []refusal {
	return []refusal{
		{"bitmaps extension has 16 bytes", set32(116, 16)},
		{"nb_bitmaps is 0", set32(120, 0)},
		{"nb_bitmaps is 65536", set32(120, 65536)},
		{"entry 1 of the bitmap directory", set32(120, 2)},
		{"bitmap_directory_size is 0", set64(128, 0)},
		{"bitmap_directory_size is 67108865", set64(128, 64<<20+1)},
		{"bitmap directory (bitmap_directory_offset) is at offset 5633", set64(136, atBitmaps+1)},
		{"bitmap directory (bitmap_directory_offset) at offset 1536", set64(136, atL1)},
		{"bitmap directory (bitmap_directory_offset) is at offset 18446744073709551104", set64(136, 1<<64-512)},
		{"bitmap 0 has its table at offset 9223372036854775808", set64(atBitmaps, 1<<63)},
		{"table of bitmap 0 at offset 1536", set64(atBitmaps, atL1)},
		{"bitmap 0 has bitmap_table_size 4294967295", set32(atBitmaps+8, 1<<32-1)},
		{"bitmap 0 has bitmap_table_size 0, want 1 to 1", set32(atBitmaps+8, 0)},
		{"bitmap 0 has flags 0x4", set32(atBitmaps+12, 4)},
		{"bitmap 0 has type 2", func(b []byte) []byte { b[atBitmaps+16] = 2; return b }},
		{"bitmap 0 has granularity_bits 8", func(b []byte) []byte { b[atBitmaps+17] = 8; return b }},
		{"bitmap 0 has name_size 0", func(b []byte) []byte { b[atBitmaps+19] = 0; return b }},
		{"bitmap 0 has extra_data_size 1", set32(atBitmaps+20, 1)},
		{"entry 0 of the table of bitmap 0 is 0x0000000000001a01", set64(atBitmapTable, atBitmapData|1)},
		{"table of bitmap 0: entry 0 has 512 bytes at offset 1536", set64(atBitmapTable, atL1)},
		{"table of bitmap 0: entry 0 has 512 bytes at offset 8192", set64(atBitmapTable, 8192)},
	}
}

func TestCheckRefusesExtended(t *testing.T) {
	const entry = 4*16384 + 16
	for _, c := range []refusal{
		{"is both allocated and zero", set64(entry+8, 1<<32|1)},
		{"want an offset where subclusters are allocated", set64(entry, 0)},
		{"want the reserved bits", set64(entry, 5*16384|1)},
		{"want a bitmap of 0 for a compressed cluster", set64(entry, flagCompressed|5*16384)},
		{"entry 1 has 16384 bytes at offset 98304", set64(entry, 6*16384)},
	} {
		b := buildExtended()
		if _, err := checkBytes(b); err != nil {
			t.Fatal(err)
		}
		if _, err := checkBytes(c.change(b)); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want a refusal with %q", err, c.want)
		}
	}
}

func TestCheckLimit(t *testing.T) {
	b := buildImage(t, false)
	if _, err := Check(bytes.NewReader(b), int64(len(b)), Limits{MaxVirtualSize: smallDisk}); err != nil {
		t.Error(err)
	}
	_, err := Check(bytes.NewReader(b), int64(len(b)), Limits{MaxVirtualSize: smallDisk - 512})
	if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "51200 bytes, want 1 to 50688") {
		t.Errorf("got %v", err)
	}
}

// failing is a file that cannot be read from some offset on.
type failing struct {
	io.ReaderAt
	from int64
}

var errDisk = errors.New("disk is broken")

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		return 0, errDisk
	}
	return f.ReaderAt.ReadAt(p, off)
}

// A file that cannot be read is not called a bad image.
func TestReadErrorsAreNotRefusals(t *testing.T) {
	b := buildImage(t, false)
	for from := int64(0); from < atBitmapTable+8; from += 64 {
		_, err := Check(failing{bytes.NewReader(b), from}, int64(len(b)), Limits{})
		if !errors.Is(err, errDisk) || errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("broken from %d: %v", from, err)
		}
	}
}

// What qemu-img makes with others' files or keys is refused.
func TestCheckRefusesQEMUs(t *testing.T) {
	needTools(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	base := filepath.Join(dir, "base.raw")
	qemuImg(t, "create", "-f", "raw", base, "1M")
	for _, c := range []struct {
		want string
		args []string
	}{
		{"backing_file_offset", []string{"-b", base, "-F", "raw"}},
		{"backing_file_offset", []string{"-b", `json:{"driver":"raw","file":{"driver":"file","filename":"` + base + `"}}`, "-F", "raw"}},
		{"external data file", []string{"-o", "data_file=" + filepath.Join(dir, "data")}},
		{"external data file", []string{"-o", "data_file_raw=on,data_file=" + filepath.Join(dir, "data2")}},
		{"crypt_method is 2", []string{"--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"}},
		{"crypt_method is 1", []string{"--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s"}},
	} {
		os.Remove(path)
		if !createOther(t, append(append([]string{"-f", "qcow2"}, c.args...), path, "1M")...) {
			continue
		}
		f, size := openImage(t, path)
		if _, err := Check(f, size, Limits{}); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: got %v, want a refusal with %q", c.args, err, c.want)
		}
	}
}

// A writer that dies leaves an image with lazy refcounts dirty.
func TestCheckRefusesDirty(t *testing.T) {
	needTools(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	qemuImg(t, "create", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "1M")
	qemuIO(t, path, "write 0 64k", "flush")
	f, size := openImage(t, path)
	if _, err := Check(f, size, Limits{}); err != nil {
		t.Fatal(err)
	}
	dies := commandThatDies(t, path)
	if err := dies.Run(); err == nil {
		t.Fatal("qemu-io lives")
	}
	f, size = openImage(t, path)
	if _, err := Check(f, size, Limits{}); err == nil || !strings.Contains(err.Error(), "(dirty)") {
		t.Errorf("got %v, want a refusal of a dirty image", err)
	}
}
