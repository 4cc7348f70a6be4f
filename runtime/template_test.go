package runtime

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/qemu"
)

const templateBytes = 8 << 20

// templateBed are templates whose guests are two pages of memory and a line of state.
type templateBed struct {
	*templates
	t     *testing.T
	made  int
	fails error
}

func newTemplateBed(t *testing.T, cfg TemplateConfig) *templateBed {
	dir := t.TempDir()
	for _, name := range []string{"qemu", "kernel", "initrd"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b := &templateBed{t: t}
	b.templates = &templates{
		cfg: cfg, dir: filepath.Join(dir, "templates"), log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		identity: &shapeIdentity{binary: filepath.Join(dir, "qemu"), files: make(map[string]fileIdentity)},
		make:     b.boot, ready: func(qemu.Machine) {}, ctx: t.Context(), work: &sync.WaitGroup{},
		loaded: make(map[string]*template), busy: make(map[string]bool), failed: make(map[string]time.Time),
	}
	t.Cleanup(func() {
		b.work.Wait()
		if err := b.close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *templateBed) boot(_ context.Context, _ qemu.Machine, memory *os.File) ([]byte, error) {
	b.made++
	page := bytes.Repeat([]byte{7}, pageBytes)
	_, one := memory.WriteAt(page, 0)
	_, two := memory.WriteAt(page, templateBytes-pageBytes)
	return []byte("state"), errors.Join(b.fails, one, two)
}

func (b *templateBed) machine(vcpus int) qemu.Machine {
	dir := filepath.Dir(b.dir)
	return qemu.Machine{
		Name: "pod", Arch: qemu.ArchX86, Accel: qemu.AccelTCG, VCPUs: vcpus, MemoryBytes: templateBytes,
		Kernel: filepath.Join(dir, "kernel"), Initrd: filepath.Join(dir, "initrd"), NICs: []qemu.NIC{{ID: "net0", MAC: "52:54:00:00:00:01", MTU: 1450}},
	}
}

// get takes a template, having waited until one is there if there can be one.
func (b *templateBed) get(vcpus int, namespace string) *template {
	b.t.Helper()
	have := b.take(b.machine(vcpus), namespace)
	if have == nil {
		b.want(b.machine(vcpus), namespace)
		b.work.Wait()
		have = b.take(b.machine(vcpus), namespace)
	}
	if have != nil {
		b.t.Cleanup(func() { _ = have.Close() })
	}
	return have
}

// another is a daemon that finds what this one has left.
func (b *templateBed) another() {
	b.work.Wait()
	if err := b.close(); err != nil {
		b.t.Fatal(err)
	}
	clear(b.failed)
}

func enabled() TemplateConfig {
	return TemplateConfig{Enabled: true, Share: shareOff, MaxSize: 1 << 20}
}

func TestTemplateIsMadeOnceAndSealed(t *testing.T) {
	b := newTemplateBed(t, enabled())
	if b.take(b.machine(1), "a") != nil {
		t.Fatal("there is a template that nobody has made")
	}
	have := b.get(1, "b")
	if have == nil || string(have.state) != "state" || have.data != 2*pageBytes {
		t.Fatalf("template %+v", have)
	}
	if _, err := have.memory.WriteAt([]byte{1}, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("writing to its memory: %v", err)
	}
	b.another()
	if b.get(1, "c") == nil || b.made != 1 {
		t.Errorf("another daemon: made %d times", b.made)
	}
	if b.get(2, "c") == nil || b.made != 2 {
		t.Errorf("another shape: made %d times", b.made)
	}
}

func TestTemplateOfChangedInputs(t *testing.T) {
	for _, name := range []string{"qemu", "kernel", "initrd"} {
		b := newTemplateBed(t, enabled())
		b.get(1, "a")
		if err := os.WriteFile(filepath.Join(filepath.Dir(b.dir), name), []byte("newer"), 0o755); err != nil {
			t.Fatal(err)
		}
		if b.get(1, "a") == nil || b.made != 2 {
			t.Errorf("another %s: made %d times", name, b.made)
		}
	}
}

func TestTemplateDamagedIsMadeAnew(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"memory":   func(dir string) error { return write(filepath.Join(dir, memoryName), 100) },
		"hole":     func(dir string) error { return write(filepath.Join(dir, memoryName), pageBytes*9) },
		"short":    func(dir string) error { return os.Truncate(filepath.Join(dir, memoryName), pageBytes) },
		"state":    func(dir string) error { return write(filepath.Join(dir, savedName), 2) },
		"manifest": func(dir string) error { return write(filepath.Join(dir, manifestName), 0) },
		"missing":  func(dir string) error { return os.Remove(filepath.Join(dir, memoryName)) },
	} {
		b := newTemplateBed(t, enabled())
		key := b.get(1, "a").key
		b.another()
		if err := damage(filepath.Join(b.dir, key)); err != nil {
			t.Fatal(err)
		}
		if have := b.get(1, "a"); have == nil || have.data != 2*pageBytes || b.made != 2 {
			t.Errorf("%s: template %+v, made %d times", name, have, b.made)
		}
	}
}

func write(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("x"), at)
	return errors.Join(err, f.Close())
}

func TestTemplateFails(t *testing.T) {
	b := newTemplateBed(t, enabled())
	b.fails = errors.New("it does not boot")
	for range 3 {
		if b.get(1, "a") != nil {
			t.Fatal("there is a template")
		}
	}
	if b.made != 1 {
		t.Errorf("tried %d times at once", b.made)
	}
	if names, err := dirNames(b.dir); err != nil || len(names) > 0 {
		t.Errorf("left: %v, %v", names, err)
	}
}

func TestTemplateBadCopy(t *testing.T) {
	b := newTemplateBed(t, enabled())
	b.drop(b.get(1, "a").key)
	if b.get(1, "a") != nil {
		t.Error("a template that was given up is used again at once")
	}
}

func TestTemplateLimit(t *testing.T) {
	cfg := enabled()
	cfg.MaxSize = 5 * pageBytes // two of them
	b := newTemplateBed(t, cfg)
	for vcpus := 1; vcpus <= 3; vcpus++ {
		if b.get(vcpus, "a") == nil {
			t.Fatalf("no template of %d", vcpus)
		}
	}
	if names, err := dirNames(b.dir); err != nil || len(names) != 2 || len(b.loaded) != 2 {
		t.Errorf("stored %v, %d loaded, %v", names, len(b.loaded), err)
	}
	if b.get(3, "a"); b.made != 3 {
		t.Error("the newest had to go")
	}
	cfg.MaxSize = pageBytes
	if b := newTemplateBed(t, cfg); b.get(1, "a") != nil {
		t.Error("a template beyond the limit")
	}
}

// One that goes while those that are stored are looked through is in nobody's way.
func TestTemplateGoesMeanwhile(t *testing.T) {
	b := newTemplateBed(t, enabled())
	gone, kept := b.get(1, "a").key, b.get(2, "a").key
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		t.Fatal(err)
	}
	b.drop(gone)
	all, err := b.stored(entries)
	if err != nil || len(all) != 1 || all[0].name != kept || all[0].data != 2*pageBytes {
		t.Errorf("stored are %+v, %v; want %s alone", all, err, kept)
	}
}

