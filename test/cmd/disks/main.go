// Command disks makes the disks of the tests, those that the cache lacks, and prints their paths. Without arguments it
// makes all; with names, only those. It needs root.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/vmruntime/vmruntime/test/images"
)

func main() {
	names := os.Args[1:]
	if len(names) == 0 {
		names = images.DiskNames()
	}
	for _, name := range names {
		start := time.Now()
		path, err := images.Disk(name)
		if err != nil {
			fmt.Fprintln(os.Stderr, "disks:", err)
			os.Exit(1)
		}
		fmt.Fprintf(os.Stderr, "%s: %s\n", name, time.Since(start).Round(10*time.Millisecond))
		fmt.Println(path)
	}
}
