package qemu

import "testing"

func TestRegionFree(t *testing.T) {
	const room = 64 * mib
	for _, tc := range []struct {
		name    string
		used    int64
		n, most int
		want    bool
	}{
		{"nothing is translated", 0, 2, 2, true},
		{"of 16 regions 13 are full and one is begun", 13*4*mib + 1, 2, 2, true},
		{"of 16 regions 15 are full and the last one is begun", 15*4*mib + 1, 2, 2, false},
		{"with what is lost at their ends", 15*4*mib - 15<<10, 2, 2, false},
		{"all are full", room, 2, 2, false},
		{"32 processors can come, as many as there are regions", 0, 32, 32, true},
		{"40 processors can come, each of which has a region", 0, 40, 40, true},
		{"half is taken, and there are none for all", 32 * mib, 32, 32, false},
	} {
		if got := regionFree(tc.used, room, tc.n, tc.most); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}
