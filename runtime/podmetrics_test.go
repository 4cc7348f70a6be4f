package runtime

import (
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
)

// The kubelet drops a sample that is not described, or has another number of labels than its description, without a word.
func TestSamplesAreDescribed(t *testing.T) {
	resp, err := new(Runtime).ListMetricDescriptors(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	labels := make(map[string]int)
	for _, d := range resp.GetDescriptors() {
		if labels[d.GetName()] > 0 || d.GetHelp() == "" {
			t.Errorf("%s is described twice, or not at all", d.GetName())
		}
		labels[d.GetName()] = len(d.GetLabelKeys())
	}
	s := &samples{labels: []string{"pod", "namespace", "container", "id", "image"}, at: time.Now()}
	s.seen(time.Now())
	s.spec(&runtimeapi.LinuxContainerResources{CpuPeriod: 1, CpuShares: 1, MemoryLimitInBytes: 1, MemorySwapLimitInBytes: 1})
	s.host(cgroup.Stats{})
	line := &agentpb.Pressure{Some: &agentpb.PressureLine{}, Full: &agentpb.PressureLine{}}
	s.guest(&agentpb.ContainerStats{Cgroup: &agentpb.CgroupStats{
		CpuPressure: line, MemoryPressure: line, IoPressure: line, Disks: []*agentpb.DiskIO{{Device: "8:0"}},
	}})
	emitted := make(map[string]bool)
	for _, m := range s.list {
		emitted[m.GetName()] = true
		if labels[m.GetName()] != len(m.GetLabelValues()) {
			t.Errorf("%s has %d labels, its description %d", m.GetName(), len(m.GetLabelValues()), labels[m.GetName()])
		}
	}
	for name := range labels {
		// What is left comes from interfaces and the OCI specification; TestPodMetrics has it.
		if !emitted[name] && !slices.Contains(metricDescs()[name].more, "interface") && name != ulimitsSoft {
			t.Errorf("%s is described and never given", name)
		}
	}
}

// A sample's labels are its own: the next one must not write into them.
func TestSamplesShareNoLabels(t *testing.T) {
	s := &samples{labels: make([]string, 5, 10)}
	s.counter(networkReceiveBytes, 1, "eth0")
	s.counter(networkReceiveBytes, 1, "eth1")
	if got := s.list[0].GetLabelValues()[5]; got != "eth0" {
		t.Errorf("the first sample's interface is %q, want eth0", got)
	}
}
