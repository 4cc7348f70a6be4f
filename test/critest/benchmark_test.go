package critest

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestReadBenchmarks(t *testing.T) {
	dir := t.TempDir()
	if _, err := readBenchmarks(dir, 2); err == nil {
		t.Error("no figures, no error")
	}
	text := `{"operationsNames":["CreatePod","StopPod"],"numParallel":1,"datapoints":[
{"sampleIndex":0,"operationsDurationsNs":[1000,20]},{"sampleIndex":1,"operationsDurationsNs":[3000,40]}]}`
	if err := os.WriteFile(filepath.Join(dir, "pod_benchmark_data.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := readBenchmarks(dir, 2)
	want := Benchmarks{"pod CreatePod": {time.Microsecond, 3 * time.Microsecond}, "pod StopPod": {20, 40}}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v, benchmarks (-want +got):\n%s", err, diff)
	}
	if _, err := readBenchmarks(dir, 3); err == nil {
		t.Error("two of three figures, no error")
	}
}
