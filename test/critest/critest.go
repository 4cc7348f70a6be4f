// Package critest runs critest, the conformance suite of the CRI, and judges
// its results.
//
// It runs on three nodes: containerd alone (the base line), vmruntime with its
// default handler, which has to give the same result spec by spec, and
// vmruntime with the handler vm, which has to pass all that the base line
// passes except the specs that skip-vm.txt names, each with its reason. These
// are run too, apart, and have to fail: one that passes is no exception any more.
//
// Several rounds against one daemon show what it leaks.
package critest

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/vmruntime/vmruntime/test/node"
	"github.com/vmruntime/vmruntime/test/tools"
)

// Result of a spec.
type Result string

// The results that a spec can have.
const (
	Passed  Result = "passed"
	Failed  Result = "failed"
	Skipped Result = "skipped"
)

// Results is what came of each spec, by its name.
type Results map[string]Result

// Count says how many specs had a result.
func (r Results) Count(want Result) int {
	n := 0
	for _, got := range r {
		if got == want {
			n++
		}
	}
	return n
}

// Summary is the line that a run ends with.
func (r Results) Summary(handler string) string {
	return fmt.Sprintf("critest %s: %d passed, %d failed, %d skipped", handler, r.Count(Passed), r.Count(Failed), r.Count(Skipped))
}

// Options of a run.
type Options struct {
	Handler  string // runtime handler; "" for the default one
	Skip     []Skip // specs not to run
	Focus    string // only specs that match this regular expression; "" for all
	Parallel int    // in how many processes specs run at the same time; 0 and 1: in one
	Dir      string // where the report goes
	Output   io.Writer
}

// reportName is the report's file: in the directory of the run or, of a parallel one, in a directory there that critest makes.
const reportName = "junit.xml"

// Run runs the suite against a node. Failed specs are in the results; the
// error says that there are none.
func Run(ctx context.Context, n *node.Node, o Options) (Results, error) {
	if err := emptyDir(o.Dir); err != nil {
		return nil, err
	}
	var args []string
	for _, s := range o.Skip {
		args = append(args, "-ginkgo.skip", s.Spec.String())
	}
	if o.Focus != "" {
		args = append(args, "-ginkgo.focus", o.Focus)
	}
	if o.Parallel > 1 {
		args = append(args, "-parallel", strconv.Itoa(o.Parallel))
	}
	run := execute(ctx, n, n.Socket(), o, args...) // fails also when a spec does
	reports, err := filepath.Glob(filepath.Join(o.Dir, "*", reportName))
	if err != nil {
		return nil, err
	}
	results := Results{}
	if err := results.read(append(reports, filepath.Join(o.Dir, reportName))[0]); err != nil {
		return nil, errors.Join(err, run)
	}
	if run != nil && results.Count(Failed) == 0 {
		return results, fmt.Errorf("critest failed but its report has no failed spec: %w", run)
	}
	return results, nil
}

func emptyDir(dir string) error { return errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)) }

