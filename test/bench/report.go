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
}

func (f figure) held() string {
	if f.Bar == nil {
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

// compare adds a figure with what it is compared to.
func (r *report) compare(name string, value, baseline float64, unit string) *figure {
	ratio := value / baseline
	f := r.add(name, value, unit)
	f.Baseline, f.Ratio = &baseline, &ratio
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

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
