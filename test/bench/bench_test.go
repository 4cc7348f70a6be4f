package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

func TestQuantiles(t *testing.T) {
	var d durations
	for i := 100; i >= 1; i-- {
		d = append(d, time.Duration(i)*time.Millisecond)
	}
	for _, c := range []struct {
		of       durations
		quantile float64
		want     float64
	}{
		{d, 0.5, 50},
		{d, 0.99, 99},
		{d, 1, 100},
		{d[:1], 0.5, 100},
		{d[:1], 0.99, 100},
		{d[:10], 0.5, 95},
		{d[:10], 0.99, 100},
		{d[:3], 0.5, 99},
	} {
		if got := c.of.at(c.quantile); got != c.want {
			t.Errorf("quantile %v of %d values = %v, want %v", c.quantile, len(c.of), got, c.want)
		}
	}
}

func TestBars(t *testing.T) {
	var r report
	r.compare("ratio below", 150, 100, "ms").within(1.6)
	r.compare("ratio above", 170, 100, "ms").within(1.6)
	r.add("value at", 0.3, "ms").within(0.3)
	r.add("value above", 0.31, "ms").within(0.3)
	r.add("free", 1, "MiB")
	r.compare("throughput above", 96, 100, "MiB/s").atLeast(0.95)
	r.compare("throughput below", 94, 100, "MiB/s").atLeast(0.95)
	r.compare("over nothing", 1, 0, "% of a core").within(1)
	want := []string{"held", "MISSED", "held", "MISSED", "", "held", "MISSED", ""}
	for i, f := range r.figures {
		if f.held() != want[i] {
			t.Errorf("%s: %q, want %q", f.Name, f.held(), want[i])
		}
	}
	if _, err := json.Marshal(r.figures); err != nil {
		t.Error(err)
	}
	data, err := json.Marshal(r.figures[4])
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"name":"free","value":1,"unit":"MiB","baseline":null,"ratio":null,"bar":null}`; string(data) != want {
		t.Errorf("a figure is written as %s, want %s", data, want)
	}
}

func TestMediansKeepWhatTheyAreOf(t *testing.T) {
	var r report
	r.medians("start", durations{3 * time.Millisecond, time.Millisecond, 2 * time.Millisecond}, durations{4 * time.Millisecond})
	data, err := json.Marshal(r.figures[0])
	if err != nil {
		t.Fatal(err)
	}
	want := `{"name":"start","value":2,"unit":"ms","baseline":4,"ratio":0.5,"bar":null,"samples":[3,1,2],"baselineSamples":[4]}`
	if string(data) != want {
		t.Errorf("a figure is written as %s, want %s", data, want)
	}
}

func TestReadMaps(t *testing.T) {
	m, err := readMaps(strings.NewReader(`7f0000000000-7f0014000000 rw-s 00000000 00:01 1036 /memfd:memory-backend-memfd (deleted)