func TestTemplateScope(t *testing.T) {
	for share, same := range map[string]bool{shareNode: true, shareNamespace: false, shareOff: true} {
		cfg := enabled()
		cfg.Share = share
		b := newTemplateBed(t, cfg)
		one, two := inode(t, b.get(1, "a")), inode(t, b.get(1, "b"))
		if b.made != 1 || (one == two) != same {
			t.Errorf("%s: made %d times, memory %d and %d", share, b.made, one, two)
		}
		m := b.get(1, "a").clone(b.machine(1), share, false)
		if private := m.Memory == qemu.MemoryPrivate; private != (share != shareOff) {
			t.Errorf("%s: memory is %s", share, m.Memory)
		}
		if m := b.get(1, "a").clone(b.machine(1), share, true); m.Memory != qemu.MemoryCopied {
			t.Errorf("%s, with a share: memory is %s", share, m.Memory)
		}
	}
}

func inode(t *testing.T, have *template) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(have.memory.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestTemplateSweep(t *testing.T) {
	b := newTemplateBed(t, enabled())
	b.get(1, "a")
	if err := os.MkdirAll(filepath.Join(b.dir, makingPrefix+"0123", "memory"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := b.sweep(); err != nil {
		t.Fatal(err)
	}
	if names, err := dirNames(b.dir); err != nil || len(names) != 1 {
		t.Errorf("left: %v, %v", names, err)
	}
}

func TestTemplateDisabled(t *testing.T) {
	b := newTemplateBed(t, TemplateConfig{Share: shareOff, MaxSize: 1 << 20})
	if b.get(1, "a") != nil || b.made != 0 {
		t.Errorf("made %d times", b.made)
	}
}
