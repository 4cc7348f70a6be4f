package vm_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// One pod's whole life: two containers, what each call and list says of them, and every end twice.
func TestLife(t *testing.T) {
	ctx, b := use(t)
	began := time.Now()
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Labels = map[string]string{"app": "life", "io.kubernetes.pod.name": "life"}
		cfg.Annotations = map[string]string{"note": "a pod"}
	})
	checkPodStatus(t, p, began)

	one := p.create(with(idle("one"), func(c *runtimeapi.ContainerConfig) {
		c.Labels, c.Annotations = map[string]string{"tier": "one"}, map[string]string{"note": "a container"}
	}))
	two := p.create(idle("two"))
	if s := one.status(); s.GetState() != runtimeapi.ContainerState_CONTAINER_CREATED || s.GetStartedAt() != 0 || s.GetFinishedAt() != 0 {
		t.Errorf("before StartContainer: %v, want CREATED and no times of start and finish", s)
	}
	_, err := one.execSync(5, "true")
	refused(t, err, codes.FailedPrecondition, "not running")
	one.start()
	two.start()
	refused(t, one.tryStart(), codes.FailedPrecondition, "only a created one")
	checkRunning(t, one, began)
	checkLists(t, p, one, two)

	one.stop(10)
	one.stop(10)
	s := one.wait()
	if s.GetExitCode() != 0 || s.GetReason() != "Completed" || s.GetFinishedAt() < s.GetStartedAt() {
		t.Errorf("after StopContainer: %v, want exit code 0, Completed, and a finish after the start", s)
	}
	if !two.running() {
		t.Error("stopping one container ended the other")
	}
	one.remove()
	one.remove()
	_, err = b.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: one.id})
	refused(t, err, codes.NotFound)

	// The name is free again; removing a container that runs ends it.
	again := p.start(idle("one"))
	checkNewestFirst(t, p, again, two)
	again.remove()

	// RemovePodSandbox takes the running container with it.
	p.remove()
	p.remove()
	_, err = b.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	refused(t, err, codes.NotFound)
	_, err = b.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: two.id})
	refused(t, err, codes.NotFound)
}

// checkNewestFirst has the pod's status tell of its containers in an order, always.
func checkNewestFirst(t *testing.T, p *pod, want ...*ctr) {
	t.Helper()
	for range 20 {
		resp, err := p.rt.PodSandboxStatus(p.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.EqualFunc(resp.GetContainersStatuses(), want, func(s *runtimeapi.ContainerStatus, c *ctr) bool { return s.GetId() == c.id }) {
			t.Fatalf("the pod's containers are told as %v, want the newest first", resp.GetContainersStatuses())
		}
	}
}

func checkPodStatus(t *testing.T, p *pod, began time.Time) {
	t.Helper()
	s := p.status()
	if s.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY || s.GetRuntimeHandler() != handlerVM || s.GetNetwork().GetIp() == "" {
		t.Errorf("status %v, want READY, handler vm and an address", s)
	}
	if at := time.Unix(0, s.GetCreatedAt()); at.Before(began) || at.After(time.Now()) {
		t.Errorf("created at %s, want since %s", at, began)
	}
	if s.GetLabels()["app"] != "life" || s.GetAnnotations()["note"] != "a pod" || s.GetMetadata().GetName() != p.cfg.GetMetadata().GetName() {
		t.Errorf("status %v has not the labels, annotations and metadata of the request", s)
	}
	// A prefix of the ID is as good, as crictl shortens IDs.
	resp, err := p.rt.PodSandboxStatus(p.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id[:13], Verbose: true})
	if err != nil || resp.GetStatus().GetId() != p.id {
		t.Errorf("status by prefix: %v, %v", resp.GetStatus(), err)
	}
	if !strings.Contains(resp.GetInfo()["info"], `"vcpus"`) {
		t.Errorf("verbose info %v does not tell the VM's size", resp.GetInfo())
	}
}

func checkRunning(t *testing.T, c *ctr, began time.Time) {
	t.Helper()
	s := c.status()
	if s.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("state %s, want RUNNING", s.GetState())
	}
	created, started := time.Unix(0, s.GetCreatedAt()), time.Unix(0, s.GetStartedAt())
	// The start is the guest's time; its clock is set from the node's at boot.
	if created.Before(began) || started.Before(created.Add(-time.Second)) || started.After(time.Now().Add(time.Second)) {
		t.Errorf("created %s, started %s, want in this order since %s", created, started, began)
	}
	if s.GetLabels()["tier"] != "one" || s.GetAnnotations()["note"] != "a container" || s.GetLogPath() != c.logFile() {
		t.Errorf("status %v has not the labels, annotations and log path of the request", s)
	}
	if s.GetImage().GetImage() != images.Busybox || s.GetImageRef() == "" || s.GetImageId() == "" {
		t.Errorf("image %v, ref %q, ID %q", s.GetImage(), s.GetImageRef(), s.GetImageId())
	}
}

