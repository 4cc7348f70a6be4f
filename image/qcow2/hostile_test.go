package qcow2

import (
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// hostile is a huge file that is made while it is read: a 16 TiB disk in
// clusters of 64 KiB. Its L1 table is at 64 KiB * 1, of 4 clusters, its refcount
// table after it, of 128 clusters, and then come the L2 tables, all 32768 of
// them, and the data. No byte of it is stored anywhere.
type hostile struct {
	size  int64
	empty bool
}

const (
	hostileCluster = 64 << 10
	hostileRef     = 5 * hostileCluster
	hostileBlocks  = hostileRef + 128*hostileCluster
	hostileL2      = hostileBlocks + 16384*hostileCluster
	hostileData    = hostileL2 + 32768*hostileCluster
)

func newHostile() hostile { return hostile{size: hostileData + 16<<40} }

func (h hostile) word(at int64) uint64 {
	switch {
	case at < hostileCluster:
		return hostileHeader(at)
	case at < hostileRef:
		i := (at - hostileCluster) / 8
		if h.empty || i >= 32768 {
			return 0
		}
		return uint64(hostileL2+i*hostileCluster) | flagCopied
	case at < hostileBlocks:
		if i := (at - hostileRef) / 8; i < 16384 {
			return uint64(hostileBlocks + i*hostileCluster)
		}
		return 0
	case at < hostileL2:
		return 0x0001000100010001
	case at < hostileData:
		return uint64(hostileData+(at-hostileL2)/8*hostileCluster) | flagCopied
	}
	return 0
}

func hostileHeader(at int64) uint64 {
	head := make([]byte, 104)
	copy(head, magic)
	put32(head, 4, 3)
	put32(head, 20, 16)
	put64(head, 24, 16<<40)
	put32(head, 36, 32768)
	put64(head, 40, hostileCluster)
	put64(head, 48, hostileRef)
	put32(head, 56, 128)
	put32(head, 96, 4)
	put32(head, 100, 104)
	if at >= int64(len(head)) {
		return 0
	}
	return binary.BigEndian.Uint64(head[at:])
}

func (h hostile) ReadAt(p []byte, off int64) (int, error) {
	n := int(min(int64(len(p)), max(h.size-off, 0)))
	for i := 0; i < n; i += 8 {
		var word [8]byte
		binary.BigEndian.PutUint64(word[:], h.word(off+int64(i)))
		copy(p[i:n], word[:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// allocated is how many bytes f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// The largest disk that is accepted, with every cluster allocated, costs a bounded
// number of bytes; so does a huge file with nothing in it.
func TestHugeFilesAreBounded(t *testing.T) {
	h := newHostile()
	for _, empty := range []bool{true, false} {
		if !empty && testing.Short() {
			continue // 2^28 entries take seconds: run by make test
		}
		h.empty = empty
		want := int64(16 << 40)
		if empty {
			want = 0
		}
		used := allocated(func() {
			info, err := Check(h, h.size, Limits{})
			if err != nil || info.Allocated != want {
				t.Errorf("empty %t: %+v, %v, want %d bytes allocated", empty, info, err, want)
			}
		})
		t.Logf("empty %t: %d bytes allocated in memory", empty, used)
		if used > 256<<20 {
			t.Errorf("empty %t: %d bytes were allocated in memory, want at most 256 MiB", empty, used)
		}
	}
	h.size = 1 << 62
	used := allocated(func() {
		if _, err := Check(h, h.size, Limits{}); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "file has 70368744177664 clusters") {
			t.Errorf("got %v", err)
		}
	})
	if used > 1<<20 {
		t.Errorf("%d bytes were allocated for a file that is refused for its size", used)
	}
}

// Snapshots cannot multiply the work: the entries of all tables together are bounded.
func TestTablesAreBoundedTogether(t *testing.T) {
	b := buildImage(t, false)
	f, err := open(strings.NewReader(string(b)), int64(len(b)), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	c := &checker{file: f, budget: 2 + 2*64 + 1}
	if err := c.spend("L1 table", 2); err != nil {
		t.Fatal(err)
	}
	if err := c.spend("L2 table", 3*64); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "over 536870912, want fewer") {
		t.Errorf("got %v", err)
	}
}
