// Command conformance runs the sig-node NodeConformance specs of Kubernetes' end-to-end suite on a cluster whose
// kubelet knows vmruntime only: once as it is, the base line, and once with every pod turned into a VM. It fails when a
// spec that passes in the base line does not with VMs, unless skip-vm.txt names it, when one that is named there passes,
// and when pods leave something on the node.
//
// With -add the results of specs are added to those of earlier runs in the same directory, which a whole run that is
// made in parts needs, by -focus.
package main

import (
	"context"
	"encoding/json"
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
	add                                              bool
}

func main() {
	var f flags
	flag.StringVar(&f.runs, "runs", containers+","+vms, "comma separated `runs`")
	flag.StringVar(&f.focus, "focus", focus, "run only specs that match this `regexp`")
	flag.StringVar(&f.out, "out", "out/conformance", "`directory` of logs and reports")
	flag.StringVar(&f.vmruntime, "vmruntime", "bin/vmruntime", "vmruntime's `program`")
	flag.StringVar(&f.guest, "guest", "out/guest", "`directory` that make guest wrote")
	flag.StringVar(&f.accel, "accel", "auto", "kvm, tcg or auto")
	flag.StringVar(&f.skips, "skip", "test/cluster/skip-vm.txt", "list of specs that fail with VMs")
	flag.IntVar(&f.procs, "procs", 4, "how many specs run at once")
	flag.BoolVar(&f.add, "add", false, "add to the results of earlier runs, and judge them all")
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
	all := map[string]critest.Results{containers: {}, vms: {}}
	if f.add {
		if err := read(f.file(resultsName), all); err != nil {
			return err
		}
	}
	var errs []error
	for name := range strings.SplitSeq(f.runs, ",") {
		if all[name] == nil {
			return fmt.Errorf("run %q is unknown, want %s or %s", name, containers, vms)
		}
		start := time.Now()
		results, err := runOne(ctx, name, f)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		maps.DeleteFunc(results, func(_ string, r critest.Result) bool { return r == critest.Skipped }) // those out of focus too
		if len(results) == 0 {
			errs = append(errs, fmt.Errorf("%s: no spec was run", name))
		}
		fmt.Printf("%s in %s, see %s\n", summary(name, results), time.Since(start).Round(time.Second), f.file(name+".log"))
		maps.Copy(all[name], results)
	}
	for _, name := range []string{containers, vms} {
		for _, spec := range slices.Sorted(maps.Keys(all[name])) {
			if all[name][spec] == critest.Failed {
				fmt.Printf("failed with %s: %s\n", name, spec)
			}
		}
		if f.add {
			fmt.Printf("%s in all runs\n", summary(name, all[name]))
		}
	}
	errs = append(errs, write(f.file(resultsName), all))
	if len(all[vms]) > 0 {
		errs = append(errs, judge(all[containers], all[vms], skips))
	}
	if n := all[vms].Count(critest.Passed); f.focus == focus && strings.Contains(f.runs, vms) && n < leastPassed {
		errs = append(errs, fmt.Errorf("%d specs passed with VMs, want at least %d", n, leastPassed))
	}
	return errors.Join(errs...)
}

// leastPassed is how many of the specs that are run by default have to pass with VMs.
const leastPassed = 98

// resultsName is the file of all results, by run and spec.
const resultsName = "results.json"

func (f flags) file(name string) string { return filepath.Join(f.out, name) }

func summary(name string, r critest.Results) string {
	return fmt.Sprintf("conformance %s: %d passed, %d failed", name, r.Count(critest.Passed), r.Count(critest.Failed))
}

// read adds what write wrote, if there is anything.
func read(file string, all map[string]critest.Results) error {
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(text, &all)
	}
	if err != nil {
		return fmt.Errorf("read the results of earlier runs: %w", err)
	}
	return nil
}

func write(file string, all map[string]critest.Results) error {
	text, err := json.MarshalIndent(all, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// judge returns an error that names every spec that passes in the base line and not with VMs, but those of the skip list,
// which have to fail. What fails in the base line cannot be had on this machine.
func judge(base, got critest.Results, skips []critest.Skip) error {
	rest, listed := critest.Results{}, critest.Results{}
	for spec, result := range got {
		switch {
		case slices.ContainsFunc(skips, func(s critest.Skip) bool { return s.Spec.MatchString(spec) }):
			listed[spec] = result
		case base[spec] != critest.Failed:
			rest[spec] = result
		}
	}
	return errors.Join(critest.Judge(base, rest, skips), critest.JudgeSkipped(listed, skips))
}

// runOne brings up a cluster and runs the suite.
func runOne(ctx context.Context, name string, f flags) (results critest.Results, err error) {
	if err := os.MkdirAll(f.out, 0o755); err != nil {
		return nil, err
	}
	log, err := os.Create(f.file(name + ".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c, err := cluster.Start(ctx, cluster.Options{VMRuntime: f.vmruntime, GuestDir: f.guest, Accel: f.accel})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Node().SaveLogs(f.file(name+"-node")), c.Stop()) }()
	e := cluster.E2E{Focus: f.focus, Skip: skip, Procs: f.procs, Dir: f.file(name), Output: log}
	if name == vms {
		if err := c.MakeAllVMs(ctx); err != nil {
			return nil, err
		}
	}
	return c.RunE2E(ctx, e)
}
