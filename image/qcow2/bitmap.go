package qcow2

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

const (
	bitmapEntrySize = 24 // bytes of a directory entry before its name
	bitmapInUse     = 1  // flag: it was not saved, and may be of another size
)

// claimBitmaps reads the bitmap directory and claims it and the bitmaps' tables.
// Without the header's bit that vouches for them, bitmaps are taken as not there.
func (c *checker) claimBitmaps() error {
	if !c.bitmapsValid {
		return nil
	}
	b := c.bitmaps
	c.info.Bitmaps = b.count
	if err := c.claim("bitmap directory (bitmap_directory_offset)", b.offset, b.size); err != nil {
		return err
	}
	r := bufio.NewReaderSize(io.NewSectionReader(c.r, int64(b.offset), b.size), chunkSize)
	for i := range b.count {
		if err := c.readBitmap(r, i); err != nil {
			return err
		}
	}
	for _, t := range c.bitmapsAt {
		if err := c.claim(t.what, uint64(t.offset), t.entries*entrySize); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) readBitmap(r *bufio.Reader, i int) error {
	raw := make([]byte, bitmapEntrySize)
	if err := readEntry(r, raw, "bitmap directory", i); err != nil {
		return err
	}
	off, entries := binary.BigEndian.Uint64(raw), int64(binary.BigEndian.Uint32(raw[8:]))
	flags, kind, granularity := binary.BigEndian.Uint32(raw[12:]), raw[16], raw[17]
	name, extra := int64(binary.BigEndian.Uint16(raw[18:])), int64(binary.BigEndian.Uint32(raw[20:]))
	switch {
	case off >= hostOffsetLimit:
		return invalid("bitmap %d has its table at offset %d, want it within the file's %d bytes", i, off, c.size)
	case flags > 3: // bit 2 is about extra data
		return invalid("bitmap %d has flags 0x%x, want only bits 0 and 1", i, flags)
	case kind != 1:
		return invalid("bitmap %d has type %d, want 1", i, kind)
	case granularity < 9 || granularity > 31:
		return invalid("bitmap %d has granularity_bits %d, want 9 to 31", i, granularity)
	case name < 1 || name > maxBitmapName:
		return invalid("bitmap %d has name_size %d, want 1 to %d", i, name, maxBitmapName)
	case extra != 0:
		return invalid("bitmap %d has extra_data_size %d, want 0", i, extra)
	}
	least, most := c.bitmapClusters(granularity), c.bitmapClusters(granularity)
	if flags&bitmapInUse != 0 {
		least, most = 1, maxBitmapBytes>>c.clusterBits
	}
	if entries < least || entries > most {
		return invalid("bitmap %d has bitmap_table_size %d, want %d to %d", i, entries, least, most)
	}
	if err := c.spend("bitmap table", entries); err != nil {
		return err
	}
	c.bitmapsAt = append(c.bitmapsAt, table{fmt.Sprintf("table of bitmap %d", i), int64(off), entries})
	return skip(r, (bitmapEntrySize+name+7)&^7-bitmapEntrySize, "bitmap directory", i)
}

// bitmapClusters is how many clusters a bitmap of the whole disk has.
func (c *checker) bitmapClusters(granularity byte) int64 {
	bits := (c.virtualSize + 1<<granularity - 1) >> granularity
	return c.clusters((bits + 7) / 8)
}

// checkBitmaps checks where the data of the bitmaps lies.
func (c *checker) checkBitmaps() error {
	for _, t := range c.bitmapsAt {
		err := c.each(t, func(i int64, entry uint64) error {
			off := entry & offsetMask
			if entry&bitmapReserved != 0 || (off != 0 && entry&1 != 0) || off&uint64(c.clusterSize-1) != 0 {
				return invalid("entry %d of the %s is 0x%016x, want 0, 1 or a multiple of the cluster size %d", i, t.what, entry, c.clusterSize)
			}
			if off == 0 {
				return nil
			}
			if err := c.mark(off, c.clusterSize, i); err != nil {
				return invalid("%s: %v", t.what, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
