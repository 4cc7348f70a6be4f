package cluster_test

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vmruntime/vmruntime/test/cluster"
	"github.com/vmruntime/vmruntime/test/critest"
)

// scaleTo is how many VM pods TestScale has at once. Each takes a processor to boot and about 150 MiB.
var scaleTo = flag.Int("scale", 8, "VM pods of the scale test's Deployment")

// scaleRounds are how often TestScale goes up and down.
const scaleRounds = 5

// A Deployment of VM pods is scaled up and down, and leaves nothing. No other test runs then.
func TestScale(t *testing.T) {
	n := newNamespace(t, true)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(n.ctx), 2*time.Hour)
	defer cancel()
	n.ctx = ctx
	n.makeMany(t)
	var used critest.Usage
	for round := range scaleRounds {
		before := startTimes(t, n)
		n.kubectl(t, "scale", "deployment/many", fmt.Sprintf("--replicas=%d", *scaleTo))
		n.kubectl(t, "rollout", "status", "deployment/many", "--timeout=30m")
		logStarts(t, n, fmt.Sprintf("round %d", round+1), before)
		n.kubectl(t, "scale", "deployment/many", "--replicas=0")
		n.kubectl(t, "wait", "pod", "-l", "app=many", "--for=delete", "--timeout=20m")
		n.await(t, "nothing to be left", func() error {
			lines, err := n.Leaks(n.ctx)
			if err == nil && len(lines) > 0 {
				err = fmt.Errorf("left on the node:\n  %s", strings.Join(lines, "\n  "))
			}
			return err
		})
		now, err := critest.Settle(n.ctx, n.Node(), used)
		if err != nil {
			t.Error(err)
		}
		t.Logf("round %d: the daemon has %s", round+1, now)
		if round == 0 {
			used = now
		}
	}
}

// makeMany makes a Deployment without pods, of a RuntimeClass of its own: by the overhead of the usual one, which is a limit too, a
// hundred do not fit where they do.
func (n *namespace) makeMany(t *testing.T) {
	t.Helper()
	n.apply(t, `
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: NAMESPACE}
handler: vm
overhead: {podFixed: {memory: 150Mi}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: many}
spec:
  replicas: 0
  progressDeadlineSeconds: 3600
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec:
      runtimeClassName: NAMESPACE
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: BUSYBOX, command: [sleep, "1000000"]}]`)
	t.Cleanup(func() { kubectl(context.WithoutCancel(n.ctx), t, n.Cluster, "delete", "runtimeclass", n.name) })
}

// startMetrics are the kubelet's histograms of how long it takes to start pods: from their creation until they are seen to run,
// with and without the pull of images (the latter leaves out pods that had to wait for a node), and of that the sandbox.
func startMetrics() []string {
	return []string{"kubelet_pod_start_total_duration_seconds", "kubelet_pod_start_sli_duration_seconds", "kubelet_run_podsandbox_duration_seconds"}
}

// startTimes reads them.
func startTimes(t *testing.T, n *namespace) map[string]cluster.Histogram {
	t.Helper()
	metrics, err := n.KubeletMetrics(n.ctx)
	if err != nil {
		t.Fatal(err)
	}
	times := map[string]cluster.Histogram{}
	for _, name := range startMetrics() {
		times[name] = cluster.NewHistogram(metrics[name], "", "")
	}
	return times
}

// logStarts tells how long pods took to start, by what the kubelet has counted since. It counts a pod when it is told of its own report.
func logStarts(t *testing.T, n *namespace, when string, before map[string]cluster.Histogram) {
	t.Helper()
	var after map[string]cluster.Histogram
	n.await(t, "the kubelet to have counted all pods", func() error {
		after = startTimes(t, n)
		counted := startMetrics()[0]
		if got := after[counted].Since(before[counted]).Count; got < uint64(*scaleTo) {
			return fmt.Errorf("%s has %d more, want %d", counted, got, *scaleTo)
		}
		return nil
	})
	for _, name := range startMetrics() {
		t.Logf("%s: %s: %s", when, name, after[name].Since(before[name]))
	}
}

// The example of two tiers runs as it is, and keeps in one tier what is said in the other.
func TestExample(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, true)
	n.kubectl(t, "apply", "-f", "../../deploy/examples/guestbook.yaml")
	for _, tier := range []string{"agnhost-primary", "agnhost-replica", "guestbook"} {
		n.kubectl(t, "rollout", "status", "deployment/"+tier, "--timeout=5m")
	}
	ask := func(query string) string {
		return n.kubectl(t, "exec", "deployment/agnhost-replica", "--", "curl", "-s", "http://guestbook/guestbook?"+query)
	}
	n.await(t, "the replica to be known to the primary", func() error {
		if out := ask("cmd=set&key=messages&value=hello"); !strings.Contains(out, "Updated") {
			return fmt.Errorf("the guest book says %q", out)
		}
		if out := ask("cmd=get&key=messages"); !strings.Contains(out, "hello") {
			return fmt.Errorf("the guest book says %q", out)
		}
		return nil
	})
}
