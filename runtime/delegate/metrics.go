package delegate

import (
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// answerer says who answered a call.
type answerer string

const (
	byNone       answerer = "none" // nobody: vmruntime is not ready, or the request could not be placed
	byVM         answerer = "vm"
	byContainerd answerer = "containerd"
	byBoth       answerer = "both"
)

// answerer is who answers what the owner of a method alone decides.
func (o Owner) answerer() answerer {
	switch o {
	case Containerd, Fallback:
		return byContainerd
	case Merged, Identity, Union:
		return byBoth
	default:
		return byNone
	}
}

// callMetrics count CRI calls.
type callMetrics struct {
	took   *prometheus.HistogramVec
	failed *prometheus.CounterVec
}

func newCallMetrics() callMetrics {
	return callMetrics{
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "vmruntime_cri_call_duration_seconds",
			Help: "How long CRI calls took, by method and by who answered: vm, containerd, both or none. GetContainerEvents, which has no end, is left out.",
			// From the fastest list to an image's pull.
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 120},
		}, []string{"method", "side"}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vmruntime_cri_call_failures_total",
			Help: "CRI calls that were answered with an error, by method, who answered, and gRPC code.",
		}, []string{"method", "side", "code"}),
	}
}

func (m callMetrics) observe(fullMethod string, by answerer, took time.Duration, err error) {
	method := path.Base(fullMethod)
	if fullMethod != runtimeapi.RuntimeService_GetContainerEvents_FullMethodName {
		m.took.WithLabelValues(method, string(by)).Observe(took.Seconds())
	}
	if err != nil {
		m.failed.WithLabelValues(method, string(by), status.Code(err).String()).Inc()
	}
}

// Describe names the server's metrics, as a prometheus.Collector.
func (s *Server) Describe(ch chan<- *prometheus.Desc) {
	s.calls.took.Describe(ch)
	s.calls.failed.Describe(ch)
}

// Collect gives the server's metrics, as a prometheus.Collector.
func (s *Server) Collect(ch chan<- prometheus.Metric) {
	s.calls.took.Collect(ch)
	s.calls.failed.Collect(ch)
}
