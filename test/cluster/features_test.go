package cluster_test

import (
	"context"
	"fmt"
	"regexp"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/vmruntime/vmruntime/test/cluster"
)

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
		n.awaitPod(t, name, "run again", func(p *corev1.Pod) bool { return ready(p) && status(t, p, "main").RestartCount == 1 })
		n.await(t, "statistics of the pod", func() error { return hasStatistics(n, name, "main") })
		n.await(t, "the CRI's metrics of the pod", func() error {
			return hasMetrics(n, "cadvisor", name, "container_memory_working_set_bytes", "container_start_time_seconds") // CPU time is in whole seconds
		})
		n.await(t, "the resource metrics of the pod", func() error {
			return hasMetrics(n, "resource", name, "container_cpu_usage_seconds_total", "pod_memory_working_set_bytes")
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
