package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// killedBar is how many milliseconds after its QEMU a container may be told to have ended.
	killedBar = 1000
	kills     = 5
)

// killedVMs measures how long after QEMU is killed the event of its container's end comes.
func (b *bench) killedVMs(ctx context.Context) error {
	var took durations
	for i := range kills {
		d, err := b.killVM(ctx, fmt.Sprintf("vm-killed-%d", i))
		if err != nil {
			return err
		}
		took = append(took, d)
	}
	b.report.add("from QEMU's end by a signal to its container's event, p50", took.median(), "ms").within(killedBar)
	b.report.add(fmt.Sprintf("from QEMU's end by a signal to its container's event, the longest of %d", kills), took.at(1), "ms").within(killedBar)
	return nil
}

func (b *bench) killVM(ctx context.Context, name string) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	events, err := b.vm.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		return 0, err
	}
	p, err := b.runPod(ctx, b.vm, vmHandler, name)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	id, err := p.create(ctx, "c")
	if err != nil {
		return 0, err
	}
	if _, err := p.cri.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		return 0, err
	}
	pid, err := p.qemuPID(ctx)
	if err != nil {
		return 0, err
	}
	if err := awaitEvent(events, id, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT); err != nil {
		return 0, err
	}
	begun := time.Now()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return 0, err
	}
	err = awaitEvent(events, id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	return time.Since(begun), err
}

func awaitEvent(events runtimeapi.RuntimeService_GetContainerEventsClient, id string, kind runtimeapi.ContainerEventType) error {
	for {
		e, err := events.Recv()
		if err != nil {
			return fmt.Errorf("wait for %v of container %s: %w", kind, id, err)
		}
		if e.GetContainerId() == id && e.GetContainerEventType() == kind {
			return nil
		}
	}
}

func (p *pod) qemuPID(ctx context.Context) (int, error) {
	answer, err := p.cri.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		return 0, err
	}
	var info struct {
		Guest struct {
			QEMU struct {
				PID int `json:"pid"`
			} `json:"qemu"`
		} `json:"guest"`
	}
	if err := json.Unmarshal([]byte(answer.GetInfo()["info"]), &info); err != nil {
		return 0, err
	}
	if info.Guest.QEMU.PID <= 0 {
		return 0, fmt.Errorf("sandbox %s tells no QEMU: %s", p.id, answer.GetInfo()["info"])
	}
	return info.Guest.QEMU.PID, nil
}
