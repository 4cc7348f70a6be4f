package qcow2

import (
	"encoding/binary"
	"math/bits"
)

// claimRefcounts reads the refcount table, which is at most 8 MiB, and claims its blocks.
func (c *checker) claimRefcounts() error {
	if err := c.claim("refcount table (refcount_table_offset)", c.refOffset, c.refBytes); err != nil {
		return err
	}
	c.refTable = make([]byte, c.refBytes)
	if err := c.read("refcount table", c.refTable, int64(c.refOffset)); err != nil {
		return err
	}
	for i := int64(0); i < c.refBytes/entrySize; i++ {
		off := binary.BigEndian.Uint64(c.refTable[i*entrySize:])
		if off == 0 {
			continue
		}
		if off >= hostOffsetLimit || off&uint64(c.clusterSize-1) != 0 || off > uint64(c.size) || uint64(c.size)-off < uint64(c.clusterSize) {
			return invalid("entry %d of the refcount table is 0x%016x, want a multiple of the cluster size %d within the file's %d bytes", i, off, c.clusterSize, c.size)
		}
		if err := c.claim("refcount block", off, c.clusterSize); err != nil {
			return err
		}
	}
	return nil
}

// checkRefcounts checks that no cluster that is used counts as free, and that
// none that is used more than once counts as used by one. Counts that are too
// high only waste space.
func (c *checker) checkRefcounts() error {
	perBlock := c.clusterSize * 8 >> c.refOrder // a multiple of 64
	var buf []byte
	for first := int64(0); first < c.total; first += perBlock {
		if c.unused(first, perBlock) {
			continue
		}
		block := first / perBlock
		var off int64
		if block < c.refBytes/entrySize {
			off = int64(binary.BigEndian.Uint64(c.refTable[block*entrySize:]))
		}
		if off == 0 {
			return invalid("entry %d of the refcount table is not there or 0, want a refcount block: clusters from offset %d on are used", block, first<<c.clusterBits)
		}
		if buf == nil {
			buf = make([]byte, c.clusterSize)
		}
		if err := c.read("refcount block", buf, off); err != nil {
			return err
		}
		if err := c.compare(buf, first, perBlock); err != nil {
			return err
		}
	}
	return nil
}

// usedWord is which of the 64 clusters from 64*w on are used.
func (c *checker) usedWord(w int64) uint64 {
	used := c.meta[w] | c.l2[w] | c.data[w]
	if c.snapL2 != nil {
		used |= c.snapL2[w]
	}
	return used
}

func (c *checker) unused(first, count int64) bool {
	for w := first / 64; w < min((first+count)/64, int64(len(c.meta))); w++ {
		if c.usedWord(w) != 0 {
			return false
		}
	}
	return true
}

// compare compares a refcount block, for count clusters from first on, with how they are used.
func (c *checker) compare(block []byte, first, count int64) error {
	for w := first / 64; w < min((first+count)/64, int64(len(c.meta))); w++ {
		for used := c.usedWord(w); used != 0; used &= used - 1 {
			i := w*64 + int64(bits.TrailingZeros64(used))
			want := uint64(1)
			if c.twice.has(i) {
				want = 2
			}
			if got := refcount(block, i-first, c.refOrder); got < want {
				return invalid("refcount of the cluster at offset %d is %d, want at least %d: repair the image with qemu-img check -r all", i<<c.clusterBits, got, want)
			}
		}
	}
	return nil
}

// refcount is count i of a block whose counts have 1<<order bits.
func refcount(block []byte, i int64, order uint) uint64 {
	switch order {
	case 3:
		return uint64(block[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(block[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(block[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(block[8*i:])
	}
	width := int64(1) << order
	return uint64(block[i*width/8]) >> (i * width % 8) & (1<<width - 1)
}
