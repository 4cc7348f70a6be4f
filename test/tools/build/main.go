// Command build builds the programs that the tests run against, those that the
// cache lacks. Without arguments it builds all; with names, only those. It
// prints the directory of each.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/vmruntime/vmruntime/test/tools"
)

func main() {
	names := os.Args[1:]
	if len(names) == 0 {
		for _, s := range tools.Sets() {
			names = append(names, s.Name)
		}
	}
	for _, name := range names {
		start := time.Now()
		dir, built, err := tools.Build(name)
		if err != nil {
			fmt.Fprintln(os.Stderr, "build:", err)
			os.Exit(1)
		}
		if built {
			fmt.Fprintf(os.Stderr, "built %s in %s\n", name, time.Since(start).Round(time.Second))
		}
		fmt.Println(dir)
	}
}
