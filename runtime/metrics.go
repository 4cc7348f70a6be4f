package runtime

import (
	"errors"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/qemu"
)

// Kinds of guests.
const (
	kindContainers = "containers"
	kindMachine    = "machine"
)

// What guests of ours begin from.
const (
	fromBoot       = "boot"
	fromTemplate   = "template"
	fromSpare      = "spare"
	fromCheckpoint = "checkpoint"
)

// vmMetrics count what happens to guests. See docs/metrics.md.
type vmMetrics struct {
	pods     *prometheus.Desc
	spares   *prometheus.Desc
	boots    *prometheus.HistogramVec
	starts   *prometheus.CounterVec
	restarts *prometheus.CounterVec
	failures *prometheus.CounterVec
}

func newVMMetrics() vmMetrics {
	m := vmMetrics{
		pods:   prometheus.NewDesc("vmruntime_vm_pods", "VM pods, by state.", []string{"state"}, nil),
		spares: prometheus.NewDesc("vmruntime_spare_guests", "Guests that wait for a pod.", nil, nil),
		boots: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "vmruntime_guest_boot_duration_seconds",
			Help: "From the start of QEMU until the guest is its pod (kind containers) or QEMU runs the disk (kind machine), by kind and result.",
			// From a template's resumption to an emulated boot on a loaded node.
			Buckets: []float64{.05, .1, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 60, 120},
		}, []string{"kind", "result"}),
		starts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vmruntime_guest_starts_total",
			Help: "Guests of containers that came to be their pods, by what they began from (boot, template, spare or checkpoint) and whether they had to be grown.",
		}, []string{"from", "grown"}),
		restarts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vmruntime_guest_restarts_total",
			Help: "QEMUs started in a sandbox whose last guest of the same kind had ended.",
		}, []string{"kind"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vmruntime_guest_failures_total",
			Help: "Guests that ended without having been told to, by kind and reason: guest (its kernel failed), silent (its agent did not answer) or vm (QEMU ended).",
		}, []string{"kind", "reason"}),
	}
	// A counter that is there from the beginning tells its first increase too.
	for _, from := range []string{fromBoot, fromTemplate, fromSpare, fromCheckpoint} {
		m.starts.WithLabelValues(from, "false")
	}
	for _, from := range []string{fromTemplate, fromSpare} {
		m.starts.WithLabelValues(from, "true")
	}
	for _, kind := range []string{kindContainers, kindMachine} {
		m.restarts.WithLabelValues(kind)
		for _, reason := range []string{"guest", "silent", "vm"} {
			m.failures.WithLabelValues(kind, reason)
		}
	}
	return m
}

func guestKind(m *machineParts) string {
	if m != nil {
		return kindMachine
	}
	return kindContainers
}

// launched counts the start of a QEMU that failed, or of one that runs a disk: when that has booted nobody tells.
func (m vmMetrics) launched(parts *machineParts, began time.Time, err error) {
	if err != nil || parts != nil {
		m.booted(guestKind(parts), began, err)
	}
}

func (m vmMetrics) booted(kind string, began time.Time, err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	m.boots.WithLabelValues(kind, result).Observe(time.Since(began).Seconds())
}

// restarted counts a start of QEMU if the sandbox's last guest was of the same kind.
func (m vmMetrics) restarted(last guestRecord, parts *machineParts) {
	if last.Boot > 0 && (last.Machine != "") == (parts != nil) {
		m.restarts.WithLabelValues(guestKind(parts)).Inc()
	}
}

// countBoot counts the boot of a guest of ours, once. One that was given up while it booted is not counted.
func (g *guest) countBoot(err error) {
	if !g.began.IsZero() && !g.told.Load() {
		g.pod.rt.metrics.booted(kindContainers, g.began, err)
		if err == nil {
			g.pod.rt.metrics.starts.WithLabelValues(g.from(), strconv.FormatBool(g.pod.rec.Status().Guest.GrownFrom != nil)).Inc()
		}
	}
	g.began = time.Time{}
}

// from is what the guest began from, as long as it is not known to others.
func (g *guest) from() string {
	r := g.pod.rec.Status().Guest
	switch {
	case g.pod.incoming.Load() != nil:
		return fromCheckpoint
	case r.Spare:
		return fromSpare
	case r.Template != "":
		return fromTemplate
	}
	return fromBoot
}

// countSilence counts a guest that is killed because its agent does not answer.
func (g *guest) countSilence() {
	g.told.Store(true)
	g.pod.rt.metrics.failures.WithLabelValues(kindContainers, "silent").Inc()
}

// countEnd counts the end of QEMU unless it was to end: a machine may also power itself off.
func (g *guest) countEnd() {
	var exit *qemu.ExitError
	if g.told.Load() || !errors.As(g.vm.Err(), &exit) || g.machine != nil && exit.Reason == qemu.ReasonPoweroff {
		return
	}
	reason := "vm"
	if exit.Guest {
		reason = "guest"
	}
	g.pod.rt.metrics.failures.WithLabelValues(guestKind(g.machine), reason).Inc()
}

// Describe names the runtime's metrics, as a prometheus.Collector.
func (rt *Runtime) Describe(ch chan<- *prometheus.Desc) {
	ch <- rt.metrics.pods
	ch <- rt.metrics.spares
	rt.metrics.boots.Describe(ch)
	rt.metrics.starts.Describe(ch)
	rt.metrics.restarts.Describe(ch)
	rt.metrics.failures.Describe(ch)
}

// Collect gives the runtime's metrics, as a prometheus.Collector.
func (rt *Runtime) Collect(ch chan<- prometheus.Metric) {
	states := map[string]int{"booting": 0, "running": 0, "idle": 0, "stopped": 0}
	for _, p := range rt.allPods() {
		states[p.metricState()]++
	}
	for state, n := range states {
		ch <- prometheus.MustNewConstMetric(rt.metrics.pods, prometheus.GaugeValue, float64(n), state)
	}
	ch <- prometheus.MustNewConstMetric(rt.metrics.spares, prometheus.GaugeValue, float64(rt.spares.count()))
	rt.metrics.boots.Collect(ch)
	rt.metrics.starts.Collect(ch)
	rt.metrics.restarts.Collect(ch)
	rt.metrics.failures.Collect(ch)
}

// metricState tells whether the pod has a guest: one that boots, one that runs, none while its sandbox is ready, or none any more.
func (p *pod) metricState() string {
	g := p.currentGuest()
	switch {
	case p.state() != runtimeapi.PodSandboxState_SANDBOX_READY && g == nil:
		return "stopped"
	case g == nil || !g.alive():
		return "idle"
	case g.machine == nil && g.agentNow() == nil:
		return "booting"
	default:
		return "running"
	}
}
