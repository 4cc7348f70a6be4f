package script

import (
	"bufio"
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// metricCommand sums, as a script names "vmruntime_x{method=\"A\"" what it means of a sample.
func metricCommand(w *world, args []string) (string, error) {
	sample := strings.Join(args[1:], " ")
	want, err := strconv.ParseFloat(args[0], 64)
	if err != nil {
		return "", err
	}
	var have float64
	if !w.until(func() bool {
		have, err = w.metric(sample)
		return err != nil || have == want
	}) {
		return "", fmt.Errorf("%s is %v, it has to become %v", sample, have, want)
	}
	return "", err
}

// metric is the sum of the samples that begin so.
func (w *world) metric(sample string) (sum float64, err error) {
	ctx, cancel := call()
	defer cancel()
	page, err := w.bed.MetricsPage(ctx)
	if err != nil {
		return 0, err
	}
	lines := bufio.NewScanner(bytes.NewReader(page))
	for lines.Scan() {
		i := strings.LastIndexByte(lines.Text(), ' ')
		if i < 0 || !strings.HasPrefix(lines.Text(), sample) {
			continue
		}
		n, err := strconv.ParseFloat(lines.Text()[i+1:], 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, lines.Err()
}

// eventsCommand prints a pod's events in the order in which they came, and fails if their times go back or the statuses are not those of
// their pod.
func eventsCommand(w *world, args []string) (string, error) {
	p, err := w.pod(args[0])
	if err != nil {
		return "", err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var out strings.Builder
	var last int64
	for _, e := range w.events {
		if e.GetPodSandboxStatus().GetId() != p.id {
			continue
		}
		if e.GetCreatedAt() < last {
			return "", fmt.Errorf("the time of event %v is before that of the event before it", e)
		}
		last = e.GetCreatedAt()
		if uid := e.GetPodSandboxStatus().GetMetadata().GetUid(); uid != p.cfg.GetMetadata().GetUid() {
			return "", fmt.Errorf("event %v is of the pod with UID %q, not %q", e, uid, p.cfg.GetMetadata().GetUid())
		}
		out.WriteString(w.eventLine(p, e))
	}
	return out.String(), nil
}

// eventLine is an event: type, name, state and number of addresses of the pod, states of all its containers.
func (w *world) eventLine(p *sandbox, e *runtimeapi.ContainerEventResponse) string {
	name := p.name
	for _, c := range w.containers {
		if c.id == e.GetContainerId() {
			name = c.name
		}
	}
	var states []string
	for _, s := range e.GetContainersStatuses() {
		states = append(states, s.GetMetadata().GetName()+"="+strings.ReplaceAll(stateLine(s), " ", ","))
	}
	slices.Sort(states)
	addresses := len(e.GetPodSandboxStatus().GetNetwork().GetAdditionalIps())
	if e.GetPodSandboxStatus().GetNetwork().GetIp() != "" {
		addresses++
	}
	kind := strings.TrimSuffix(strings.TrimPrefix(e.GetContainerEventType().String(), "CONTAINER_"), "_EVENT")
	state := strings.ToLower(strings.TrimPrefix(e.GetPodSandboxStatus().GetState().String(), "SANDBOX_"))
	return strings.TrimSpace(fmt.Sprintf("%s %s %s,%d %s", kind, name, state, addresses, strings.Join(states, " "))) + "\n"
}
