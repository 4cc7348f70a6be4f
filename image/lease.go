package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
)

const (
	leasePrefix = "vmruntime-"
	ownerLabel  = "vmruntime.github.io/owner" // on leases that an owner holds
	buildLabel  = "vmruntime.github.io/build" // on leases of builds
)

// pin keeps containerd's garbage collection away from the image for as long as
// owner's lease is there. The content refers to its snapshots, so they stay too.
func (s *Store) pin(ctx context.Context, owner string, r *resolved) error {
	m := s.opts.Client.LeasesService()
	lease, err := m.Create(ctx, leases.WithID(leasePrefix+owner), leases.WithLabel(ownerLabel, owner))
	if errdefs.IsAlreadyExists(err) {
		lease, err = leases.Lease{ID: leasePrefix + owner}, nil
	}
	if err != nil {
		return fmt.Errorf("create lease for owner %s: %w", owner, err)
	}
	err = m.AddResource(ctx, lease, leases.Resource{ID: r.image.Target.Digest.String(), Type: "content"})
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("lease image %s for owner %s: %w", r.image.Name, owner, err)
	}
	return nil
}

// unpin removes owner's lease.
func (s *Store) unpin(ctx context.Context, owner string) error {
	return s.deleteLease(ctx, leasePrefix+owner)
}

func (s *Store) deleteLease(ctx context.Context, id string, opts ...leases.DeleteOpt) error {
	err := s.opts.Client.LeasesService().Delete(ctx, leases.Lease{ID: id}, opts...)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete lease %s: %w", id, err)
	}
	return nil
}

// buildLease returns a context under a lease that a crash leaves to expire.
func (s *Store) buildLease(ctx context.Context) (context.Context, string, error) {
	id := leasePrefix + "build-" + rand.Text()
	_, err := s.opts.Client.LeasesService().Create(ctx, leases.WithID(id),
		leases.WithLabel(buildLabel, "true"), leases.WithExpiration(s.opts.BuildTimeout+cleanupTimeout))
	if err != nil {
		return nil, "", fmt.Errorf("create lease for a build: %w", err)
	}
	return leases.WithLease(ctx, id), id, nil
}

// pruneLeases removes the leases of owners that are not live, and those of
// builds that a crash cut short, with their views.
func (s *Store) pruneLeases(ctx context.Context, live map[string]bool) error {
	all, err := s.opts.Client.LeasesService().List(ctx,
		fmt.Sprintf("labels.%q", ownerLabel), fmt.Sprintf("labels.%q", buildLabel))
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	var errs []error
	for _, l := range all {
		if owner, ok := l.Labels[ownerLabel]; !ok || !live[owner] {
			errs = append(errs, s.deleteLease(ctx, l.ID))
		}
	}
	return errors.Join(errs...)
}
