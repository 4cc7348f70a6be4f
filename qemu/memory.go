package qemu

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// memoryCopy has the launcher put a copy in the place of a descriptor. It is in the VM's cgroup by then, which so pays for the
// memory.
type memoryCopy struct {
	FD    int   `json:"fd"`
	Bytes int64 `json:"bytes"`
}

func (c *memoryCopy) run() error {
	from := os.NewFile(uintptr(c.FD), "memory")
	fd, err := unix.MemfdCreate("memory", 0)
	if err != nil {
		return err
	}
	to := os.NewFile(uintptr(fd), "memory")
	if err := errors.Join(to.Truncate(c.Bytes), copyMemory(to, from, c.Bytes)); err != nil {
		return err
	}
	// Closed here, so that the collector of garbage does not close what takes its number.
	if err := errors.Join(from.Close(), unix.Dup3(fd, c.FD, 0)); err != nil {
		return err
	}
	return to.Close()
}

// copyMemory copies what is not a hole in the first bytes of a file on a memory file system to the same places of another.
func copyMemory(to, from *os.File, bytes int64) error {
	return Extents(from, bytes, func(at, size int64) error {
		data, err := unix.Mmap(int(from.Fd()), at, int(size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return fmt.Errorf("map %d bytes at %d: %w", size, at, err)
		}
		_, err = to.WriteAt(data, at)
		return errors.Join(err, unix.Munmap(data))
	})
}

// Extents calls do for each part of the first bytes of a file that is not a hole.
func Extents(f *os.File, bytes int64, do func(at, size int64) error) error {
	for at := int64(0); at < bytes; {
		data, err := f.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= bytes {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := f.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		end = min(end, bytes)
		if err := do(data, end-data); err != nil {
			return err
		}
		at = end
	}
	return nil
}
