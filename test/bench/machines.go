package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

const (
	// machineBootBar is how much longer than bare QEMU with the same disk a machine may take to boot.
	machineBootBar = 1.05
	// diskBar and networkBar are what is left to a machine of bare QEMU's throughput.
	diskBar, networkBar = 0.95, 0.9

	// machineTimeout bounds one machine's boot, and one command in it.
	machineTimeout = 3 * time.Minute
	machineMemory  = 256 << 20
	machineDisk    = 2 << 30
	// machineQuota of each machinePeriod, in microseconds, are a machine's two vCPUs.
	machineQuota, machinePeriod = 200000, 100000

	kernelLine = "Linux version "
	bootedLine = "tiny: up "
)

// runMachine creates a pod for a machine.
func (b *bench) runMachine(ctx context.Context, name string) (*pod, error) {
	return b.runPodWith(ctx, b.vm, vmHandler, name, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Annotations = map[string]string{"vmruntime.io/root-disk-size": fmt.Sprint(machineDisk)}
		cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: machineMemory, CpuQuota: machineQuota, CpuPeriod: machinePeriod}
	})
}

// machineTimes is how long it took from StartContainer, or from bare QEMU's execution.
type machineTimes struct{ kernel, booted durations }

// startMachine starts a machine of an image and returns its container when it has booted.
func (b *bench) startMachine(ctx context.Context, p *pod, image string, times *machineTimes) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, machineTimeout)
	defer cancel()
	id, err := p.createOf(ctx, p.cri, "machine", image, nil)
	if err != nil {
		return "", err
	}
	begun := time.Now()
	if _, err := p.cri.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		return "", fmt.Errorf("StartContainer: %w", err)
	}
	return id, times.take(ctx, begun, filepath.Join(p.config.LogDirectory, "machine.log"))
}

// take notes when a file has the lines that tell of the boot.
func (m *machineTimes) take(ctx context.Context, begun time.Time, file string) error {
	for _, wanted := range []struct {
		line string
		took *durations
	}{{kernelLine, &m.kernel}, {bootedLine, &m.booted}} {
		if err := awaitText(ctx, file, wanted.line); err != nil {
			return err
		}
		*wanted.took = append(*wanted.took, time.Since(begun))
	}
	return nil
}

// awaitText returns when a file has a text.
func awaitText(ctx context.Context, file, text string) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		data, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if bytes.Contains(data, []byte(text)) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s has no %q: %w\n%s", file, text, ctx.Err(), data)
		case <-tick.C:
		}
	}
}

// machineShapeOf is what a machine has, as its record says.
func (b *bench) machineShapeOf(id string) (s machineShape, err error) {
	data, err := os.ReadFile(filepath.Join(b.store("containers"), id, "spec.json"))
	if err != nil {
		return s, err
	}
	var record struct {
		Machine machineShape `json:"machine"`
	}
	if err := json.Unmarshal(data, &record); err != nil {
		return s, err
	}
	if record.Machine.VCPUs == 0 || record.Machine.MemoryBytes == 0 {
		return s, fmt.Errorf("the record of container %s says %d vCPUs and %d bytes of memory", id, record.Machine.VCPUs, record.Machine.MemoryBytes)
	}
	return record.Machine, nil
}

// machineBoots measures, in turns, the boot of a machine and of bare QEMU with the same disk and devices. The first
// round does not count.
func (b *bench) machineBoots(ctx context.Context) error {
	if err := b.vm.pull(ctx, images.Tiny); err != nil {
		return err
	}
	var machine, bare, discarded machineTimes
	shape, err := b.machineOnce(ctx, "machine-first", &discarded)
	if err != nil {
		return err
	}
	for i := range b.machines {
		turns := []func() error{
			func() error {
				_, err := b.machineOnce(ctx, fmt.Sprintf("machine-%d", i), &machine)
				return err
			},
			func() error {
				m, err := b.startBareMachine(ctx, images.TinyDisk, shape, &bare)
				return errors.Join(err, m.stop())
			},
		}
		for j := range turns {
			if err := turns[(i+j)%len(turns)](); err != nil {
				return err
			}
		}
	}
	r := &b.report
	r.medians("machine: StartContainer to the kernel's first line, over bare QEMU, p50", machine.kernel, bare.kernel).within(machineBootBar)
	r.medians("machine: StartContainer to the end of boot, over bare QEMU, p50", machine.booted, bare.booted).within(machineBootBar)
	return nil
}

func (b *bench) machineOnce(ctx context.Context, name string, times *machineTimes) (shape machineShape, err error) {
	p, err := b.runMachine(ctx, name)
	if err != nil {
		return shape, err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	id, err := b.startMachine(ctx, p, images.Tiny, times)
	if err != nil {
		return shape, err
	}
	return b.machineShapeOf(id)
}

// sharedImage measures what machines of one image take beside it.
func (b *bench) sharedImage(ctx context.Context) (err error) {
	if err := b.vm.pull(ctx, images.Tiny); err != nil {
		return err
	}
	var pods []*pod
	defer func() { err = errors.Join(err, removeAll(ctx, pods)) }()
	var disk uint64
	for i := range b.sharing {
		p, err := b.runMachine(ctx, fmt.Sprintf("sharing-%d", i))
		if err != nil {
			return err
		}
		pods = append(pods, p)
		id, err := b.startMachine(ctx, p, images.Tiny, &machineTimes{})
		if err != nil {
			return err
		}
		stats, err := b.vm.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
		if err != nil {
			return err
		}
		disk += stats.GetStats().GetWritableLayer().GetUsedBytes().GetValue()
	}
	if err := sleep(ctx, settle); err != nil {
		return err
	}
	sum, err := memoryOfAll(pods)
	if err != nil {
		return err
	}
	each := float64(len(pods)) * (1 << 20)
	of := fmt.Sprintf(", of %d of one image", len(pods))
	b.report.add("machine: disk beyond the image"+of, float64(disk)/each, "MiB")
	b.report.add("machine: memory beyond the guest's"+of, float64(sum.own())/each, "MiB")
	b.report.add("  of it code translated by TCG", float64(sum.code)/each, "MiB")
	return nil
}
