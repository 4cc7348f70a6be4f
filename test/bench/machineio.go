package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/runtime/cgroup"
	"github.com/vmruntime/vmruntime/test/images"
)

// inGuest runs a script in a guest.
type inGuest func(ctx context.Context, script string) (string, error)

// machineIO measures, in turns, what the disk and the network of a machine do and those of bare QEMU with the same disk
// and a tap of its own. Both run all the time.
func (b *bench) machineIO(ctx context.Context) (err error) {
	if err := b.vm.pull(ctx, images.Fio); err != nil {
		return err
	}
	p, err := b.runMachine(ctx, "fio")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	id, err := b.startMachine(ctx, p, images.Fio, &machineTimes{})
	if err != nil {
		return err
	}
	shape, err := b.machineShapeOf(id)
	if err != nil {
		return err
	}
	bare, err := b.startBareMachine(ctx, images.FioDisk, shape, &machineTimes{})
	defer func() { err = errors.Join(err, bare.stop()) }()
	if err != nil {
		return err
	}
	machine := func(ctx context.Context, script string) (string, error) { return p.execIn(ctx, id, script) }
	guests := []inGuest{machine, bare.exec}
	for _, guest := range guests {
		if err := awaitAgent(ctx, guest); err != nil {
			return err
		}
	}
	if err := b.compareDisks(ctx, guests); err != nil {
		return err
	}
	return b.compareNetworks(ctx, p, machine, bare)
}

// execIn runs a script in a container.
func (p *pod) execIn(ctx context.Context, id, script string) (string, error) {
	answer, err := p.cri.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/sh", "-c", script}, Timeout: int64(machineTimeout / time.Second)})
	if err != nil {
		return "", err
	}
	if answer.ExitCode != 0 {
		return "", fmt.Errorf("exit code %d: %s%s", answer.ExitCode, answer.Stdout, answer.Stderr)
	}
	return string(answer.Stdout), nil
}

// awaitAgent returns when commands can be run in a guest that has booted.
func awaitAgent(ctx context.Context, guest inGuest) error {
	ctx, cancel := context.WithTimeout(ctx, machineTimeout)
	defer cancel()
	for {
		_, err := guest(ctx, "true")
		if err == nil {
			return nil
		}
		if sleep(ctx, 200*time.Millisecond) != nil {
			return fmt.Errorf("the guest runs no commands: %w", err)
		}
	}
}

// fioJobs are run one after the other on a part of the disk that the image leaves empty.
const fioJobs = `fio --output-format=json --filename=/dev/vda --offset=1g --size=128m --direct=1 --time_based --runtime=4 \
	--name=write --rw=write --bs=1m --ioengine=libaio --iodepth=4 \
	--name=read --stonewall --rw=read --bs=1m --ioengine=libaio --iodepth=4 \
	--name=randwrite --stonewall --rw=randwrite --bs=4k --ioengine=psync \
	--name=randread --stonewall --rw=randread --bs=4k --ioengine=psync`

// fioResult is what fio prints, as far as it is of use.
type fioResult struct {
	Jobs []struct {
		Name  string `json:"jobname"`
		Read  fioSide
		Write fioSide
	}
}

type fioSide struct {
	BytesPerSecond float64 `json:"bw_bytes"`
	Latency        struct {
		Mean float64
	} `json:"lat_ns"`
}

// compareDisks runs fio in both guests. The first run, which allocates the space in the overlays, does not count.
func (b *bench) compareDisks(ctx context.Context, guests []inGuest) error {
	results := make([]map[string][]fioSide, len(guests))
	for i := range 1 + b.fio {
		for j := range guests {
			side := (i + j) % len(guests)
			out, err := guests[side](ctx, fioJobs)
			if err != nil {
				return fmt.Errorf("fio: %w", err)
			}
			if i == 0 {
				results[side] = map[string][]fioSide{}
				continue
			}
			if err := readFio(out, results[side]); err != nil {
				return err
			}
		}
	}
	for _, job := range []string{"write", "read"} {
		f := b.report.compare("machine: disk, "+job+" in blocks of 1 MiB, over bare QEMU", rate(results[0][job]), rate(results[1][job]), "MiB/s")
		f.atLeast(diskBar)
	}
	for _, job := range []string{"randwrite", "randread"} {
		b.report.compare("machine: disk, latency of "+job+" of 4 KiB, over bare QEMU", latency(results[0][job]), latency(results[1][job]), "µs").within(1 / diskBar)
	}
	return nil
}

