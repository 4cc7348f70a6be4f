// Package state keeps durable records: one directory for each, with an immutable spec written once and a small
// status that is replaced as a whole.
//
//	ROOT/ID/spec.json    what was decided when the record was made
//	ROOT/ID/status.json  what happened since
//	ROOT/.new-ID         a record that is being made
//	ROOT/.gone-ID        a record that is being removed
//
// Invariants:
//   - A record is there with both files, or it is not there: it appears and goes by one rename.
//   - What Status tells is on disk: Update writes, syncs, and only then publishes.
//   - What is published is what the disk's bytes say, so a reload gives the same values. Fields that JSON does not carry
//     do not survive an Update.
//   - Published values are never changed. Readers share them without a lock and must not change what they
//     point to.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

const (
	specFile   = "spec.json"
	statusFile = "status.json"
	newPrefix  = ".new-"
	gonePrefix = ".gone-"

	// loadParallel bounds how many records are read at once.
	loadParallel = 16
	// maxFileBytes bounds one file of a record; a gRPC message, and so a CRI config, has at most 16 MiB.
	maxFileBytes = 32 << 20
)

// Store is the records below one directory. Its methods may be called at the same time.
type Store[S, T any] struct {
	root string

	// mu guards the index; it is never held while the disk is written.
	mu      sync.RWMutex
	ids     []string // sorted
	records map[string]*Record[S, T]
	// making holds the IDs of which a record is being made.
	making map[string]bool
}

// Broken is a record that cannot be read. Remove takes it away.
type Broken struct {
	ID  string
	Err error
}

// Open makes the directory if it is missing. The store knows no records until Load.
func Open[S, T any](root string) (*Store[S, T], error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of records: %w", err)
	}
	return &Store[S, T]{root: root, records: make(map[string]*Record[S, T]), making: make(map[string]bool)}, nil
}

// Load reads all records and takes away what a crash left half made or half removed. What cannot be read is
// reported apart and not known to the store. It is called once, before any other method.
func (s *Store[S, T]) Load() ([]*Record[S, T], []Broken, error) {
	names, err := s.sweep()
	if err != nil {
		return nil, nil, err
	}
	loaded := make([]*Record[S, T], len(names))
	failed := make([]error, len(names))
	var work errgroup.Group
	work.SetLimit(loadParallel)
	for i, id := range names {
		work.Go(func() error {
			loaded[i], failed[i] = load[S, T](filepath.Join(s.root, id), id)
			return nil
		})
	}
	_ = work.Wait() // each record has its own error
	var records []*Record[S, T]
	var broken []Broken
	for i, id := range names {
		if failed[i] != nil {
			broken = append(broken, Broken{ID: id, Err: failed[i]})
			continue
		}
		records = append(records, loaded[i])
		s.add(loaded[i])
	}
	return records, broken, nil
}

// sweep removes what is half made or half removed and returns the names of the rest, sorted.
func (s *Store[S, T]) sweep() ([]string, error) {
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var names []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
			continue
		}
		if strings.HasPrefix(e.Name(), newPrefix) || strings.HasPrefix(e.Name(), gonePrefix) {
			if err := os.RemoveAll(filepath.Join(s.root, e.Name())); err != nil {
				return nil, fmt.Errorf("remove a half-made record: %w", err)
			}
		}
	}
	return names, nil
}

// load reads one record. Temporary files of an interrupted Update are removed.
func load[S, T any](dir, id string) (*Record[S, T], error) {
	r := &Record[S, T]{id: id, dir: dir}
	spec, err := readBounded(filepath.Join(dir, specFile))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(spec, &r.spec); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, specFile), err)
	}
	if r.raw, err = readBounded(filepath.Join(dir, statusFile)); err != nil {
		return nil, err
	}
	var status T
	if err := json.Unmarshal(r.raw, &status); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, statusFile), err)
	}
	r.status.Store(&status)
	return r, removeTemporary(dir)
}

func removeTemporary(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "."+statusFile) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFileBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes: %w", path, maxFileBytes, errdefs.ErrOutOfRange)
	}
	return b, nil
}

