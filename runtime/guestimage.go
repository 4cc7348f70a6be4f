package runtime

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vmruntime/vmruntime/qemu"
)

// guestImage is the kernel and initramfs that container VMs boot, as `make guest` leaves them.
type guestImage struct {
	dir           string
	Arch          string `json:"arch"`
	Kernel        string `json:"kernel"`
	Initramfs     string `json:"initramfs"`
	Cmdline       string `json:"cmdline"`
	KernelRelease string `json:"kernelRelease"`
}

// agentDir holds the agent as a program, for machines that ask for it.
func (g *guestImage) agentDir() string { return filepath.Join(g.dir, "agent") }

func loadGuestImage(dir string) (*guestImage, error) {
	path := filepath.Join(dir, "manifest.json")
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("guest.dir %q: %w; `make guest` builds what belongs there", dir, err)
	}
	g := &guestImage{dir: dir}
	if err := json.Unmarshal(b, g); err != nil {
		return nil, fmt.Errorf("guest.dir %q: manifest.json: %w", dir, err)
	}
	for _, name := range []string{g.Kernel, g.Initramfs} {
		if !filepath.IsLocal(name) {
			return nil, fmt.Errorf("guest.dir %q: manifest.json names %q; it must be a file in the same directory", dir, name)
		}
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return nil, fmt.Errorf("guest.dir %q: %w", dir, err)
		}
	}
	return g, nil
}

// machine is a VM that boots the guest, without what makes it a pod.
func (g *guestImage) machine(accel string) qemu.Machine {
	return qemu.Machine{
		Arch:    g.Arch,
		Accel:   accel,
		Kernel:  filepath.Join(g.dir, g.Kernel),
		Initrd:  filepath.Join(g.dir, g.Initramfs),
		Cmdline: g.Cmdline,
		// For the share of directories, for memory, and for the balloon.
		HotplugPorts: 3,
	}
}
