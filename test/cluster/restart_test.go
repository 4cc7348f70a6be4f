package cluster_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Pods of both kinds live on while daemons of the node restart, and take commands after it. No other test runs then.
func TestRestarts(t *testing.T) {
	n := newNamespace(t, false)
	for _, name := range []string{"container", "vm"} {
		n.vm = name == "vm"
		n.apply(t, strings.ReplaceAll(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: NAME}
spec:
  selector: {matchLabels: {app: NAME}}
  template:
    metadata: {labels: {app: NAME}}
    spec:
      CLASS
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: BUSYBOX, command: [sleep, "1000000"]}]`, "NAME", name))
	}
	for _, name := range []string{"container", "vm"} {
		n.kubectl(t, "rollout", "status", "deployment/"+name, "--timeout=5m")
	}
	before := n.containers(t)
	boot := n.kubectl(t, "exec", "deployment/vm", "--", "cat", "/proc/sys/kernel/random/boot_id")
	for _, daemon := range []struct {
		name    string
		restart func(context.Context) error
	}{{"kubelet", n.RestartKubelet}, {"vmruntime", n.RestartVMRuntime}, {"containerd", n.RestartContainerd}} {
		if err := daemon.restart(n.ctx); err != nil {
			t.Fatalf("restart %s: %v", daemon.name, err)
		}
		for _, name := range []string{"container", "vm"} {
			n.awaitOutput(t, "deployment/"+name, "echo lives", "lives")
		}
		if after := n.containers(t); !slices.Equal(after, before) {
			t.Errorf("a restart of %s made %v of %v", daemon.name, after, before)
		}
		if got := n.kubectl(t, "exec", "deployment/vm", "--", "cat", "/proc/sys/kernel/random/boot_id"); got != boot {
			t.Errorf("a restart of %s restarted the VM", daemon.name)
		}
	}
}

// containers has a line of each container in the namespace: its pod, how often it was started, its ID.
func (n *namespace) containers(t *testing.T) (lines []string) {
	t.Helper()
	pods, err := n.Client().CoreV1().Pods(n.name).List(n.ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		for _, s := range p.Status.ContainerStatuses {
			lines = append(lines, fmt.Sprintf("%s %d %s", p.Name, s.RestartCount, s.ContainerID))
		}
	}
	slices.Sort(lines)
	return lines
}