// Create makes a record, durable when it returns. The ID must be new, and good as a file's name: ErrAlreadyExists,
// ErrInvalidArgument.
func (s *Store[S, T]) Create(id string, spec S, status T) (*Record[S, T], error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	if err := s.reserve(id); err != nil {
		return nil, err
	}
	defer s.release(id)
	tmp, dir := filepath.Join(s.root, newPrefix+id), filepath.Join(s.root, id)
	if err := writeRecord(tmp, spec, status); err != nil {
		return nil, errors.Join(fmt.Errorf("write record %s: %w", id, err), os.RemoveAll(tmp))
	}
	r, err := load[S, T](tmp, id)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("record %s does not read back: %w", id, err), os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, dir); err != nil {
		return nil, errors.Join(fmt.Errorf("publish record %s: %w", id, err), os.RemoveAll(tmp))
	}
	if err := syncDir(s.root); err != nil {
		return nil, errors.Join(err, s.discard(id))
	}
	r.dir = dir
	s.add(r)
	return r, nil
}

func checkID(id string) error {
	if id == "" || strings.HasPrefix(id, ".") || filepath.Base(id) != id || len(id) > 200 {
		return fmt.Errorf("record ID %q must be the name of a file, at most 200 bytes and not beginning with a dot: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *Store[S, T]) reserve(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.making[id] || s.records[id] != nil {
		return fmt.Errorf("record %s: %w", id, errdefs.ErrAlreadyExists)
	}
	s.making[id] = true
	return nil
}

func (s *Store[S, T]) release(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.making, id)
}

func writeRecord(dir string, spec, status any) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(dir, specFile), spec); err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(dir, statusFile), status); err != nil {
		return err
	}
	return syncDir(dir)
}

func writeSynced(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Get finds a record by its whole ID, or returns ErrNotFound.
func (s *Store[S, T]) Get(id string) (*Record[S, T], error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if r := s.records[id]; r != nil {
		return r, nil
	}
	return nil, fmt.Errorf("no record %q: %w", id, errdefs.ErrNotFound)
}

// List returns all records, ordered by ID.
func (s *Store[S, T]) List() []*Record[S, T] {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]*Record[S, T], len(s.ids))
	for i, id := range s.ids {
		out[i] = s.records[id]
	}
	return out
}

// Find returns the one ID that begins with the prefix; a whole ID is always found. None is ErrNotFound, several
// are ErrInvalidArgument.
func (s *Store[S, T]) Find(prefix string) (string, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if prefix == "" {
		return "", fmt.Errorf("the ID is empty; it must be an ID or the beginning of one: %w", errdefs.ErrNotFound)
	}
	i, exact := slices.BinarySearch(s.ids, prefix)
	switch {
	case exact:
		return prefix, nil
	case i == len(s.ids) || !strings.HasPrefix(s.ids[i], prefix):
		return "", fmt.Errorf("no record begins with %q: %w", prefix, errdefs.ErrNotFound)
	case i+1 < len(s.ids) && strings.HasPrefix(s.ids[i+1], prefix):
		return "", fmt.Errorf("%q is ambiguous: it begins %s and %s; give more of the ID: %w", prefix, s.ids[i], s.ids[i+1], errdefs.ErrInvalidArgument)
	}
	return s.ids[i], nil
}

// Remove forgets a record and takes it off the disk; an unknown ID succeeds, a broken record goes too. An Update
// that comes later fails with ErrNotFound. After an error the record is as it was or gone, and Remove may be repeated.
func (s *Store[S, T]) Remove(id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	s.mu.RLock()
	r := s.records[id]
	s.mu.RUnlock()
	if r != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.removed {
			return nil
		}
	}
	if err := s.discard(id); err != nil {
		return fmt.Errorf("remove record %s: %w", id, err)
	}
	if r != nil {
		r.removed = true
		s.drop(id)
	}
	return nil
}

// discard takes a record's directory away: out of sight by one rename, then piece by piece.
func (s *Store[S, T]) discard(id string) error {
	gone := filepath.Join(s.root, gonePrefix+id)
	if err := os.RemoveAll(gone); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(s.root, id), gone); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	if err := syncDir(s.root); err != nil {
		return err
	}
	return os.RemoveAll(gone)
}

func (s *Store[S, T]) add(r *Record[S, T]) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, found := slices.BinarySearch(s.ids, r.id); !found {
		s.ids = slices.Insert(s.ids, i, r.id)
	}
	s.records[r.id] = r
}

func (s *Store[S, T]) drop(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, found := slices.BinarySearch(s.ids, id); found {
		s.ids = slices.Delete(s.ids, i, i+1)
	}
	delete(s.records, id)
}
