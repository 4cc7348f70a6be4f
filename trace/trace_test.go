package trace_test

import (
	"context"
	"errors"
	"testing"

	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/vmruntime/vmruntime/trace"
)

// record has spans below one called "call" recorded.
func record(t *testing.T, sampler sdktrace.Sampler) (call context.Context, end func() tracetest.SpanStubs) {
	t.Helper()
	exporter := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter), sdktrace.WithSampler(sampler))
	call, span := provider.Tracer("test").Start(t.Context(), "call")
	return call, func() tracetest.SpanStubs {
		span.End()
		return exporter.GetSpans()
	}
}

func TestSpans(t *testing.T) {
	call, end := record(t, sdktrace.AlwaysSample())
	trace.Tag(call, "k", "v")
	failed := errors.New("failed")
	err := trace.Do(call, "step", func(ctx context.Context) error {
		_, end := trace.Start(ctx, "part")
		end(nil)
		end(failed) // has ended
		return failed
	})
	if !errors.Is(err, failed) {
		t.Errorf("Do returns %v", err)
	}
	end()
	_, late := trace.Start(trace.Of(context.Background(), call), "late")
	late(nil)
	spans := end()
	if len(spans) != 4 {
		t.Fatalf("%d spans, want 4: %v", len(spans), spans)
	}
	part, step, root, after := spans[0], spans[1], spans[2], spans[3]
	if part.Name != "part" || part.Parent.SpanID() != step.SpanContext.SpanID() || part.Status.Code != codes.Unset {
		t.Errorf("part: %+v", part)
	}
	if step.Name != "step" || step.Parent.SpanID() != root.SpanContext.SpanID() || step.Status.Code != codes.Error || step.Status.Description != "failed" {
		t.Errorf("step: %+v", step)
	}
	if len(root.Attributes) != 1 || string(root.Attributes[0].Key) != "k" || root.Attributes[0].Value.AsString() != "v" {
		t.Errorf("attributes %v", root.Attributes)
	}
	if after.Name != "late" || after.Parent.SpanID() != root.SpanContext.SpanID() {
		t.Errorf("after the call: %+v", after)
	}
}

// Nothing is made where the call is not recorded, or is in no trace at all.
func TestOff(t *testing.T) {
	unsampled, end := record(t, sdktrace.NeverSample())
	for _, call := range []context.Context{t.Context(), unsampled} {
		ctx, end := trace.Start(call, "step")
		if ctx != call {
			t.Error("Start makes another context")
		}
		end(errors.New("failed"))
		trace.Tag(call, "k", "v")
	}
	if spans := end(); len(spans) != 0 {
		t.Errorf("spans %v", spans)
	}
	if n := testing.AllocsPerRun(100, func() {
		_, end := trace.Start(unsampled, "step")
		end(nil)
	}); n != 0 {
		t.Errorf("a step that is not recorded makes %v allocations", n)
	}
}
