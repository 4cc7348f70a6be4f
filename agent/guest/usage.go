package guest

import (
	"io/fs"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const (
	// usageAge is how old a writable layer's figures may get, and usageShare how much of the time may go
	// into walking it: a walk of one second is not repeated within twenty.
	usageAge   = 10 * time.Second
	usageShare = 20
)

// usageCache measures a writable layer by walking it, seldom.
type usageCache struct {
	mu     sync.Mutex
	next   time.Time
	bytes  uint64
	inodes uint64
}

// measure gives the allocated bytes and the files of the tree at dir.
func (u *usageCache) measure(dir string) (bytes, inodes uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	begin := time.Now()
	if begin.Before(u.next) {
		return u.bytes, u.inodes
	}
	u.bytes, u.inodes = 0, 0
	linked := make(map[uint64]bool)
	// Files that vanish meanwhile are not counted.
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || linked[st.Ino] {
			return nil
		}
		if st.Nlink > 1 && !d.IsDir() {
			linked[st.Ino] = true
		}
		u.bytes += uint64(st.Blocks) * 512
		u.inodes++
		return nil
	})
	u.next = begin.Add(max(usageAge, usageShare*time.Since(begin)))
	return u.bytes, u.inodes
}

// measureFileSystem tells the size of the file system that a writable layer lies on.
func measureFileSystem(st *agentpb.ContainerStats, dir string) {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return
	}
	st.WritableSizeBytes = fs.Blocks * uint64(fs.Bsize)
	st.WritableInodesTotal, st.WritableInodesFree = fs.Files, fs.Ffree
}
