// Command critest runs the CRI's conformance suite on plain containerd, on
// vmruntime's default handler and on its handler vm, at the same time, each on a
// node of its own. It fails when one is not as it should be, or leaks.
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

type flags struct {
	runs, focus, out, vmruntime, guest, skip string
	timeout                                  time.Duration
}

type outcome struct {
	results critest.Results
	took    time.Duration
	err     error
}

func main() {
	var f flags
	flag.StringVar(&f.runs, "runs", strings.Join([]string{baseline, defaultHandler, vmHandler}, ","), "comma separated `runs`")
	flag.StringVar(&f.focus, "focus", "", "run only specs that match this `regexp`; the results are then not compared")
	flag.StringVar(&f.out, "out", "out/critest", "`directory` of logs and reports")
	flag.StringVar(&f.vmruntime, "vmruntime", "bin/vmruntime", "vmruntime's `program`")
	flag.StringVar(&f.guest, "guest", "out/guest", "`directory` that make guest wrote")
	flag.StringVar(&f.skip, "skip", "test/critest/skip-vm.txt", "skip list of the handler vm")
	flag.DurationVar(&f.timeout, "timeout", 30*time.Minute, "for each run")
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
			start := time.Now()
			o.results, o.err = runOne(ctx, name, f, skips, registry)
			o.took = time.Since(start)
		})
	}
	wg.Wait()
	err = judge(f, outcomes, skips)
	for _, name := range names {
		fmt.Printf("critest %s took %s, see %s\n", name, outcomes[name].took.Round(time.Second), filepath.Join(f.out, name+".log"))
	}
	for _, name := range names {
		fmt.Println(outcomes[name].results.Summary(name))
	}
	return err
}

// runOne brings up a node, runs the suite, and fails when pods left something.
func runOne(ctx context.Context, name string, f flags, skips []critest.Skip, registry http.Handler) (results critest.Results, err error) {
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	options := critest.Options{Focus: f.focus, Dir: filepath.Join(f.out, name)}
	nodeOptions := node.Options{Registry: registry}
	if name != baseline {
		nodeOptions.VMRuntime, nodeOptions.GuestDir = f.vmruntime, f.guest
	}
	if name == vmHandler {
		options.Handler, options.Skip = vmHandler, skips
	}
	if err := os.MkdirAll(f.out, 0o755); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(f.out, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	options.Output = log
	n, err := node.Start(ctx, nodeOptions)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, n.SaveLogs(filepath.Join(f.out, name+"-node")), n.Stop()) }()
	results, err = critest.Run(ctx, n, options)
	if err != nil {
		return results, err
	}
	leaks, err := n.Leaks(ctx)
	if err == nil && len(leaks) > 0 {
		err = fmt.Errorf("left behind:\n  %s", strings.Join(leaks, "\n  "))
	}
	return results, err
}

// judge joins what is wrong with the outcomes.
func judge(f flags, outcomes map[string]*outcome, skips []critest.Skip) error {
	var errs []error
	for name, o := range outcomes {
		if o.err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, o.err))
		}
		if failed := o.results.Count(critest.Failed); failed > 0 || len(o.results) == 0 {
			errs = append(errs, fmt.Errorf("%s: %d of %d specs failed", name, failed, len(o.results)))
		}
	}
	base, haveBase := outcomes[baseline]
	if f.focus != "" || !haveBase {
		return errors.Join(errs...)
	}
	if o, ok := outcomes[defaultHandler]; ok {
		if err := critest.Compare(base.results, o.results); err != nil {
			errs = append(errs, fmt.Errorf("%s is not as %s:\n%w", defaultHandler, baseline, err))
		}
	}
	if o, ok := outcomes[vmHandler]; ok {
		if err := critest.Judge(base.results, o.results, skips); err != nil {
			errs = append(errs, fmt.Errorf("%s:\n%w", vmHandler, err))
		}
	}
	return errors.Join(errs...)
}
