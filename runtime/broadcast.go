package runtime

import (
	"slices"
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
	// keep is how much of the latest output is kept, in bytes; recent has it, and up to as much again.
	keep   int
	recent []byte
}

// remember keeps some of the output for whoever subscribes later.
func (b *broadcaster) remember(bytes int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.keep = bytes
}

// subscribe returns a channel of all output from now on. It is closed at the container's end, or when the
// reader is too slow.
func (b *broadcaster) subscribe() (ch chan *agentpb.OutputChunk, cancel func()) {
	_, ch, cancel = b.subscribeRecent()
	return ch, cancel
}

// subscribeRecent is subscribe, with what is remembered of the output before.
func (b *broadcaster) subscribeRecent() (recent []byte, ch chan *agentpb.OutputChunk, cancel func()) {
	ch = make(chan *agentpb.OutputChunk, subscriberChunks)
	b.mu.Lock()
	defer b.mu.Unlock()
	recent = slices.Clone(b.recent[max(0, len(b.recent)-b.keep):])
	if b.closed {
		close(ch)
		return recent, ch, func() {}
	}
	if b.subs == nil {
		b.subs = make(map[chan *agentpb.OutputChunk]struct{})
	}
	b.subs[ch] = struct{}{}
	return recent, ch, func() {
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
	if b.keep > 0 {
		b.recent = append(b.recent, chunk.GetData()...)
		if len(b.recent) > 2*b.keep {
			b.recent = append(b.recent[:0], b.recent[len(b.recent)-b.keep:]...)
		}
	}
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
