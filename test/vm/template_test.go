package vm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
	"github.com/vmruntime/vmruntime/test/node"
)

// guestInfo is what a verbose status tells of a pod's guest.
type guestInfo struct {
	Boot          int    `json:"boot"`
	Template      string `json:"template"`
	PrivateMemory bool   `json:"privateMemory"`
	Spare         bool   `json:"spare"`
	GrownFrom     *struct {
		VCPUs       int   `json:"vcpus"`
		MemoryBytes int64 `json:"memoryBytes"`
	} `json:"grownFrom"`
	Growing bool `json:"growing"`
}

func (p *pod) guestInfo() guestInfo {
	p.t.Helper()
	resp, err := p.rt.PodSandboxStatus(p.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		p.t.Fatal(err)
	}
	var info struct {
		Guest guestInfo `json:"guest"`
	}
	if err := json.Unmarshal([]byte(resp.GetInfo()["info"]), &info); err != nil {
		p.t.Fatal(err)
	}
	return info.Guest
}

// withTemplates has the node's daemon begin pods as templates, shared so, for the time of the test, and so many guests wait for pods. It
// waits until there is a template.
func (b *bed) withTemplates(ctx context.Context, t *testing.T, share string, spares int) {
	t.Helper()
	from := fileSize(b.LogFile("vmruntime"))
	b.configured(ctx, t, node.TemplateConfig, fmt.Sprintf("[template]\nshare = %q\nspares = %d\n", share, spares))
	b.awaitTemplate(ctx, t, from)
}

// configured has the node's daemon run with a part of its configuration exchanged, for the time of the test.
func (b *bed) configured(ctx context.Context, t *testing.T, part, by string) {
	t.Helper()
	config := filepath.Join(b.Root, "vmruntime", "vmruntime.toml")
	before := readFile(config)
	if !strings.Contains(before, part) {
		t.Fatalf("%s does not contain %q", config, part)
	}
	b.configure(ctx, t, config, strings.Replace(before, part, by, 1))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		b.configure(ctx, t, config, before)
	})
}

func (b *bed) configure(ctx context.Context, t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(b.StopVMRuntime(), b.StartVMRuntime(ctx)); err != nil {
		t.Fatal(err)
	}
}

// awaitTemplate waits until the log beyond an offset says that pods without limits begin as a template.
func (b *bed) awaitTemplate(ctx context.Context, t *testing.T, from int64) {
	t.Helper()
	until(ctx, t, "a template is ready", func() bool {
		return strings.Contains(readFile(b.LogFile("vmruntime"))[from:], "guests begin as a template")
	})
}

const clones = 50

// clone is one guest of TestNoTwins.
type clone struct {
	values    []string // lines of a name and a value
	sequences []uint32 // what its initial sequence numbers of TCP have from its secret, for two connections
}

// TestNoTwins compares what must differ from clone to clone.
func TestNoTwins(t *testing.T) {
	_, b := use(t)
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute) // many pods, each of which has its time
	t.Cleanup(cancel)
	b.withTemplates(ctx, t, "off", 0)
	var all [clones]clone
	for batch := range clones / 5 {
		var work sync.WaitGroup
		for i := range 5 {
			number := batch*5 + i
			p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) {
				cfg.Metadata.Name = fmt.Sprintf("clone-%d", number)
				cfg.Hostname = cfg.Metadata.Name
			})
			work.Go(func() {
				defer p.remove()
				if g := p.guestInfo(); g.Template == "" {
					t.Errorf("pod %s did not begin as a template", p.cfg.Metadata.Name)
				}
				all[number] = p.identity()
			})
		}
		work.Wait()
	}
	seen := make(map[string]int) // line to clone
	for i, c := range all {
		for _, line := range c.values {
			if other, twin := seen[line]; twin {
				t.Errorf("clones %d and %d have the same %s", other, i, line)
			}
			seen[line] = i
		}
		for j, other := range all[:i] {
			if near(c.sequences[0], other.sequences[0]) && near(c.sequences[1], other.sequences[1]) {
				t.Errorf("clones %d and %d have one secret of TCP's sequence numbers: %d and %d", j, i, other.sequences, c.sequences)
			}
		}
	}
}

