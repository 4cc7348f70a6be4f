package qcow2

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// Every shape of image that qemu-img makes is accepted and read as qemu-img reads it.
func TestReaderReadsAsQEMUDoes(t *testing.T) {
	needTools(t, "qemu-img", "qemu-io")
	raw := rawDisk(t, diskSize)
	for _, s := range shapes() {
		t.Run(s.name, func(t *testing.T) {
			path := makeImage(t, s, raw)
			f, size := openImage(t, path)
			r, err := Open(f, size, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if s.want != nil {
				if what, ok := s.want(r.Info()); !ok {
					t.Errorf("info is %+v, want %s", r.Info(), what)
				}
			}
			flat := filepath.Join(t.TempDir(), "flat")
			qemuImg(t, "convert", "-f", "qcow2", "-O", "raw", path, flat)
			want, err := os.ReadFile(flat)
			if err != nil {
				t.Fatal(err)
			}
			compareDisk(t, r, want)
		})
	}
}

// compareDisk reads the disk whole, by its extents, and in random pieces.
func compareDisk(t *testing.T, r *Reader, want []byte) {
	t.Helper()
	if r.Size() != int64(len(want)) {
		t.Fatalf("size is %d, want %d", r.Size(), len(want))
	}
	got := make([]byte, r.Size())
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, r.Size()), got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the disk read whole differs")
	}
	compareExtents(t, r, want)
	random := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		off := random.Int64N(r.Size())
		p := make([]byte, random.IntN(200000))
		n, err := r.ReadAt(p, off)
		if n < len(p) && (!errors.Is(err, io.EOF) || off+int64(n) != r.Size()) {
			t.Fatalf("read of %d bytes at %d gave %d, %v", len(p), off, n, err)
		}
		if !bytes.Equal(p[:n], want[off:off+int64(n)]) {
			t.Fatalf("%d bytes at %d differ", n, off)
		}
	}
}

func compareExtents(t *testing.T, r *Reader, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	var data, last int64
	for off := int64(0); ; {
		start, end, err := r.NextData(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if start < off || end <= start || end > r.Size() || (off > 0 && start == last) {
			t.Fatalf("data after %d is from %d to %d of %d", off, start, end, r.Size())
		}
		if _, err := r.ReadAt(got[start:end], start); err != nil {
			t.Fatal(err)
		}
		data += end - start
		off, last = end, end
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the disk read by extents differs")
	}
	if a := r.Info().Allocated; data > a || a-data >= r.Info().ClusterSize {
		t.Errorf("extents have %d bytes, Allocated is %d", data, a)
	}
}
