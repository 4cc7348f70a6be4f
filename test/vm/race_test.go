//go:build race

package vm_test

// raceFlags build the daemon like the test itself, so that go test -race finds the daemon's races.
var raceFlags = []string{"-race"}