func readFio(out string, to map[string][]fioSide) error {
	_, text, found := strings.Cut(out, "{") // it may warn first
	var result fioResult
	if err := json.Unmarshal([]byte("{"+text), &result); err != nil || !found {
		return fmt.Errorf("what fio prints is no JSON: %w: %s", err, out)
	}
	for _, job := range result.Jobs {
		side := job.Read
		if job.Write.BytesPerSecond > 0 {
			side = job.Write
		}
		if side.BytesPerSecond == 0 {
			return fmt.Errorf("fio's job %s has done nothing", job.Name)
		}
		to[job.Name] = append(to[job.Name], side)
	}
	return nil
}

func rate(sides []fioSide) float64 {
	return median(sides, func(s fioSide) float64 { return s.BytesPerSecond / (1 << 20) })
}

func latency(sides []fioSide) float64 {
	return median(sides, func(s fioSide) float64 { return s.Latency.Mean / 1000 })
}

// median is of the values of all runs, by nearest rank.
func median(sides []fioSide, value func(fioSide) float64) float64 {
	var all []float64
	for _, s := range sides {
		all = append(all, value(s))
	}
	slices.Sort(all)
	return all[(len(all)-1)/2]
}

const (
	bareHost, bareGuest = "198.18.99.1", "198.18.99.2"
	// servedMiB is what is downloaded from a guest: a file without content, so that the network is what takes time.
	servedMiB = 256
	serve     = "mkdir -p /run/www && truncate -s 256M /run/www/zero && httpd -p 9000 -h /run/www"
)

// compareNetworks downloads from both guests.
func (b *bench) compareNetworks(ctx context.Context, p *pod, machine inGuest, bare *bareMachine) error {
	status, err := b.vm.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		return err
	}
	for _, args := range [][]string{{"addr", "add", bareHost + "/24", "dev", bareTap}, {"link", "set", bareTap, "up"}} {
		if out, err := b.node.Command(ctx, "ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	if _, err := machine(ctx, "net 4 >/dev/null && "+serve); err != nil {
		return fmt.Errorf("the machine's network: %w", err)
	}
	if _, err := bare.exec(ctx, "modprobe virtio_net && ip link set eth0 up && ip addr add "+bareGuest+"/24 dev eth0 && "+serve); err != nil {
		return fmt.Errorf("the bare machine's network: %w", err)
	}
	addresses := []string{status.GetStatus().GetNetwork().GetIp(), bareGuest}
	groups := []cgroup.Group{cgroup.For(b.node.CgroupParent(), p.id), bare.group}
	took, spent := make([]durations, len(addresses)), make([]durations, len(addresses))
	for i := range 1 + b.downloads {
		for j := range addresses {
			side := (i + j) % len(addresses)
			before, err := groups[side].Stats()
			if err != nil {
				return err
			}
			begun := time.Now()
			if out, err := b.node.Command(ctx, "busybox", "wget", "-q", "-O", "/dev/null", "http://"+addresses[side]+":9000/zero").CombinedOutput(); err != nil {
				return fmt.Errorf("download from %s: %w: %s", addresses[side], err, out)
			}
			lasted := time.Since(begun)
			after, err := groups[side].Stats()
			if err != nil {
				return err
			}
			if i > 0 {
				took[side] = append(took[side], lasted)
				spent[side] = append(spent[side], time.Duration(after.CPUUsageNano-before.CPUUsageNano))
			}
		}
	}
	perSecond := func(d durations) float64 { return servedMiB / (d.median() / 1000) }
	b.report.compare("machine: download from the guest, over a bare tap, p50", perSecond(took[0]), perSecond(took[1]), "MiB/s").atLeast(networkBar)
	b.report.compare("  QEMU's processor time in it, over a bare tap, p50", spent[0].median(), spent[1].median(), "ms")
	return nil
}
