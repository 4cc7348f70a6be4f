package vm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// guestInfo is what a verbose status tells of a pod's guest.
type guestInfo struct {
	Boot          int    `json:"boot"`
	Template      string `json:"template"`
	PrivateMemory bool   `json:"privateMemory"`
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

// withTemplates has the node's daemon begin pods as templates for the time of the test, and waits until it does.
func (b *bed) withTemplates(ctx context.Context, t *testing.T) {
	t.Helper()
	config := filepath.Join(b.Root, "vmruntime", "vmruntime.toml")
	before := readFile(config)
	from := fileSize(b.LogFile("vmruntime"))
	b.configure(ctx, t, config, before+"\n[template]\nenabled = true\n")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		b.configure(ctx, t, config, before)
	})
	b.awaitTemplate(ctx, t, from)
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

// What must differ from clone to clone: what the kernel's random generator gives, and what derives from it.
const identity = `
for f in /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /sys/class/net/eth0/address; do echo $f $(cat $f); done
echo random $(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' ')
echo stack $(grep stack /proc/self/maps | cut -d' ' -f1)
echo mmap $(head -n1 /proc/self/maps | cut -d' ' -f1) $(grep vdso /proc/self/maps | cut -d' ' -f1)
echo hostname $(hostname)
echo address $(ip -4 -o addr show eth0 | awk '{print $4}')
echo time $(date +%s)
`

func TestNoTwins(t *testing.T) {
	_, b := use(t)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute) // many pods, each of which has its time
	t.Cleanup(cancel)
	b.withTemplates(ctx, t)
	var mu sync.Mutex
	seen := make(map[string]int) // line to clone
	for batch := range clones / 5 {
		var work sync.WaitGroup
		for i := range 5 {
			p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) {
				cfg.Metadata.Name = fmt.Sprintf("clone-%d", batch*5+i)
				cfg.Hostname = cfg.Metadata.Name
			})
			work.Go(func() {
				defer p.remove()
				if g := p.guestInfo(); g.Template == "" {
					t.Errorf("pod %s did not begin as a template", p.cfg.Metadata.Name)
				}
				text := p.output(shell("identity", identity))
				mu.Lock()
				defer mu.Unlock()
				for line := range strings.Lines(text) {
					if key, value, _ := strings.Cut(strings.TrimSpace(line), " "); value == "" {
						t.Errorf("no %s", key)
					} else if other, twin := seen[line]; twin && key != "time" {
						t.Errorf("clones %d and %d have the same %s", other, batch*5+i, line)
					}
					seen[line] = batch*5 + i
				}
			})
		}
		work.Wait()
	}
	if len(seen) < clones*8 {
		t.Errorf("only %d values of %d clones were compared", len(seen), clones)
	}
}

// TestTemplateDamaged holds that a daemon that finds a damaged template starts pods all the same, and makes another one.
func TestTemplateDamaged(t *testing.T) {
	ctx, b := use(t)
	b.withTemplates(ctx, t)
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
	b.withTemplates(ctx, t)
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
