package guest

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// Standby does what needs no pod yet of what every pod needs.
func (s *Server) Standby(ctx context.Context, req *agentpb.StandbyRequest) (*agentpb.Empty, error) {
	s.sandbox.Lock()
	defer s.sandbox.Unlock()
	if s.configured.Load() {
		return nil, fmt.Errorf("the guest is a pod already: %w", errdefs.ErrFailedPrecondition)
	}
	ctx = context.WithoutCancel(ctx)
	for _, do := range []func() error{
		func() error { return s.bindAnew(true) },
		func() error { return s.mountScratch(ctx, req.ScratchDisk) },
		func() error { return s.mountShm(req.ShmSizeBytes) },
		func() error { return s.writeSandboxFiles(&agentpb.ConfigureSandboxRequest{}) },
		func() error { return s.keepPrepared(ctx) },
		s.standbyExec,
	} {
		if err := do(); err != nil {
			return nil, fmt.Errorf("stand by: %w", err)
		}
	}
	return &agentpb.Empty{}, nil
}

// keepPrepared has a crun wait, unless one does.
func (s *Server) keepPrepared(ctx context.Context) error {
	s.mu.Lock()
	there := s.prepared != nil
	s.mu.Unlock()
	if there {
		return nil
	}
	return s.prepareRun(ctx)
}

// standbyExec has a crun wait for the pod's first exec at once, if an exec has been rehearsed: beside the start of the pod's container it would be
// in its way.
func (s *Server) standbyExec() error {
	if !s.hasRunExec() {
		return nil
	}
	return s.bringExec()
}
