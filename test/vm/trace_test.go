package vm_test

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// spanReceiver takes spans as a collector does.
type spanReceiver struct {
	collector.UnimplementedTraceServiceServer

	mu    sync.Mutex
	spans []*tracepb.Span
}

func (r *spanReceiver) Export(_ context.Context, req *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, resource := range req.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			r.spans = append(r.spans, scope.GetSpans()...)
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// receiveSpans has the node's daemon send its spans to a receiver for the time of the test.
func (b *bed) receiveSpans(ctx context.Context, t *testing.T) *spanReceiver {
	t.Helper()
	socket := filepath.Join(b.Root, "run", "otlp.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	r, server := &spanReceiver{}, grpc.NewServer()
	collector.RegisterTraceServiceServer(server, r)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	config := filepath.Join(b.Root, "vmruntime", "vmruntime.toml")
	before := readFile(config)
	b.configure(ctx, t, config, fmt.Sprintf("%s\n[tracing]\nendpoint = %q\n", before, socket))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		b.configure(ctx, t, config, before)
	})
	return r
}

func (r *spanReceiver) all() []*tracepb.Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.spans)
}

// of are the spans of one trace.
func (r *spanReceiver) of(trace string) []*tracepb.Span {
	return slices.DeleteFunc(r.all(), func(s *tracepb.Span) bool { return hex.EncodeToString(s.GetTraceId()) != trace })
}

// tree writes the spans below one, each level in the order of names.
func tree(spans []*tracepb.Span, parent, indent string) string {
	below := slices.DeleteFunc(slices.Clone(spans), func(s *tracepb.Span) bool { return hex.EncodeToString(s.GetParentSpanId()) != parent })
	slices.SortFunc(below, func(a, b *tracepb.Span) int { return cmp.Compare(a.GetName(), b.GetName()) })
	var out strings.Builder
	for _, s := range below {
		out.WriteString(indent + s.GetName() + "\n" + tree(spans, hex.EncodeToString(s.GetSpanId()), indent+"  "))
	}
	return out.String()
}

// timeline writes when spans began, after the first one, and how long they took.
func timeline(spans []*tracepb.Span) string {
	spans = slices.Clone(spans)
	slices.SortFunc(spans, func(a, b *tracepb.Span) int { return cmp.Compare(a.GetStartTimeUnixNano(), b.GetStartTimeUnixNano()) })
	var out strings.Builder
	for _, s := range spans {
		fmt.Fprintf(&out, "%8.1f ms  %8.1f ms  %s\n", float64(s.GetStartTimeUnixNano()-spans[0].GetStartTimeUnixNano())/1e6,
			float64(s.GetEndTimeUnixNano()-s.GetStartTimeUnixNano())/1e6, s.GetName())
	}
	return out.String()
}

// What happens between the kubelet's calls and the first output of a pod that begins as a template is in the kubelet's trace, if that is recorded.
func TestSpansOfAPod(t *testing.T) {
	const (
		recorded, dropped = "0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319c"
		caller            = "b7ad6b7169203331"
	)
	ctx, b := use(t)
	from := fileSize(b.LogFile("vmruntime"))
	r := b.receiveSpans(ctx, t)
	b.awaitTemplate(ctx, t, from)

	silent := metadata.AppendToOutgoingContext(ctx, "traceparent", "00-"+dropped+"-"+caller+"-00")
	q := b.vmPod(silent, t)
	q.output(shell("silent", "echo said"))
	traced := metadata.AppendToOutgoingContext(ctx, "traceparent", "00-"+recorded+"-"+caller+"-01")
	p := b.vmPod(traced, t)
	c := p.start(shell("main", "echo said; sleep 1000"))
	c.ready("said")

	want := `runtime.v1.RuntimeService/CreateContainer
  image disk
runtime.v1.RuntimeService/RunPodSandbox
  agent's first answer
  configure sandbox
  exec QEMU
  load state
  network
  resume
  scratch disk
runtime.v1.RuntimeService/StartContainer
  create container
  first output
  plug disk
  start container
  wait for the guest
`
	got := ""
	until(ctx, t, "all spans are there", func() bool {
		got = tree(r.of(recorded), caller, "")
		return strings.Count(got, "\n") >= strings.Count(want, "\n")
	})
	if got != want {
		t.Errorf("the spans are\n%swant\n%s", got, want)
	}
	spans := r.of(recorded)
	t.Logf("begun, took:\n%s", timeline(spans))
	for _, s := range spans {
		if s.GetEndTimeUnixNano() < s.GetStartTimeUnixNano() || s.GetStatus().GetCode() == tracepb.Status_STATUS_CODE_ERROR {
			t.Errorf("span %v", s)
		}
		if strings.HasPrefix(s.GetName(), "runtime.v1.") && !slices.ContainsFunc(s.GetAttributes(), func(a *commonpb.KeyValue) bool {
			return a.GetKey() == "vmruntime.sandbox.id" && a.GetValue().GetStringValue() == p.id
		}) {
			t.Errorf("span %s does not name its pod: %v", s.GetName(), s.GetAttributes())
		}
	}
	if s := r.of(dropped); len(s) > 0 {
		t.Errorf("a trace that its caller does not record has spans: %v", s)
	}
	if _, err := b.rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.id}); err != nil {
		t.Fatal(err)
	}
	until(ctx, t, "a call that nobody traces begins a trace", func() bool {
		return slices.ContainsFunc(r.all(), func(s *tracepb.Span) bool {
			return s.GetName() == "runtime.v1.RuntimeService/StopContainer" && len(s.GetParentSpanId()) == 0
		})
	})
	for _, s := range r.all() {
		if strings.Contains(s.GetName(), "/List") || strings.HasSuffix(s.GetName(), "Status") {
			t.Errorf("a call that only asks has the span %s", s.GetName())
		}
	}
}
