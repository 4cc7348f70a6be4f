package main

import (
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/runtime"
)

// Calls that come every second, or never end, are in no trace.
func TestCallsThatAreTraced(t *testing.T) {
	var got []string
	for _, service := range []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc} {
		for _, m := range service.Methods {
			if changes("/" + service.ServiceName + "/" + m.MethodName) {
				got = append(got, m.MethodName)
			}
		}
		for _, s := range service.Streams {
			if changes("/" + service.ServiceName + "/" + s.StreamName) {
				t.Errorf("the stream %s is traced", s.StreamName)
			}
		}
	}
	slices.Sort(got)
	want := "Attach CheckpointContainer CheckpointPod CreateContainer Exec ExecSync PortForward PullImage RemoveContainer RemoveImage RemovePodSandbox " +
		"ReopenContainerLog RestorePod RunPodSandbox StartContainer StopContainer StopPodSandbox UpdateContainerResources UpdatePodSandboxResources UpdateRuntimeConfig"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("traced are\n%s, want\n%s", s, want)
	}
}

// Nobody has to be there to take spans.
func TestTracingToNobody(t *testing.T) {
	off, err := startTracing(t.Context(), runtime.TracingConfig{}, slog.Default())
	if off != nil || err != nil || off.calls() != nil {
		t.Errorf("without an endpoint: %v, %v", off, err)
	}
	off.close()
	cfg := runtime.TracingConfig{Endpoint: filepath.Join(t.TempDir(), "nobody.sock"), SamplingRatePerMillion: 1000000}
	on, err := startTracing(t.Context(), cfg, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	_, span := on.provider.Tracer("test").Start(t.Context(), "lost")
	span.End()
	begun := time.Now()
	on.close()
	if took := time.Since(begun); took > 2*sendTimeout {
		t.Errorf("the end took %s", took)
	}
}
