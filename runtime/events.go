package runtime

import (
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// eventBacklog is how many events a subscriber may lag behind. One that lags further loses its stream, so
// that the kubelet lists again instead of missing one.
const eventBacklog = 1000

type eventHub struct {
	// order is held from an event's time until it is published, so that times never go back.
	order sync.Mutex
	mu    sync.Mutex
	subs  map[chan *runtimeapi.ContainerEventResponse]struct{}
}

func (h *eventHub) subscribe() (chan *runtimeapi.ContainerEventResponse, func()) {
	ch := make(chan *runtimeapi.ContainerEventResponse, eventBacklog)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.subs == nil {
		h.subs = make(map[chan *runtimeapi.ContainerEventResponse]struct{})
	}
	h.subs[ch] = struct{}{}
	return ch, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.subs, ch)
	}
}

func (h *eventHub) idle() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subs) == 0
}

func (h *eventHub) publish(ev *runtimeapi.ContainerEventResponse) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ch := range h.subs {
		select {
		case ch <- ev:
		default:
			delete(h.subs, ch)
			close(ch)
		}
	}
}

// GetContainerEvents streams what happens to VM pods and their containers from now on.
func (rt *Runtime) GetContainerEvents(_ *runtimeapi.GetEventsRequest, stream grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	events, cancel := rt.events.subscribe()
	defer cancel()
	for {
		select {
		case ev, ok := <-events:
			if !ok {
				return fmt.Errorf("the reader lags more than %d events behind: %w", eventBacklog, errdefs.ErrResourceExhausted)
			}
			if err := stream.Send(ev); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		case <-rt.ctx.Done():
			return fmt.Errorf("the runtime is stopping: %w", errdefs.ErrUnavailable)
		}
	}
}

func (rt *Runtime) podEvent(p *pod, kind runtimeapi.ContainerEventType) {
	rt.event(p, p.id, kind)
}

func (rt *Runtime) containerEvent(c *container, kind runtimeapi.ContainerEventType) {
	rt.event(c.pod, c.id, kind)
}

func (rt *Runtime) event(p *pod, id string, kind runtimeapi.ContainerEventType) {
	if rt.events.idle() {
		return
	}
	rt.events.order.Lock()
	defer rt.events.order.Unlock()
	ev := &runtimeapi.ContainerEventResponse{
		ContainerId:        id,
		ContainerEventType: kind,
		CreatedAt:          time.Now().UnixNano(),
		PodSandboxStatus:   p.criStatus(),
		ContainersStatuses: p.containerStatuses(),
	}
	rt.events.publish(ev)
}
