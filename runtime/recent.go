package runtime

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const (
	// recentAge is how old a guest's figures may be in a list. Several may ask for lists at the same time, such as the kubelet's parts; `crictl stats`
	// compares two that are a second apart.
	recentAge = 500 * time.Millisecond
	// lateAge is how old they may be when the guest does not answer in time.
	lateAge = time.Minute
	// lateTimeout bounds the wait for an answer that nobody waits for any more. As long as it runs the guest is not asked again.
	lateTimeout = 30 * time.Second
)

// recent is what a guest has told last.
type recent struct {
	mu     sync.Mutex
	last   *agentpb.StatsResponse
	at     time.Time
	asking chan struct{} // closed when the question that is being asked is over; nil if none is
}

// of gives the figures if they are no older than that and have all the containers.
func (r *recent) of(containers []string, age time.Duration) (*agentpb.StatsResponse, time.Time, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil || time.Since(r.at) > age {
		return nil, time.Time{}, false
	}
	for _, id := range containers {
		if !slices.ContainsFunc(r.last.GetContainers(), func(s *agentpb.ContainerStats) bool { return s.GetId() == id }) {
			return nil, time.Time{}, false
		}
	}
	return r.last, r.at, true
}

func (r *recent) set(resp *agentpb.StatsResponse) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last, r.at = resp, time.Now()
}

// recentStats gives figures of the guest that are recent and have the containers. It asks for others if there are none, and gives older ones
// if they do not come in time.
func (g *guest) recentStats(ctx context.Context, containers []string) (*agentpb.StatsResponse, time.Time) {
	if resp, at, ok := g.recent.of(containers, recentAge); ok {
		return resp, at
	}
	select {
	case <-g.askOnce():
	case <-ctx.Done():
	}
	resp, at, _ := g.recent.of(nil, lateAge)
	return resp, at
}

// askOnce asks the guest, unless it is being asked. The channel is closed when that is over.
func (g *guest) askOnce() <-chan struct{} {
	r := &g.recent
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.asking != nil {
		return r.asking
	}
	asked := make(chan struct{})
	r.asking = asked
	g.owned.Go(func() {
		ctx, cancel := context.WithTimeout(g.ctx, lateTimeout)
		defer cancel()
		g.askContainers(ctx, false)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.asking = nil
		close(asked)
	})
	return asked
}
