package qcow2

// bitset is a set of clusters of the file. A fresh one costs address space;
// memory only where it is written.
type bitset []uint64

func newBitset(n int64) bitset { return make(bitset, (n+63)/64) }

func (b bitset) has(i int64) bool { return b[i/64]>>(i%64)&1 != 0 }

// add reports whether i was in the set already.
func (b bitset) add(i int64) bool {
	was := b.has(i)
	b[i/64] |= 1 << (i % 64)
	return was
}
