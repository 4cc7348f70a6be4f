package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmruntime/vmruntime/test/critest"
	"github.com/vmruntime/vmruntime/test/images"
)

// criRounds are how often critest's benchmarks are run in each way.
const criRounds = 2

// criBenchmarks are critest's own benchmarks of pods, containers and images with both handlers, in turns with containerd's socket.
func (b *bench) criBenchmarks(ctx context.Context) error {
	ways := []struct{ name, socket, handler string }{
		{"containerd", b.node.ContainerdSocket(), ""},
		{"default handler", b.node.Socket(), ""},
		{"handler vm", b.node.Socket(), vmHandler},
	}
	took := make([]critest.Benchmarks, len(ways))
	for i := range criRounds {
		for j := range ways { // another one goes first each time
			k := (i + j) % len(ways)
			dir := filepath.Join(b.node.Root, "critest", fmt.Sprintf("%d-%d", i, k))
			got, err := b.criBenchmark(ctx, ways[k].socket, critest.Options{Handler: ways[k].handler, Dir: dir})
			if err != nil {
				return fmt.Errorf("%s: %w", ways[k].name, err)
			}
			if took[k] == nil {
				took[k] = critest.Benchmarks{}
			}
			for operation, d := range got {
				took[k][operation] = append(took[k][operation], d...)
			}
		}
	}
	for k, way := range ways[1:] {
		for _, operation := range slices.Sorted(maps.Keys(took[0])) {
			value, base := durations(took[k+1][operation]), durations(took[0][operation])
			b.report.medians(fmt.Sprintf("critest's %s, %s, p50", operation, way.name), value, base)
		}
	}
	return nil
}

// criBenchmark runs them once; what critest says is told when it fails.
func (b *bench) criBenchmark(ctx context.Context, socket string, o critest.Options) (critest.Benchmarks, error) {
	var said strings.Builder
	o.Output = &said
	got, err := critest.Benchmark(ctx, b.node, socket, o, b.critest, images.Layers)
	if err != nil {
		fmt.Fprint(os.Stderr, said.String())
	}
	return got, err
}
