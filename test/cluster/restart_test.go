package cluster_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// restartWatched is how long pods are watched after a restart: what the kubelet makes of it comes with its next looks at all pods.
const restartWatched = 30 * time.Second

// Pods of all kinds live on while daemons of the node restart, none is there twice, what they write is not lost, and they take commands
// after it. No other test runs then.
func TestRestarts(t *testing.T) {
	n := newNamespace(t, false)
	kinds := []string{"container", "vm"}
	for _, name := range kinds {
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
      containers: [{name: main, image: BUSYBOX, command: [sh, -c, "i=0; while echo $i; do i=$((i+1)); sleep 0.2; done"]}]`, "NAME", name))
	}
	n.vm = true
	n.createMachine(t, "machine", machine(agent, "terminationGracePeriodSeconds: 1", ""))
	for _, name := range kinds {
		n.kubectl(t, "rollout", "status", "deployment/"+name, "--timeout=5m")
	}
	n.awaitOutput(t, "machine", "echo lives", "lives")
	before := n.containers(t)
	const bootID = "cat /proc/sys/kernel/random/boot_id"
	boots := []string{n.exec(t, "deployment/vm", bootID), n.exec(t, "machine", bootID)}
	for _, daemon := range []struct {
		name    string
		restart func(context.Context) error
	}{{"kubelet", n.RestartKubelet}, {"vmruntime", n.RestartVMRuntime}, {"containerd", n.RestartContainerd}} {
		if err := daemon.restart(n.ctx); err != nil {
			t.Fatalf("restart %s: %v", daemon.name, err)
		}
		time.Sleep(restartWatched)
		for _, pod := range []string{"deployment/container", "deployment/vm", "machine"} {
			n.awaitOutput(t, pod, "echo lives", "lives")
		}
		if after := n.containers(t); !slices.Equal(after, before) {
			t.Errorf("a restart of %s made %v of %v", daemon.name, after, before)
		}
		n.noneTwice(t, len(before))
		if now := []string{n.exec(t, "deployment/vm", bootID), n.exec(t, "machine", bootID)}; !slices.Equal(now, boots) {
			t.Errorf("a restart of %s restarted a VM", daemon.name)
		}
	}
	for _, name := range kinds {
		lines := strings.Split(n.kubectl(t, "logs", "deployment/"+name), "\n")
		for i, line := range lines {
			if line != fmt.Sprint(i) {
				t.Fatalf("line %d of %d in the log of %s is %q", i, len(lines), name, line)
			}
		}
	}
}

// noneTwice fails unless the runtime has as many ready sandboxes of the namespace as there are pods.
func (n *namespace) noneTwice(t *testing.T, pods int) {
	t.Helper()
	out, err := n.Node().Crictl(n.ctx, "pods", "--state", "ready", "--label", "io.kubernetes.pod.namespace="+n.name, "-q")
	if err != nil {
		t.Fatal(err)
	}
	if ids := strings.Fields(out); len(ids) != pods {
		t.Errorf("the runtime has the sandboxes %v, want one for each of %d pods", ids, pods)
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
