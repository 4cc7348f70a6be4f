package cluster_test

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/vmruntime/vmruntime/test/critest"
)

// scaleTo is how many VM pods TestScale has at once. Each takes a processor to boot and about 250 MiB.
var scaleTo = flag.Int("scale", 8, "VM pods of the scale test's Deployment")

// A Deployment of VM pods is scaled up and down, and leaves nothing. No other test runs then.
func TestScale(t *testing.T) {
	n := newNamespace(t, true)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(n.ctx), time.Hour)
	defer cancel()
	n.ctx = ctx
	n.apply(t, `
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
      CLASS
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: BUSYBOX, command: [sleep, "1000000"], resources: {limits: {memory: 32Mi}}}]`)
	var used critest.Usage
	for range 2 {
		n.kubectl(t, "scale", "deployment/many", fmt.Sprintf("--replicas=%d", *scaleTo))
		n.kubectl(t, "rollout", "status", "deployment/many", "--timeout=30m")
		logStarts(t, n)
		n.kubectl(t, "scale", "deployment/many", "--replicas=0")
		n.kubectl(t, "wait", "pod", "-l", "app=many", "--for=delete", "--timeout=10m")
		n.await(t, "nothing to be left", func() error {
			lines, err := n.Leaks(n.ctx)
			if err == nil && len(lines) > 0 {
				err = fmt.Errorf("left on the node:\n  %s", strings.Join(lines, "\n  "))
			}
			return err
		})
		var err error
		if used, err = critest.Settle(n.ctx, n.Node(), used); err != nil {
			t.Error(err)
		}
	}
}

// logStarts tells how long pods took from their creation until they were ready, to a second.
func logStarts(t *testing.T, n *namespace) {
	t.Helper()
	pods, err := n.Client().CoreV1().Pods(n.name).List(n.ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var took []time.Duration
	for _, p := range pods.Items {
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				took = append(took, c.LastTransitionTime.Sub(p.CreationTimestamp.Time))
			}
		}
	}
	if len(took) != *scaleTo {
		t.Fatalf("%d of %d pods are ready", len(took), *scaleTo)
	}
	slices.Sort(took)
	t.Logf("%d pods were ready after %s to %s, half of them by %s", len(took), took[0], took[len(took)-1], took[len(took)/2])
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
