// Command conformance runs the sig-node NodeConformance specs of Kubernetes' end-to-end suite on a cluster whose
// kubelet knows vmruntime only: once as it is, the base line, and once with every pod turned into a VM. It fails when a
// spec fails with VMs that does not in the base line, or pods leave something on the node; the specs of skip-vm.txt are
// not run with VMs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vmruntime/vmruntime/test/cluster"
	"github.com/vmruntime/vmruntime/test/critest"
)

// The runs.
const (
	containers = "containers"
	vms        = "vms"
)

const (
	focus = `\[sig-node\].*\[NodeConformance\]`
	skip  = `\[Serial\]|\[Slow\]|\[Disruptive\]|\[Feature:|\[FeatureGate:`
)

type flags struct {
	runs, focus, out, vmruntime, guest, accel, skips string
	procs                                            int
}

func main() {
	var f flags
	flag.StringVar(&f.runs, "runs", containers+","+vms, "comma separated `runs`")
	flag.StringVar(&f.focus, "focus", focus, "run only specs that match this `regexp`")
	flag.StringVar(&f.out, "out", "out/conformance", "`directory` of logs and reports")
	flag.StringVar(&f.vmruntime, "vmruntime", "bin/vmruntime", "vmruntime's `program`")
	flag.StringVar(&f.guest, "guest", "out/guest", "`directory` that make guest wrote")
	flag.StringVar(&f.accel, "accel", "auto", "kvm, tcg or auto")
	flag.StringVar(&f.skips, "skip", "test/cluster/skip-vm.txt", "skip list of the run with VMs")
	flag.IntVar(&f.procs, "procs", 4, "how many specs run at once")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, f); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		cancel()
		os.Exit(1)
	}
}

func run(ctx context.Context, f flags) error {
	for _, p := range []*string{&f.out, &f.vmruntime, &f.guest} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	text, err := os.ReadFile(f.skips)
	if err != nil {
		return err
	}
	skips, err := critest.ReadSkips(string(text))
	if err != nil {
		return err
	}
	var errs []error
	base := critest.Results{}
	for name := range strings.SplitSeq(f.runs, ",") {
		if name != containers && name != vms {
			return fmt.Errorf("run %q is unknown, want %s or %s", name, containers, vms)
		}
		start := time.Now()
		results, err := runOne(ctx, name, f, skips)
		for _, spec := range slices.Sorted(maps.Keys(results)) {
			if results[spec] != critest.Failed {
				continue
			}
			fmt.Printf("failed with %s: %s\n", name, spec)
			if name == vms && base[spec] != critest.Failed {
				err = errors.Join(err, fmt.Errorf("fails with VMs alone: %s", spec))
			}
		}
		if name == containers {
			base = results
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		fmt.Printf("conformance %s: %d passed, %d failed in %s, see %s\n", name, results.Count(critest.Passed), results.Count(critest.Failed),
			time.Since(start).Round(time.Second), filepath.Join(f.out, name+".log"))
	}
	return errors.Join(errs...)
}

// runOne brings up a cluster and runs the suite.
func runOne(ctx context.Context, name string, f flags, skips []critest.Skip) (results critest.Results, err error) {
	if err := os.MkdirAll(f.out, 0o755); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(f.out, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c, err := cluster.Start(ctx, cluster.Options{VMRuntime: f.vmruntime, GuestDir: f.guest, Accel: f.accel})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Node().SaveLogs(filepath.Join(f.out, name+"-node")), c.Stop()) }()
	e := cluster.E2E{Focus: f.focus, Skip: skip, Procs: f.procs, Dir: filepath.Join(f.out, name), Output: log}
	if name == vms {
		if err := c.MakeAllVMs(ctx); err != nil {
			return nil, err
		}
		if len(skips) > 0 {
			e.Skip += "|" + critest.AnyOf(skips)
		}
	}
	return c.RunE2E(ctx, e)
}
