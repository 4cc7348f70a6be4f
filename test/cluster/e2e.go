package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/vmruntime/vmruntime/test/critest"
	"github.com/vmruntime/vmruntime/test/tools"
)

// E2E is a run of Kubernetes' end-to-end suite.
type E2E struct {
	Focus string // only specs that match this regular expression
	Skip  string // but not those that match this one
	Procs int    // how many specs run at once
	Dir   string // where the report goes
	// Output gets what the suite prints.
	Output io.Writer
}

// RunE2E runs specs of Kubernetes' end-to-end suite. Failed specs are in the results; the error says that there are
// none. It needs the tool sets "cri-ginkgo" and "kubernetes-e2e".
func (c *Cluster) RunE2E(ctx context.Context, e E2E) (critest.Results, error) {
	ginkgo, err := tools.Dir("cri-ginkgo")
	if err != nil {
		return nil, err
	}
	suite, err := tools.Dir("kubernetes-e2e")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.RemoveAll(e.Dir), os.MkdirAll(e.Dir, 0o755)); err != nil {
		return nil, err
	}
	program := filepath.Join(e.Dir, "e2e.test") // ginkgo knows programs by this name
	if err := os.Symlink(filepath.Join(suite, "e2e"), program); err != nil {
		return nil, err
	}
	cmd := c.node.Command(ctx, filepath.Join(ginkgo, "ginkgo"),
		"--procs", strconv.Itoa(e.Procs), "--focus", e.Focus, "--skip", e.Skip, "--timeout", "3h", "--no-color",
		"--output-dir", e.Dir, "--junit-report", "junit.xml", program, "--",
		"--kubeconfig", c.path("node-admin.conf"), "--provider=skeleton", "--num-nodes=1", "--minStartupPods=0",
		"--disable-log-dump", "--dump-logs-on-failure=false", "--kubectl-path", c.KubectlProgram())
	cmd.Dir = e.Dir
	cmd.Stdout, cmd.Stderr = e.Output, e.Output
	// ginkgo ends its processes when it is interrupted, and not when it is killed.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	run := cmd.Run() // fails also when a spec does
	results, err := critest.ReadReport(filepath.Join(e.Dir, "junit.xml"))
	if err != nil {
		return nil, errors.Join(err, run)
	}
	if run != nil && results.Count(critest.Failed) == 0 {
		return results, fmt.Errorf("the suite failed but its report has no failed spec: %w", run)
	}
	return results, nil
}
