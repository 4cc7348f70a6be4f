package runtime

import (
	"context"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/vmruntime/vmruntime/qemu"
)

func newSpareBed(t *testing.T, most int) (*spares, func(vcpus int) qemu.Machine) {
	s, b := newSparesOf(t, most)
	return s, func(vcpus int) qemu.Machine { return shape(b.machine(vcpus)) }
}

func newSparesOf(t *testing.T, most int) (*spares, *templateBed) {
	b := newTemplateBed(t, TemplateConfig{Enabled: true, Share: shareOff, MaxSize: 1 << 30, Spares: most})
	rt := &Runtime{cfg: Config{Template: b.cfg}, templates: b.templates, log: b.log}
	rt.ctx, rt.cancel = context.WithCancel(t.Context())
	return rt.newSpares(), b
}

func (s *spares) wantedVCPUs() (out []int) {
	for _, w := range s.wanted {
		out = append(out, w.shape.VCPUs)
	}
	return out
}

func TestSparesAreOfTheLatestShapes(t *testing.T) {
	s, shapeOf := newSpareBed(t, 2)
	for _, step := range []struct {
		vcpus int
		want  []int
	}{{1, []int{1}}, {2, []int{2, 1}}, {1, []int{1, 2}}, {3, []int{3, 1}}, {3, []int{3, 1}}} {
		s.want(shapeOf(step.vcpus))
		if diff := cmp.Diff(step.want, s.wantedVCPUs()); diff != "" {
			t.Errorf("after one with %d (-want +got):\n%s", step.vcpus, diff)
		}
	}
	first, ok := s.missing()
	if !ok || first.shape.VCPUs != 3 {
		t.Errorf("missing is %d, %v; want the latest, 3", first.shape.VCPUs, ok)
	}
	s.ready[first.key] = &spare{}
	if next, ok := s.missing(); !ok || next.shape.VCPUs != 1 {
		t.Errorf("then missing is %d, %v; want 1", next.shape.VCPUs, ok)
	}
	s.putOff(s.wanted[1].key)
	if next, ok := s.missing(); ok {
		t.Errorf("missing is %d, which could not be made just now", next.shape.VCPUs)
	}
}

func TestNoSpares(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*TemplateConfig, *qemu.Machine)
	}{
		{"none wanted", func(c *TemplateConfig, _ *qemu.Machine) { c.Spares = 0 }},
		{"no templates", func(c *TemplateConfig, _ *qemu.Machine) { c.Enabled = false }},
		{"memory shared in a namespace", func(c *TemplateConfig, _ *qemu.Machine) { c.Share = shareNamespace }},
		{"several interfaces", func(_ *TemplateConfig, m *qemu.Machine) { m.NICs = append(m.NICs, m.NICs...) }},
		{"huge pages", func(_ *TemplateConfig, m *qemu.Machine) { m.HugeNodeBytes = 2 << 20 }},
	} {
		s, shapeOf := newSpareBed(t, 2)
		m := shapeOf(1)
		tc.change(&s.rt.cfg.Template, &m)
		s.rt.templates.cfg = s.rt.cfg.Template
		s = s.rt.newSpares()
		s.want(m)
		if got := s.wantedVCPUs(); got != nil {
			t.Errorf("%s: wanted are %v", tc.name, got)
		}
	}
}

// A spare is not made while pods start, nor just after.
func TestSparesWaitForQuiet(t *testing.T) {
	s, _ := newSpareBed(t, 1)
	one, two := s.hold(), s.hold()
	quiet := make(chan time.Time, 1)
	go func() { s.awaitQuiet(); quiet <- time.Now() }()
	one()
	time.Sleep(3 * sparePoll)
	if len(quiet) > 0 {
		t.Error("it is quiet while a pod starts")
	}
	ended := time.Now()
	two()
	if at := <-quiet; at.Sub(ended) < spareQuiet {
		t.Errorf("it is quiet %v after the last start; want %v", at.Sub(ended), spareQuiet)
	}
}

// endable has spares end without a node, and tells which have.
func (s *spares) endable() (ended func() []string) {
	var mu sync.Mutex
	var ids []string
	s.end = func(sp *spare) {
		mu.Lock()
		defer mu.Unlock()
		ids = append(ids, sp.id)
	}
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(ids)
	}
}

func fakeSpare(t *testing.T, id, key string) *spare {
	t.Helper()
	return &spare{id: id, key: key, vm: fakeVM(t, func(string) string { return "{}" }), taken: make(chan struct{})}
}

