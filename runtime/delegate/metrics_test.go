package delegate

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Every call is counted once, under who answered it.
func TestMetrics(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(n.server)
	for name, call := range map[string]func() error{
		"VM pod": func() error {
			_, err := n.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id("aa")})
			return err
		},
		"containerd's pod": func() error {
			_, err := n.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id("b")})
			return err
		},
		"merged": func() error {
			_, err := n.cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			return err
		},
		"streamed": func() error {
			ss, err := n.cri.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{})
			for err == nil {
				_, err = ss.Recv()
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		},
		"not registered": func() error {
			_, err := n.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{})
			return err
		},
	} {
		if err := call(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	n.vm.setFault(func(string) error { return status.Error(codes.ResourceExhausted, "forced") })
	_, err := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id("ca")})
	wantCode(t, err, codes.ResourceExhausted)
	n.server.ready.Store(false)
	_, err = n.cri.Version(ctx, &runtimeapi.VersionRequest{})
	wantCode(t, err, codes.Unavailable)

	want := `vmruntime_cri_call_duration_seconds ImageStatus containerd 1
vmruntime_cri_call_duration_seconds ListPodSandbox both 1
vmruntime_cri_call_duration_seconds StopContainer vm 1
vmruntime_cri_call_duration_seconds StopPodSandbox containerd 1
vmruntime_cri_call_duration_seconds StopPodSandbox vm 1
vmruntime_cri_call_duration_seconds StreamPodSandboxes both 1
vmruntime_cri_call_duration_seconds Version none 1
vmruntime_cri_call_failures_total ResourceExhausted StopContainer vm 1
vmruntime_cri_call_failures_total Unavailable Version none 1
`
	if diff := cmp.Diff(want, samples(t, registry)); diff != "" {
		t.Error(diff)
	}
}

// samples are the counts of a registry, as lines.
func samples(t *testing.T, g prometheus.Gatherer) string {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, f := range families {
		for _, m := range f.GetMetric() {
			out.WriteString(f.GetName())
			for _, l := range m.GetLabel() {
				out.WriteString(" " + l.GetValue())
			}
			fmt.Fprintf(&out, " %v\n", float64(m.GetHistogram().GetSampleCount())+m.GetCounter().GetValue())
		}
	}
	return out.String()
}
