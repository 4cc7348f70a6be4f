package qcow2

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/containerd/errdefs"
)

// fuzzLimit keeps a disk that is read whole small.
const fuzzLimit = 64 << 20

// addSeeds adds generated images, and what qemu-img makes where there is one.
func addSeeds(f *testing.F) {
	v2 := buildImage(f, false)
	version2(v2)
	for _, b := range [][]byte{nil, []byte(magic), buildImage(f, false), buildImage(f, true), v2, buildExtended()} {
		f.Add(b)
	}
	for _, c := range refusals() {
		f.Add(c.change(buildImage(f, false)))
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return
	}
	for i, options := range []string{
		"cluster_size=512", "cluster_size=512,compat=0.10", "cluster_size=4k", "cluster_size=512,refcount_bits=1",
		"cluster_size=512,refcount_bits=64", "cluster_size=512,lazy_refcounts=on", "cluster_size=512,preallocation=metadata",
		"cluster_size=16k,extended_l2=on", "cluster_size=512,compression_type=zstd",
	} {
		path := filepath.Join(f.TempDir(), "seed.qcow2")
		qemuImg(f, "create", "-f", "qcow2", "-o", options, path, "100k")
		qemuIO(f, path, "write -P 1 0 1k", "write -z 8k 4k")
		if i%2 == 0 && i != 6 { // nothing is compressed over what is preallocated
			qemuIO(f, path, "write -c -P 2 64k 16k")
		}
		if i == 0 {
			qemuImg(f, "snapshot", "-c", "s", path)
			qemuImg(f, "bitmap", "--add", "-f", "qcow2", path, "b")
		}
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
}

// refusedOrIntact fails unless an error is a refusal: a file in memory can always be read.
func refusedOrIntact(t *testing.T, err error) bool {
	if err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Fatalf("%v is no refusal", err)
	}
	return err == nil
}

// Check neither panics nor takes memory that the file's size does not justify,
// refuses by name, and says the same of the same file.
func FuzzCheck(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		info, err := checkBytes(b)
		runtime.ReadMemStats(&after)
		// The first cluster, a chunk, an L2 table, a refcount block and the refcount table.
		if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20+8*uint64(len(b)) {
			t.Errorf("%d bytes were allocated for a file of %d", used, len(b))
		}
		if !refusedOrIntact(t, err) {
			return
		}
		if info.VirtualSize <= 0 || info.VirtualSize > defaultMaxVirtualSize || info.Allocated < 0 ||
			info.Allocated >= info.VirtualSize+info.ClusterSize {
			t.Errorf("accepted with %+v", info)
		}
		if format, err := DetectFormat(bytes.NewReader(b), int64(len(b)), "disk"); format != FormatQcow2 || err != nil {
			t.Errorf("accepted, but its format is %q, %v", format, err)
		}
		again, err := checkBytes(b)
		if err != nil || *again != *info {
			t.Errorf("checked again: %+v, %v, want %+v", again, err, info)
		}
	})
}

// What is accepted can be read to its end: by extents it is the same as whole,
// and outside of them there are zeros.
func FuzzReader(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Open(bytes.NewReader(b), int64(len(b)), Limits{MaxVirtualSize: fuzzLimit})
		if !refusedOrIntact(t, err) {
			return
		}
		buf := make([]byte, 256<<10)
		for off := int64(0); ; {
			start, end, err := r.NextData(off)
			if errors.Is(err, io.EOF) {
				readZeros(t, r, buf, off, r.Size())
				return
			}
			if err != nil || start < off || end <= start || end > r.Size() {
				t.Fatalf("data after %d: %d to %d, %v", off, start, end, err)
			}
			readZeros(t, r, buf, off, start)
			for at := start; at < end; at += int64(len(buf)) {
				part := buf[:min(int64(len(buf)), end-at)]
				n, err := r.ReadAt(part, at)
				if refusedOrIntact(t, err) && n < len(part) {
					t.Fatalf("read %d of %d bytes at %d", n, len(part), at)
				}
			}
			off = end
		}
	})
}

func readZeros(t *testing.T, r *Reader, buf []byte, from, to int64) {
	// The ends are enough, and a hole may be large.
	for _, at := range []int64{from, max(from, to-int64(len(buf)))} {
		part := buf[:min(int64(len(buf)), to-at)]
		n, err := r.ReadAt(part, at)
		if err != nil || n < len(part) || bytes.ContainsFunc(part, func(c rune) bool { return c != 0 }) {
			t.Fatalf("hole from %d to %d: read %d bytes at %d, %v, want zeros", from, to, n, at, err)
		}
	}
}

// Whatever we accept of damaged images, QEMU reads alike: what was checked here
// is what a guest gets.
func TestDamagedReadsAsQEMUDoes(t *testing.T) {
	if testing.Short() {
		t.Skip("needs hundreds of runs of qemu-img: run by make test")
	}
	needTools(t, "qemu-img")
	dir := t.TempDir()
	path, flat := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "flat")
	random := rand.New(rand.NewPCG(5, 6))
	accepted := 0
	for i := range 3000 {
		b := buildImage(t, i%2 == 0)
		if i%3 == 0 {
			b = buildExtended()
		}
		for range 1 + random.IntN(3) {
			damage(b, random)
		}
		r, err := Open(bytes.NewReader(b), int64(len(b)), Limits{MaxVirtualSize: fuzzLimit})
		if err != nil {
			continue
		}
		accepted++
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, r.Size())
		_, ours := io.ReadFull(io.NewSectionReader(r, 0, r.Size()), got)
		out, theirs := exec.CommandContext(t.Context(), "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, flat).CombinedOutput()
		want, err := os.ReadFile(flat)
		if (ours == nil) != (theirs == nil) || (ours == nil && (err != nil || !bytes.Equal(got, want))) {
			os.WriteFile("/tmp/qcow2-damaged", b, 0o600)
			t.Errorf("image %d: we read it with %v, qemu-img with %v %s", i, ours, theirs, out)
		}
	}
	if accepted < 100 {
		t.Errorf("%d damaged images were accepted, too few to compare", accepted)
	}
}

// damage changes a byte or a bit, more often where there is something.
func damage(b []byte, random *rand.Rand) {
	at := random.IntN(len(b))
	for range 20 {
		if b[at] != 0 {
			break
		}
		at = random.IntN(len(b))
	}
	if random.IntN(2) == 0 {
		at = at &^ 7
	}
	b[at] ^= 1 << random.IntN(8)
}
