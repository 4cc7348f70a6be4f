package vm_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// metrics are samples as a kubelet makes them: "NAME{KEY=VALUE,...}" and the value.
type metrics map[string]uint64

// podMetrics asks as the kubelet does: descriptions once, then the samples of all pods. It fails for a sample that the kubelet would drop.
func (b *bed) podMetrics(ctx context.Context, t *testing.T) map[string]metrics {
	t.Helper()
	descs, err := b.rt.ListMetricDescriptors(ctx, &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := make(map[string][]string)
	for _, d := range descs.GetDescriptors() {
		if keys[d.GetName()] != nil {
			t.Errorf("%s is described twice", d.GetName())
		}
		keys[d.GetName()] = d.GetLabelKeys()
	}
	list, err := b.rt.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]metrics)
	for _, p := range list.GetPodMetrics() {
		m := make(metrics)
		m.add(t, keys, p.GetMetrics())
		for _, c := range p.GetContainerMetrics() {
			m.add(t, keys, c.GetMetrics())
		}
		all[p.GetPodSandboxId()] = m
	}
	return all
}

func (m metrics) add(t *testing.T, keys map[string][]string, list []*runtimeapi.Metric) {
	t.Helper()
	for _, s := range list {
		labels := keys[s.GetName()]
		if labels == nil || len(labels) != len(s.GetLabelValues()) {
			t.Errorf("%s has the labels %q, its description %q", s.GetName(), s.GetLabelValues(), labels)
			continue
		}
		var pairs []string
		for i, k := range labels {
			pairs = append(pairs, k+"="+s.GetLabelValues()[i])
		}
		key := fmt.Sprintf("%s{%s}", s.GetName(), strings.Join(pairs, ","))
		if _, twice := m[key]; twice {
			t.Errorf("%s comes twice", key)
		}
		m[key] = s.GetValue().GetValue()
		if age := time.Since(time.Unix(0, s.GetTimestamp())); age < 0 || age > time.Minute {
			t.Errorf("%s was taken at %d", key, s.GetTimestamp())
		}
	}
}

// within holds that a sample is there, with a value between two.
func (m metrics) within(t *testing.T, name, labels string, least, most uint64) {
	t.Helper()
	v, there := m[name+"{"+labels+"}"]
	if !there || v < least || v > most {
		t.Errorf("%s{%s} is %d (there: %v), want %d to %d", name, labels, v, there, least, most)
	}
}