Rss:              120000 kB
Pss:              100000 kB
Pss_Dirty:          9999 kB
VmFlags: rd wr
Private_Dirty:     90000 kB
7f0014000000-7f0014001000 r-xp 00000000 08:01 77 /usr/bin/qemu-system-x86_64
Pss:                 300 kB
Private_Clean:       100 kB
Private_Dirty:        50 kB
7f0014001000-7f0014002000 rw-p 00000000 00:00 0
Pss:                  24 kB
Private_Dirty:        24 kB
7f0014002000-7f0014003000 ---p 00000000 00:00 0
Pss:                   0 kB
7f0014003000-7f0014803000 rw-p 00000000 00:00 0
Pss:                  40 kB
7f0016000000-7f001e000000 rwxp 00000000 00:00 0
Pss:               60000 kB
Private_Dirty:     60000 kB
7f001e000000-7f001e021000 rw-p 00000000 00:00 0
Pss:                  60 kB
7f001e021000-7f0022000000 ---p 00000000 00:00 0
Pss:                   0 kB
7f0022000000-7f0022021000 rw-p 00000000 00:00 0
Pss:                  16 kB
7ffd10000000-7ffd10021000 rw-p 00000000 00:00 0 [stack]
Pss:                   8 kB
`))
	if err != nil {
		t.Fatal(err)
	}
	if want := (mapped{
		guest: 100000 << 10, code: 60000 << 10, anonymous: 100 << 10, stacks: 48 << 10, files: 300 << 10, private: 60174 << 10,
	}); m != want {
		t.Errorf("readMaps = %+v, want %+v", m, want)
	}
	for _, bad := range []string{"Pss: many kB\n", "1000-none rw-p 00000000 00:00 0\n"} {
		if _, err := readMaps(strings.NewReader(bad)); err == nil {
			t.Errorf("readMaps takes %q", bad)
		}
	}
}

func TestReadStat(t *testing.T) {
	got, err := readStat("cpu  100 20 3 9999 9999 4 5 9999 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
	if want := 1320 * time.Millisecond; err != nil || got != want {
		t.Errorf("readStat = %v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{"", "cpu0 1 2 3 4 5 6 7 8\n", "cpu 1 2\n", "cpu 1 2 many 4 5 6 7 8\n"} {
		if _, err := readStat(bad); err == nil {
			t.Errorf("readStat takes %q", bad)
		}
	}
}

func TestSetChangesOnlyWhatIsThere(t *testing.T) {
	object := map[string]any{"config": map[string]any{"metadata": 1}}
	if err := set(object, 2, "config", "metadata"); err != nil || object["config"].(map[string]any)["metadata"] != 2 {
		t.Errorf("set: %v, the object is %v", err, object)
	}
	for _, path := range [][]string{{"absent"}, {"config", "absent"}, {"absent", "metadata"}} {
		if err := set(object, 2, path...); err == nil {
			t.Errorf("set %q succeeds on %v", path, object)
		}
	}
}

func TestReadFio(t *testing.T) {
	got := map[string][]fioSide{}
	err := readFio(`fio: a warning
{"jobs": [
	{"jobname": "write", "read": {"bw_bytes": 0, "lat_ns": {"mean": 0}}, "write": {"bw_bytes": 2097152, "lat_ns": {"mean": 5000}}},
	{"jobname": "read", "read": {"bw_bytes": 1048576, "lat_ns": {"mean": 7000}}, "write": {"bw_bytes": 0, "lat_ns": {"mean": 0}}}
]}`, got)
	if err != nil || rate(got["write"]) != 2 || latency(got["write"]) != 5 || rate(got["read"]) != 1 || latency(got["read"]) != 7 {
		t.Errorf("readFio: %v, %v", got, err)
	}
	for _, bad := range []string{"", "fio: no such device", `{"jobs": [{"jobname": "read", "read": {"bw_bytes": 0}}]}`} {
		if err := readFio(bad, got); err == nil {
			t.Errorf("readFio takes %q", bad)
		}
	}
}

func TestPlot(t *testing.T) {
	var p plot
	p.add("one", durations{100 * time.Millisecond, 300 * time.Millisecond, 200 * time.Millisecond})
	p.add("other", durations{400 * time.Millisecond})
	svg := p.svg([]string{"a machine"})
	if err := xml.Unmarshal([]byte(svg), new(any)); err != nil && !errors.Is(err, io.EOF) {
		t.Errorf("no XML: %v", err)
	}
	for text, times := range map[string]int{"<circle": 4, ">one<": 1, ">other<": 1, `fill="#cc3311">200<`: 1, ">a machine<": 1, `middle" fill="#555">`: 9} {
		if got := strings.Count(svg, text); got != times {
			t.Errorf("%q is there %d times, not %d:\n%s", text, got, times, svg)
		}
	}
	for top, want := range map[float64]float64{7: 1, 9: 2, 400: 50, 1700: 500} {
		if got := tick(top); got != want {
			t.Errorf("the marks of an axis to %v are %v apart, not %v", top, got, want)
		}
	}
}
