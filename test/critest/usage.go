package critest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
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

// heapSlack is what may be on the heap beyond twice the first round's: garbage is collected when it has doubled.
const heapSlack = 16 << 20

// Settle waits until the daemon holds no more goroutines and descriptors than before, and fails when it goes on holding
// them, or has more memory than garbage explains. The first time, before is the zero value.
func Settle(ctx context.Context, n *node.Node, before Usage) (Usage, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		now, err := usage(ctx, n.MetricsSocket())
		if err != nil || before == (Usage{}) {
			return now, err
		}
		if err = now.more(before); err == nil {
			return now, nil
		}
		select {
		case <-ctx.Done():
			return now, err
		case <-time.After(100 * time.Millisecond):
		}
	}
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
func usage(ctx context.Context, socket string) (u Usage, err error) {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://vmruntime/metrics", nil)
	if err != nil {
		return u, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return u, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return u, fmt.Errorf("GET /metrics: %s", resp.Status)
	}
	wanted := map[string]*int64{
		"go_goroutines": &u.Goroutines, "process_open_fds": &u.Descriptors,
		"go_memstats_heap_inuse_bytes": &u.Heap, "process_resident_memory_bytes": &u.Resident,
	}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if field, ok := wanted[name]; ok {
			number, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return u, fmt.Errorf("metric %s: %w", name, err)
			}
			*field = int64(number)
			delete(wanted, name)
		}
	}
	if len(wanted) > 0 {
		var missing []string
		for name := range wanted {
			missing = append(missing, name)
		}
		slices.Sort(missing)
		return u, fmt.Errorf("the daemon's metrics lack %s", strings.Join(missing, ", "))
	}
	return u, lines.Err()
}
