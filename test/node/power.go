package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// powerOffTimeout is how long killed processes may take to be gone.
const powerOffTimeout = 20 * time.Second

// PowerOff kills every process of the node and takes away what does not outlive a machine that is switched off:
// mounts, cgroups, network links, packet filters, and what lies in directories that are on tmpfs elsewhere. Other
// daemons than the node's own must have ended.
func (n *Node) PowerOff(ctx context.Context) error {
	if err := errors.Join(n.vmruntime.Kill(), n.containerd.Kill()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, powerOffTimeout)
	defer cancel()
	for {
		r := resources{}
		if err := errors.Join(r.addProcesses(n.Root), r.addMounts(n.Root)); err != nil {
			return err
		}
		lines := slices.Sorted(maps.Keys(r))
		err := errors.Join(clean(n.Root, lines), n.removeCgroups()) // which a process that is ending keeps
		if len(lines) == 0 && err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("still there after the power was switched off: %w\n  %s", ctx.Err(), strings.Join(lines, "\n  ")), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
	return errors.Join(n.netns.do(clearNetwork), empty(n.path("run")), empty(n.path("containerd", "state")))
}

// PowerOn starts the daemons after PowerOff.
func (n *Node) PowerOn(ctx context.Context) error {
	if err := n.StartContainerd(ctx); err != nil || n.options.VMRuntime == "" {
		return err
	}
	return n.StartVMRuntime(ctx)
}

// clearNetwork removes links and packet filters.
func clearNetwork() error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Attrs().Name == "lo" {
			continue
		}
		var gone netlink.LinkNotFoundError // one end of a pair goes with the other
		if err := netlink.LinkDel(l); err != nil && !errors.As(err, &gone) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove link %s: %w", l.Attrs().Name, err)
		}
	}
	if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
		return fmt.Errorf("nft flush ruleset: %w\n%s", err, out)
	}
	return nil
}

// empty removes what is in a directory.
func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}
