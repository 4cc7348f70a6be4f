package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	dto "github.com/prometheus/client_model/go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/cluster"
)

// watched is how long a daemon of which nothing is asked is looked at.
const watched = 20 * time.Second

// callLives are how many pods of each kind live for the figures of calls.
const callLives = 50

// callTimes reports how long calls take, by the daemon's own metrics: a VM pod's life against that of a pod of containerd, both through
// vmruntime.
func (b *bench) callTimes(ctx context.Context) error {
	if _, err := b.freshDaemon(ctx, nil, nil); err != nil { // whose metrics begin with the calls that are meant
		return err
	}
	for i := range callLives {
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
		"UpdateContainerResources", "ExecSync", "StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox",
	} {
		vm, err := timesOf(calls, method, "vm")
		containerd, cerr := timesOf(calls, method, "containerd")
		if err := errors.Join(err, cerr); err != nil {
			return err
		}
		b.report.compare(method+" of a VM pod over containerd's, mean", vm.Mean()*1000, containerd.Mean()*1000, "ms")
		b.report.compare(method+", p99 is at most", vm.Quantile(0.99)*1000, containerd.Quantile(0.99)*1000, "ms")
	}
	for _, method := range []string{"ListPodSandbox", "ListContainers", "ListPodSandboxStats", "ListContainerStats", "ListPodSandboxMetrics", "ImageFsInfo"} {
		both, err := timesOf(calls, method, "both")
		if err != nil {
			return err
		}
		b.report.add(method+" of both sides, one pod, mean", both.Mean()*1000, "ms")
		b.report.add(method+", p99 is at most", both.Quantile(0.99)*1000, "ms")
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
	images := runtimeapi.NewImageServiceClient(b.vm.conn)
	for _, call := range []func() error{
		func() error { return of(b.vm.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})) },
		func() error { return of(b.vm.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})) },
		func() error { return of(b.vm.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})) },
		func() error { return of(b.vm.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})) },
		func() error { return of(images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})) },
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
			return of(b.vm.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{CpuShares: 512}}))
		},
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
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	metrics, err := b.node.Metrics(ctx)
	return metrics[name].GetMetric(), err
}

// timesOf is how long calls of a method took that a side answered.
func timesOf(calls []*dto.Metric, method, side string) (cluster.Histogram, error) {
	for _, m := range calls {
		labels := make(map[string]string)
		for _, l := range m.GetLabel() {
			labels[l.GetName()] = l.GetValue()
		}
		if labels["method"] == method && labels["side"] == side {
			return cluster.NewHistogram(&dto.MetricFamily{Metric: []*dto.Metric{m}}, "", ""), nil
		}
	}
	return cluster.Histogram{}, fmt.Errorf("the daemon's metrics have no call of %s that was answered by %s", method, side)
}
