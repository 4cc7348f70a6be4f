package cluster_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/vmruntime/vmruntime/test/cluster"
)

// guestDir is what make guest builds.
const guestDir = "../../out/guest"

// theCluster is the cluster of all tests, or why there is none.
var (
	theCluster *cluster.Cluster
	noCluster  string
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	if noCluster = reasonForNoCluster(); noCluster == "" {
		dir, err := os.MkdirTemp("", "c-") // short: sockets lie below it
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		c, err := newCluster(dir)
		if err != nil {
			fmt.Fprintln(os.Stderr, "the cluster does not come up:", errors.Join(err, os.RemoveAll(dir)))
			return 1
		}
		theCluster = c
		defer func() {
			if err := errors.Join(c.Stop(), os.RemoveAll(dir), goleak.Find()); err != nil {
				fmt.Fprintln(os.Stderr, "after all tests:", err)
				code = 1
			}
		}()
	}
	return m.Run()
}

// reasonForNoCluster says what a cluster needs that is not here.
func reasonForNoCluster() string {
	switch {
	case testing.Short():
		return "boots VMs: run by make test"
	case os.Geteuid() != 0:
		return "needs root: a node makes namespaces, mounts and cgroups"
	}
	if _, err := os.Stat(filepath.Join(guestDir, "manifest.json")); err != nil {
		return "needs the guest: run make guest"
	}
	return ""
}

func newCluster(dir string) (*cluster.Cluster, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	guest, err := filepath.Abs(guestDir)
	if err != nil {
		return nil, err
	}
	binary := filepath.Join(dir, "bin", "vmruntime")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", binary, "../../cmd/vmruntime").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build vmruntime: %w\n%s", err, out)
	}
	return cluster.Start(ctx, cluster.Options{Root: dir, VMRuntime: binary, GuestDir: guest, LogLevel: "debug"})
}

// use gives a test the cluster, and a context that ends after a time that is enough on a busy machine.
func use(t *testing.T) (context.Context, *cluster.Cluster) {
	t.Helper()
	if noCluster != "" {
		t.Skip(noCluster)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	t.Cleanup(cancel)
	return ctx, theCluster
}
