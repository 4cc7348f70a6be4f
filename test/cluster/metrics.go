package cluster

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"slices"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// KubeletMetrics are the kubelet's own metrics, by name.
func (c *Cluster) KubeletMetrics(ctx context.Context) (map[string]*dto.MetricFamily, error) {
	page, err := c.client.CoreV1().RESTClient().Get().Resource("nodes").Name(NodeName).SubResource("proxy").Suffix("metrics").DoRaw(ctx)
	if err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	return parser.TextToMetricFamilies(bytes.NewReader(page))
}

// Histogram is how often something took how long.
type Histogram struct {
	Count   uint64
	Sum     float64            // in the metric's unit, which is seconds
	Buckets map[float64]uint64 // how many were no greater than the key
}

// NewHistogram adds up the histograms of a metric that have a label's value; those without any label "" are all.
func NewHistogram(metric *dto.MetricFamily, label, value string) Histogram {
	h := Histogram{Buckets: map[float64]uint64{}}
	for _, m := range metric.GetMetric() {
		if label != "" && !slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName() == label && l.GetValue() == value }) {
			continue
		}
		h.Count += m.GetHistogram().GetSampleCount()
		h.Sum += m.GetHistogram().GetSampleSum()
		for _, b := range m.GetHistogram().GetBucket() {
			h.Buckets[b.GetUpperBound()] += b.GetCumulativeCount()
		}
	}
	return h
}

// Since is what came after an earlier state of the same histogram.
func (h Histogram) Since(before Histogram) Histogram {
	d := Histogram{Count: h.Count - before.Count, Sum: h.Sum - before.Sum, Buckets: map[float64]uint64{}}
	for bound, n := range h.Buckets {
		d.Buckets[bound] = n - before.Buckets[bound]
	}
	return d
}

// Mean is 0 of nothing.
func (h Histogram) Mean() float64 {
	if h.Count == 0 {
		return 0
	}
	return h.Sum / float64(h.Count)
}

// Quantile is the least bound of a bucket that the quantile is not above: what is between bounds is not known.
func (h Histogram) Quantile(q float64) float64 {
	rank := uint64(math.Ceil(q * float64(h.Count)))
	least := math.Inf(1)
	for bound, n := range h.Buckets {
		if n >= rank {
			least = min(least, bound)
		}
	}
	return least
}

func (h Histogram) String() string {
	return fmt.Sprintf("%d, mean %.3g s, p50 within %g s, p90 within %g s, p99 within %g s",
		h.Count, h.Mean(), h.Quantile(0.5), h.Quantile(0.9), h.Quantile(0.99))
}
