package runtime

import (
	"sync"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// subscriberChunks is how many chunks an attached client may lag behind before it is let go: a reader that
// stands still must not stop the container's log.
const subscriberChunks = 256

// broadcaster gives a container's output to the clients that are attached.
type broadcaster struct {
	mu     sync.Mutex
	subs   map[chan *agentpb.OutputChunk]struct{}
	closed bool
}

// subscribe returns a channel of all output from now on. It is closed at the container's end, or when the
// reader is too slow.
func (b *broadcaster) subscribe() (ch chan *agentpb.OutputChunk, cancel func()) {
	ch = make(chan *agentpb.OutputChunk, subscriberChunks)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		close(ch)
		return ch, func() {}
	}
	if b.subs == nil {
		b.subs = make(map[chan *agentpb.OutputChunk]struct{})
	}
	b.subs[ch] = struct{}{}
	return ch, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.drop(ch)
	}
}

func (b *broadcaster) drop(ch chan *agentpb.OutputChunk) {
	if _, ok := b.subs[ch]; ok {
		delete(b.subs, ch)
		close(ch)
	}
}

func (b *broadcaster) send(chunk *agentpb.OutputChunk) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for ch := range b.subs {
		select {
		case ch <- chunk:
		default:
			b.drop(ch)
		}
	}
}

func (b *broadcaster) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for ch := range b.subs {
		b.drop(ch)
	}
}
