package network

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// InterfaceStats are the counters of one interface since the pod began, as the pod sees them: Rx is what came to it. What
// arrives while no guest runs is lost and not counted, as on a cable that is not plugged in.
type InterfaceStats struct {
	Name                                    string
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// Stats reads the counters of all interfaces, in their order. They are the taps': what the host sends into a tap, the guest
// receives. ErrNotFound when the network is gone.
func (m *Manager) Stats(a *Attachment) ([]InterfaceStats, error) {
	var out []InterfaceStats
	err := inNetNS(a.NetNS, func() error {
		for _, i := range a.Interfaces {
			l, err := netlink.LinkByName(i.Tap)
			if err != nil {
				return fmt.Errorf("tap of %s: %w", i.Name, err)
			}
			s := l.Attrs().Statistics
			if s == nil {
				return fmt.Errorf("tap %s has no counters", i.Tap)
			}
			out = append(out, InterfaceStats{
				Name:    i.Name,
				RxBytes: s.TxBytes, RxPackets: s.TxPackets, RxErrors: s.TxErrors, RxDropped: s.TxDropped,
				TxBytes: s.RxBytes, TxPackets: s.RxPackets, TxErrors: s.RxErrors, TxDropped: s.RxDropped,
			})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the network counters of %s: %w", a.NetNS, err)
	}
	return out, nil
}
