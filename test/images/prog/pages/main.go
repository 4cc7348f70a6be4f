// Command pages maps so many bytes of huge pages, of a file on a hugetlbfs if one is named, writes to each page, and tells how
// many there were.
package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"

	"golang.org/x/sys/unix"
)

const page = 2 << 20

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "pages:", err)
		os.Exit(1)
	}
}

func run(args []string) (err error) {
	size, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_HUGETLB
	if len(args) > 1 {
		flags = unix.MAP_SHARED
		if fd, err = unix.Open(args[1], unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644); err != nil {
			return err
		}
	}
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	n := 0
	debug.SetPanicOnFault(true) // a page over the limit is a SIGBUS
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("no more after %d pages: %v", n, r)
		}
	}()
	for ; n < size/page; n++ {
		mem[n*page] = 'p'
	}
	fmt.Println(n, "pages")
	return nil
}
