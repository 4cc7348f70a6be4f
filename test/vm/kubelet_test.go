package vm_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
)

// kubelet is the client that kubelets have.
func (b *bed) kubelet(ctx context.Context, t *testing.T, streaming bool) cri.RuntimeService {
	t.Helper()
	k, err := remote.NewRemoteRuntimeServiceBuilder().WithEndpoint("unix://" + b.Socket()).WithConnectionTimeout(time.Minute).
		WithTracerProvider(nil).WithUseStreaming(streaming).Build(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return k
}

// both is a VM pod and one of containerd's, each with a running container.
func (b *bed) both(ctx context.Context, t *testing.T) (pods []*pod, containers []*ctr) {
	t.Helper()
	for handler, suffix := range map[string]string{"vm": "-vm", "": "-ordinary"} {
		p := b.runPod(ctx, t, handler, b.podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += suffix }))
		pods = append(pods, p)
		containers = append(containers, p.start(idle("c")).ready("ready"))
	}
	return pods, containers
}

// A kubelet sees the same pods, containers and statistics by lists and by streams, of both runtimes.
func TestKubeletLists(t *testing.T) {
	ctx, b := use(t)
	pods, containers := b.both(ctx, t)
	var podIDs, containerIDs []string
	for i := range pods {
		podIDs, containerIDs = append(podIDs, pods[i].id), append(containerIDs, containers[i].id)
	}
	slices.Sort(podIDs)
	slices.Sort(containerIDs)
	for name, streaming := range map[string]bool{"lists": false, "streams": true} {
		k := b.kubelet(ctx, t, streaming)
		p, err := k.ListPodSandbox(ctx, nil)
		wantIDs(t, name+" of pods", ids(p), podIDs, err)
		c, err := k.ListContainers(ctx, nil)
		wantIDs(t, name+" of containers", ids(c), containerIDs, err)
		ps, err := k.ListPodSandboxStats(ctx, nil)
		wantIDs(t, name+" of pods' statistics", ids(attributes(ps)), podIDs, err)
		cs, err := k.ListContainerStats(ctx, nil)
		wantIDs(t, name+" of containers' statistics", ids(attributes(cs)), containerIDs, err)
		m, err := k.ListPodSandboxMetrics(ctx)
		var measured []string
		for _, s := range m {
			measured = append(measured, s.GetPodSandboxId())
		}
		slices.Sort(measured)
		wantIDs(t, name+" of metrics", measured, podIDs, err)
	}
}

func attributes[A any, S interface{ GetAttributes() A }](list []S) (out []A) {
	for _, s := range list {
		out = append(out, s.GetAttributes())
	}
	return out
}

func ids[T interface{ GetId() string }](list []T) (out []string) {
	for _, i := range list {
		out = append(out, i.GetId())
	}
	slices.Sort(out)
	return out
}

func wantIDs(t *testing.T, what string, got, want []string, err error) {
	t.Helper()
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%s: %q, %v; want %q", what, got, err, want)
	}
}

// The kubelet's stream has the events of both runtimes, each with the pod's status and those of its containers, from which the
// kubelet makes the pod's. It breaks when one side does, so that the kubelet lists anew.
func TestKubeletEvents(t *testing.T) {
	ctx, b := use(t)
	k := b.kubelet(ctx, t, true)
	events := make(chan *runtimeapi.ContainerEventResponse, 1000)
	ended := make(chan error, 1)
	listen, cancel := context.WithCancel(ctx)
	go func() { ended <- k.GetContainerEvents(listen, events, nil) }()
	t.Cleanup(func() { cancel(); <-ended })
	b.awaitSubscription(ctx, t, events)

	pods, containers := b.both(ctx, t)
	for i, c := range containers {
		c.stop(0)
		c.remove()
		pods[i].remove()
	}
	seen := make(map[string][]string)
	for deleted := 0; deleted < 2*len(pods); {
		ev := next(t, events)
		if ev.GetContainerEventType() == runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT {
			deleted++
		}
		seen[ev.GetContainerId()] = append(seen[ev.GetContainerId()], ev.GetContainerEventType().String())
		if age := time.Since(time.Unix(0, ev.GetCreatedAt())); age < 0 || age > time.Minute {
			t.Errorf("event %v is of %s ago", ev, age)
		}
	}
	want := []string{"CONTAINER_CREATED_EVENT", "CONTAINER_STARTED_EVENT", "CONTAINER_STOPPED_EVENT", "CONTAINER_DELETED_EVENT"}
	for i := range pods {
		for _, id := range []string{pods[i].id, containers[i].id} {
			if !slices.Equal(seen[id], want) {
				t.Errorf("events of %s: %v, want %v", id, seen[id], want)
			}
		}
	}

	if err := b.StopContainerd(); err != nil {
		t.Fatal(err)
	}
	err := <-ended
	ended <- err
	if status.Code(err) != codes.Unavailable {
		t.Errorf("containerd has stopped, the stream says %v, want Unavailable", err)
	}
	if err := b.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	b.listen(ctx, t) // and so it can again
}