// checkLists asks with every filter; a is running and labelled tier=one, both are of p.
func checkLists(t *testing.T, p *pod, a, b *ctr) {
	t.Helper()
	pods := map[string]struct {
		filter *runtimeapi.PodSandboxFilter
		want   []string
	}{
		"all":            {nil, []string{p.id}},
		"id":             {&runtimeapi.PodSandboxFilter{Id: p.id}, []string{p.id}},
		"prefix":         {&runtimeapi.PodSandboxFilter{Id: p.id[:10]}, []string{p.id}},
		"unknown id":     {&runtimeapi.PodSandboxFilter{Id: "no-such-id"}, nil},
		"label":          {&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "life"}}, []string{p.id}},
		"label and more": {&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "life", "x": "y"}}, nil},
		"ready":          {&runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}}, []string{p.id}},
		"not ready":      {&runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}}, nil},
	}
	for name, tt := range pods {
		resp, err := p.rt.ListPodSandbox(p.ctx, &runtimeapi.ListPodSandboxRequest{Filter: tt.filter})
		var got []string
		for _, item := range resp.GetItems() {
			got = append(got, item.GetId())
		}
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("ListPodSandbox %s: %v, %v, want %v", name, got, err, tt.want)
		}
	}
	running := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	exited := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_EXITED}
	containers := map[string]struct {
		filter *runtimeapi.ContainerFilter
		want   []string
	}{
		"all":     {nil, []string{a.id, b.id}},
		"id":      {&runtimeapi.ContainerFilter{Id: a.id}, []string{a.id}},
		"prefix":  {&runtimeapi.ContainerFilter{Id: a.id[:10]}, []string{a.id}},
		"label":   {&runtimeapi.ContainerFilter{LabelSelector: map[string]string{"tier": "one"}}, []string{a.id}},
		"pod":     {&runtimeapi.ContainerFilter{PodSandboxId: p.id}, []string{a.id, b.id}},
		"no pod":  {&runtimeapi.ContainerFilter{PodSandboxId: "no-such-id"}, nil},
		"running": {&runtimeapi.ContainerFilter{State: running}, []string{a.id, b.id}},
		"exited":  {&runtimeapi.ContainerFilter{State: exited}, nil},
		"several": {&runtimeapi.ContainerFilter{PodSandboxId: p.id, State: running, LabelSelector: map[string]string{"tier": "one"}}, []string{a.id}},
	}
	for name, tt := range containers {
		resp, err := p.rt.ListContainers(p.ctx, &runtimeapi.ListContainersRequest{Filter: tt.filter})
		var got []string
		for _, c := range resp.GetContainers() {
			got = append(got, c.GetId())
		}
		slices.Sort(got)
		slices.Sort(tt.want)
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("ListContainers %s: %v, %v, want %v", name, got, err, tt.want)
		}
	}
}

// Unknown IDs: NotFound, but what is not there is stopped and removed.
func TestUnknownIDs(t *testing.T) {
	ctx, b := use(t)
	const id = "feedfeedfeed"
	calls := map[string]struct {
		call func() error
		want codes.Code
	}{
		"PodSandboxStatus": {func() error {
			_, err := b.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
			return err
		}, codes.NotFound},
		"CreateContainer": {func() error {
			_, err := b.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: id, Config: idle("c"), SandboxConfig: b.podConfig(t)})
			return err
		}, codes.NotFound},
		"StartContainer": {func() error {
			_, err := b.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			return err
		}, codes.NotFound},
		"ContainerStatus": {func() error {
			_, err := b.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
			return err
		}, codes.NotFound},
		"ContainerStats": {func() error {
			_, err := b.rt.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
			return err
		}, codes.NotFound},
		"ExecSync": {func() error {
			_, err := b.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
			return err
		}, codes.NotFound},
		"StopContainer": {func() error {
			_, err := b.rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
			return err
		}, codes.OK},
		"RemoveContainer": {func() error {
			_, err := b.rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
			return err
		}, codes.OK},
		"StopPodSandbox": {func() error {
			_, err := b.rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
			return err
		}, codes.OK},
		"RemovePodSandbox": {func() error {
			_, err := b.rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		}, codes.OK},
	}
	for name, tt := range calls {
		if err := tt.call(); status.Code(err) != tt.want {
			t.Errorf("%s of an unknown ID: %v, want %s", name, err, tt.want)
		}
	}
}

