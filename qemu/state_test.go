package qemu

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const stateMemory = 128 * mib

// memoryFile is memory that can be sealed.
func memoryFile(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("memory", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memory")
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(stateMemory); err != nil {
		t.Fatal(err)
	}
	return f
}

func hash(t *testing.T, f *os.File) [32]byte {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, stateMemory)); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

func killed(t *testing.T, v *VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := v.Kill(ctx); err != nil {
		t.Fatal(err)
	}
}

// incoming starts what was saved of a machine, on another disk, and lets it go on.
func incoming(t *testing.T, m Machine, memory *os.File, state []byte, disk string) *guest {
	t.Helper()
	m.Incoming = true
	m.Disks = []Disk{{Serial: "scratch", Path: disk, Format: "raw"}}
	s := spec(t, m)
	s.Memory, s.State = memory, bytes.NewReader(state)
	begin := time.Now()
	g := &guest{VM: start(t, s), t: t}
	if got, err := g.State(t.Context()); err != nil || got != "paused" {
		t.Errorf("loaded, it is %q, %v", got, err)
	}
	if err := g.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.dial()
	g.do("scan")
	t.Logf("the guest answers after %s", time.Since(begin))
	return g
}

func TestTemplateAndClones(t *testing.T) {
	memory := memoryFile(t)
	var m Machine
	g := boot(t, func(s *Spec) {
		s.Machine.MemoryBytes, s.Machine.Memory, s.Memory = stateMemory, MemoryShared, memory
		m = s.Machine
	})
	g.do("write /kept of-the-template")
	var state bytes.Buffer
	begin := time.Now()
	if err := g.SaveDevices(t.Context(), &state); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes of state after %s", state.Len(), time.Since(begin))
	if state.Len() > 2*mib {
		t.Errorf("the state has %d bytes: it holds the memory", state.Len())
	}
	killed(t, g.VM)
	// Only without a writable mapping.
	if _, err := unix.FcntlInt(memory.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		t.Fatalf("seal the memory: %v", err)
	}
	before := hash(t, memory)
	m.Memory = MemoryPrivate
	one := incoming(t, m, memory, state.Bytes(), diskFile(t, "one"))
	one.do("write /kept of-the-first")
	m.Memory = MemoryCopied
	two := incoming(t, m, memory, state.Bytes(), diskFile(t, "two"))
	for _, tc := range []struct {
		g         *guest
		disk, own string
	}{{one, "one", "of-the-first"}, {two, "two", "of-the-template"}} {
		if got := tc.g.do("disks"); got != "scratch=sda,ro=0" {
			t.Errorf("disks of %s: %q", tc.disk, got)
		}
		if got := tc.g.do("head /dev/sda"); !strings.HasPrefix(got, tc.disk+"\x00") {
			t.Errorf("disk of %s: %q", tc.disk, got)
		}
		if got := tc.g.do("head /kept"); got != tc.own {
			t.Errorf("memory of %s: %q, want %q", tc.disk, got, tc.own)
		}
	}
	if hash(t, memory) != before {
		t.Error("the template's memory has changed")
	}
}

func TestSaveState(t *testing.T) {
	disk := diskFile(t, "disk")
	var m Machine
	g := boot(t, func(s *Spec) {
		s.Machine.MemoryBytes = stateMemory
		m = s.Machine
	})
	g.do("write /kept saved")
	if err := g.SaveState(t.Context(), failingWriter{}); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Fatalf("a writer that fails: %v", err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.SaveState(over, io.Discard); !errors.Is(err, context.Canceled) {
		t.Fatalf("a context that has ended: %v", err)
	}
	for range 2 { // also after it has failed, and after another one
		var state bytes.Buffer
		if err := g.SaveState(t.Context(), &state); err != nil {
			t.Fatal(err)
		}
		if s, err := g.VM.State(t.Context()); err != nil || s != "postmigrate" && s != "finish-migrate" {
			t.Errorf("the guest that was saved is %q (%v); who saves its disks relies on postmigrate or, at first, finish-migrate", s, err)
		}
		if err := g.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := g.do("head /kept"); got != "saved" {
			t.Errorf("the guest that was saved has %q", got)
		}
		again := incoming(t, m, nil, state.Bytes(), disk)
		if got := again.do("head /kept"); got != "saved" {
			t.Errorf("the guest that was restored has %q", got)
		}
		killed(t, again.VM)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("no room") }

func TestIncomingDamaged(t *testing.T) {
	m := guestMachine(t)
	m.Incoming = true
	s := spec(t, m)
	s.State = strings.NewReader("this is no state")
	before := descriptors(t)
	v, err := Start(t.Context(), s)
	if err == nil {
		t.Fatal(v.Close())
	}
	if !strings.Contains(err.Error(), "load the VM's state") || !strings.Contains(err.Error(), "Not a migration stream") {
		t.Errorf("error %v", err)
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
