package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// grownSizes are what pods of other sizes than the template's are to have: vCPUs, and MiB beside those of a pod without limits.
var grownSizes = []struct{ vcpus, mib int64 }{{1, 256}, {2, 256}}

const (
	defaultMemory = 256 // of a pod without limits, in MiB
	// sizedFew is how many times fewer repetitions there are than of other starts: most of them take a daemon that starts anew.
	sizedFew = 4
)

// sizedWay is a way in which a pod of another size may begin.
type sizedWay struct {
	name, section string
	from          string // what the pod's guest has to begin from
	grown         bool
}

// sizedStarts measures pods of other sizes than that of a pod without limits, from RunPodSandbox to the container's first line.
func (b *bench) sizedStarts(ctx context.Context) error {
	ways := []sizedWay{
		{"booted", "[template]\nenabled = false\n", "boot", false},
		{"from a template of its size", "[template]\nspares = 0\n", "template", false},
		{"grown from the template", "[template]\nspares = 0\n", "template", true},
		{"grown from a guest that waits", "[template]\nspares = 1\n", "spare", true},
	}
	took := make(map[string][]starts)
	for _, w := range ways {
		if err := b.withTemplateConfig(ctx, w.section, func() (err error) {
			took[w.name], err = b.measureSized(ctx, w)
			return err
		}); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	for i, size := range grownSizes {
		for _, w := range ways {
			name := fmt.Sprintf("pod of %d vCPUs and %d MiB, %s, over one that boots, p50", size.vcpus, defaultMemory+size.mib, w.name)
			b.report.medians(name, took[w.name][i].total, took["booted"][i].total)
		}
	}
	return nil
}

func (b *bench) measureSized(ctx context.Context, w sizedWay) ([]starts, error) {
	took := make([]starts, len(grownSizes))
	if w.from != "boot" {
		if err := b.freshTemplate(ctx); err != nil {
			return nil, err
		}
	}
	for i := range max(b.starts/sizedFew, 1) {
		for j, size := range grownSizes {
			if err := b.readyFor(ctx, w, size.vcpus, size.mib, i == 0); err != nil {
				return nil, err
			}
			if err := b.startSized(ctx, w, size.vcpus, size.mib, &took[j]); err != nil {
				return nil, err
			}
		}
	}
	return took, nil
}

// readyFor has the node as a pod is to find it. A daemon that starts anew has no template but that of the default size, and gives up the one
// that it has begun to make of the last pod's.
func (b *bench) readyFor(ctx context.Context, w sizedWay, vcpus, mib int64, first bool) error {
	switch {
	case w.grown && w.from == "spare":
		return errors.Join(b.freshTemplate(ctx), b.awaitSpares(ctx, 1))
	case w.grown:
		return b.freshTemplate(ctx)
	case first && w.from == "template":
		from, err := b.logSize()
		if err != nil {
			return err
		}
		var discarded starts
		if err := b.startSized(ctx, sizedWay{from: "template", grown: true}, vcpus, mib, &discarded); err != nil {
			return err
		}
		return b.awaitTemplateFrom(ctx, from)
	}
	return nil
}

// startSized starts a pod of a size, which has to begin in a way, and removes it.
func (b *bench) startSized(ctx context.Context, w sizedWay, vcpus, mib int64, s *starts) (err error) {
	begun := time.Now()
	call, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	p, err := b.runPodWith(call, b.vm, vmHandler, fmt.Sprintf("sized-%d-%d-%d", vcpus, mib, len(s.total)), func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{
			CpuPeriod: 100000, CpuQuota: vcpus * 100000, MemoryLimitInBytes: (defaultMemory + mib) << 20,
		}
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	if err := b.finishStart(call, p, begun, s); err != nil {
		return err
	}
	return b.beganAs(call, p, w)
}

// beganAs holds how a pod's guest has begun.
func (b *bench) beganAs(ctx context.Context, p *pod, w sizedWay) error {
	status, err := b.vm.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		return err
	}
	var info struct {
		Guest struct {
			Template  string    `json:"template"`
			Spare     bool      `json:"spare"`
			GrownFrom *struct{} `json:"grownFrom"`
		} `json:"guest"`
	}
	if err := json.Unmarshal([]byte(status.GetInfo()["info"]), &info); err != nil {
		return err
	}
	from := "boot"
	switch {
	case info.Guest.Spare:
		from = "spare"
	case info.Guest.Template != "":
		from = "template"
	}
	if grown := info.Guest.GrownFrom != nil; from != w.from || grown != w.grown {
		return fmt.Errorf("pod %s began from a %s, grown: %v; want %s, %v", p.id, from, grown, w.from, w.grown)
	}
	return nil
}
