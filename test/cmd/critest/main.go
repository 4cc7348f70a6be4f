// Command critest runs the CRI's conformance suite on plain containerd, on
// vmruntime's default handler and on its handler vm, at the same time, each on a
// node of its own. It fails when one is not as it should be, or leaks. With several
// rounds the suite runs that often on the same node, and whatever a round leaves in
// the daemon that the first did not is a leak too.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vmruntime/vmruntime/test/critest"
	"github.com/vmruntime/vmruntime/test/images"
	"github.com/vmruntime/vmruntime/test/node"
)

// The runs, by the names that the summaries have.
const (
	baseline       = "containerd"
	defaultHandler = "default"
	vmHandler      = "vm"
)

// slower is how much longer than the first a round may take, which on a machine that does nothing else means that the daemon has slowed down.
const slower = 1.5

type flags struct {
	runs, focus, out, vmruntime, guest, skip string
	parallel, rounds                         int
	timeout                                  time.Duration
}

// outcome is what came of one run: its rounds, as far as it got, and what was wrong with it besides specs.
type outcome struct {
	rounds []round
	err    error
}

type round struct {
	results critest.Results
	skipped critest.Results // of the specs of the skip list, run apart
	took    time.Duration
	usage   critest.Usage
}

func main() {
	var f flags
	flag.StringVar(&f.runs, "runs", strings.Join([]string{baseline, defaultHandler, vmHandler}, ","), "comma separated `runs`")
	flag.StringVar(&f.focus, "focus", "", "run only specs that match this `regexp`; the results are then not compared")
	flag.StringVar(&f.out, "out", "out/critest", "`directory` of logs and reports")
	flag.StringVar(&f.vmruntime, "vmruntime", "bin/vmruntime", "vmruntime's `program`")
	flag.StringVar(&f.guest, "guest", "out/guest", "`directory` that make guest wrote")
	flag.StringVar(&f.skip, "skip", "test/critest/skip-vm.txt", "skip list of the handler vm")
	flag.IntVar(&f.parallel, "parallel", 1, "run specs in so many `processes` at the same time")
	flag.IntVar(&f.rounds, "rounds", 1, "run the suite so many `times`, on the same node")
	flag.DurationVar(&f.timeout, "timeout", 30*time.Minute, "for each round")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, f); err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
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
	text, err := os.ReadFile(f.skip)
	if err != nil {
		return err
	}
	skips, err := critest.ReadSkips(string(text))
	if err != nil {
		return err
	}
	registry, err := images.Handler()
	if err != nil {
		return err
	}
	names := strings.Split(f.runs, ",")
	outcomes := map[string]*outcome{}
	var wg sync.WaitGroup
	for _, name := range names {
		if !slices.Contains([]string{baseline, defaultHandler, vmHandler}, name) {
			return fmt.Errorf("run %q is unknown, want %s, %s or %s", name, baseline, defaultHandler, vmHandler)
		}
		o := &outcome{}
		outcomes[name] = o
		wg.Go(func() {
			o.rounds, o.err = runOne(ctx, name, f, skips, registry)
		})
	}
	wg.Wait()
	err = judge(f, outcomes, skips)
	for _, name := range names {
		outcomes[name].print(name, filepath.Join(f.out, name+".log"))
	}
	for _, name := range names {
		for _, r := range outcomes[name].rounds {
			fmt.Println(r.results.Summary(name))
		}
	}
	return err
}

// print tells how long each round took, against the first, and what the daemon had after it.
func (o *outcome) print(name, log string) {
	for i, r := range o.rounds {
		fmt.Printf("critest %s, round %d took %s (ratio %.2f), see %s\n", name, i+1, r.took.Round(time.Second), r.ratio(o), log)
		if name != baseline {
			fmt.Printf("  after it the daemon has %s\n", r.usage)
		}
	}
}

// ratio is how long the round took against the first one.
func (r round) ratio(o *outcome) float64 { return float64(r.took) / float64(o.rounds[0].took) }

