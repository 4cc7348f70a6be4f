package image

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// refs records on disk which owner uses which keys. The caller locks.
type refs struct {
	dir string
	by  map[string]map[string]bool // owner -> keys
}

// loadRefs reads dir. Names that are no keys are left alone and mean nothing.
func loadRefs(dir string) (refs, error) {
	r := refs{dir: dir, by: map[string]map[string]bool{}}
	owners, err := os.ReadDir(dir)
	if err != nil {
		return r, fmt.Errorf("read owners of images: %w", err)
	}
	for _, o := range owners {
		keys, err := os.ReadDir(filepath.Join(dir, o.Name()))
		if err != nil {
			return r, fmt.Errorf("read images of owner %s: %w", o.Name(), err)
		}
		r.by[o.Name()] = map[string]bool{}
		for _, k := range keys {
			if keyFormat.MatchString(k.Name()) {
				r.by[o.Name()][k.Name()] = true
			}
		}
	}
	return r, nil
}

// add records that owner uses key. It reports whether that is new.
func (r refs) add(owner, key string) (bool, error) {
	if r.by[owner][key] {
		return false, nil
	}
	dir := filepath.Join(r.dir, owner)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return false, fmt.Errorf("record owner %s of image: %w", owner, err)
	}
	err := os.WriteFile(filepath.Join(dir, key), nil, 0o600)
	if err := errors.Join(err, syncDir(dir), syncDir(r.dir)); err != nil {
		return false, fmt.Errorf("record owner %s of image: %w", owner, err)
	}
	if r.by[owner] == nil {
		r.by[owner] = map[string]bool{}
	}
	r.by[owner][key] = true
	return true, nil
}

// drop forgets one key of owner, and the owner with its last key. It reports
// whether the owner is gone.
func (r refs) drop(owner, key string) (bool, error) {
	delete(r.by[owner], key)
	if err := removeIfThere(filepath.Join(r.dir, owner, key)); err != nil {
		return false, fmt.Errorf("forget owner %s of image: %w", owner, err)
	}
	if len(r.by[owner]) > 0 {
		return false, nil
	}
	return true, r.dropOwner(owner)
}

// dropOwner forgets all keys of owner.
func (r refs) dropOwner(owner string) error {
	if err := os.RemoveAll(filepath.Join(r.dir, owner)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget owner %s of images: %w", owner, err)
	}
	delete(r.by, owner)
	return nil
}

// owners lists all owners.
func (r refs) owners() []string { return slices.Sorted(maps.Keys(r.by)) }

// owns reports whether owner uses anything.
func (r refs) owns(owner string) bool { return len(r.by[owner]) > 0 }

// used reports whether anyone uses key.
func (r refs) used(key string) bool {
	for _, keys := range r.by {
		if keys[key] {
			return true
		}
	}
	return false
}
