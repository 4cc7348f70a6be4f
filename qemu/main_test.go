package qemu

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain lets the test binary be the launcher of the machines it starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "launch" {
		LaunchMain(os.Args[2:])
	}
	goleak.VerifyTestMain(m)
}