// runOne brings up a node and runs the suite, as often as asked.
func runOne(ctx context.Context, name string, f flags, skips []critest.Skip, registry http.Handler) (rounds []round, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(f.rounds)*f.timeout)
	defer cancel()
	nodeOptions := node.Options{Registry: registry}
	if name != baseline {
		nodeOptions.VMRuntime, nodeOptions.GuestDir = f.vmruntime, f.guest
	}
	if err := os.MkdirAll(f.out, 0o755); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(f.out, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	n, err := node.Start(ctx, nodeOptions)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, n.SaveLogs(filepath.Join(f.out, name+"-node")), n.Stop()) }()
	options := critest.Options{Focus: f.focus, Parallel: f.parallel, Output: log}
	if name == vmHandler {
		options.Handler, options.Skip = vmHandler, skips
	}
	for i := range f.rounds {
		options.Dir = filepath.Join(f.out, name, strconv.Itoa(i+1))
		r, err := runRound(ctx, n, options)
		rounds = append(rounds, r)
		if err != nil {
			return rounds, fmt.Errorf("round %d: %w", i+1, err)
		}
		if name != baseline {
			rounds[i].usage, err = critest.Settle(ctx, n, rounds[0].usage)
		}
		if err != nil {
			return rounds, fmt.Errorf("after round %d: %w", i+1, err)
		}
	}
	return rounds, nil
}

// runRound runs the suite once, then the skipped specs, and fails when pods left something.
func runRound(ctx context.Context, n *node.Node, o critest.Options) (r round, err error) {
	start := time.Now()
	r.results, err = critest.Run(ctx, n, o)
	r.took = time.Since(start)
	if err != nil {
		return r, err
	}
	if len(o.Skip) > 0 && o.Focus == "" {
		apart := o
		apart.Skip, apart.Focus, apart.Parallel, apart.Dir = nil, critest.AnyOf(o.Skip), 1, o.Dir+"-skipped"
		if r.skipped, err = critest.Run(ctx, n, apart); err != nil {
			return r, fmt.Errorf("specs of the skip list: %w", err)
		}
	}
	leaks, err := n.Leaks(ctx)
	if err == nil && len(leaks) > 0 {
		err = fmt.Errorf("left behind:\n  %s", strings.Join(leaks, "\n  "))
	}
	return r, err
}

// judge joins what is wrong with the outcomes.
func judge(f flags, outcomes map[string]*outcome, skips []critest.Skip) error {
	var errs []error
	for name, o := range outcomes {
		if o.err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, o.err))
		}
		for i, r := range o.rounds {
			if err := r.judge(f, name, outcomes[baseline], i, skips); err != nil {
				errs = append(errs, fmt.Errorf("%s, round %d: %w", name, i+1, err))
			}
			if err := critest.Compare(o.rounds[0].results, r.results); err != nil {
				errs = append(errs, fmt.Errorf("%s, round %d against the first: %w", name, i+1, err))
			}
			if ratio := r.ratio(o); ratio > slower {
				errs = append(errs, fmt.Errorf("%s, round %d took %.2f times as long as the first, want at most %.1f", name, i+1, ratio, slower))
			}
		}
	}
	return errors.Join(errs...)
}

// judge joins what is wrong with round i of a run. Without the base line's there is nothing to compare.
func (r round) judge(f flags, name string, base *outcome, i int, skips []critest.Skip) error {
	if failed := r.results.Count(critest.Failed); failed > 0 || len(r.results) == 0 {
		return fmt.Errorf("%d of %d specs failed", failed, len(r.results))
	}
	if f.focus != "" {
		return nil
	}
	var errs []error
	if name == vmHandler {
		errs = append(errs, critest.JudgeSkipped(r.skipped, skips))
	}
	if base == nil || i >= len(base.rounds) {
		return errors.Join(errs...)
	}
	switch name {
	case defaultHandler:
		errs = append(errs, critest.Compare(base.rounds[i].results, r.results))
	case vmHandler:
		errs = append(errs, critest.Judge(base.rounds[i].results, r.results, skips))
	}
	return errors.Join(errs...)
}
