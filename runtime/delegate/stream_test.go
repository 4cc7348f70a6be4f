package delegate

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestEvents(t *testing.T) {
	n := newNode(t)
	ss := openEvents(t, n)
	for range 50 {
		for _, s := range []*side{n.vm, n.containerd} {
			s.events <- &runtimeapi.ContainerEventResponse{ContainerId: s.name}
			got, err := ss.Recv()
			if err != nil || got.ContainerId != s.name {
				t.Fatalf("%v, %v; want an event of %s", got, err, s.name)
			}
		}
	}
}

// A side that ends or breaks its events ends them all, so that the kubelet lists anew.
func TestEventsBreakWhole(t *testing.T) {
	vm := func(n *node) *side { return n.vm }
	containerd := func(n *node) *side { return n.containerd }
	for name, tc := range map[string]struct {
		side func(*node) *side
		end  error
		want codes.Code
	}{
		"VM side ends":      {vm, nil, codes.Unavailable},
		"VM side breaks":    {vm, errdefs.ErrDataLoss, codes.DataLoss},
		"containerd ends":   {containerd, nil, codes.Unavailable},
		"containerd breaks": {containerd, status.Error(codes.DataLoss, "forced"), codes.DataLoss},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			ss := openEvents(t, n)
			tc.side(n).endEvent <- tc.end
			_, err := ss.Recv()
			wantCode(t, err, tc.want)
		})
	}
	t.Run("containerd is killed", func(t *testing.T) {
		n := newNode(t)
		ss := openEvents(t, n)
		n.containerd.events <- &runtimeapi.ContainerEventResponse{}
		if _, err := ss.Recv(); err != nil {
			t.Fatal(err)
		}
		n.stop()
		_, err := ss.Recv()
		wantCode(t, err, codes.Unavailable)
	})
}

func openEvents(t *testing.T, n *node) grpc.ServerStreamingClient[runtimeapi.ContainerEventResponse] {
	t.Helper()
	ss, err := n.cri.GetContainerEvents(testContext(t), &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return ss
}

func TestStreamedLists(t *testing.T) {
	n := newNode(t)
	ss, err := n.cri.StreamPodSandboxes(testContext(t), &runtimeapi.StreamPodSandboxesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for {
		resp, err := ss.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, resp.PodSandboxes[0].Id)
	}
	slices.Sort(got)
	if want := []string{id("aa"), id("ab"), id("b")}; !slices.Equal(got, want) {
		t.Errorf("pods %v, want %v", got, want)
	}
}

// Stop must not wait for streams that have no end.
func TestStopEndsStreams(t *testing.T) {
	n := newNode(t)
	ss, err := n.cri.GetContainerEvents(testContext(t), &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	n.vm.events <- &runtimeapi.ContainerEventResponse{}
	if _, err := ss.Recv(); err != nil {
		t.Fatal(err)
	}
	n.server.Stop(testContext(t))
	_, err = ss.Recv()
	wantCode(t, err, codes.Unavailable)
	if !strings.Contains(err.Error(), "stopping") {
		t.Errorf("%v does not say why", err)
	}
}

// Stop waits for unary calls only as long as its context lasts.
func TestStopBreaksCallsOff(t *testing.T) {
	n := newNode(t)
	entered := make(chan struct{})
	release := make(chan struct{})
	n.vm.setFault(func(string) error { close(entered); <-release; return nil })
	answered := make(chan error, 1)
	go func() {
		_, err := n.cri.StopContainer(testContext(t), &runtimeapi.StopContainerRequest{ContainerId: id("ca")})
		answered <- err
	}()
	<-entered
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	go func() { n.server.Stop(ctx); close(stopped) }()
	cancel()
	wantCode(t, <-answered, codes.Unavailable)
	close(release)
	<-stopped
}

// A daemon may be told to stop before it has begun to serve.
func TestStopBeforeServe(t *testing.T) {
	s := New(Options{VM: newSide("vm", nil, nil), Containerd: must(t)(Dial("/nowhere")), Logger: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() { _ = s.containerd.Close() })
	s.Stop(testContext(t))
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(l); err != nil {
		t.Errorf("Serve after Stop: %v, want nil", err)
	}
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener is left open: %v", err)
	}
}