// execute runs critest in its directory.
func execute(ctx context.Context, n *node.Node, socket string, o Options, args ...string) error {
	ginkgo, err := tools.Dir("cri-ginkgo")
	if err != nil {
		return err
	}
	args = append(args, "-config", "/dev/null", "-test.timeout", "0", "-runtime-endpoint", "unix://"+socket, "-image-endpoint", "unix://"+socket,
		"-runtime-handler", o.Handler, "-ginkgo.junit-report", reportName, "-ginkgo.no-color")
	cmd := n.Command(ctx, n.Tool("cri-tools", "critest"), args...)
	cmd.Dir = o.Dir
	cmd.Env = append(os.Environ(), "TMPDIR="+o.Dir, "PATH="+ginkgo+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = o.Output, o.Output
	return cmd.Run()
}

// junit is the part of a JUnit report that is read.
type junit struct {
	Cases []struct {
		Name    string    `xml:"name,attr"`
		Status  string    `xml:"status,attr"`
		Failure *struct{} `xml:"failure"`
		Error   *struct{} `xml:"error"`
		Skipped *struct{} `xml:"skipped"`
	} `xml:"testsuite>testcase"`
}

// ReadReport reads the results of a JUnit report.
func ReadReport(file string) (Results, error) {
	r := Results{}
	return r, r.read(file)
}

// read adds the results of a report. The suite's own nodes, in brackets at the
// start of the name, count only when they failed.
func (r Results) read(file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var report junit
	if err := xml.Unmarshal(data, &report); err != nil {
		return fmt.Errorf("read report %s: %w", file, err)
	}
	for _, c := range report.Cases {
		result := Passed
		switch {
		case c.Failure != nil || c.Error != nil:
			result = Failed
		case c.Skipped != nil:
			result = Skipped
		case c.Status != "passed":
			return fmt.Errorf("report %s: spec %q has status %q, want passed, or an element that says why not", file, c.Name, c.Status)
		}
		name, isSpec := strings.CutPrefix(c.Name, "[It] ")
		if isSpec || result == Failed {
			r[name] = result
		}
	}
	return nil
}

// Compare returns an error that names every spec whose result is not the base
// line's.
func Compare(base, got Results) error {
	var errs []error
	for _, spec := range specs(base, got) {
		if base[spec] != got[spec] {
			errs = append(errs, fmt.Errorf("%s: %s, base line %s", spec, orMissing(got[spec]), orMissing(base[spec])))
		}
	}
	return errors.Join(errs...)
}

// Judge returns an error that names every spec that passes in the base line
// and neither passes here nor is in the skip list, and every entry of the skip list
// that is of no use.
func Judge(base, got Results, skips []Skip) error {
	var errs []error
	for _, spec := range specs(base, got) {
		listed := slices.ContainsFunc(skips, func(s Skip) bool { return s.Spec.MatchString(spec) })
		if got[spec] == Failed || base[spec] == Passed && got[spec] != Passed && !listed {
			errs = append(errs, fmt.Errorf("%s: %s, base line %s", spec, orMissing(got[spec]), orMissing(base[spec])))
		}
	}
	for _, s := range skips {
		if !slices.ContainsFunc(specs(base), func(spec string) bool { return base[spec] == Passed && s.Spec.MatchString(spec) }) {
			errs = append(errs, fmt.Errorf("skip list: %q matches no spec that the base line passes", s.Spec))
		}
	}
	return errors.Join(errs...)
}

// JudgeSkipped judges the run of the skipped specs alone: it returns an error that names every one that passes, and every
// entry of the skip list of which no spec failed.
func JudgeSkipped(got Results, skips []Skip) error {
	var errs []error
	for _, s := range skips {
		failed := false
		for _, spec := range specs(got) {
			switch {
			case !s.Spec.MatchString(spec):
			case got[spec] == Passed:
				errs = append(errs, fmt.Errorf("skip list: %s passes; remove %q", spec, s.Spec))
			case got[spec] == Failed:
				failed = true
			}
		}
		if !failed {
			errs = append(errs, fmt.Errorf("skip list: of %q no spec fails", s.Spec))
		}
	}
	return errors.Join(errs...)
}

// AnyOf is a regular expression for all specs of a skip list.
func AnyOf(skips []Skip) string {
	var parts []string
	for _, s := range skips {
		parts = append(parts, "("+s.Spec.String()+")")
	}
	return strings.Join(parts, "|")
}

func specs(all ...Results) []string {
	var names []string
	for _, r := range all {
		for name := range r {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func orMissing(r Result) Result {
	if r == "" {
		return "not run"
	}
	return r
}

// Skip is a spec that is not run, and why.
type Skip struct {
	Spec   *regexp.Regexp
	Reason string
}

// ReadSkips reads a skip list: lines of `regular expression # reason`, blank
// lines, and comments that start with #. All faults are reported at once.
func ReadSkips(text string) ([]Skip, error) {
	var skips []Skip
	var errs []error
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		expr, reason, _ := strings.Cut(line, " # ")
		spec, err := regexp.Compile(strings.TrimSpace(expr))
		if err != nil {
			errs = append(errs, fmt.Errorf("skip list, line %d: %w", i+1, err))
			continue
		}
		if strings.TrimSpace(reason) == "" {
			errs = append(errs, fmt.Errorf("skip list, line %d: %q has no reason, want `regular expression # reason`", i+1, line))
			continue
		}
		skips = append(skips, Skip{spec, strings.TrimSpace(reason)})
	}
	return skips, errors.Join(errs...)
}
