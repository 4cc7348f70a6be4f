package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const (
	virtioDevices = "/sys/bus/virtio/devices"
	netDriver     = "/sys/bus/virtio/drivers/virtio_net"
	// keepFree is what Prepare leaves alone of the memory that is free, in bytes: the kernel must not come to need it. To it comes a share
	// of all memory, for page tables and the kernel's watermarks.
	keepFree, keepShare = 24 << 20, 128
)

// Prepare makes the guest ready to be saved.
func (s *Server) Prepare(ctx context.Context, _ *agentpb.PrepareRequest) (*agentpb.Empty, error) {
	s.sandbox.Lock()
	defer s.sandbox.Unlock()
	if err := loadLazy("virtiofs"); err != nil {
		return nil, err
	}
	if err := driversFound(ctx); err != nil {
		return nil, err
	}
	if err := s.prepareRun(ctx); err != nil {
		return nil, err
	}
	return &agentpb.Empty{}, zeroFree()
}

// driversFound waits until each virtio device has its driver: drivers look for their devices side by side.
func driversFound(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootDeviceTimeout)
	defer cancel()
	var waiting string
	err := poll(ctx, devicePoll, func() (bool, error) {
		devices, err := os.ReadDir(virtioDevices)
		for _, d := range devices {
			if _, err := os.Stat(filepath.Join(virtioDevices, d.Name(), "driver")); err != nil {
				waiting = d.Name()
				return false, nil
			}
		}
		return true, err
	})
	if err != nil {
		return fmt.Errorf("device %s has no driver: %w", waiting, err)
	}
	return nil
}

// zeroFree has the kernel clear the pages that nobody uses, by taking and giving back nearly all of them.
func zeroFree() error {
	memory := readMeminfo()
	free := int64(memory["MemFree"]) - keepFree - int64(memory["MemTotal"])/keepShare
	if free <= 0 {
		return nil
	}
	pages, err := unix.Mmap(-1, 0, int(free), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("take free memory: %w", err)
	}
	for at := 0; at < len(pages); at += os.Getpagesize() {
		pages[at] = 0
	}
	return unix.Munmap(pages)
}

// bindAnew finds what the devices of a restored guest lead to now. It is done once: a network that is configured is left
// alone.
func (s *Server) bindAnew(restored bool) error {
	if !restored || s.bound {
		return nil
	}
	if err := scanFirstDisk(); err != nil {
		return err
	}
	nics, err := filepath.Glob(netDriver + "/virtio*")
	if err != nil {
		return err
	}
	for _, file := range []string{"unbind", "bind"} {
		for _, nic := range nics {
			if err := os.WriteFile(filepath.Join(netDriver, file), []byte(filepath.Base(nic)), 0); err != nil {
				return fmt.Errorf("%s %s: %w", file, filepath.Base(nic), err)
			}
		}
	}
	s.bound = true
	return nil
}

// scanFirstDisk looks for the disk that was there when QEMU started: nothing tells the driver of it.
func scanFirstDisk() error {
	hosts, err := filepath.Glob("/sys/class/scsi_host/host*/scan")
	for _, host := range hosts {
		err = errors.Join(err, os.WriteFile(host, []byte("0 0 0"), 0))
	}
	return err
}