// identity runs what tells who the guest is.
func (p *pod) identity() (out clone) {
	p.t.Helper()
	text := p.output(with(of("identity", images.Server), func(c *runtimeapi.ContainerConfig) { c.Args = []string{"identity"} }))
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name != "sequence" {
			out.values = append(out.values, name+" "+value)
			continue
		}
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil {
			p.t.Error(err)
		}
		out.sequences = append(out.sequences, uint32(n))
	}
	if len(out.values) != 8 || len(out.sequences) != 2 {
		p.t.Errorf("of itself the guest says %q", text)
		out.sequences = make([]uint32, 2)
	}
	return out
}

// near tells whether two sequence numbers less their clock could come from one secret: what they tell of the clock is right to
// some microseconds, and a unit is 64 ns.
func near(a, b uint32) bool { return a-b < 1<<18 || b-a < 1<<18 }

// What the pods of each scope share of a template's memory, that a pod with a volume of the node gets one, and that what began as a
// template can be checkpointed and restored.
func TestTemplateShare(t *testing.T) {
	_, b := use(t)
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute) // three daemons, many pods
	t.Cleanup(cancel)
	for _, tc := range []struct {
		share            string
		private          bool
		same, namespaces bool // whether the memory of two pods of one namespace is one file, and of two namespaces
	}{{"off", false, false, false}, {"namespace", true, true, false}, {"node", true, true, true}} {
		t.Run(tc.share, func(t *testing.T) { b.templateShare(ctx, t, tc.share, tc.private, tc.same, tc.namespaces) })
	}
}

func (b *bed) templateShare(ctx context.Context, t *testing.T, share string, private, same, namespaces bool) {
	b.withTemplates(ctx, t, share, 0)
	one, two, other := b.templatePod(ctx, t, "a"), b.templatePod(ctx, t, "a"), b.templatePod(ctx, t, "b")
	for _, p := range []*pod{one, two, other} {
		if g := p.guestInfo(); g.PrivateMemory != private {
			t.Errorf("private memory: %v", g.PrivateMemory)
		}
	}
	file := one.memoryFile()
	if (file == two.memoryFile()) != same || (file == other.memoryFile()) != namespaces {
		t.Errorf("the memory is of the files %s, %s and, in another namespace, %s", file, two.memoryFile(), other.memoryFile())
	}
	other.remove()

	// A volume of the node: from the first container on always, later only where the memory is the VM's own.
	host := t.TempDir()
	writeFile(t, filepath.Join(host, "file"), "of the node\n")
	shared := with(shell("volume", "cat /volume/file"), func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{mount("/volume", host)} })
	if got := two.output(shared); got != "of the node\n" {
		t.Errorf("the first container has read %q", got)
	}
	if g := two.guestInfo(); g.Template == "" || g.PrivateMemory {
		t.Errorf("with a volume the guest is %+v", g)
	}
	two.remove()

	count := one.start(counter("count")).ready(" 50\n")
	dir := one.checkpoint(count)
	r, ctrs := b.restore(ctx, t, dir, b.podConfig(t, func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name += "-restored" }), proto.CloneOf(count.cfg))
	ctrs[0].start()
	r.until("the restored counter goes on", func() bool { return len(ctrs[0].numbers()) > 20 })
	consecutive(t, "restored", ctrs[0].numbers())
	r.remove()
	at := len(count.numbers())
	one.until("the checkpointed pod goes on", func() bool { return len(count.numbers()) > at+20 })
	late := one.create(shared)
	_, err := b.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: late.id})
	if private {
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "template.share") {
			t.Errorf("a volume beside a container that runs: %v", err)
		}
	} else if err != nil {
		t.Errorf("a volume beside a container that runs: %v", err)
	}
	one.remove()
}

