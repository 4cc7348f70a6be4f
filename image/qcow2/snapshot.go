package qcow2

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
)

// claimSnapshots reads the snapshot table and claims it, the snapshots' L1
// tables, and the L2 tables that the disk does not share with them.
func (c *checker) claimSnapshots() error {
	if c.snapshots == 0 {
		return nil
	}
	if c.snapOffset >= uint64(c.size) {
		return invalid("snapshots_offset is %d, want it within the file's %d bytes", c.snapOffset, c.size)
	}
	length, err := c.readSnapshots()
	if err != nil {
		return err
	}
	if err := c.claim("snapshot table (snapshots_offset)", c.snapOffset, length); err != nil {
		return err
	}
	c.snapL2 = newBitset(c.total)
	for _, t := range c.snapL1 {
		if err := c.claim(t.what, uint64(t.offset), t.entries*entrySize); err != nil {
			return err
		}
	}
	for _, t := range c.snapL1 {
		if err := c.claimSnapshotL2(t); err != nil {
			return err
		}
	}
	return nil
}

// readSnapshots fills snapL1 and returns the length of the snapshot table.
func (c *checker) readSnapshots() (int64, error) {
	from := io.NewSectionReader(c.r, int64(c.snapOffset), min(maxSnapshotTable, c.size-int64(c.snapOffset)))
	r := bufio.NewReaderSize(from, chunkSize)
	var length int64
	for i := range c.snapshots {
		n, err := c.readSnapshot(r, i)
		if err != nil {
			return 0, err
		}
		length += n
	}
	return length, nil
}

// readSnapshot reads entry i of the snapshot table and returns its length.
func (c *checker) readSnapshot(r *bufio.Reader, i int) (int64, error) {
	raw := make([]byte, 40)
	if err := readEntry(r, raw, "snapshot table", i); err != nil {
		return 0, err
	}
	off, entries := binary.BigEndian.Uint64(raw), int64(binary.BigEndian.Uint32(raw[8:]))
	extra := int64(binary.BigEndian.Uint32(raw[36:]))
	if extra > maxSnapshotExtra || (c.version >= 3 && extra < 16) {
		return 0, invalid("entry %d of the snapshot table has %d bytes of extra data, want %d to %d", i, extra, 16*min(1, c.version-2), maxSnapshotExtra)
	}
	if entries > maxL1Bytes/entrySize {
		return 0, invalid("entry %d of the snapshot table has an L1 table of %d entries, want at most %d", i, entries, maxL1Bytes/entrySize)
	}
	if off >= hostOffsetLimit {
		return 0, invalid("entry %d of the snapshot table has its L1 table at offset %d, want it within the file's %d bytes", i, off, c.size)
	}
	what := fmt.Sprintf("L1 table of snapshot %d", i)
	c.snapL1 = append(c.snapL1, table{what, int64(off), entries})
	rest := extra + int64(binary.BigEndian.Uint16(raw[12:])) + int64(binary.BigEndian.Uint16(raw[14:]))
	length := (40 + rest + 7) &^ 7
	return length, skip(r, length-40, "snapshot table", i)
}

// readEntry fills p with the next bytes of entry i of a table whose size is not known beforehand.
func readEntry(r io.Reader, p []byte, what string, i int) error {
	if _, err := io.ReadFull(r, p); err != nil {
		return tableError(err, what, i)
	}
	return nil
}

func skip(r *bufio.Reader, n int64, what string, i int) error {
	if got, err := io.CopyN(io.Discard, r, n); got < n {
		return tableError(err, what, i)
	}
	return nil
}

func tableError(err error, what string, i int) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF { //nolint:errorlint // of a reader that does not wrap
		return invalid("entry %d of the %s goes over its end, want it within the file and the table's limit", i, what)
	}
	return fmt.Errorf("qcow2 image: read %s: %w", what, err)
}

func (c *checker) claimSnapshotL2(t table) error {
	if err := c.spend(t.what, t.entries); err != nil {
		return err
	}
	return c.each(t, func(i int64, entry uint64) error {
		at, err := c.l2At(t, i, entry&^flagCopied)
		if err != nil || at == 0 {
			return err
		}
		n := at >> c.clusterBits
		if c.l2.has(n) || c.snapL2.add(n) {
			c.twice.add(n)
		}
		return nil
	})
}

// checkSnapshots checks each L2 table that only snapshots use, once.
func (c *checker) checkSnapshots() error {
	for w, tables := range c.snapL2 {
		for ; tables != 0; tables &= tables - 1 {
			at := int64(w)*64 + int64(bits.TrailingZeros64(tables))
			if err := c.checkL2(at<<c.clusterBits, 0); err != nil {
				return err
			}
		}
	}
	return nil
}
