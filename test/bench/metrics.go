package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// watched is how long a daemon of which nothing is asked is looked at.
const watched = 20 * time.Second

// idleCPU reports what the daemon does while nothing is asked of it.
func (b *bench) idleCPU(ctx context.Context, pods string) error {
	before, err := b.daemonCPU()
	if err != nil {
		return err
	}
	if err := sleep(ctx, watched); err != nil {
		return err
	}
	after, err := b.daemonCPU()
	if err != nil {
		return err
	}
	b.report.add("daemon's processor time while idle, with "+pods, float64(after-before)/float64(watched)*100, "% of a core")
	return nil
}

// callTimes reports how long calls take, by the daemon's own metrics: a VM pod's life against that of a pod of containerd, both through
// vmruntime.
func (b *bench) callTimes(ctx context.Context) error {
	if _, err := b.freshDaemon(ctx, nil); err != nil { // whose metrics begin with the calls that are meant
		return err
	}
	for i := range b.starts {
		for _, handler := range []string{vmHandler, ""} {
			if err := b.wholeLife(ctx, handler, fmt.Sprintf("calls-%d-%s", i, handler)); err != nil {
				return err
			}
		}
	}
	calls, err := b.scrape(ctx, "vmruntime_cri_call_duration_seconds")
	if err != nil {
		return err
	}
	for _, method := range []string{
		"RunPodSandbox", "CreateContainer", "StartContainer", "ContainerStatus", "PodSandboxStatus", "ContainerStats", "PodSandboxStats",
		"ExecSync", "StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox",
	} {
		vm, err := meanCall(calls, method, "vm")
		containerd, cerr := meanCall(calls, method, "containerd")
		if err := errors.Join(err, cerr); err != nil {
			return err
		}
		b.report.compare(method+" of a VM pod over containerd's, mean", vm, containerd, "ms")
	}
	for _, method := range []string{"ListPodSandbox", "ListContainers", "ListPodSandboxStats"} {
		both, err := meanCall(calls, method, "both")
		if err != nil {
			return err
		}
		b.report.add(method+" of both sides, one pod, mean", both, "ms")
	}
	return nil
}

// wholeLife makes every call of a pod's life at least once.
func (b *bench) wholeLife(ctx context.Context, handler, name string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	p, err := b.runPod(ctx, b.vm, handler, name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	if _, _, _, err := p.start(ctx, "c"); err != nil {
		return err
	}
	list, err := b.vm.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err := errors.Join(err, count(len(list.GetContainers()), 1)); err != nil {
		return err
	}
	id := list.Containers[0].Id
	for _, call := range []func() error{
		func() error { return of(b.vm.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})) },
		func() error { return of(b.vm.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})) },
		func() error {
			return of(b.vm.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id}))
		},
		func() error {
			return of(b.vm.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.id}))
		},
		func() error {
			return of(b.vm.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id}))
		},
		func() error { return of(b.vm.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})) },
		func() error {
			return of(b.vm.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}}))
		},
		func() error { return of(b.vm.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})) },
		func() error {
			return of(b.vm.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id}))
		},
	} {
		if err := call(); err != nil {
			return err
		}
	}
	return nil
}

// of is the error of a call whose answer is of no interest.
func of[T any](_ T, err error) error { return err }

// scrape reads one of the daemon's metrics.
func (b *bench) scrape(ctx context.Context, name string) ([]*dto.Metric, error) {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", b.node.MetricsSocket())
	}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://vmruntime/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("GET /metrics: %s: %w", resp.Status, err)
	}
	return families[name].GetMetric(), nil
}

// meanCall is how long calls of a method took that a side answered, in milliseconds.
func meanCall(calls []*dto.Metric, method, side string) (float64, error) {
	for _, m := range calls {
		labels := make(map[string]string)
		for _, l := range m.GetLabel() {
			labels[l.GetName()] = l.GetValue()
		}
		if h := m.GetHistogram(); labels["method"] == method && labels["side"] == side && h.GetSampleCount() > 0 {
			return h.GetSampleSum() / float64(h.GetSampleCount()) * 1000, nil
		}
	}
	return 0, fmt.Errorf("the daemon's metrics have no call of %s that was answered by %s", method, side)
}
