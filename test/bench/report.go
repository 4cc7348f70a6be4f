package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"
)

// figure is one line of the result. Bar is an upper limit, or with AtLeast a lower one: of Ratio if there is a baseline,
// else of Value.
type figure struct {
	Name     string   `json:"name"`
	Value    float64  `json:"value"`
	Unit     string   `json:"unit"`
	Baseline *float64 `json:"baseline"`
	Ratio    *float64 `json:"ratio"`
	Bar      *float64 `json:"bar"`
	AtLeast  bool     `json:"atLeast,omitempty"`
	// Samples are all measurements of which the value is the median, in their order; BaselineSamples those of the baseline.
	Samples         []float64 `json:"samples,omitempty"`
	BaselineSamples []float64 `json:"baselineSamples,omitempty"`
}

func (f figure) held() string {
	if f.Bar == nil || f.Baseline != nil && f.Ratio == nil {
		return ""
	}
	measured := f.Value
	if f.Ratio != nil {
		measured = *f.Ratio
	}
	if measured == *f.Bar || measured < *f.Bar != f.AtLeast {
		return "held"
	}
	return "MISSED"
}

// report collects figures.
type report struct {
	machine []string // what the figures were taken on, for people
	figures []figure
}

// add adds a figure of its own.
func (r *report) add(name string, value float64, unit string) *figure {
	r.figures = append(r.figures, figure{Name: name, Value: value, Unit: unit})
	return &r.figures[len(r.figures)-1]
}

// compare adds a figure with what it is compared to. There is no ratio to nothing.
func (r *report) compare(name string, value, baseline float64, unit string) *figure {
	f := r.add(name, value, unit)
	f.Baseline = &baseline
	if baseline != 0 {
		f.Ratio = new(value / baseline)
	}
	return f
}

// medians adds a figure of repetitions, with all of them.
func (r *report) medians(name string, value, baseline durations) *figure {
	f := r.compare(name, value.median(), baseline.median(), "ms")
	f.Samples, f.BaselineSamples = value.milliseconds(), baseline.milliseconds()
	return f
}

// within sets the bar to what the figure may be at most.
func (f *figure) within(bar float64) { f.Bar = &bar }

// atLeast sets the bar to what the figure has to be at least.
func (f *figure) atLeast(bar float64) { f.Bar, f.AtLeast = &bar, true }

func (r *report) print(w io.Writer) {
	for _, line := range r.machine {
		fmt.Fprintln(w, line)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nFIGURE\tVALUE\tBASELINE\tUNIT\tRATIO\tBAR\t")
	for _, f := range r.figures {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", f.Name, number(&f.Value), number(f.Baseline), f.Unit, number(f.Ratio), number(f.Bar), f.held())
	}
	_ = t.Flush() // to the terminal; the file is what counts
}

// number writes three significant digits, or all before the point.
func number(v *float64) string {
	switch {
	case v == nil:
		return ""
	case *v >= 100 || *v <= -100:
		return strconv.FormatFloat(*v, 'f', 0, 64)
	default:
		return strconv.FormatFloat(*v, 'g', 3, 64)
	}
}

func (r *report) write(file string) error {
	data, err := json.MarshalIndent(r.figures, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}

// durations are measurements of one thing.
type durations []time.Duration

// at is a quantile in milliseconds, by nearest rank: of 10 values the 0.99 quantile is the greatest.
func (d durations) at(quantile float64) float64 {
	sorted := slices.Sorted(slices.Values(d))
	rank := int(quantile*float64(len(sorted)) + 0.999999)
	return milliseconds(sorted[min(max(rank, 1), len(sorted))-1])
}

func (d durations) median() float64 { return d.at(0.5) }

func (d durations) milliseconds() []float64 {
	var out []float64
	for _, one := range d {
		out = append(out, milliseconds(one))
	}
	return out
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