// A retry that comes while the first call is on its way cannot make a second sandbox or container.
func TestNamesAreReserved(t *testing.T) {
	ctx, b := use(t)
	cfg := b.podConfig(t)
	var mu sync.Mutex
	var ids []string
	both := func(call func() (string, error)) {
		ids = nil
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				id, err := call()
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					ids = append(ids, id)
				} else if code := status.Code(err); code != codes.AlreadyExists && code != codes.Unavailable {
					t.Errorf("a concurrent call: %v, want AlreadyExists", err)
				}
			})
		}
		wg.Wait()
	}
	both(func() (string, error) {
		resp, err := b.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handlerVM})
		return resp.GetPodSandboxId(), err
	})
	for _, id := range ids {
		t.Cleanup((&pod{bed: b, t: t, ctx: ctx, id: id}).remove)
	}
	if len(ids) != 1 {
		t.Fatalf("4 equal RunPodSandbox at once made %d sandboxes, want 1", len(ids))
	}
	id := ids[0]
	both(func() (string, error) {
		resp, err := b.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: id, Config: idle("c"), SandboxConfig: cfg})
		return resp.GetContainerId(), err
	})
	if len(ids) != 1 {
		t.Errorf("4 equal CreateContainer at once made %d containers, want 1", len(ids))
	}
}

// Events of a pod's life in their order, with the state of the moment.
func TestEvents(t *testing.T) {
	ctx, b := use(t)
	events := b.listen(ctx, t)
	p := b.vmPod(ctx, t)
	c := p.start(shell("c", "exit 3"))
	c.wait()
	c.remove()
	p.remove()
	want := []struct {
		id   string
		kind runtimeapi.ContainerEventType
	}{
		{p.id, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT},
		{p.id, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT},
		{c.id, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT},
		{c.id, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT},
		{c.id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT},
		{c.id, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT},
		{p.id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT},
		{p.id, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT},
	}
	for i, w := range want {
		ev := next(t, events)
		if ev.GetContainerId() != w.id || ev.GetContainerEventType() != w.kind {
			t.Fatalf("event %d: %s of %.10s, want %s of %.10s", i, ev.GetContainerEventType(), ev.GetContainerId(), w.kind, w.id)
		}
		if ev.GetPodSandboxStatus().GetId() != p.id {
			t.Errorf("event %d has the status of sandbox %q, want %q", i, ev.GetPodSandboxStatus().GetId(), p.id)
		}
		if w.id == c.id && w.kind == runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT {
			statuses := ev.GetContainersStatuses()
			if len(statuses) != 1 || statuses[0].GetExitCode() != 3 {
				t.Errorf("the event of the end has container statuses %v, want one with exit code 3", statuses)
			}
		}
	}
}

// listen subscribes to events; what it returns is closed when the stream ends.
func (b *bed) listen(ctx context.Context, t *testing.T) <-chan *runtimeapi.ContainerEventResponse {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	stream, err := b.rt.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	events := make(chan *runtimeapi.ContainerEventResponse, 1000)
	var owned sync.WaitGroup
	owned.Go(func() {
		defer close(events)
		for {
			ev, err := stream.Recv()
			if err != nil {
				if !errors.Is(err, io.EOF) && ctx.Err() == nil && status.Code(err) != codes.Unavailable {
					t.Errorf("the stream of events: %v", err)
				}
				return
			}
			events <- ev
		}
	})
	t.Cleanup(func() {
		cancel()
		owned.Wait()
	})
	b.awaitSubscription(ctx, t, events)
	return events
}

// awaitSubscription returns when the server has subscribed to the VM side and nothing is pending: the containers of
// a pod of its own come and go until their events are seen.
func (b *bed) awaitSubscription(ctx context.Context, t *testing.T, events <-chan *runtimeapi.ContainerEventResponse) {
	t.Helper()
	probe := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-probe" })
	probe.until("the stream of events has begun", func() bool {
		probe.create(idle("c")).remove()
		return len(events) > 0
	})
	probe.remove()
	for {
		ev := next(t, events)
		if ev.GetContainerId() == probe.id && ev.GetContainerEventType() == runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT {
			return
		}
	}
}

func next(t *testing.T, events <-chan *runtimeapi.ContainerEventResponse) *runtimeapi.ContainerEventResponse {
	t.Helper()
	select {
	case ev, ok := <-events:
		if !ok {
			t.Fatal("the stream of events has ended")
		}
		return ev
	case <-time.After(30 * time.Second):
		t.Fatal("no event within 30 s")
	}
	return nil
}
