package cluster_test

import (
	"math"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/vmruntime/vmruntime/test/cluster"
)

func TestHistogram(t *testing.T) {
	read := func(page string) cluster.Histogram {
		parser := expfmt.NewTextParser(model.UTF8Validation)
		metrics, err := parser.TextToMetricFamilies(strings.NewReader("# TYPE took histogram\n" + page))
		if err != nil {
			t.Fatal(err)
		}
		return cluster.NewHistogram(metrics["took"], "of", "vm")
	}
	before := read(`took_bucket{of="vm",le="1"} 1
took_bucket{of="vm",le="2"} 1
took_bucket{of="vm",le="+Inf"} 1
took_sum{of="vm"} 0.5
took_count{of="vm"} 1
`)
	h := read(`took_bucket{of="vm",le="1"} 2
took_bucket{of="vm",le="2"} 4
took_bucket{of="vm",le="+Inf"} 5
took_sum{of="vm"} 10.5
took_count{of="vm"} 5
took_bucket{of="other",le="1"} 100
took_bucket{of="other",le="+Inf"} 100
took_sum{of="other"} 1
took_count{of="other"} 100
`).Since(before)
	if h.Count != 4 || h.Mean() != 2.5 {
		t.Errorf("there are %d with a mean of %v, want 4 of 2.5", h.Count, h.Mean())
	}
	for q, want := range map[float64]float64{0.25: 1, 0.5: 2, 0.75: 2, 0.99: math.Inf(1)} {
		if got := h.Quantile(q); got != want {
			t.Errorf("the quantile %v is within %v, want %v", q, got, want)
		}
	}
}
