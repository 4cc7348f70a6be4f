//go:build !race

package vm_test

var raceFlags []string
