package qcow2

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// maxWindow bounds what a zstd frame may make its reader remember. A frame
// holds one cluster, at most 2 MiB.
const maxWindow = 8 << 20

// Reader reads the disk that an image holds. What is not allocated reads as
// zeros. It may be used by several goroutines at once, and needs no Close.
type Reader struct {
	f    *file
	info *Info
	l1   []uint64 // of the disk, without what lies beyond its end

	mu      sync.Mutex // for all below: the tables and data read last
	l2At    uint64     // 0: none
	l2      []byte
	packed  cluster // whose data is in plain; packed.packed is 0 if none is
	plain   []byte
	deflate io.ReadCloser
	zstd    *zstd.Decoder
}

// Open checks r as Check does and returns a reader of the disk. r must stay
// as it is while the Reader is used.
func Open(r io.ReaderAt, fileSize int64, l Limits) (*Reader, error) {
	f, err := open(r, fileSize, l)
	if err != nil {
		return nil, err
	}
	info, err := f.check()
	if err != nil {
		return nil, err
	}
	raw := make([]byte, f.l1Needed()*entrySize)
	if err := f.read("L1 table", raw, int64(f.l1Offset)); err != nil {
		return nil, err
	}
	l1 := make([]uint64, f.l1Needed())
	for i := range l1 {
		l1[i] = binary.BigEndian.Uint64(raw[i*entrySize:]) & offsetMask
	}
	return &Reader{f: f, info: info, l1: l1}, nil
}

// Info says what the image is. It must not be changed.
func (r *Reader) Info() *Info { return r.info }

// Size is the size of the disk in bytes.
func (r *Reader) Size() int64 { return r.f.virtualSize }

// ReadAt reads the disk as io.ReaderAt asks. Compressed data that cannot be
// unpacked is errdefs.ErrInvalidArgument.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read disk at offset %d, want at least 0", off)
	}
	n := 0
	for n < len(p) {
		at := off + int64(n)
		if at >= r.Size() {
			return n, io.EOF
		}
		s, err := r.spanAt(at)
		if err != nil {
			return n, err
		}
		part := p[n:min(int64(len(p)), int64(n)+s.end-at)]
		if err := r.readSpan(part, s, at); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// NextData finds the first data at or after off: the disk reads as zeros from
// off to start, and from start to end, both in bytes, data is stored, which
// may be zeros too. It returns io.EOF if only zeros follow.
func (r *Reader) NextData(off int64) (start, end int64, err error) {
	start = max(off, 0)
	for ; ; start = end {
		if start >= r.Size() {
			return 0, 0, io.EOF
		}
		s, err := r.spanAt(start)
		if err != nil {
			return 0, 0, err
		}
		if end = s.end; s.stored() {
			break
		}
	}
	for end < r.Size() {
		s, err := r.spanAt(end)
		if err != nil {
			return 0, 0, err
		}
		if !s.stored() {
			break
		}
		end = s.end
	}
	return start, end, nil
}

// span is a part of the disk that is stored in one way.
type span struct {
	end     int64 // on the disk
	host    int64 // of its first byte in the file; 0: not stored there, or compressed
	cluster cluster
}

func (s span) stored() bool { return s.host != 0 || s.cluster.packed > 0 }

// spanAt is what is stored from off, which is on the disk, to the end of its
// cluster at most, or to the end of the L2 table that is not there.
func (r *Reader) spanAt(off int64) (span, error) {
	f := r.f
	index := off >> f.clusterBits
	l1 := index / f.l2Entries()
	if r.l1[l1] == 0 {
		return span{end: min((l1+1)*f.l2Entries()<<f.clusterBits, r.Size())}, nil
	}
	c, err := r.lookup(r.l1[l1], index%f.l2Entries())
	if err != nil {
		return span{}, err
	}
	start := index << f.clusterBits
	if c.packed > 0 {
		return span{end: min(start+f.clusterSize, r.Size()), cluster: c}, nil
	}
	size := f.clusterSize / f.subclusters()
	sub := (off - start) / size
	stored := c.data >> sub & 1
	last := sub
	for last+1 < f.subclusters() && c.data>>(last+1)&1 == stored {
		last++
	}
	s := span{end: min(start+(last+1)*size, r.Size()), cluster: c}
	if stored != 0 {
		s.host = int64(c.host) + off - start
	}
	return s, nil
}

// lookup reads entry i of the L2 table at off.
func (r *Reader) lookup(off uint64, i int64) (cluster, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.l2At != off {
		if r.l2 == nil {
			r.l2 = make([]byte, r.f.clusterSize)
		}
		r.l2At = 0
		if err := r.f.read("L2 table", r.l2, int64(off)); err != nil {
			return cluster{}, err
		}
		r.l2At = off
	}
	c, err := r.f.entry(r.l2, i)
	if err != nil {
		return cluster{}, invalid("L2 table at offset %d: %v", off, err)
	}
	return c, nil
}

// readSpan fills p with what s, which off lies in, holds from off on.
func (r *Reader) readSpan(p []byte, s span, off int64) error {
	switch {
	case s.cluster.packed > 0:
		return r.readPacked(p, s.cluster, off&(r.f.clusterSize-1))
	case s.host != 0:
		return r.f.readPadded(p, s.host)
	}
	clear(p)
	return nil
}

// readPadded reads data, of which what is beyond the end of the file is zeros.
func (f *file) readPadded(p []byte, off int64) error {
	have := min(max(f.size-off, 0), int64(len(p)))
	clear(p[have:])
	return f.read("data", p[:have], off)
}

func (r *Reader) readPacked(p []byte, c cluster, from int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.packed != c {
		r.packed = cluster{}
		if err := r.unpack(c); err != nil {
			return err
		}
		r.packed = c
	}
	copy(p, r.plain[from:])
	return nil
}

// unpack fills plain with the cluster. The length that its entry gives is an
// upper bound; unpacking ends when the cluster is full.
func (r *Reader) unpack(c cluster) error {
	if r.plain == nil {
		r.plain = make([]byte, r.f.clusterSize)
	}
	raw := make([]byte, c.packed)
	if err := r.f.readPadded(raw, int64(c.host)); err != nil {
		return err
	}
	from, err := r.unpacker(bytes.NewReader(raw))
	if err == nil {
		_, err = io.ReadFull(from, r.plain)
	}
	if err == nil {
		err = checkEnd(from)
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return invalid("%s data of at most %d bytes at offset %d cannot be unpacked to a cluster of %d bytes: %v",
			r.info.CompressionType, c.packed, c.host, r.f.clusterSize, err)
	}
	return nil
}

// checkEnd looks at what follows a full cluster, as QEMU does: more data, missing
// data and what is no data of this kind are taken, a broken block or frame is not.
func checkEnd(from io.Reader) error {
	_, err := io.ReadFull(from, make([]byte, 1))
	for _, harmless := range []error{io.EOF, io.ErrUnexpectedEOF, zstd.ErrMagicMismatch} {
		if errors.Is(err, harmless) {
			return nil
		}
	}
	return err
}

func (r *Reader) unpacker(from io.Reader) (io.Reader, error) {
	if !r.f.zstd {
		if r.deflate == nil {
			r.deflate = flate.NewReader(from)
			return r.deflate, nil
		}
		return r.deflate, r.deflate.(flate.Resetter).Reset(from, nil)
	}
	if r.zstd == nil {
		// One worker decodes in the caller: no goroutine is started.
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		r.zstd = d
	}
	return r.zstd, r.zstd.Reset(from)
}
