package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	erofsSuffix   = ".erofs"
	scratchSuffix = ".ext4"
	findingSuffix = ".json"
)

var (
	nameFormat = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	keyFormat  = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// dirs names every file of the store.
//
//	images/KEY.erofs      root file systems; KEY is the hex part of a chain ID
//	owners/OWNER/KEY      empty; OWNER uses KEY
//	scratch/POD.ext4      scratch disks
//	templates/NAME.ext4   empty scratch disks to copy from
//	disks/KEY.json        what was found when an image was looked through for disks
//	views/KEY/            where the view of an image with a disk is mounted
//	viewers/OWNER/KEY     empty; OWNER uses the view of KEY
//	machines/OWNER/       files of a machine VM: its overlay and whatever else is its own
//	tmp/                  what is being made; emptied by New
type dirs struct{ root string }

func (d dirs) images() string    { return filepath.Join(d.root, "images") }
func (d dirs) owners() string    { return filepath.Join(d.root, "owners") }
func (d dirs) scratch() string   { return filepath.Join(d.root, "scratch") }
func (d dirs) templates() string { return filepath.Join(d.root, "templates") }
func (d dirs) disks() string     { return filepath.Join(d.root, "disks") }
func (d dirs) views() string     { return filepath.Join(d.root, "views") }
func (d dirs) viewers() string   { return filepath.Join(d.root, "viewers") }
func (d dirs) machines() string  { return filepath.Join(d.root, "machines") }
func (d dirs) tmp() string       { return filepath.Join(d.root, "tmp") }

func (d dirs) erofs(key string) string       { return filepath.Join(d.images(), key+erofsSuffix) }
func (d dirs) finding(key string) string     { return filepath.Join(d.disks(), key+findingSuffix) }
func (d dirs) view(key string) string        { return filepath.Join(d.views(), key) }
func (d dirs) machine(owner string) string   { return filepath.Join(d.machines(), owner) }
func (d dirs) scratchDisk(pod string) string { return filepath.Join(d.scratch(), pod+scratchSuffix) }

// prepare makes the directories and clears tmp.
func (d dirs) prepare() error {
	for _, dir := range []string{
		d.root, d.images(), d.owners(), d.scratch(), d.templates(), d.tmp(),
		d.disks(), d.views(), d.viewers(), d.machines(),
	} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make directory of the image store: %w", err)
		}
	}
	entries, err := os.ReadDir(d.tmp())
	if err != nil {
		return fmt.Errorf("sweep image store: %w", err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, removeTmp(filepath.Join(d.tmp(), e.Name()), e.IsDir()))
	}
	return errors.Join(errs...)
}

// removeTmp removes one left-over. A directory is a mount point, and what may
// still be mounted there is not ours to delete: it is unmounted, then removed
// only if empty.
func removeTmp(path string, dir bool) error {
	if dir {
		if err := mount.UnmountAll(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("sweep mount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("sweep image store: %w", err)
	}
	return nil
}

// keyOf returns the name of the EROFS file for a chain ID. An image without
// layers has an empty chain ID.
func keyOf(chain digest.Digest) string {
	if chain == "" {
		return digest.FromString("").Encoded()
	}
	if chain.Algorithm() != digest.SHA256 {
		return digest.FromString(chain.String()).Encoded()
	}
	return chain.Encoded()
}

// serialOf returns the disk serial for a key: 20 characters, 64 bits of the digest.
func serialOf(key string) string { return "img-" + key[:16] }

// checkName refuses names that are not fit to be one file name.
func checkName(what, name string) error {
	if nameFormat.MatchString(name) {
		return nil
	}
	return fmt.Errorf("%s is %q, want 1 to 128 letters, digits, '.', '_' or '-': %w", what, name, errdefs.ErrInvalidArgument)
}

// imageKeys lists the keys of all EROFS files and findings.
func (d dirs) imageKeys() ([]string, error) {
	built, err := listNames(d.images(), erofsSuffix)
	if err != nil {
		return nil, err
	}
	found, err := listNames(d.disks(), findingSuffix)
	if err != nil {
		return nil, err
	}
	keys := append(built, found...)
	slices.Sort(keys)
	return slices.Compact(keys), nil
}

// listNames lists the files of dir that end in suffix, without the suffix.
func listNames(dir, suffix string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), suffix); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

// syncDir makes renames and removals in dir durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// removeIfThere removes a file; that it is gone already is fine.
func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
