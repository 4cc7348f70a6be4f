package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const vmHandler = "vm"

// coldStartBar is how much longer than bare QEMU's boot a VM pod's start may take.
const coldStartBar = 1.3

// starts are what was measured of one way to start a pod.
type starts struct{ sandbox, create, start, line, total durations }

// coldStarts measures, in turns, a VM pod from RunPodSandbox to its container's first line in the log, bare QEMU from
// its execution to the agent's answer with the same machine, kernel and initramfs, and a pod on containerd's
// own socket. The image has been pulled; the first round, which builds its EROFS file, does not count. There are no templates
// meanwhile.
func (b *bench) coldStarts(ctx context.Context) error {
	return b.withoutTemplates(ctx, func() error { return b.measureColdStarts(ctx) })
}

func (b *bench) measureColdStarts(ctx context.Context) error {
	var vm, container, discarded starts
	var bare durations
	shape, err := b.warmUp(ctx, &discarded)
	if err != nil {
		return err
	}
	for i := range b.starts {
		turns := []func() error{
			func() error { return b.startOnce(ctx, b.vm, vmHandler, fmt.Sprintf("vm-%d", i), &vm) },
			func() error {
				took, err := b.bootBare(ctx, shape)
				bare = append(bare, took)
				return err
			},
			func() error { return b.startOnce(ctx, b.direct, "", fmt.Sprintf("container-%d", i), &container) },
		}
		for j := range turns { // another one goes first each time
			if err := turns[(i+j)%len(turns)](); err != nil {
				return err
			}
		}
	}
	b.reportStarts(vm, container, bare)
	b.plot.add("VM pod that boots", vm.total)
	return b.moreContainers(ctx)
}

func (b *bench) reportStarts(vm, container starts, bare durations) {
	r := &b.report
	r.medians("VM pod's start, over bare QEMU's boot, p50", vm.total, bare).within(coldStartBar)
	r.compare("VM pod's start, over bare QEMU's boot, slowest", vm.total.at(1), bare.at(1), "ms")
	r.medians("VM pod's start, over containerd's pod, p50", vm.total, container.total)
	r.medians("  of it RunPodSandbox", vm.sandbox, container.sandbox)
	r.medians("  of it CreateContainer", vm.create, container.create)
	r.medians("  of it StartContainer", vm.start, container.start)
	r.medians("  of it until the line is in the log", vm.line, container.line)
}

// warmUp starts one pod each way and reads the shape of the VM off it.
func (b *bench) warmUp(ctx context.Context, discarded *starts) (shape machineShape, err error) {
	if err := b.startOnce(ctx, b.direct, "", "container-first", discarded); err != nil {
		return shape, err
	}
	p, err := b.runPod(ctx, b.vm, vmHandler, "vm-first")
	if err != nil {
		return shape, err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	if _, _, _, err := p.start(ctx, "c"); err != nil {
		return shape, err
	}
	return b.shapeOf(p)
}

// startOnce starts a pod, notes what took how long, and removes it.
func (b *bench) startOnce(ctx context.Context, c *cri, handler, name string, s *starts) (err error) {
	begun := time.Now()
	call, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	p, err := b.runPod(call, c, handler, name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	return b.finishStart(call, p, begun, s)
}

// finishStart starts the container of a pod that runs.
func (b *bench) finishStart(ctx context.Context, p *pod, begun time.Time, s *starts) error {
	ran := time.Now()
	created, started, logged, err := p.start(ctx, "c")
	if err != nil {
		return err
	}
	s.sandbox = append(s.sandbox, ran.Sub(begun))
	s.create = append(s.create, created.Sub(ran))
	s.start = append(s.start, started.Sub(created))
	s.line = append(s.line, logged.Sub(started))
	s.total = append(s.total, logged.Sub(begun))
	return nil
}

// moreContainers measures, in turns, one more container in a running VM pod and in a running pod of containerd: what is
// left of a start when nothing has to boot.
func (b *bench) moreContainers(ctx context.Context) (err error) {
	var pods []*pod
	defer func() { err = errors.Join(err, removeAll(ctx, pods)) }()
	for _, way := range []struct {
		cri     *cri
		handler string
		name    string
	}{{b.vm, vmHandler, "vm-more"}, {b.direct, "", "container-more"}} {
		p, err := b.runPod(ctx, way.cri, way.handler, way.name)
		if err != nil {
			return err
		}
		pods = append(pods, p)
		if err := b.startIn(ctx, p); err != nil {
			return err
		}
	}
	took := make([]durations, len(pods))
	for i := range b.starts {
		for j, p := range pods {
			call, cancel := context.WithTimeout(ctx, podTimeout)
			begun := time.Now()
			_, _, logged, err := p.start(call, fmt.Sprintf("more-%d", i))
			cancel()
			if err != nil {
				return err
			}
			took[j] = append(took[j], logged.Sub(begun))
		}
	}
	b.report.medians("one more container, VM pod over containerd's, p50", took[0], took[1])
	return nil
}
