package cluster

import (
	"context"
	"errors"
)

// Reboot does what switching the machine off and on does: every process of the node is killed, its mounts, network
// links, packet filters, cgroups and what lies below /run are gone, and then all starts again. Disks stay.
func (c *Cluster) Reboot(ctx context.Context) error {
	var errs []error
	for _, name := range stopOrder() {
		errs = append(errs, c.daemons[name].Kill())
	}
	if err := errors.Join(append(errs, c.node.PowerOff(ctx))...); err != nil {
		return err
	}
	if err := c.node.PowerOn(ctx); err != nil {
		return err
	}
	if err := c.node.Do(setUpNetwork); err != nil {
		return err
	}
	return c.startAll(ctx)
}
