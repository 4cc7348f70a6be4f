package runtime

import (
	"context"
	"testing"
	"time"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// Figures are given again as long as they are recent and have every container.
func TestRecent(t *testing.T) {
	var r recent
	if _, _, ok := r.of(nil, time.Hour); ok {
		t.Error("there are figures before there was an answer")
	}
	r.set(&agentpb.StatsResponse{Containers: []*agentpb.ContainerStats{{Id: "a"}, {Id: "b"}}})
	for _, tc := range []struct {
		name       string
		containers []string
		age        time.Duration
		want       bool
	}{
		{"all containers", []string{"b", "a"}, time.Hour, true},
		{"one that is new", []string{"a", "c"}, time.Hour, false},
		{"too old", []string{"a"}, 0, false},
	} {
		if _, at, ok := r.of(tc.containers, tc.age); ok != tc.want || ok && time.Since(at) > time.Minute {
			t.Errorf("%s: %v, of %s", tc.name, ok, at)
		}
	}
}

// A guest that does not answer is asked once, however many ask, and what it has told last stands in.
func TestAskedOnce(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	g := &guest{ctx: ctx, changed: make(chan struct{}), log: withPods(t).log}
	g.recent.set(&agentpb.StatsResponse{TimeUnixNano: 7})
	g.recent.at = time.Now().Add(-2 * recentAge)
	first := g.askOnce()
	if second := g.askOnce(); second != first {
		t.Error("the guest is asked again before it has answered")
	}
	soon, end := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer end()
	if resp, at := g.recentStats(soon, nil); resp.GetTimeUnixNano() != 7 || time.Since(at) < 2*recentAge {
		t.Errorf("a guest that does not answer gives %v of %s", resp, at)
	}
	cancel()
	<-first
	g.owned.Wait()
	if again := g.askOnce(); again == first {
		t.Error("the guest is not asked again")
	}
	g.owned.Wait()
}
