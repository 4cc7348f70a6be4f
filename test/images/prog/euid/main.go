// Command euid prints its effective user ID. Its file is set-uid root in an
// image, so that no_new_privs shows.
package main

import (
	"fmt"
	"os"
)

func main() { fmt.Printf("Effective uid: %d\n", os.Geteuid()) }
