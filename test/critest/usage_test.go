package critest

import "testing"

func TestMore(t *testing.T) {
	before := Usage{Goroutines: 40, Descriptors: 20, Heap: 10 << 20, Resident: 50 << 20}
	for name, test := range map[string]struct {
		change func(*Usage)
		leaks  bool
	}{
		"the same":            {func(*Usage) {}, false},
		"less":                {func(u *Usage) { u.Goroutines, u.Descriptors = 30, 10 }, false},
		"one more goroutine":  {func(u *Usage) { u.Goroutines++ }, true},
		"one more descriptor": {func(u *Usage) { u.Descriptors++ }, true},
		"garbage on the heap": {func(u *Usage) { u.Heap *= 2 }, false},
		"more than garbage":   {func(u *Usage) { u.Heap = 4*u.Heap + heapSlack }, true},
		"more pages, no heap": {func(u *Usage) { u.Resident *= 2 }, false},
	} {
		now := before
		test.change(&now)
		if err := now.more(before); (err != nil) != test.leaks {
			t.Errorf("%s: %v", name, err)
		}
	}
}
