package critest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmruntime/vmruntime/test/node"
)

// Usage is what the daemon itself has of what it may leak, as its metrics tell.
type Usage struct {
	Goroutines, Descriptors, Heap, Resident int64 // the latter two in bytes
}

func (u Usage) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %d KiB of heap, %d KiB resident", u.Goroutines, u.Descriptors, u.Heap>>10, u.Resident>>10)
}

// settleTimeout is how long after the last call the daemon may take to let go of it.
const settleTimeout = 30 * time.Second

// firstSettles is how long the first usage has to stay as it is.
const firstSettles = 3 * time.Second

// heapSlack is what may be on the heap beyond twice the first round's: garbage is collected when it has doubled.
const heapSlack = 16 << 20

// Settle waits until the daemon holds no more goroutines and descriptors than before, and fails when it goes on holding
// them, or has more memory than garbage explains. The first time, when before is the zero value, it waits until they stay as many.
func Settle(ctx context.Context, n *node.Node, before Usage) (Usage, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	first, pause := before == (Usage{}), 100*time.Millisecond
	if first {
		pause = firstSettles
	}
	for {
		now, err := usage(ctx, n)
		if err != nil {
			return now, err
		}
		if err = now.more(before); first {
			err = now.other(before)
			before = now
		}
		if err == nil {
			return now, nil
		}
		select {
		case <-ctx.Done():
			return now, err
		case <-time.After(pause):
		}
	}
}

// other says that there are not as many as before.
func (u Usage) other(before Usage) error {
	if u.Goroutines == before.Goroutines && u.Descriptors == before.Descriptors {
		return nil
	}
	return fmt.Errorf("the daemon has %s, and %s shortly before", u, before)
}

// more says what there is more of than before.
func (u Usage) more(before Usage) error {
	var errs []error
	for _, c := range []struct {
		what             string
		now, before, max int64
	}{
		{"goroutines", u.Goroutines, before.Goroutines, before.Goroutines},
		{"descriptors", u.Descriptors, before.Descriptors, before.Descriptors},
		{"bytes of heap", u.Heap, before.Heap, 2*before.Heap + heapSlack},
	} {
		if c.now > c.max {
			errs = append(errs, fmt.Errorf("the daemon has %d %s, and had %d after the first round", c.now, c.what, c.before))
		}
	}
	return errors.Join(errs...)
}

// usage reads the daemon's metrics.
func usage(ctx context.Context, n *node.Node) (u Usage, err error) {
	metrics, err := n.Metrics(ctx)
	if err != nil {
		return u, err
	}
	for name, field := range map[string]*int64{
		"go_goroutines": &u.Goroutines, "process_open_fds": &u.Descriptors,
		"go_memstats_heap_inuse_bytes": &u.Heap, "process_resident_memory_bytes": &u.Resident,
	} {
		samples := metrics[name].GetMetric()
		if len(samples) != 1 {
			return u, fmt.Errorf("the daemon's metrics have %d samples of %s, want one", len(samples), name)
		}
		*field = int64(samples[0].GetGauge().GetValue())
	}
	return u, nil
}
