package runtime

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/vmruntime/vmruntime/agent"
)

// A guest that boots lets another one boot when it is its pod, or will not be.
func TestMayBoot(t *testing.T) {
	answers := func(g *guest) { g.publish(&agent.Client{}, nil) }
	fails := func(g *guest) { g.publish(nil, errors.New("no")) }
	ends := func(g *guest) { g.cancel() }
	for name, happens := range map[string]func(*guest){"answers": answers, "fails": fails, "ends": ends} {
		t.Run(name, func(t *testing.T) {
			rt := &Runtime{boots: semaphore.NewWeighted(1)}
			if err := rt.mayBoot(t.Context()); err != nil {
				t.Fatal(err)
			}
			g := &guest{changed: make(chan struct{}), done: make(chan struct{})}
			g.ctx, g.cancel = context.WithCancel(t.Context())
			defer g.cancel()
			rt.whileBooting(g)
			short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := rt.mayBoot(short); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("beside a guest that boots: %v, want a wait", err)
			}
			happens(g)
			if err := rt.mayBoot(t.Context()); err != nil {
				t.Errorf("after it: %v", err)
			}
			rt.whileBooting(nil) // it was not started
			if err := rt.mayBoot(t.Context()); err != nil {
				t.Errorf("after one that was not started: %v", err)
			}
		})
	}
}
