package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc/stats"

	"github.com/vmruntime/vmruntime/runtime"
)

// spans sends those of CRI calls away; nil where the configuration names no endpoint.
type spans struct {
	provider *sdktrace.TracerProvider
	log      *slog.Logger
}

// sendTimeout bounds how long the daemon's end may wait for who takes the spans.
const sendTimeout = 2 * time.Second

// startTracing begins to send spans. Nobody has to be there to take them: then they are dropped, with a word in the log.
func startTracing(ctx context.Context, cfg runtime.TracingConfig, log *slog.Logger) (*spans, error) {
	if cfg.Endpoint == "" {
		return nil, nil
	}
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(cfg.Target()), otlptracegrpc.WithInsecure())
	if err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, errors.Join(err, exporter.Shutdown(ctx))
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("sending spans", "error", err) }))
	rate := float64(cfg.SamplingRatePerMillion) / 1e6
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(rate))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "vmruntime"), attribute.String("service.version", runtime.Version()), attribute.String("host.name", host),
		)),
	)
	return &spans{provider, log}, nil
}

// calls gives each call its span, below the caller's if there is one.
func (s *spans) calls() stats.Handler {
	if s == nil {
		return nil
	}
	return otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(s.provider),
		otelgrpc.WithPropagators(propagation.TraceContext{}),
		otelgrpc.WithFilter(func(call *stats.RPCTagInfo) bool { return changes(call.FullMethodName) }),
	)
}

// changes tells whether a call does something. The others only ask, which the kubelet does every second.
func changes(method string) bool {
	name := path.Base(method)
	for _, prefix := range []string{"List", "Stream", "Get"} {
		if strings.HasPrefix(name, prefix) {
			return false
		}
	}
	return !strings.HasSuffix(name, "Status") && !strings.HasSuffix(name, "Stats") &&
		!slices.Contains([]string{"Version", "RuntimeConfig", "ImageFsInfo"}, name)
}

// close sends what is left, if somebody takes it.
func (s *spans) close() {
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), sendTimeout)
	defer cancel()
	if err := s.provider.Shutdown(ctx); err != nil {
		s.log.Warn("sending the last spans", "error", err)
	}
}
