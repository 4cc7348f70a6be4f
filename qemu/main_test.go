package qemu

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain lets the test binary be the launcher of the machines it starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "launch" {
		LaunchMain(os.Args[2:])
	}
	if len(os.Args) > 1 && os.Args[1] == "spool" {
		fmt.Fprintln(os.Stderr, spoolMain(os.Args[2], os.Args[3], os.Args[4]))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}
