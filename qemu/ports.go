package qemu

import "context"

// What VM.PortOpen asks for: the port of our agent and that of qemu-guest-agent.
const (
	AgentPort      = "agent"
	GuestAgentPort = "guestagent"
)

// PortOpen tells whether a program in the guest has a virtio-serial port open: AgentPort or GuestAgentPort. A port that the machine
// does not have is not open.
func (v *VM) PortOpen(ctx context.Context, port string) (bool, error) {
	var list []struct {
		Label string `json:"label"`
		Open  bool   `json:"frontend-open"`
	}
	if err := v.mon.Execute(ctx, "query-chardev", nil, &list); err != nil {
		return false, err
	}
	for _, c := range list {
		if c.Label == port {
			return c.Open, nil
		}
	}
	return false, nil
}
