package cluster

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// Kubectl runs kubectl as the cluster's administrator and returns its standard output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	cmd := c.KubectlCommand(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w\n%s%s", strings.Join(args, " "), err, &stdout, &stderr)
	}
	return stdout.String(), nil
}

// KubectlCommand is a command of kubectl that has not been started. It runs in the machine's network namespace, not
// the node's: port-forward listens there.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.KubectlProgram(), append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...)
}

// KubectlProgram is kubectl's path.
func (c *Cluster) KubectlProgram() string { return c.tool("kubernetes", "kubectl") }