// templatePod runs a pod in a namespace that begins as a template. There may be none yet for the namespace: then it is loaded when the
// first container runs.
func (b *bed) templatePod(ctx context.Context, t *testing.T, namespace string) *pod {
	t.Helper()
	var p *pod
	until(ctx, t, "a pod begins as a template", func() bool {
		p = b.vmPod(ctx, t, func(c *runtimeapi.PodSandboxConfig) {
			c.Metadata.Namespace = namespace
			c.Metadata.Name += fmt.Sprint("-", time.Now().UnixNano())
		})
		if p.guestInfo().Template != "" {
			return true
		}
		p.output(shell("first", "true"))
		p.remove()
		return false
	})
	return p
}

// memoryFile is the file that the guest's memory is mapped from, as the inode in /proc/PID/maps.
func (p *pod) memoryFile() string {
	p.t.Helper()
	var found string
	for line := range strings.Lines(readFile(fmt.Sprintf("/proc/%d/maps", p.verboseInfo().Guest.QEMU.PID))) {
		fields := strings.Fields(line)
		if len(fields) > 5 && (fields[5] == "/memfd:template" || fields[5] == "/memfd:memory") {
			found = fields[4]
		}
	}
	if found == "" {
		p.t.Fatal("no mapping of the guest's memory")
	}
	return found
}

// TestTemplateDamaged holds that a daemon that finds a damaged template starts pods all the same, and makes another one.
func TestTemplateDamaged(t *testing.T) {
	ctx, b := use(t)
	b.withTemplates(ctx, t, "off", 0)
	dirs, err := filepath.Glob(filepath.Join(b.Root, "vmruntime", "root", "templates", "*", "memory"))
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no templates: %v", err)
	}
	b.crash(t)
	for _, file := range dirs {
		damage(t, file)
	}
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	b.vmPod(ctx, t).start(shell("first", "echo runs")).wait()
	until(ctx, t, "a template is made anew", func() bool {
		log := readFile(b.LogFile("vmruntime"))
		_, after, found := strings.Cut(log, "a template is damaged")
		return found && strings.Contains(after, "guests begin as a template")
	})
	p := b.vmPod(ctx, t)
	if p.guestInfo().Template == "" {
		t.Error("the pod did not begin as the new template")
	}
	if got := p.output(shell("again", "echo runs")); got != "runs\n" {
		t.Errorf("output %q", got)
	}
}

// TestTemplateHalfMade holds that a daemon that was killed while it made a template leaves nothing that the next one does not end.
func TestTemplateHalfMade(t *testing.T) {
	ctx, b := use(t)
	b.withTemplates(ctx, t, "off", 0)
	b.crash(t)
	store := filepath.Join(b.Root, "vmruntime", "root", "templates")
	if err := os.RemoveAll(store); err != nil {
		t.Fatal(err)
	}
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	maker := filepath.Join(b.Root, "run", "s", "template", "agent.sock")
	until(ctx, t, "a template's guest boots", func() bool { _, err := os.Stat(maker); return err == nil })
	b.crash(t)
	if _, err := os.Stat(maker); err != nil {
		t.Errorf("the template was not being made any more: %v", err)
	}
	from := fileSize(b.LogFile("vmruntime"))
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	b.awaitTemplate(ctx, t, from)
	left, err := filepath.Glob(filepath.Join(store, "making-*"))
	if _, statErr := os.Stat(filepath.Dir(maker)); err != nil || len(left) > 0 || !errors.Is(statErr, os.ErrNotExist) {
		t.Errorf("left: %v, %v; directory of the maker: %v", left, err, statErr)
	}
	if got := b.vmPod(ctx, t).output(shell("first", "echo runs")); got != "runs\n" {
		t.Errorf("output %q", got)
	}
}

// damage changes one byte that is not zero, in the middle of what there is.
func damage(t *testing.T, file string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	at := len(data) / 2
	for data[at] == 0 {
		at++
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{data[at] ^ 1}, int64(at)); err != nil {
		t.Fatal(err)
	}
}
