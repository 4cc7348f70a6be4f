package qcow2

import "fmt"

// markCluster takes what entry i of an L2 table points at, also where it is
// only reserved for the guest.
func (c *checker) markCluster(e cluster, i int64) error {
	if e.packed > 0 {
		return c.mark(e.host, e.packed, i)
	}
	return c.mark(e.host, c.clusterSize, i)
}

// mark takes the clusters that hold length bytes from off on for data, of
// entry i of a table. The last cluster of the file need not be whole: what is
// missing reads as zeros.
func (c *checker) mark(off uint64, length, i int64) error {
	if off >= uint64(c.size) || (int64(off)+length-1)>>c.clusterBits >= c.total {
		return fmt.Errorf("entry %d has %d bytes at offset %d, want them within the file's %d bytes", i, length, off, c.size)
	}
	first, last := int64(off)>>c.clusterBits, (int64(off)+length-1)>>c.clusterBits
	for at := first; at <= last; at++ {
		if c.meta.has(at) || c.l2.has(at) || (c.snapL2 != nil && c.snapL2.has(at)) {
			return fmt.Errorf("entry %d has %d bytes at offset %d, want data that does not overlap a table", i, length, off)
		}
		if c.data.add(at) {
			c.twice.add(at)
		}
	}
	return nil
}