// A spare that is given back when another one of its template waits is ended, as is one that comes back when the daemon has ended.
func TestSpareGivenBack(t *testing.T) {
	s, _ := newSpareBed(t, 1)
	ended := s.endable()
	s.add(fakeSpare(t, "waits", "key"))
	s.giveBack(fakeSpare(t, "back", "key"))
	if diff := cmp.Diff([]string{"back"}, ended()); diff != "" || s.ready["key"].id != "waits" {
		t.Errorf("%s waits; ended (-want +got):\n%s", s.ready["key"].id, diff)
	}
	s.rt.owned.Go(s.run)
	s.rt.cancel()
	s.rt.owned.Wait() // for what watches them too
	s.giveBack(fakeSpare(t, "late", "key"))
	s.rt.owned.Wait()
	if diff := cmp.Diff([]string{"back", "waits", "late"}, ended()); diff != "" || s.count() != 0 {
		t.Errorf("%d wait; ended (-want +got):\n%s", s.count(), diff)
	}
}

// One that is given back while it is not quiet is not made a second time.
func TestSpareGivenBackIsNotMade(t *testing.T) {
	s, shapeOf := newSpareBed(t, 1)
	s.endable()
	s.make = func(w wantedSpare) (*spare, error) {
		t.Errorf("one is made of template %s", w.key)
		return fakeSpare(t, "made", w.key), nil
	}
	s.want(shapeOf(1))
	release := s.hold()
	filled := make(chan struct{})
	go func() { s.fill(); close(filled) }()
	time.Sleep(sparePoll) // it has seen that one is missing
	s.giveBack(fakeSpare(t, "back", s.wanted[0].key))
	release()
	<-filled
	s.rt.cancel()
	s.rt.owned.Wait()
}

// After another QEMU was installed no spare waits as a copy of a template that no pod asks for any more, and none is made under its key.
func TestSpareOfOutdatedTemplate(t *testing.T) {
	s, b := newSparesOf(t, 2)
	ended := s.endable()
	for vcpus := 1; vcpus <= 2; vcpus++ {
		s.want(shape(b.machine(vcpus)))
	}
	old := s.wanted[0]
	s.add(fakeSpare(t, "old", old.key))
	if err := os.WriteFile(b.identity.binary, []byte("newer"), 0o755); err != nil {
		t.Fatal(err)
	}
	if b.get(2, "") == nil {
		t.Fatal("no template by the new key")
	}
	if _, err := s.rt.makeSpare(old); !errdefs.IsNotFound(err) {
		t.Errorf("made by the old key: %v", err)
	}
	s.want(shape(b.machine(2)))
	s.make = func(w wantedSpare) (*spare, error) { return fakeSpare(t, "new", w.key), nil }
	s.rt.owned.Go(s.run)
	s.poke()
	for deadline := time.Now().Add(20 * time.Second); s.count() == 0 || len(ended()) == 0; time.Sleep(sparePoll) {
		if time.Now().After(deadline) {
			t.Fatal("no other guest waits")
		}
	}
	s.mu.Lock()
	if diff := cmp.Diff([]int{2}, s.wantedVCPUs()); diff != "" || s.wanted[0].key == old.key {
		t.Errorf("wanted by the key %s (-want +got):\n%s", s.wanted[0].key, diff)
	}
	s.mu.Unlock()
	s.rt.cancel()
	s.rt.owned.Wait()
	if diff := cmp.Diff([]string{"old", "new"}, ended()); diff != "" {
		t.Errorf("ended (-want +got):\n%s", diff)
	}
}

// A guest that answered while it waited, and not any more when it had a pod, says nothing of its template.
func TestSpareSparesItsTemplate(t *testing.T) {
	for _, spare := range []bool{true, false} {
		b := newTemplateBed(t, enabled())
		rt := withPods(t)
		rt.templates = b.templates
		p, err := rt.findVM("aa1")
		if err != nil {
			t.Fatal(err)
		}
		key := b.get(1, "").key
		if err := p.update(func(s *podStatus) error { s.Guest.Template, s.Guest.Spare = key, spare; return nil }); err != nil {
			t.Fatal(err)
		}
		g := &guest{pod: p, began: time.Now()}
		g.judgeTemplate()
		if kept := b.get(1, "") != nil; kept != spare || !g.wasBadCopy() {
			t.Errorf("spare %v: the template is kept: %v; another guest is begun: %v", spare, kept, g.wasBadCopy())
		}
	}
}
