package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// needTools skips where QEMU's own tools are not installed.
func needTools(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("needs %s of QEMU, the other implementation of the format: %v", name, err)
		}
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	return run(t, "qemu-img", args...)
}

// createOther creates an image that is to be refused. It reports false where
// qemu-img could not measure this busy machine, which it does for LUKS keys.
func createOther(t testing.TB, args ...string) bool {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "qemu-img", append([]string{"create"}, args...)...).CombinedOutput()
	if err != nil && strings.Contains(string(out), "Unable to get accurate CPU usage") {
		t.Logf("left out: %s", out)
		return false
	}
	if err != nil {
		t.Fatalf("qemu-img create %v: %v\n%s", args, err, out)
	}
	return true
}

// qemuIO runs commands on a qcow2 image.
func qemuIO(t testing.TB, path string, commands ...string) string {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	return run(t, "qemu-io", append(args, path)...)
}

// rawDisk writes a disk of size bytes with data that packs well, data that does not, and holes.
func rawDisk(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	text := bytes.Repeat([]byte("a disk of words, "), 9000)
	for at := int64(0); at < size; at += 1 + random.Int64N(size/8) {
		part := text[:random.IntN(len(text))]
		if random.IntN(2) == 0 {
			part = make([]byte, random.IntN(100000))
			for i := range part {
				part[i] = byte(random.Uint32())
			}
		}
		part = part[:min(int64(len(part)), size-at)]
		if _, err := f.WriteAt(part, at); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func openImage(t testing.TB, path string) (*os.File, int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return f, st.Size()
}

// shape is a way to make an image.
type shape struct {
	name    string
	options string                          // of qemu-img -o
	args    []string                        // more arguments of qemu-img convert
	after   func(t testing.TB, path string) // what is done to the image then
	empty   bool                            // created, not converted from the disk
	want    func(info *Info) (what string, ok bool)
}

func shapes() []shape {
	list := []shape{
		{name: "v2", options: "compat=0.10", want: func(i *Info) (string, bool) { return "version 2", i.Version == 2 }},
		{name: "v3", options: "compat=1.1", want: func(i *Info) (string, bool) { return "version 3", i.Version == 3 }},
		{name: "v2-deflate", options: "compat=0.10", args: []string{"-c"}, want: packed("zlib")},
		{name: "deflate", args: []string{"-c"}, want: packed("zlib")},
		{name: "zstd", options: "compression_type=zstd", args: []string{"-c"}, want: packed("zstd")},
		{name: "zstd-512", options: "cluster_size=512,compression_type=zstd", args: []string{"-c"}, want: packed("zstd")},
		{name: "zstd-4k", options: "cluster_size=4k,compression_type=zstd", args: []string{"-c"}, want: packed("zstd")},
		{name: "deflate-2M", options: "cluster_size=2M", args: []string{"-c"}, want: packed("zlib")},
		{name: "zstd-2M", options: "cluster_size=2M,compression_type=zstd", args: []string{"-c"}, want: packed("zstd")},
		{name: "deflate-512", options: "cluster_size=512", args: []string{"-c"}, want: packed("zlib")},
		{name: "lazy", options: "lazy_refcounts=on"},
		{name: "extended", options: "extended_l2=on", want: func(i *Info) (string, bool) { return "extended L2", i.ExtendedL2 }},
		{name: "extended-deflate", options: "extended_l2=on", args: []string{"-c"}, want: packed("zlib")},
		{name: "extended-parts", options: "extended_l2=on,cluster_size=128k", empty: true, after: writeParts},
		{name: "parts", empty: true, after: writeParts},
		{name: "mixed", args: []string{"-c"}, after: writeParts, want: packed("zlib")},
		{name: "snapshots", after: takeSnapshots, want: func(i *Info) (string, bool) { return "2 snapshots", i.Snapshots == 2 }},
		{name: "snapshots-v2", options: "compat=0.10", after: takeSnapshots},
		{name: "bitmaps", after: addBitmaps, want: func(i *Info) (string, bool) { return "2 bitmaps", i.Bitmaps == 2 }},
		{name: "resized", after: func(t testing.TB, p string) { qemuImg(t, "resize", "-f", "qcow2", p, "+100M") }},
		{name: "shrunk", after: func(t testing.TB, p string) { qemuImg(t, "resize", "-f", "qcow2", "--shrink", p, "3M") }},
		{name: "rebased", after: func(t testing.TB, p string) { qemuImg(t, "rebase", "-u", "-f", "qcow2", "-b", "", p) }},
		{name: "amended", options: "compat=0.10", after: func(t testing.TB, p string) { qemuImg(t, "amend", "-f", "qcow2", "-o", "compat=1.1", p) }},
	}
	for _, size := range []string{"512", "4k", "64k", "2M"} {
		list = append(list, shape{name: "clusters-" + size, options: "cluster_size=" + size})
	}
	for _, mode := range []string{"off", "metadata", "falloc", "full"} {
		list = append(list,
			shape{name: "preallocation-" + mode, options: "preallocation=" + mode},
			shape{name: "empty-" + mode, options: "preallocation=" + mode, empty: true})
	}
	list = append(list, shape{name: "empty-metadata-extended", options: "preallocation=metadata,extended_l2=on", empty: true})
	for _, width := range []int{1, 2, 4, 8, 32, 64} {
		list = append(list, shape{name: fmt.Sprintf("refcounts-%d", width), options: fmt.Sprintf("refcount_bits=%d", width)})
	}
	return list
}

func packed(kind string) func(*Info) (string, bool) {
	return func(i *Info) (string, bool) {
		return "compressed with " + kind, i.Compressed && i.CompressionType == kind
	}
}

// writeParts writes parts of clusters, zeros and discards.
func writeParts(t testing.TB, path string) {
	qemuIO(t, path, "write -P 1 4k 8k", "write -P 2 130k 1k", "write -z 256k 64k", "write -z 300k 4k",
		"write -P 3 1M 300k", "write -z 1040k 20k", "discard 1216k 64k", "write -z -u 1300k 8k", "write -P 4 3000k 4k")
}

func takeSnapshots(t testing.TB, path string) {
	qemuImg(t, "snapshot", "-c", "first", path)
	qemuIO(t, path, "write -P 9 1M 200k", "write -P 8 64k 1k")
	qemuImg(t, "snapshot", "-c", "second", path)
	qemuIO(t, path, "write -P 7 1100k 64k", "discard 2M 1M")
}

func addBitmaps(t testing.TB, path string) {
	qemuImg(t, "bitmap", "--add", "-f", "qcow2", path, "one")
	qemuImg(t, "bitmap", "--add", "-f", "qcow2", "-g", "512", path, "two")
	qemuIO(t, path, "write -P 9 1M 200k", "write -P 8 3M 1k")
}

const diskSize = 4<<20 + 512*3

// makeImage makes an image of the shape.
func makeImage(t testing.TB, s shape, raw string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	args := []string{"convert", "-f", "raw", "-O", "qcow2"}
	if s.empty {
		args = []string{"create", "-f", "qcow2"}
	}
	if s.options != "" {
		args = append(args, "-o", s.options)
	}
	args = append(args, s.args...)
	if s.empty {
		args = append(args, path, fmt.Sprint(diskSize))
	} else {
		args = append(args, raw, path)
	}
	qemuImg(t, args...)
	if s.after != nil {
		s.after(t, path)
	}
	return path
}

// commandThatDies writes to an image and aborts before it is closed.
func commandThatDies(t testing.TB, path string) *exec.Cmd {
	return exec.CommandContext(t.Context(), "qemu-io", "-f", "qcow2", "-c", "write 128k 64k", "-c", "flush", "-c", "abort", path)
}
