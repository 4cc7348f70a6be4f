package state

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
)

// Names reserves the names of sandboxes or containers, so that a request that is repeated while the first still runs
// cannot make a second one.
type Names struct {
	mu      sync.Mutex
	holders map[string]string
}

// NewNames makes an empty set of reservations.
func NewNames() *Names {
	return &Names{holders: make(map[string]string)}
}

// Reserve gives a name to an ID until it is released. A name that another ID holds is ErrAlreadyExists.
func (n *Names) Reserve(name, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if holder, held := n.holders[name]; held && holder != id {
		return fmt.Errorf("name %q is reserved for %s: %w", name, holder, errdefs.ErrAlreadyExists)
	}
	n.holders[name] = id
	return nil
}

// Release gives a name back if the ID holds it. Repeating it changes nothing.
func (n *Names) Release(name, id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.holders[name] == id {
		delete(n.holders, name)
	}
}
