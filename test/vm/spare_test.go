package vm_test

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var waits = regexp.MustCompile(`msg="a guest waits for its pod" pod=(\w+)`)

// awaitSpare waits until the log beyond an offset says that a guest waits for its pod, and tells its ID.
func (b *bed) awaitSpare(ctx context.Context, t *testing.T, from int64) (id string) {
	t.Helper()
	until(ctx, t, "a guest waits for its pod", func() bool {
		found := waits.FindStringSubmatch(logFrom(b.LogFile("vmruntime"), from))
		if found == nil {
			return false
		}
		id = found[1]
		return true
	})
	return id
}

// sparePod runs a pod whose guest has waited for it; from is where the log began when that was not there yet. The log's offset when the
// pod was about to begin is told.
func (b *bed) sparePod(ctx context.Context, t *testing.T, from int64, name string) (*pod, int64) {
	t.Helper()
	id := b.awaitSpare(ctx, t, from)
	from = fileSize(b.LogFile("vmruntime"))
	p := b.vmPod(ctx, t, func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name, c.Hostname = name, name })
	if g := p.guestInfo(); p.id != id || !g.Spare || g.Template == "" || g.Boot != 1 {
		t.Errorf("pod %s has the guest %+v; want the one that waited, %s", p.id, g, id)
	}
	return p, from
}

// TestSpare holds that pods get guests that wait, which are like any others, and that one after the other waits.
func TestSpare(t *testing.T) {
	ctx, b := use(t)
	from := fileSize(b.LogFile("vmruntime"))
	b.withTemplates(ctx, t, "off", 1)

	one, from := b.sparePod(ctx, t, from, "one")
	count := one.start(counter("count"))
	count.expect("hostname", "one")
	count.expect("ip -o -4 addr show eth0 | awk '{print $4}' | cut -d/ -f1", one.ip())
	one.memoryIsCounted()
	dir := one.checkpoint(count.ready(" 20\n"))
	r, ctrs := b.restore(ctx, t, dir, b.podConfig(t, func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "restored" }), proto.CloneOf(count.cfg))
	ctrs[0].start()
	r.until("the restored counter goes on", func() bool { return len(ctrs[0].numbers()) > 20 })
	consecutive(t, "restored", ctrs[0].numbers())
	r.remove()

	two, from := b.sparePod(ctx, t, from, "two")
	web := two.start(idle("web"))
	web.expect("ping -c 1 -w 20 "+one.ip()+" >/dev/null && echo reached", "reached")
	one.remove()
	two.sharesADirectory(t)
	first := two.identity()
	two.remove()

	three, from := b.sparePod(ctx, t, from, "three")
	second := three.identity()
	three.remove()
	for _, line := range first.values {
		if slices.Contains(second.values, line) {
			t.Errorf("two guests that waited have the same %s", line)
		}
	}
	if near(first.sequences[0], second.sequences[0]) && near(first.sequences[1], second.sequences[1]) {
		t.Errorf("two guests that waited have one secret of TCP's sequence numbers")
	}
	b.loseSpare(ctx, t, from)
}

// memoryIsCounted holds that the pod's memory has in it what its guest took before the pod was known.
func (p *pod) memoryIsCounted() {
	p.t.Helper()
	resp, err := p.rt.PodSandboxStats(p.ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.id})
	if err != nil {
		p.t.Fatal(err)
	}
	resident := uint64(0)
	for line := range strings.Lines(readFile(fmt.Sprintf("/proc/%d/status", p.verboseInfo().Guest.QEMU.PID))) {
		if fields := strings.Fields(line); len(fields) > 1 && (fields[0] == "RssAnon:" || fields[0] == "RssShmem:") {
			kib, err := strconv.ParseUint(fields[1], 10, 64)
			if err != nil {
				p.t.Fatal(err)
			}
			resident += kib << 10
		}
	}
	if got := resp.GetStats().GetLinux().GetMemory().GetUsageBytes().GetValue(); got < resident*9/10 {
		p.t.Errorf("the pod's memory is %d; QEMU alone has %d", got, resident)
	}
}

func (p *pod) sharesADirectory(t *testing.T) {
	t.Helper()
	host := t.TempDir()
	writeFile(t, filepath.Join(host, "file"), "of the node\n")
	got := p.output(with(shell("volume", "cat /volume/file"), func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{mount("/volume", host)}
	}))
	if got != "of the node\n" {
		t.Errorf("a container with a volume has read %q", got)
	}
}

// loseSpare holds that a guest that ends while it waits is taken away, and that the next pod does without.
func (b *bed) loseSpare(ctx context.Context, t *testing.T, from int64) {
	t.Helper()
	id := b.awaitSpare(ctx, t, from)
	files, err := filepath.Glob("/sys/fs/cgroup/*/vmruntime-" + id + "/cgroup.procs")
	if unified, _ := filepath.Glob("/sys/fs/cgroup/vmruntime-" + id + "/cgroup.procs"); len(unified) > 0 {
		files = unified
	}
	if err != nil || len(files) == 0 {
		t.Fatalf("the guest that waits has no cgroup: %v", err)
	}
	for text := range strings.FieldsSeq(readFile(files[0])) {
		pid, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	until(ctx, t, "the guest is missed", func() bool {
		return strings.Contains(logFrom(b.LogFile("vmruntime"), from), "a guest that waited for its pod has ended")
	})
	if leaks, err := b.Leaks(ctx); err != nil || len(leaks) > 0 {
		t.Errorf("left of a guest that ended while it waited: %v\n  %s", err, strings.Join(leaks, "\n  "))
	}
	p := b.vmPod(ctx, t, func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "without" })
	if g := p.guestInfo(); g.Spare || g.Template == "" {
		t.Errorf("the guest is %+v; want one that begins as a template", g)
	}
	p.remove()
}
