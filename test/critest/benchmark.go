package critest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmruntime/vmruntime/test/node"
)

// Benchmarks are durations of calls, by what was measured and the operation: "pod CreatePod".
type Benchmarks map[string][]time.Duration

// benchmarkFile ends the names of the files that critest writes, which begin with what was measured.
const benchmarkFile = "_benchmark_data.json"

// Benchmark runs critest's own benchmarks of pods, containers and images against a socket of a node, each so many times.
// The image is pulled and removed. Of the options it takes handler, directory and output.
func Benchmark(ctx context.Context, n *node.Node, socket string, o Options, samples int, image string) (Benchmarks, error) {
	if err := emptyDir(o.Dir); err != nil {
		return nil, err
	}
	params := filepath.Join(o.Dir, "params.yaml")
	text := fmt.Sprintf("podsNumber: %d\ncontainersNumber: %d\nimagesNumber: %d\nimagePullingBenchmarkImage: %s\n", samples, samples, samples, image)
	if err := os.WriteFile(params, []byte(text), 0o644); err != nil {
		return nil, err
	}
	// The other two benchmarks write no figures, or list images of a public registry.
	err := execute(ctx, n, socket, o, "-benchmark", "-benchmarking-params-file", params, "-benchmarking-output-dir", o.Dir,
		"-ginkgo.skip", "benchmark about listing Image|benchmark about start a container from scratch")
	if err != nil {
		return nil, fmt.Errorf("critest -benchmark: %w", err)
	}
	return readBenchmarks(o.Dir, samples)
}

func readBenchmarks(dir string, samples int) (Benchmarks, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*"+benchmarkFile))
	if err != nil {
		return nil, err
	}
	all := Benchmarks{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var set struct {
			OperationsNames []string `json:"operationsNames"`
			Datapoints      []struct {
				Durations []time.Duration `json:"operationsDurationsNs"`
			} `json:"datapoints"`
		}
		if err := json.Unmarshal(data, &set); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		what := strings.TrimSuffix(filepath.Base(file), benchmarkFile)
		for i, operation := range set.OperationsNames {
			key := what + " " + operation
			for _, point := range set.Datapoints {
				if i < len(point.Durations) {
					all[key] = append(all[key], point.Durations[i])
				}
			}
			if len(all[key]) != samples {
				return nil, fmt.Errorf("%s has %d durations of %s, want %d", file, len(all[key]), operation, samples)
			}
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("critest wrote no figures to %s", dir)
	}
	return all, nil
}
