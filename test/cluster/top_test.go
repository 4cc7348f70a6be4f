package cluster_test

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// kubectl top tells of pods and of the node what they take.
func TestTop(t *testing.T) {
	eachRuntime(t, showsUsage)
}

// busy is a pod that has a string of 40 MB and runs as much as it may.
const busy = `
containers:
- name: main
  image: BUSYBOX
  command: [awk, 'BEGIN { s = sprintf("%40000000s", ""); while (1) i++ }']
  resources: {limits: {cpu: 300m, memory: 128Mi}}`

// showsUsage holds kubectl top to what a busy pod and an idle one do by their own account.
func showsUsage(t *testing.T, n *namespace) {
	n.run(t, "idle", sleeper)
	n.run(t, "busy", busy)
	began, before := n.worked(t, "busy")
	since := time.Now()
	for _, pod := range []string{"idle", "busy"} {
		n.awaitMeasured(t, pod, since)
	}
	ended, after := n.worked(t, "busy")
	pods := n.top(t, "pod")
	load := (after - before).Seconds() / (ended - began).Seconds() * 1000
	if got := float64(pods["busy"].cpu); load < 1 || got < load/2 || got > load*2 {
		t.Errorf("kubectl top says that the busy pod takes %.0fm of CPU, and it took %.0fm", got, load)
	}
	if pods["busy"].memory < 38<<20 || pods["busy"].memory > 128<<20 {
		t.Errorf("kubectl top says that the pod with a string of 40 MB and a limit of 128Mi takes %d bytes", pods["busy"].memory)
	}
	idle, known := pods["idle"]
	if !known || idle.cpu > pods["busy"].cpu/4 || idle.memory > pods["busy"].memory/2 { // a sleep has less than 1 MiB, which is printed as none
		t.Errorf("kubectl top says of an idle pod beside a busy one %v", pods)
	}
	holdsPods(t, n.top(t, "node"), pods["busy"])
}

// holdsPods says that the node takes no less than a pod, and no more than the machine has.
func holdsPods(t *testing.T, nodes map[string]usage, pod usage) {
	t.Helper()
	var machine unix.Sysinfo_t
	if err := unix.Sysinfo(&machine); err != nil {
		t.Fatal(err)
	}
	if len(nodes) != 1 {
		t.Fatalf("kubectl top knows of the nodes %v, want one", nodes)
	}
	for name, node := range nodes {
		if node.cpu < pod.cpu/2 || node.cpu > int64(runtime.NumCPU())*1100 {
			t.Errorf("kubectl top says that node %s takes %dm of CPU, and a pod on it %dm", name, node.cpu, pod.cpu)
		}
		if node.memory < pod.memory || node.memory > int64(machine.Totalram)*int64(machine.Unit) {
			t.Errorf("kubectl top says that node %s takes %d bytes of memory, and a pod on it %d", name, node.memory, pod.memory)
		}
	}
}

// usage is what kubectl top tells: thousandths of a CPU, and bytes.
type usage struct{ cpu, memory int64 }

// top is what kubectl top prints, by name. Of nodes there is a percentage after each figure.
func (n *namespace) top(t *testing.T, kind string) map[string]usage {
	t.Helper()
	table := map[string]usage{}
	for line := range strings.Lines(n.kubectl(t, "top", kind, "--no-headers")) {
		var figures []int64
		fields := strings.Fields(line)
		for _, f := range fields[1:] {
			if strings.HasSuffix(f, "%") {
				continue
			}
			q, err := resource.ParseQuantity(f)
			if err != nil {
				t.Fatalf("kubectl top prints %q: %v", line, err)
			}
			figures = append(figures, q.MilliValue())
		}
		if len(figures) != 2 {
			t.Fatalf("kubectl top prints %q", line)
		}
		table[fields[0]] = usage{cpu: figures[0], memory: figures[1] / 1000}
	}
	return table
}

// awaitMeasured waits until what the metrics server knows of a pod was measured since a time.
func (n *namespace) awaitMeasured(t *testing.T, pod string, since time.Time) {
	t.Helper()
	n.await(t, "figures of pod "+pod, func() error {
		out, err := n.Client().Discovery().RESTClient().Get().
			AbsPath("/apis/metrics.k8s.io/v1beta1/namespaces/" + n.name + "/pods/" + pod).DoRaw(n.ctx)
		if err != nil {
			return err
		}
		var figures struct {
			Timestamp metav1.Time
			Window    metav1.Duration
		}
		if err := json.Unmarshal(out, &figures); err != nil {
			return err
		}
		if begin := figures.Timestamp.Add(-figures.Window.Duration); begin.Before(since) {
			return fmt.Errorf("the latest begin at %s", begin)
		}
		return nil
	})
}

// worked is how long a pod's first process has run by a time of its kernel, as that tells.
func (n *namespace) worked(t *testing.T, pod string) (at, cpu time.Duration) {
	t.Helper()
	out := n.exec(t, pod, "cut -d' ' -f1 /proc/uptime; cut -d' ' -f14,15 /proc/1/stat")
	var seconds []float64
	for f := range strings.FieldsSeq(out) {
		v, err := strconv.ParseFloat(f, 64)
		if err != nil {
			t.Fatalf("a process's times are %q: %v", out, err)
		}
		seconds = append(seconds, v)
	}
	if len(seconds) != 3 {
		t.Fatalf("a process's times are %q", out)
	}
	const ticks = 100 // in a second, on every Linux
	return time.Duration(seconds[0] * float64(time.Second)), time.Duration((seconds[1] + seconds[2]) / ticks * float64(time.Second))
}
