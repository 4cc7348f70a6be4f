package qcow2

import (
	"encoding/binary"
	"io"
)

// Check tells whether r, a file of fileSize bytes, is a qcow2 image that is
// intact, whole by itself and within the limits. It refuses with
// errdefs.ErrInvalidArgument, naming the field, its value and what would
// be right; an error of r is returned as it is, wrapped.
//
// It looks at tables only: whether compressed data can be unpacked is seen when it is read.
func Check(r io.ReaderAt, fileSize int64, l Limits) (*Info, error) {
	f, err := open(r, fileSize, l)
	if err != nil {
		return nil, err
	}
	return f.check()
}

func (f *file) check() (*Info, error) {
	n := f.clusters(f.size)
	c := &checker{
		file: f, total: n, budget: maxEntries,
		meta: newBitset(n), l2: newBitset(n), data: newBitset(n), twice: newBitset(n),
		info: &Info{
			Version: f.version, VirtualSize: f.virtualSize, ClusterSize: f.clusterSize,
			CompressionType: "zlib", ExtendedL2: f.extended, Snapshots: f.snapshots,
		},
	}
	if f.zstd {
		c.info.CompressionType = "zstd"
	}
	// Every table is claimed before the first cluster of data is looked at.
	for _, step := range []func() error{
		c.claimHeader, c.claimRefcounts, c.claimActive, c.claimSnapshots, c.claimBitmaps,
		c.checkActive, c.checkSnapshots, c.checkBitmaps, c.checkRefcounts,
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return c.info, nil
}

// checker knows what every cluster of the file is used for.
type checker struct {
	*file
	total  int64 // clusters of the file
	meta   bitset
	l2     bitset // L2 tables
	data   bitset // guest data and data of bitmaps
	twice  bitset // l2 and data that are used more than once
	snapL2 bitset // L2 tables that only snapshots use; nil without snapshots

	refTable  []byte
	snapL1    []table
	bitmapsAt []table
	budget    int64 // entries that may still be read
	info      *Info
	l2Buffer  []byte
}

// table is where a table of 8-byte entries lies.
type table struct {
	what    string
	offset  int64
	entries int64
}

// claim takes a range of the file for a table.
func (c *checker) claim(what string, off uint64, length int64) error {
	if off&uint64(c.clusterSize-1) != 0 {
		return invalid("%s is at offset %d, want a multiple of the cluster size %d", what, off, c.clusterSize)
	}
	if off > uint64(c.size) || uint64(length) > uint64(c.size)-off {
		return invalid("%s is at offset %d with %d bytes, want it within the file's %d bytes", what, off, length, c.size)
	}
	first := int64(off) >> c.clusterBits
	for i := first; i < first+c.clusters(length); i++ {
		if c.meta.has(i) || c.l2.has(i) || (c.snapL2 != nil && c.snapL2.has(i)) {
			return invalid("%s at offset %d with %d bytes overlaps another table in the cluster at %d, want clusters of its own", what, off, length, i<<c.clusterBits)
		}
		c.meta.add(i)
	}
	return nil
}

// spend takes entries from the budget.
func (c *checker) spend(what string, entries int64) error {
	if c.budget -= entries; c.budget < 0 {
		return invalid("%s brings the entries of all tables over %d, want fewer: convert the image with qemu-img, without snapshots or with larger clusters", what, maxEntries)
	}
	return nil
}

// each calls do for every entry of a table.
func (c *checker) each(t table, do func(i int64, entry uint64) error) error {
	buf := make([]byte, min(chunkSize, t.entries*entrySize))
	for i := int64(0); i < t.entries; {
		part := buf[:min(int64(len(buf)), (t.entries-i)*entrySize)]
		if err := c.read(t.what, part, t.offset+i*entrySize); err != nil {
			return err
		}
		for ; len(part) > 0; part, i = part[entrySize:], i+1 {
			if err := do(i, binary.BigEndian.Uint64(part)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) claimHeader() error {
	return c.claim("header", 0, min(c.clusterSize, c.size))
}

func (c *checker) activeL1() table {
	return table{"L1 table", int64(c.l1Offset), c.l1Entries}
}

func (c *checker) claimActive() error {
	t := c.activeL1()
	if err := c.claim("L1 table (l1_table_offset)", c.l1Offset, t.entries*entrySize); err != nil {
		return err
	}
	if err := c.spend(t.what, t.entries); err != nil {
		return err
	}
	return c.each(t, func(i int64, entry uint64) error {
		at, err := c.l2At(t, i, entry)
		if err != nil || at == 0 {
			return err
		}
		if c.l2.add(at >> c.clusterBits) {
			return invalid("entry %d of the L1 table is 0x%016x, want an L2 table that no other entry has", i, entry)
		}
		return nil
	})
}

// l2At is where entry i of an L1 table has its L2 table; 0 if it has none.
func (c *checker) l2At(t table, i int64, entry uint64) (int64, error) {
	if entry&l1Reserved != 0 {
		return 0, invalid("entry %d of the %s is 0x%016x, want the reserved bits 0x%x clear", i, t.what, entry, uint64(l1Reserved))
	}
	off := entry & offsetMask
	switch {
	case off == 0 && entry != 0:
		return 0, invalid("entry %d of the %s is 0x%016x, want bit 63 (copied) clear without an L2 table", i, t.what, entry)
	case off == 0:
		return 0, nil
	case off&uint64(c.clusterSize-1) != 0:
		return 0, invalid("entry %d of the %s is 0x%016x, want an offset that is a multiple of the cluster size %d", i, t.what, entry, c.clusterSize)
	case off > uint64(c.size) || uint64(c.size)-off < uint64(c.clusterSize):
		return 0, invalid("entry %d of the %s is 0x%016x, want an L2 table within the file's %d bytes", i, t.what, entry, c.size)
	case c.meta.has(int64(off) >> c.clusterBits):
		return 0, invalid("entry %d of the %s is 0x%016x, want an L2 table that does not overlap another table", i, t.what, entry)
	}
	return int64(off), nil
}

func (c *checker) checkActive() error {
	t := c.activeL1()
	return c.each(t, func(i int64, entry uint64) error {
		if entry == 0 {
			return nil
		}
		return c.checkL2(int64(entry&offsetMask), c.clusters(c.virtualSize)-i*c.l2Entries())
	})
}

// checkL2 checks the L2 table at off, which is within the file. Of its entries
// the first count are of the disk, and go into Info; others are of snapshots,
// or beyond the end of the disk.
func (c *checker) checkL2(off, count int64) error {
	if err := c.spend("L2 table", c.l2Entries()); err != nil {
		return err
	}
	if c.l2Buffer == nil {
		c.l2Buffer = make([]byte, c.clusterSize)
	}
	if err := c.read("L2 table", c.l2Buffer, off); err != nil {
		return err
	}
	for i := range c.l2Entries() {
		e, err := c.entry(c.l2Buffer, i)
		if err == nil && (e.host != 0 || e.packed != 0) {
			err = c.markCluster(e, i)
		}
		if err != nil {
			return invalid("L2 table at offset %d: %v", off, err)
		}
		if i < count {
			c.info.Allocated += c.stored(e)
			c.info.Compressed = c.info.Compressed || e.packed > 0
		}
	}
	return nil
}
