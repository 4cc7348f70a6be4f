package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/google/renameio/v2"
)

// Record is one durable record.
type Record[S, T any] struct {
	id   string
	dir  string
	spec S

	status atomic.Pointer[T]

	// mu orders changes: one at a time.
	mu      sync.Mutex
	raw     []byte // the status as it is on disk
	removed bool
}

// ID is the record's name.
func (r *Record[S, T]) ID() string { return r.id }

// Spec is what was decided when the record was made. What it points to is shared and must not be changed.
func (r *Record[S, T]) Spec() S { return r.spec }

// Status is what happened since, as last published. What it points to is shared and must not be changed.
func (r *Record[S, T]) Status() T { return *r.status.Load() }

// Update lets change work on a copy of the status, makes the result durable and then publishes it. When change
// fails, or the disk does, the published status stays. A change of nothing writes nothing. A record that was removed is
// ErrNotFound.
func (r *Record[S, T]) Update(change func(*T) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.removed {
		return fmt.Errorf("record %s was removed: %w", r.id, errdefs.ErrNotFound)
	}
	var next T
	if err := json.Unmarshal(r.raw, &next); err != nil {
		return fmt.Errorf("copy the status of %s: %w", r.id, err)
	}
	if err := change(&next); err != nil {
		return err
	}
	raw, err := json.Marshal(next)
	if err != nil {
		return fmt.Errorf("encode the status of %s: %w", r.id, err)
	}
	if bytes.Equal(raw, r.raw) {
		return nil
	}
	var published T
	if err := json.Unmarshal(raw, &published); err != nil {
		return fmt.Errorf("the status of %s does not read back: %w", r.id, err)
	}
	if err := r.persist(raw); err != nil {
		return fmt.Errorf("write the status of %s: %w", r.id, err)
	}
	r.raw = raw
	r.status.Store(&published)
	return nil
}

// persist replaces the status file. When only the directory's sync fails, the former content is put back, so that disk and
// memory do not part.
func (r *Record[S, T]) persist(raw []byte) error {
	path := filepath.Join(r.dir, statusFile)
	if err := replace(path, r.dir, raw); err != nil {
		return err
	}
	if err := syncDir(r.dir); err != nil {
		return errors.Join(err, replace(path, r.dir, r.raw))
	}
	return nil
}

func replace(path, dir string, content []byte) error {
	return renameio.WriteFile(path, content, 0o600, renameio.WithTempDir(dir))
}
