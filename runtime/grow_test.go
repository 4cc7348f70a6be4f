package runtime

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmruntime/vmruntime/qemu"
)

func TestBeginnings(t *testing.T) {
	vm := Default().VM
	rt := &Runtime{cfg: Config{VM: vm}, templates: &templates{}, guestImage: &guestImage{Arch: qemu.ArchX86}}
	base := vm.base()
	more := func(vcpus int, bytes int64) vmSize { return vmSize{base.VCPUs + vcpus, base.MemoryBytes + bytes} }
	for _, tc := range []struct {
		name string
		spec podSpec
		size vmSize
		want []vmSize
	}{
		{"the base size", podSpec{}, base, []vmSize{base}},
		{"more of both", podSpec{}, more(1, mib), []vmSize{more(1, mib), base}},
		{"more memory", podSpec{}, more(0, gib), []vmSize{more(0, gib), base}},
		{"more processors", podSpec{}, more(2, 0), []vmSize{more(2, 0), base}},
		{"less memory", podSpec{}, more(1, -mib), []vmSize{more(1, -mib)}},
		{"huge pages", podSpec{HugeBytes: 2 * mib}, more(0, gib), []vmSize{more(0, gib)}},
	} {
		if diff := cmp.Diff(tc.want, rt.beginnings(tc.spec, tc.size)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
	rt.templates.stopGrowing()
	if got := rt.beginnings(podSpec{}, more(0, gib)); len(got) != 1 {
		t.Errorf("after a guest has not grown, the beginnings are %v", got)
	}
	rt.templates.ungrown = time.Now().Add(-templateRetry)
	if got := rt.beginnings(podSpec{}, more(0, gib)); len(got) != 2 {
		t.Errorf("later the beginnings are %v", got)
	}
	rt.guestImage.Arch = qemu.ArchARM64
	if cpus, memory := rt.beginnings(podSpec{}, more(1, gib)), rt.beginnings(podSpec{}, more(0, gib)); len(cpus) != 1 || len(memory) != 2 {
		t.Errorf("where no processors can be plugged, the beginnings are %v with another processor and %v with more memory", cpus, memory)
	}
}

// Of the guests that wait one is of the base size, if there are two.
func TestSpareOfTheBaseSizeStays(t *testing.T) {
	for most, want := range map[int][]int{1: {3}, 2: {3, 1}, 3: {3, 2, 1}} {
		s, shapeOf := newSpareBed(t, most)
		s.rt.cfg.VM.DefaultVCPUs, s.rt.cfg.VM.MaxVCPUs = 1, 3
		base := shapeOf(1)
		s.rt.cfg.VM.DefaultMemory, s.rt.cfg.VM.MinMemory, s.rt.cfg.VM.MaxMemory = Size(base.MemoryBytes), 0, Size(base.MemoryBytes)
		for vcpus := range 3 {
			s.want(shapeOf(vcpus + 1))
		}
		if diff := cmp.Diff(want, s.wantedVCPUs()); diff != "" {
			t.Errorf("with %d guests that wait (-want +got):\n%s", most, diff)
		}
	}
}
