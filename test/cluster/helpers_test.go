package cluster_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/vmruntime/vmruntime/test/cluster"
	"github.com/vmruntime/vmruntime/test/images"
)

// whole has every test run, not the quick ones only.
var whole = flag.Bool("whole", false, "run all tests, which takes half an hour on two cores that do nothing else")

// awaitTimeout is how long a condition may take on a busy machine that emulates its guests.
const awaitTimeout = 8 * time.Minute

// namespace is a namespace of one test, whose pods are all of one kind.
type namespace struct {
	*cluster.Cluster
	ctx  context.Context
	name string
	vm   bool // pods have `runtimeClassName: vm`
}

// eachRuntime runs a test twice, beside other tests: with pods of containers and with VM pods.
func eachRuntime(t *testing.T, test func(t *testing.T, n *namespace)) {
	t.Helper()
	t.Parallel()
	for _, kind := range []string{"container", "vm"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			test(t, newNamespace(t, kind == "vm"))
		})
	}
}

// newNamespace makes a namespace that is named after the test, and removes it with all that is in it at its end.
func newNamespace(t *testing.T, vm bool) *namespace {
	t.Helper()
	ctx, c := use(t)
	if !*whole {
		t.Skip("takes long: run by make test-cluster")
	}
	n := &namespace{Cluster: c, ctx: ctx, vm: vm, name: strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))}
	kubectl(ctx, t, c, "create", "namespace", n.name)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), awaitTimeout)
		defer cancel()
		if t.Failed() {
			out, err := c.Kubectl(ctx, "-n", n.name, "get", "pods,events", "-o", "wide")
			t.Log(out, err)
		}
		kubectl(ctx, t, c, "delete", "namespace", n.name, "--wait")
	})
	// Pods are refused until it is there.
	n.await(t, "the service account", func() error {
		_, err := c.Client().CoreV1().ServiceAccounts(n.name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	return n
}

// kubectl is the function of that name in the namespace.
func (n *namespace) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	return kubectl(n.ctx, t, n.Cluster, append([]string{"-n", n.name}, args...)...)
}

// command is a kubectl in the namespace that has not been started.
func (n *namespace) command(args ...string) *exec.Cmd {
	return n.KubectlCommand(n.ctx, append([]string{"-n", n.name}, args...)...)
}

// exec is what a shell command in a pod prints.
func (n *namespace) exec(t *testing.T, pod, script string) string {
	t.Helper()
	return n.kubectl(t, "exec", pod, "--", "sh", "-c", script)
}

// apply makes what a manifest describes. In it, CLASS stands for the pods' RuntimeClass, BUSYBOX and AGNHOST for images.
func (n *namespace) apply(t *testing.T, manifest string) {
	t.Helper()
	apply(n.ctx, t, n.Cluster, n.name, n.expand(manifest))
}

func (n *namespace) expand(manifest string) string {
	class := ""
	if n.vm {
		class = "runtimeClassName: vm"
	}
	return strings.NewReplacer("CLASS", class, "BUSYBOX", images.Busybox, "AGNHOST", images.Agnhost, "NAMESPACE", n.name).Replace(manifest)
}

// create makes a pod from its spec.
func (n *namespace) create(t *testing.T, name, spec string) {
	t.Helper()
	n.apply(t, podManifest(name, spec))
}

func podManifest(name, spec string) string {
	if !strings.Contains(spec, "terminationGracePeriodSeconds") {
		spec = "terminationGracePeriodSeconds: 1\n" + strings.TrimSpace(spec)
	}
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: %s}}\nspec:\n  CLASS\n  %s\n",
		name, name, strings.ReplaceAll(strings.TrimSpace(spec), "\n", "\n  "))
}

// run makes a pod from its spec and waits until it is ready.
func (n *namespace) run(t *testing.T, name, spec string) *corev1.Pod {
	t.Helper()
	n.create(t, name, spec)
	return n.awaitPod(t, name, "be ready", ready)
}

// sleeper is the spec of a pod that does nothing.
const sleeper = `
containers:
- {name: main, image: BUSYBOX, command: [sleep, "1000000"]}`

// await fails the test when try does not return nil in time.
func (n *namespace) await(t *testing.T, what string, try func() error) {
	t.Helper()
	if err := cluster.Await(n.ctx, awaitTimeout, what, func(context.Context) error { return try() }); err != nil {
		t.Fatal(err)
	}
}

// awaitPod waits until a pod does something, and returns it.
func (n *namespace) awaitPod(t *testing.T, name, what string, does func(*corev1.Pod) bool) (pod *corev1.Pod) {
	t.Helper()
	n.await(t, "pod "+name+" to "+what, func() (err error) {
		if pod, err = n.Client().CoreV1().Pods(n.name).Get(n.ctx, name, metav1.GetOptions{}); err == nil && !does(pod) {
			err = fmt.Errorf("it is %s", describe(pod))
		}
		return err
	})
	return pod
}

// awaitOutput waits until a shell command in a pod prints what is wanted.
func (n *namespace) awaitOutput(t *testing.T, pod, script, want string) {
	t.Helper()
	n.await(t, fmt.Sprintf("%s in pod %s to print %q", script, pod, want), func() error {
		out, err := n.Kubectl(n.ctx, "-n", n.name, "exec", pod, "--", "sh", "-c", script)
		if err == nil && strings.TrimSpace(out) != want {
			err = fmt.Errorf("it prints %q", out)
		}
		return err
	})
}

// awaitLogs waits until a container's log holds each text.
func (n *namespace) awaitLogs(t *testing.T, pod, container string, texts ...string) {
	t.Helper()
	n.await(t, fmt.Sprintf("the log of %s/%s to hold %q", pod, container, texts), func() error {
		out, err := n.Kubectl(n.ctx, "-n", n.name, "logs", pod, "-c", container)
		if err == nil && slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(out, text) }) {
			err = errors.New("it is " + out)
		}
		return err
	})
}

// awaitEvents waits until a pod's events hold each text.
func (n *namespace) awaitEvents(t *testing.T, pod string, texts ...string) {
	t.Helper()
	n.await(t, fmt.Sprintf("the events of %s to hold %q", pod, texts), func() error {
		out, err := n.Kubectl(n.ctx, "-n", n.name, "events", "--for", "pod/"+pod)
		if err == nil && slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(out, text) }) {
			err = errors.New("they are " + out)
		}
		return err
	})
}

func ready(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

func inPhase(phase corev1.PodPhase) func(*corev1.Pod) bool {
	return func(p *corev1.Pod) bool { return p.Status.Phase == phase }
}

// ended says that a pod and all of its containers came to an end.
func ended(p *corev1.Pod) bool {
	return (p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed) &&
		!slices.ContainsFunc(p.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool { return s.State.Terminated == nil })
}

// describe is a pod's state in a line.
func describe(p *corev1.Pod) string {
	line := fmt.Sprintf("%s %s %s", p.Status.Phase, p.Status.Reason, p.Status.Message)
	for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		line += fmt.Sprintf("; %s: ready %t, %d restarts, %s", s.Name, s.Ready, s.RestartCount, s.State.String())
	}
	return line
}

// status is that of one of a pod's containers.
func status(t *testing.T, p *corev1.Pod, container string) corev1.ContainerStatus {
	t.Helper()
	i := slices.IndexFunc(p.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool { return s.Name == container })
	if i < 0 {
		t.Fatalf("pod %s has no container %s: %s", p.Name, container, describe(p))
	}
	return p.Status.ContainerStatuses[i]
}
