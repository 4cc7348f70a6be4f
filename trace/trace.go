// Package trace marks what a call spends its time on, as spans of OpenTelemetry below the call's own. Where that one is not recorded, as
// always while tracing is off, nothing is done. Nothing is kept but in contexts: who serves a call decides whether it has a span, and where it goes.
package trace

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

const scope = "github.com/vmruntime/vmruntime"

// Start begins a span below the context's. What it returns ends it, with the error if there is one; it may be called again.
func Start(ctx context.Context, name string) (context.Context, func(error)) {
	parent := trace.SpanFromContext(ctx)
	if !parent.SpanContext().IsSampled() {
		return ctx, func(error) {}
	}
	ctx, span := parent.TracerProvider().Tracer(scope).Start(ctx, name)
	return ctx, func(err error) {
		if err != nil {
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
	}
}

// Do runs a step within a span of its own.
func Do(ctx context.Context, name string, step func(context.Context) error) error {
	ctx, end := Start(ctx, name)
	err := step(ctx)
	end(err)
	return err
}

// Tag says of the context's span what it is about.
func Tag(ctx context.Context, key, value string) {
	trace.SpanFromContext(ctx).SetAttributes(attribute.String(key, value))
}

// Of is ctx, but with the span of a call, which may have ended by then: for what goes on after the call.
func Of(ctx, call context.Context) context.Context {
	return trace.ContextWithSpan(ctx, trace.SpanFromContext(call))
}
