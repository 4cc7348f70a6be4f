package images

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/vmruntime/vmruntime/test/tools"
)

// A disk is made once from its sources and packages and kept in tools.CacheDir(), below "disks". Its name there
// holds a hash of what it is made of: the sources in this package and the versions of the packages.
type disk struct {
	name     string
	suffix   string                               // of the file: ".qcow2", ".raw" or, for a directory, ""
	packages []string                             // whose versions decide the content
	sources  []string                             // of this package, and directories of them
	make     func(d *diskBuild, out string) error // writes out
}

// The disks that can be made.
const (
	TinyDisk    = "tiny"        // qcow2 of a small system that boots fast, see tiny/init
	TinyRaw     = "tiny-raw"    // the same with Debian's full kernel, raw; takes longer to boot
	TinyKernel  = "tiny-kernel" // a directory with its kernel (vmlinuz) and initramfs (initrd)
	DebianRoot  = "debian-root" // tar archive of Debian 12's files, from packages
	DebianDisk  = "debian"      // qcow2 of Debian 12 as a cloud image has it
	FioDisk     = "fio"         // qcow2 of the tiny system with fio
	BackingDisk = "backing"     // qcow2 whose header names a backing file
)

// DiskNames lists the disks.
func DiskNames() []string {
	var names []string
	for _, d := range disks() {
		names = append(names, d.name)
	}
	return names
}

func disks() []disk {
	tiny := []string{"disk_layout.go", "disk_tiny.go", "tiny"}
	return []disk{
		{name: TinyKernel, packages: tinyPackages(), sources: tiny, make: makeTinyKernel},
		{name: TinyRaw, suffix: ".raw", packages: append(tinyPackages(), bootPackages()...), sources: tiny, make: makeTinyRaw},
		{name: TinyDisk, suffix: ".qcow2", packages: append(tinyPackages(), bootPackages()...), sources: tiny, make: makeTinyDisk},
		{name: FioDisk, suffix: ".qcow2", packages: append(tinyPackages(), append(bootPackages(), "fio")...), sources: append(tiny, "disk_fio.go"), make: makeFioDisk},
		{name: DebianRoot, suffix: ".tar", packages: debianPackages(), sources: []string{"disk_bootstrap.go"}, make: makeDebianRoot},
		{
			name: DebianDisk, suffix: ".qcow2", packages: append(debianPackages(), bootPackages()...),
			sources: []string{"disk_bootstrap.go", "disk_layout.go", "disk_debian.go"}, make: makeDebianDisk,
		},
		{name: BackingDisk, suffix: ".qcow2", sources: tiny, make: makeBackingDisk},
	}
}

// Disk gives the path of a disk in the cache, where it is made unless it is there. Nobody may write to it. Making a
// disk needs root, for the owners of its files, and amd64.
func Disk(name string) (string, error) {
	for _, d := range disks() {
		if d.name == name {
			return d.path()
		}
	}
	return "", fmt.Errorf("disk %q is unknown, want one of %s", name, strings.Join(DiskNames(), ", "))
}

func (d disk) path() (string, error) {
	if arch() != "amd64" {
		return "", fmt.Errorf("disk %q: test disks are made on amd64 only, this is %s", d.name, arch())
	}
	key, err := d.key()
	if err != nil {
		return "", fmt.Errorf("disk %q: %w", d.name, err)
	}
	dir := filepath.Join(tools.CacheDir(), "disks")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, d.name+"-"+key+d.suffix)
	unlock, err := lockFile(filepath.Join(dir, d.name+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("disk %q: making it needs root, for the owners of the files in it", d.name)
	}
	if err := d.build(dir, path); err != nil {
		return "", fmt.Errorf("make disk %q: %w", d.name, err)
	}
	return path, d.removeOlder(dir, path)
}

// build makes the disk aside and moves it into place.
func (d disk) build(dir, path string) error {
	tmp, err := os.MkdirTemp(dir, d.name+"-make-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, "out"+d.suffix)
	b := &diskBuild{dir: tmp}
	if err := d.make(b, out); err != nil {
		return err
	}
	return os.Rename(out, path)
}

// removeOlder removes what earlier sources and packages made.
func (d disk) removeOlder(dir, path string) error {
	const hash = "????????????????"
	olds, err := filepath.Glob(filepath.Join(dir, d.name+"-"+hash+d.suffix))
	if err != nil {
		return err
	}
	var errs []error
	for _, old := range olds {
		if old != path {
			errs = append(errs, os.RemoveAll(old))
		}
	}
	return errors.Join(errs...)
}

// sources decide what a disk is made like.
//
//go:embed disk_bootstrap.go disk_layout.go disk_tiny.go disk_debian.go disk_fio.go tiny
var sources embed.FS

// key hashes what decides the disk's content.
func (d disk) key() (string, error) {
	h := sha256.New()
	for _, source := range d.sources {
		err := fs.WalkDir(sources, source, func(name string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			data, err := sources.ReadFile(name)
			fmt.Fprintf(h, "%s %d\n%s", name, len(data), data)
			return err
		})
		if err != nil {
			return "", err
		}
	}
	versions, err := packageVersions(d.packages)
	if err != nil {
		return "", err
	}
	io.WriteString(h, versions) //nolint:errcheck // a hash takes everything
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

// packageVersions is what apt would install of the packages. Dependencies are not followed: that costs a simulated
// installation at every use of a disk.
func packageVersions(packages []string) (string, error) {
	if len(packages) == 0 {
		return "", nil
	}
	out, err := exec.Command("apt-cache", append([]string{"show", "--no-all-versions"}, packages...)...).Output()
	if err != nil {
		return "", fmt.Errorf("apt knows not all of the packages %s, run `apt-get update`: %w", strings.Join(packages, " "), err)
	}
	var versions strings.Builder
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "Package: ") || strings.HasPrefix(line, "Version: ") {
			versions.WriteString(line)
		}
	}
	return versions.String(), nil
}

// diskBuild is where one disk is made.
type diskBuild struct{ dir string }

func (b *diskBuild) path(elem ...string) string {
	return filepath.Join(append([]string{b.dir}, elem...)...)
}

// run runs a program of the machine; input is what it reads.
func (b *diskBuild) run(input, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Stdin = b.dir, strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w (test/tools/install-deps.sh installs it)\n%s", cmd, err, out)
	}
	return nil
}

// lockFile waits for an exclusive lock on a file and returns how to let it go.
func lockFile(name string) (func(), error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}
