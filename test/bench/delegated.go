package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// addedBar is what the way through vmruntime may add to a unary call at the median, in milliseconds.
	addedBar = 0.3
	// listed is the number of containers in the list.
	listed = 100
	// warmUps are calls that do not count, or fewer where there are few that do.
	warmUps = 20
	// callTimeout bounds one call.
	callTimeout = 30 * time.Second
)

// measured is a call, or several, with the time that counts.
type measured func(context.Context, *cri) (time.Duration, error)

// unary takes the time of one call.
func unary(call func(context.Context, *cri) error) measured {
	return func(ctx context.Context, c *cri) (time.Duration, error) {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		begun := time.Now()
		err := call(ctx, c)
		return time.Since(begun), err
	}
}

// delegatedCalls measures calls that are containerd's through vmruntime and on containerd's own socket, in turns.
func (b *bench) delegatedCalls(ctx context.Context) (err error) {
	p, err := b.runPod(ctx, b.direct, "", "delegated")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	if err := b.compareCalls(ctx, "Version", b.calls, true, unary(func(ctx context.Context, c *cri) error {
		_, err := c.Version(ctx, &runtimeapi.VersionRequest{})
		return err
	})); err != nil {
		return err
	}
	if err := b.compareCalls(ctx, "container start (create and start)", b.containers, false, b.containerStart(p)); err != nil {
		return err
	}
	for i := range listed {
		if _, err := p.create(ctx, fmt.Sprintf("listed-%d", i)); err != nil {
			return err
		}
	}
	name := fmt.Sprintf("ListContainers of %d", listed)
	return b.compareCalls(ctx, name, b.calls, true, unary(func(ctx context.Context, c *cri) error {
		answer, err := c.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
		return errors.Join(err, count(len(answer.GetContainers()), listed))
	}))
}

func count(have, want int) error {
	if have != want {
		return fmt.Errorf("the list has %d entries, not %d", have, want)
	}
	return nil
}

// containerStart takes the time of creating and starting a container in a running pod. Its removal does not count.
func (b *bench) containerStart(p *pod) measured {
	number := 0
	return func(ctx context.Context, c *cri) (took time.Duration, err error) {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		number++
		begun := time.Now()
		id, err := p.createOn(ctx, c, fmt.Sprintf("started-%d", number))
		if err != nil {
			return 0, err
		}
		_, err = c.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
		took = time.Since(begun)
		if err != nil {
			return 0, fmt.Errorf("StartContainer: %w", err)
		}
		_, err = c.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
		return took, err
	}
}

// compareCalls reports a call's time each way, and what was added.
func (b *bench) compareCalls(ctx context.Context, name string, times int, barred bool, call measured) error {
	before, err := b.daemonCPU()
	if err != nil {
		return err
	}
	warmUps := min(warmUps, times/10)
	through, direct, err := inTurns(ctx, times, warmUps, call, b.vm, b.direct)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	after, err := b.daemonCPU()
	if err != nil {
		return err
	}
	b.report.compare(name+", over containerd's own, p50", through.median(), direct.median(), "ms")
	added := b.report.add(name+", added at p50", through.median()-direct.median(), "ms")
	if barred {
		added.within(addedBar)
	}
	b.report.add(name+", added at p99", through.at(0.99)-direct.at(0.99), "ms")
	b.report.add("  processor time of the daemon for one", milliseconds(after-before)/float64(warmUps+times), "ms")
	return nil
}

// inTurns makes a call on two sockets, another one first each time.
func inTurns(ctx context.Context, times, warmUps int, call measured, first, second *cri) (a, b durations, err error) {
	type side struct {
		cri  *cri
		took *durations
	}
	sides := []side{{first, &a}, {second, &b}}
	for i := range warmUps + times {
		for j := range sides {
			s := sides[(i+j)%len(sides)]
			took, err := call(ctx, s.cri)
			if err != nil {
				return nil, nil, err
			}
			if i >= warmUps {
				*s.took = append(*s.took, took)
			}
		}
	}
	return a, b, nil
}
