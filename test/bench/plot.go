package main

import (
	"fmt"
	"os"
	"strings"
)

// plot is a picture of all measurements of what is compared: a row for each, a dot for each measurement, a line at the median.
type plot struct {
	names []string
	rows  []durations
}

func (p *plot) add(name string, d durations) {
	p.names, p.rows = append(p.names, name), append(p.rows, d)
}

// Sizes of the picture.
const (
	plotLeft  = 330 // where the axis begins
	plotWidth = 560 // of the axis
	plotRow   = 44
	plotTop   = 30
	plotTicks = 8 // at most so many
)

// write makes the file, which begins with what the figures were taken on. Without a name, or without figures, it makes none.
func (p *plot) write(file string, machine []string) error {
	if file == "" || len(p.rows) == 0 {
		return nil
	}
	return os.WriteFile(file, []byte(p.svg(machine)), 0o644)
}

func (p *plot) svg(machine []string) string {
	top := 0.0
	for _, d := range p.rows {
		top = max(top, d.at(1))
	}
	step := tick(top)
	x := func(ms float64) float64 { return plotLeft + plotWidth*ms/top }
	bottom := plotTop + plotRow*len(p.rows)
	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n",
		plotLeft+plotWidth+60, bottom+40+16*len(machine))
	fmt.Fprintf(&out, `<rect width="100%%" height="100%%" fill="white"/>`+"\n"+`<text x="10" y="18">From RunPodSandbox to the first line in the log, in ms</text>`+"\n")
	for ms := 0.0; ms <= top; ms += step {
		fmt.Fprintf(&out, `<path d="M%.1f %d V%d" stroke="#ddd"/><text x="%.1f" y="%d" text-anchor="middle" fill="#555">%.0f</text>`+"\n",
			x(ms), plotTop, bottom, x(ms), bottom+16, ms)
	}
	for i, d := range p.rows {
		y := plotTop + plotRow*i + plotRow/2
		fmt.Fprintf(&out, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", plotLeft-10, y+4, p.names[i])
		for _, one := range d {
			fmt.Fprintf(&out, `<circle cx="%.1f" cy="%d" r="4" fill="#4477aa" fill-opacity="0.4"/>`+"\n", x(milliseconds(one)), y)
		}
		median := x(d.median())
		fmt.Fprintf(&out, `<path d="M%.1f %d v24" stroke="#cc3311" stroke-width="2"/><text x="%.1f" y="%d" text-anchor="middle" fill="#cc3311">%s</text>`+"\n",
			median, y-12, median, y-14, number(new(d.median())))
	}
	for i, line := range machine {
		fmt.Fprintf(&out, `<text x="10" y="%d" fill="#555">%s</text>`+"\n", bottom+38+16*i, line)
	}
	out.WriteString("</svg>\n")
	return out.String()
}

// tick is the distance of the axis' marks: 1, 2 or 5 times a power of ten.
func tick(top float64) float64 {
	for step := 1.0; ; step *= 10 {
		for _, times := range []float64{1, 2, 5} {
			if top/(step*times) <= plotTicks {
				return step * times
			}
		}
	}
}
