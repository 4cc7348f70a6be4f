package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// Bits of entries that are reserved.
const (
	l1Reserved     = 0x7f000000000001ff
	l2Reserved     = 0x3f000000000001fe
	l2Zero         = 1
	offsetMask     = 0x00fffffffffffe00
	bitmapReserved = 0xff000000000001fe
)

// cluster is what an L2 entry says of one guest cluster.
type cluster struct {
	host   uint64 // where it is stored in the file; 0 if it is not
	packed int64  // bytes of compressed data at host; 0 if it is not compressed
	data   uint32 // which subclusters are stored at host
	zero   uint32 // which subclusters read as zeros without being stored
}

// subclusters is how many parts of a cluster are allocated by themselves.
func (h *header) subclusters() int64 {
	if h.extended {
		return 32
	}
	return 1
}

// stored is how many bytes of the guest the cluster holds.
func (h *header) stored(c cluster) int64 {
	if c.packed > 0 {
		return h.clusterSize
	}
	return int64(bits.OnesCount32(c.data)) * (h.clusterSize / h.subclusters())
}

// entry decodes entry i of an L2 table.
func (h *header) entry(table []byte, i int64) (cluster, error) {
	at := table[i*h.l2EntrySize():]
	raw := binary.BigEndian.Uint64(at)
	var sub uint64
	if h.extended {
		sub = binary.BigEndian.Uint64(at[entrySize:])
	}
	if raw|sub == 0 {
		return cluster{}, nil
	}
	var c cluster
	var err error
	if raw&flagCompressed != 0 {
		c, err = h.compressed(raw, sub)
	} else {
		c, err = h.standard(raw, sub)
	}
	if err != nil && h.extended {
		return c, fmt.Errorf("entry %d is 0x%016x with bitmap 0x%016x, %w", i, raw, sub, err)
	}
	if err != nil {
		return c, fmt.Errorf("entry %d is 0x%016x, %w", i, raw, err)
	}
	return c, nil
}

func (h *header) compressed(raw, sub uint64) (cluster, error) {
	if raw&flagCopied != 0 {
		return cluster{}, fmt.Errorf("want bit 63 (copied) clear for a compressed cluster")
	}
	if sub != 0 {
		return cluster{}, fmt.Errorf("want a bitmap of 0 for a compressed cluster")
	}
	x := 62 - (h.clusterBits - 8)
	host := raw & (1<<x - 1)
	if host >= hostOffsetLimit {
		return cluster{}, fmt.Errorf("want bits 56 to %d clear", x-1)
	}
	sectors := int64(raw & (flagCompressed - 1) >> x)
	return cluster{host: host, packed: (sectors+1)*sectorSize - int64(host%sectorSize)}, nil
}

func (h *header) standard(raw, sub uint64) (cluster, error) {
	reserved := uint64(l2Reserved)
	if h.version < 3 || h.extended {
		reserved |= l2Zero
	}
	if raw&reserved != 0 {
		return cluster{}, fmt.Errorf("want the reserved bits 0x%x clear", reserved)
	}
	c := cluster{host: raw & offsetMask}
	switch {
	case c.host&uint64(h.clusterSize-1) != 0:
		return c, fmt.Errorf("want an offset that is a multiple of the cluster size %d", h.clusterSize)
	case c.host == 0 && raw&flagCopied != 0:
		return c, fmt.Errorf("want bit 63 (copied) clear where no cluster is allocated")
	case !h.extended && raw&l2Zero != 0:
		c.zero = 1
	case !h.extended:
		c.data = 1
	default:
		c.data, c.zero = uint32(sub), uint32(sub>>32)
	}
	if c.data&c.zero != 0 {
		return c, fmt.Errorf("want no subcluster that is both allocated and zero")
	}
	if c.data != 0 && c.host == 0 {
		return c, fmt.Errorf("want an offset where subclusters are allocated")
	}
	return c, nil
}
