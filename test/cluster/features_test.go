package cluster_test

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/vmruntime/vmruntime/test/cluster"
)

// The node tells that its default handler and that of VMs have what pods may ask of handlers, and that groups are as pods want them.
func TestNodeFeatures(t *testing.T) {
	ctx, c := use(t)
	node, err := c.Client().CoreV1().Nodes().Get(ctx, cluster.NodeName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "vm"} {
		i := slices.IndexFunc(node.Status.RuntimeHandlers, func(h corev1.NodeRuntimeHandler) bool { return h.Name == name })
		if i < 0 {
			t.Errorf("the node has the handlers %v, want also %q", node.Status.RuntimeHandlers, name)
			continue
		}
		has := func(feature *bool) bool { return feature != nil && *feature }
		if f := node.Status.RuntimeHandlers[i].Features; f == nil || !has(f.RecursiveReadOnlyMounts) || !has(f.UserNamespaces) {
			t.Errorf("the handler %q has %v, want read-only mounts below and user namespaces", name, f)
		}
	}
	if f := node.Status.Features; f == nil || f.SupplementalGroupsPolicy == nil || !*f.SupplementalGroupsPolicy {
		t.Errorf("the node has %v, want a policy for supplemental groups", f)
	}
}

// heardWithin is how soon the kubelet starts a container anew of whose end an event has told it: its wait after the first end is ten seconds.
// Without the event it finds out within five minutes.
const heardWithin = 90 * time.Second

// A kubelet that hears of containers by events, asks the CRI for all statistics and lists by streams knows as much as one
// that does not. No other test runs then.
func TestKubeletFeatures(t *testing.T) {
	n := newNamespace(t, false)
	if err := n.SetKubeletFeatures(n.ctx, "EventedPLEG=true", "PodAndContainerStatsFromCRI=true", "CRIListStreaming=true"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(n.ctx), awaitTimeout)
		defer cancel()
		if err := n.SetKubeletFeatures(ctx); err != nil {
			t.Error(err)
		}
	})
	for _, name := range []string{"container", "vm"} {
		n.vm = name == "vm"
		n.create(t, name, `
containers:
- name: main
  image: BUSYBOX
  command: [sh, -c, "[ -e /d/again ] && exec sleep 1000000; touch /d/again; exit 3"]
  volumeMounts: [{name: d, mountPath: /d}]
volumes: [{name: d, emptyDir: {}}]`)
	}
	for _, name := range []string{"container", "vm"} {
		pod := n.awaitPod(t, name, "run again", func(p *corev1.Pod) bool { return ready(p) && status(t, p, "main").RestartCount == 1 })
		main := status(t, pod, "main")
		if took := main.State.Running.StartedAt.Sub(main.LastTerminationState.Terminated.FinishedAt.Time); took > heardWithin {
			t.Errorf("pod %s was started again %s after its end, want %s at most", name, took, heardWithin)
		}
		n.await(t, "statistics of the pod", func() error { return hasStatistics(n, name, "main") })
		n.await(t, "the CRI's metrics of the pod", func() error {
			return hasMetrics(n, "cadvisor", name, "container_memory_working_set_bytes", "container_start_time_seconds") // CPU time is in whole seconds
		})
		n.await(t, "the resource metrics of the pod", func() error {
			return hasMetrics(n, "resource", name, "container_cpu_usage_seconds_total", "pod_memory_working_set_bytes")
		})
	}
	listsAreStreamed(t, n)
	for _, name := range []string{"container", "vm"} {
		t.Run("top of pods as "+name, func(t *testing.T) {
			n := newNamespace(t, name == "vm")
			showsUsage(t, n)
		})
	}
	out := n.kubectl(t, "get", "--raw", "/api/v1/nodes/"+cluster.NodeName+"/proxy/metrics")
	for metric, want := range map[string]string{
		"kubelet_evented_pleg_connection_success_count":         "[1-9]",
		"kubelet_evented_pleg_connection_error_count":           "0$",
		"kubelet_evented_pleg_connection_latency_seconds_count": "[1-9]",
	} {
		if !regexp.MustCompile(fmt.Sprintf("(?m)^%s %s", metric, want)).MatchString(out) {
			t.Errorf("the kubelet's metric %s is %q, want %s", metric, regexp.MustCompile("(?m)^"+metric+".*").FindString(out), want)
		}
	}
}

// listsAreStreamed says that the kubelet's lists of pods and containers come by streams, and that none was answered with an error.
func listsAreStreamed(t *testing.T, n *namespace) {
	t.Helper()
	metrics, err := n.Node().Metrics(n.ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{"StreamPodSandboxes", "StreamContainers"} {
		if h := cluster.NewHistogram(metrics["vmruntime_cri_call_duration_seconds"], "method", method); h.Count == 0 {
			t.Errorf("the kubelet has not called %s", method)
		}
		for _, m := range metrics["vmruntime_cri_call_failures_total"].GetMetric() {
			if strings.Contains(m.String(), method) {
				t.Errorf("calls of %s failed: %s", method, m)
			}
		}
	}
}