// The metrics of a VM pod and of containerd's are in one list, under the same names and labels.
func TestPodMetrics(t *testing.T) {
	ctx, b := use(t)
	began := uint64(time.Now().Unix())
	p := b.vmPod(ctx, t)
	cfg := with(shell("c", "dd if=/dev/zero of=/written bs=1M count=2; sync; dd if=/dev/zero of=/dev/shm/held bs=1M count=30; echo ready; while :; do sleep 3600; done"),
		func(c *runtimeapi.ContainerConfig) {
			c.Image.UserSpecifiedImage = "busybox-as-asked"
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuPeriod: 100000, CpuQuota: 90000, CpuShares: 512}
		})
	c := p.start(cfg).ready("ready")
	ordinary := b.runPod(ctx, t, "", b.podConfig(t))
	ordinary.start(idle("c")).ready("ready")

	const mib = 1 << 20
	all := b.podMetrics(ctx, t)
	m := all[p.id]
	meta := p.cfg.GetMetadata()
	pod := fmt.Sprintf("pod=%s,namespace=%s,container=,id=%s,image=", meta.GetName(), meta.GetNamespace(), p.id)
	ctr := fmt.Sprintf("pod=%s,namespace=%s,container=c,id=%s,image=busybox-as-asked", meta.GetName(), meta.GetNamespace(), c.id)
	for _, s := range []struct {
		name, labels string
		least, most  uint64
	}{
		{"container_cpu_usage_seconds_total", pod, 1, 600},
		{"container_memory_usage_bytes", pod, 60 * mib, 2048 * mib},
		{"container_memory_working_set_bytes", pod, 60 * mib, 2048 * mib},
		{"container_threads", pod, 2, 1000},
		{"container_start_time_seconds", pod, began, began + 300},
		{"container_network_receive_bytes_total", pod + ",interface=eth0", 1, mib},
		{"container_network_receive_packets_total", pod + ",interface=eth0", 1, 10000},
		{"container_network_transmit_errors_total", pod + ",interface=eth0", 0, 0},

		{"container_cpu_usage_seconds_total", ctr, 0, 600},
		{"container_cpu_cfs_periods_total", ctr, 1, 1e6},
		{"container_memory_usage_bytes", ctr, 30 * mib, 64 * mib},
		{"container_memory_max_usage_bytes", ctr, 30 * mib, 64 * mib},
		{"container_memory_working_set_bytes", ctr, 30 * mib, 64 * mib},
		{"container_memory_rss", ctr, 1, 30 * mib},
		{"container_memory_cache", ctr, 30 * mib, 64 * mib},
		{"container_memory_failures_total", ctr + ",failure_type=pgfault,scope=container", 1, 1e9},
		{"container_oom_events_total", ctr, 0, 0},
		{"container_fs_usage_bytes", ctr + ",device=/", 2 * mib, 16 * mib},
		{"container_fs_limit_bytes", ctr + ",device=/", 100 * mib, 1 << 40},
		{"container_fs_inodes_free", ctr + ",device=/", 1, 1e9},
		{"container_processes", ctr, 2, 3},
		{"container_threads", ctr, 2, 3},
		{"container_file_descriptors", ctr, 3, 100},
		{"container_sockets", ctr, 0, 0},
		{"container_spec_memory_limit_bytes", ctr, 64 * mib, 64 * mib},
		{"container_spec_cpu_shares", ctr, 512, 512},
		{"container_spec_cpu_period", ctr, 100000, 100000},
		{"container_start_time_seconds", ctr, began, began + 300},
		{"container_last_seen", ctr, began, began + 300},
		{"container_pressure_cpu_waiting_seconds_total", ctr, 0, 600},
	} {
		m.within(t, s.name, s.labels, s.least, s.most)
	}
	var written uint64
	for key, v := range m {
		if strings.HasPrefix(key, "container_fs_writes_bytes_total{"+ctr+",device=") {
			written += v
		}
	}
	if written < 2*mib {
		t.Errorf("the container wrote 2 MiB to disks; its metrics say %d", written)
	}
	if len(all[ordinary.id]) == 0 {
		t.Error("no metrics of containerd's pod")
	}
	streamed, err := b.rt.StreamPodSandboxMetrics(ctx, &runtimeapi.StreamPodSandboxMetricsRequest{})
	pods := make(map[string]bool)
	for _, r := range drain(t, streamed, err) {
		for _, s := range r.GetPodSandboxMetrics() {
			pods[s.GetPodSandboxId()] = true
		}
	}
	if !pods[p.id] || !pods[ordinary.id] {
		t.Errorf("the stream has the pods %v, want %s and %s", pods, p.id, ordinary.id)
	}
}

// A machine's figures are what the node and its balloon driver tell, since what runs in it is its own affair.
func TestMachineMetrics(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	c.sh("dd if=/dev/urandom of=/written bs=1M count=20 && sync")
	m := b.podMetrics(ctx, t)[c.pod.id]
	meta := c.pod.cfg.GetMetadata()
	labels := fmt.Sprintf("pod=%s,namespace=%s,container=machine,id=%s,image=", meta.GetName(), meta.GetNamespace(), c.id)
	const mib = 1 << 20
	m.within(t, "container_cpu_usage_seconds_total", labels, 1, 600)
	m.within(t, "container_memory_working_set_bytes", labels, mib, 512*mib)
	m.within(t, "container_fs_usage_bytes", labels+",device=/", 20*mib, 200*mib)
	m.within(t, "container_fs_writes_bytes_total", labels+",device=root", 20*mib, 400*mib)
	m.within(t, "container_fs_reads_total", labels+",device=root", 1, 1e6)
	m.within(t, "container_network_receive_bytes_total",
		fmt.Sprintf("pod=%s,namespace=%s,container=,id=%s,image=,interface=eth0", meta.GetName(), meta.GetNamespace(), c.pod.id), 1, mib)
}
