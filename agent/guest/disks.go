package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// bootDeviceTimeout is as long as a guest may take to see the devices that it boots with: one that is emulated on a busy node
	// takes a quarter of a minute.
	bootDeviceTimeout = time.Minute
	// plugTimeout is the same for a device that was plugged, in a guest that has booted.
	plugTimeout = 10 * time.Second
	devicePoll  = 5 * time.Millisecond
)

// findDisk gives the device path of the disk with the given serial, SCSI or virtio-blk. It waits for one that is not
// there yet, but not longer than the limit.
func findDisk(ctx context.Context, serial string, limit time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var dev string
	err := poll(ctx, devicePoll, func() (bool, error) {
		var err error
		dev, err = lookupDisk("/sys/block", serial)
		if err != nil || dev == "" {
			return false, err
		}
		f, err := os.Open(dev) // sysfs tells of a disk a moment before it can be used
		if err != nil {
			return false, nil
		}
		return true, f.Close()
	})
	if err != nil {
		return "", fmt.Errorf("disk %q: no such serial among the guest's disks: %w: %w", serial, err, errdefs.ErrNotFound)
	}
	return dev, nil
}

func lookupDisk(sysBlock, serial string) (string, error) {
	entries, err := os.ReadDir(sysBlock)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if diskSerial(filepath.Join(sysBlock, e.Name())) == serial {
			return "/dev/" + e.Name(), nil
		}
	}
	return "", nil
}

func diskSerial(dir string) string {
	if page, err := os.ReadFile(filepath.Join(dir, "device/vpd_pg80")); err == nil && len(page) > 4 {
		// Four bytes of header, then the number, padded with blanks.
		return string(bytes.TrimSpace(bytes.TrimRight(page[4:], "\x00")))
	}
	b, err := os.ReadFile(filepath.Join(dir, "serial"))
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

// poll asks until the answer is yes, an error, or ctx ends.
func poll(ctx context.Context, every time.Duration, ask func() (bool, error)) error {
	for {
		ok, err := ask()
		if err != nil || ok {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(every):
		}
	}
}

// imageMounts mounts each EROFS disk once at each place, however many containers use it.
type imageMounts struct {
	mount func(dev, target string) error

	mu   sync.Mutex
	used map[string]*imageMount // by mount point
}

type imageMount struct {
	disk  string
	users int
}

func (m *imageMounts) acquire(ctx context.Context, target, disk string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if have, ok := m.used[target]; ok {
		if have.disk != disk {
			return fmt.Errorf("mount of disk %q at %s: disk %q is mounted there: %w", disk, target, have.disk, errdefs.ErrAlreadyExists)
		}
		have.users++
		return nil
	}
	dev, err := findDisk(ctx, disk, plugTimeout)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := m.mount(dev, target); err != nil {
		return fmt.Errorf("mount EROFS of disk %q (%s) at %s: %w", disk, dev, target, err)
	}
	m.used[target] = &imageMount{disk: disk, users: 1}
	return nil
}

// mountImage mounts an EROFS disk as the pod's containers are to see it.
func (s *Server) mountImage(dev, target string) error {
	if ns := s.userns.Load(); ns != nil {
		return ns.mountImage(dev, target)
	}
	return unix.Mount(dev, target, "erofs", unix.MS_RDONLY|unix.MS_NODEV, "")
}

func (m *imageMounts) release(target string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	have, ok := m.used[target]
	if !ok {
		return nil
	}
	if have.users--; have.users > 0 {
		return nil
	}
	delete(m.used, target)
	return unmountDir(target)
}

// unmountDir unmounts a directory and removes it. What is not mounted or not there is no error.
func unmountDir(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
