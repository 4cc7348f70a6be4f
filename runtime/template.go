package runtime

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/qemu"
)

// A template is a guest of ours that has booted and is nobody's yet: its memory and the state of its devices. A pod's guest
// begins as a copy of it.
//
//	key: hash of all that a guest's shape depends on
//	server.root/templates/KEY: memory, state, manifest.json     made in making-KEY, renamed when whole
//	loaded: the memory in a sealed memfd, that nobody can change, checked while it is filled
//
// Whatever is wrong with a template, the pod boots cold: nothing waits for one, and nothing fails for lack of one.

const (
	templateFormat = 1
	makingPrefix   = "making-"
	memoryName     = "memory"
	savedName      = "state"
	manifestName   = "manifest.json"

	// templateTimeout bounds the making of one.
	templateTimeout = bootTimeout + time.Minute
	// templateRetry is how long after a failure the same template is not tried again.
	templateRetry = 5 * time.Minute

	// Values of template.share.
	shareOff       = "off"
	shareNamespace = "namespace"
	shareNode      = "node"
)

// templateManifest tells what belongs to a template's files.
type templateManifest struct {
	Format      int    `json:"format"`
	MemoryBytes int64  `json:"memoryBytes"`
	DataBytes   int64  `json:"dataBytes"` // what is not zero
	MemorySHA   string `json:"memorySHA256"`
	StateSHA    string `json:"stateSHA256"`
}

// template is one that is loaded.
type template struct {
	key    string
	memory *os.File
	state  []byte
	data   int64
	used   time.Time
}

// Close lets go of the memory; VMs that have it keep it.
func (t *template) Close() error { return t.memory.Close() }

// clone is the machine that begins as the template. sharing says that it will get a shared directory.
func (t *template) clone(m qemu.Machine, share string, sharing bool) qemu.Machine {
	m.Incoming, m.Memory = true, qemu.MemoryPrivate
	if share == shareOff || sharing {
		m.Memory = qemu.MemoryCopied
	}
	return m
}

// give adds what a clone begins with; without a template nothing.
func (t *template) give(s *qemu.Spec) {
	if t != nil {
		s.Memory, s.State = t.memory, bytes.NewReader(t.state)
	}
}

// templates makes, keeps and hands out templates. Each is made or loaded by one goroutine, one after the other.
type templates struct {
	cfg      TemplateConfig
	dir      string
	log      *slog.Logger
	identity *shapeIdentity
	// make boots a machine without disks and taps into memory until it could be a pod's, and gives the state of its devices.
	make func(ctx context.Context, m qemu.Machine, memory *os.File) (state []byte, err error)
	// ready is told of each shape of which there is a template now.
	ready func(shape qemu.Machine)
	ctx   context.Context
	work  *sync.WaitGroup

	making sync.Mutex // one at a time

	mu     sync.Mutex
	loaded map[string]*template // by key and scope
	busy   map[string]bool      // of these, what is being made or loaded
	failed map[string]time.Time // by key, when
	// ungrown is when a guest last did not grow from the base size.
	ungrown time.Time
}

func (rt *Runtime) newTemplates() *templates {
	return &templates{
		cfg: rt.cfg.Template, dir: filepath.Join(rt.cfg.Server.Root, "templates"), log: rt.log,
		identity: &shapeIdentity{binary: rt.cfg.QEMU.Binary, files: make(map[string]fileIdentity)},
		make:     rt.makeTemplate, ready: func(m qemu.Machine) { rt.spares.want(m) }, ctx: rt.ctx, work: &rt.owned,
		loaded: make(map[string]*template), busy: make(map[string]bool), failed: make(map[string]time.Time),
	}
}

// shape is the machine that a template of m is made with: without what differs from pod to pod.
func shape(m qemu.Machine) qemu.Machine {
	m.Name, m.UUID, m.Disks = "vmruntime-template", "", nil
	m.NICs = slices.Clone(m.NICs)
	for i := range m.NICs {
		m.NICs[i] = qemu.NIC{ID: fmt.Sprintf("net%d", i), MAC: fmt.Sprintf("02:00:00:00:00:%02x", i+1), Unconnected: true}
	}
	m.Memory = qemu.MemoryShared
	return m
}

// take gives a template for the machine of a pod in the namespace, which the caller closes; nil if there is none yet.
func (t *templates) take(m qemu.Machine, namespace string) *template {
	_, scope, ok := t.find(shape(m), namespace)
	if !ok {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	have := t.loaded[scope]
	if have == nil {
		return nil
	}
	have.used = time.Now()
	return t.lend(have)
}

// want has a template made or loaded for such machines, unless there is one, which it tells. It does not wait.
func (t *templates) want(m qemu.Machine, namespace string) (there bool) {
	m = shape(m)
	key, scope, ok := t.find(m, namespace)
	t.mu.Lock()
	defer t.mu.Unlock()
	if !ok || t.loaded[scope] != nil || t.busy[scope] || time.Since(t.failed[key]) < templateRetry || t.ctx.Err() != nil {
		return ok && t.loaded[scope] != nil
	}
	t.busy[scope] = true
	t.work.Go(func() { t.provide(m, key, scope) })
	return false
}

// find gives the key of a shape, and with it the scope in which the memory is shared. Memory of huge pages cannot be a copy, so a machine
// with some has no template.
func (t *templates) find(shape qemu.Machine, namespace string) (key, scope string, ok bool) {
	if !t.cfg.Enabled || shape.HugeNodeBytes > 0 {
		return "", "", false
	}
	key, err := t.identity.key(t.ctx, shape)
	if err != nil {
		t.log.Warn("no template: what it depends on cannot be read", "error", err)
		return "", "", false
	}
	if t.cfg.Share == shareNamespace {
		return key, key + "/" + namespace, true
	}
	return key, key, true
}

// lend gives a template of its own to somebody who closes it. The caller holds mu.
func (t *templates) lend(have *template) *template {
	fd, err := unix.FcntlInt(have.memory.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.log.Warn("no template", "error", err)
		return nil
	}
	lent := *have
	lent.memory = os.NewFile(uintptr(fd), "template")
	return &lent
}

// provide loads a template, making it first if need be.
func (t *templates) provide(m qemu.Machine, key, scope string) {
	t.making.Lock()
	have, err := t.loadOrMake(m, key)
	t.making.Unlock()
	if err != nil {
		t.log.Warn("no template could be made; guests boot instead", "template", key, "error", err)
	} else {
		defer t.ready(m)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.busy, scope)
	if err != nil {
		t.failed[key] = time.Now()
		return
	}
	have.used = time.Now()
	t.loaded[scope] = have
	t.log.Info("guests begin as a template", "template", key, "vcpus", m.VCPUs, "memory", m.MemoryBytes)
	t.evictLoaded()
}

func (t *templates) loadOrMake(m qemu.Machine, key string) (*template, error) {
	have, err := t.load(key)
	if err == nil {
		if err := t.fits(have.data); err != nil {
			return nil, errors.Join(err, have.Close())
		}
		return have, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		t.log.Warn("a template is damaged; it is made anew", "template", key, "error", err)
	}
	if err := t.build(m, key); err != nil {
		return nil, err
	}
	return t.load(key)
}

// build makes a template's files. They are not synced: what a crash leaves of them is found out by their hashes.
func (t *templates) build(m qemu.Machine, key string) (err error) {
	ctx, cancel := context.WithTimeout(t.ctx, templateTimeout)
	defer cancel()
	begin := time.Now()
	dir := filepath.Join(t.dir, makingPrefix+key)
	if err := errors.Join(os.RemoveAll(dir), os.RemoveAll(filepath.Join(t.dir, key)), os.MkdirAll(dir, 0o700)); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	memory, err := newMemory(m.MemoryBytes)
	if err != nil {
		return err
	}
	defer memory.Close()
	state, err := t.make(ctx, m, memory)
	if err != nil {
		return err
	}
	man := templateManifest{Format: templateFormat, MemoryBytes: m.MemoryBytes, StateSHA: sum(state)}
	file, err := os.OpenFile(filepath.Join(dir, memoryName), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	man.DataBytes, man.MemorySHA, err = copyPages(file, memory, m.MemoryBytes)
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	if err := t.fits(man.DataBytes); err != nil {
		return err
	}
	text, err := json.Marshal(man)
	if err != nil {
		return err
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, savedName), state, 0o600),
		os.WriteFile(filepath.Join(dir, manifestName), text, 0o600),
		os.Rename(dir, filepath.Join(t.dir, key)),
	); err != nil {
		return err
	}
	t.log.Info("a template is made", "template", key, "vcpus", m.VCPUs, "memory", m.MemoryBytes, "data", man.DataBytes, "took", time.Since(begin))
	return t.evictStored(key)
}

// fits refuses a template that is alone too large.
func (t *templates) fits(data int64) error {
	if data > int64(t.cfg.MaxSize) {
		return fmt.Errorf("it has %d bytes; template.max_size is %s: %w", data, t.cfg.MaxSize, errdefs.ErrResourceExhausted)
	}
	return nil
}

// load reads a template into memory that cannot be changed any more. One that is not what its manifest says is removed.
func (t *templates) load(key string) (have *template, err error) {
	dir := filepath.Join(t.dir, key)
	text, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(errors.New(err.Error()), os.RemoveAll(dir)) // the template was there, whatever of it is not
		}
	}()
	var man templateManifest
	if err := json.Unmarshal(text, &man); err != nil {
		return nil, err
	}
	if man.Format != templateFormat {
		return nil, fmt.Errorf("its format is %d, not %d", man.Format, templateFormat)
	}
	state, err := os.ReadFile(filepath.Join(dir, savedName))
	if err != nil {
		return nil, err
	}
	if sum(state) != man.StateSHA {
		return nil, errors.New("its state is not what was written")
	}
	memory, err := loadMemory(filepath.Join(dir, memoryName), man)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	if err := os.Chtimes(dir, now, now); err != nil { // the least recently used go first
		t.log.Warn("the use of a template is not noted", "template", key, "error", err)
	}
	return &template{key: key, memory: memory, state: state, data: man.DataBytes}, nil
}

func loadMemory(path string, man templateManifest) (*os.File, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	memory, err := newMemory(man.MemoryBytes)
	if err != nil {
		return nil, err
	}
	data, hash, err := copyPages(memory, file, man.MemoryBytes)
	if err == nil && (data != man.DataBytes || hash != man.MemorySHA) {
		err = errors.New("its memory is not what was written")
	}
	if err == nil {
		_, err = unix.FcntlInt(memory.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	return memory, nil
}

// drop forgets a template that a guest could not begin as, and makes it anew at the next need.
func (t *templates) drop(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for scope, have := range t.loaded {
		if have.key == key {
			delete(t.loaded, scope)
			_ = have.Close() // only read
		}
	}
	t.failed[key] = time.Now()
	if err := os.RemoveAll(filepath.Join(t.dir, key)); err != nil {
		t.log.Warn("removing a template", "template", key, "error", err)
	}
}

// grow tells whether guests may begin with another size than their pods'.
func (t *templates) grow() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Since(t.ungrown) >= templateRetry
}

// stopGrowing has guests begin with the sizes of their pods for some time.
func (t *templates) stopGrowing() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ungrown = time.Now()
}

// evictLoaded keeps the memory of all within the limit. The caller holds mu.
func (t *templates) evictLoaded() {
	for {
		total, oldest := int64(0), ""
		for scope, have := range t.loaded {
			total += have.data
			if oldest == "" || have.used.Before(t.loaded[oldest].used) {
				oldest = scope
			}
		}
		if total <= int64(t.cfg.MaxSize) {
			return
		}
		_ = t.loaded[oldest].Close() // only read
		delete(t.loaded, oldest)
	}
}

// storedTemplate is one that is there as files.
type storedTemplate struct {
	name string
	data int64
	used time.Time
}

// evictStored keeps the files of all within the limit, the given one before all others.
func (t *templates) evictStored(keep string) error {
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return err
	}
	all, err := t.stored(entries)
	if err != nil {
		return err
	}
	for i := range all {
		if all[i].name == keep {
			all[i].used = time.Now()
		}
	}
	slices.SortFunc(all, func(a, b storedTemplate) int { return b.used.Compare(a.used) })
	total := int64(0)
	for _, s := range all {
		if total += s.data; total > int64(t.cfg.MaxSize) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(t.dir, s.name)))
		}
	}
	return err
}

// stored reads what there is to know of the templates in these directories, of which some may have been removed meanwhile.
func (t *templates) stored(entries []os.DirEntry) ([]storedTemplate, error) {
	var all []storedTemplate
	for _, e := range entries {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var man templateManifest
		if text, err := os.ReadFile(filepath.Join(t.dir, e.Name(), manifestName)); err == nil {
			_ = json.Unmarshal(text, &man) // a damaged one counts nothing, and goes when it is loaded
		}
		all = append(all, storedTemplate{e.Name(), man.DataBytes, info.ModTime()})
	}
	return all, nil
}

// sweep removes what a daemon has left that was ended while it made a template.
func (t *templates) sweep() error {
	names, err := dirNames(t.dir)
	for _, name := range names {
		if strings.HasPrefix(name, makingPrefix) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(t.dir, name)))
		}
	}
	return err
}

// close lets go of all memory. Nothing is made any more.
func (t *templates) close() (err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for scope, have := range t.loaded {
		err = errors.Join(err, have.Close())
		delete(t.loaded, scope)
	}
	return err
}

func newMemory(bytes int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("template", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memory of a template: %w", err)
	}
	f := os.NewFile(uintptr(fd), "template")
	if err := f.Truncate(bytes); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

const pageBytes = 4096

// copyPages copies all pages that are not zero, and tells their size together and the hash of them and their places.
func copyPages(to, from *os.File, bytes int64) (data int64, hash string, err error) {
	h := sha256.New()
	buf, zero := make([]byte, 1<<20), make([]byte, pageBytes)
	err = qemu.Extents(from, bytes, func(at, size int64) error {
		for end := at + size; at < end; {
			n, err := io.ReadFull(io.NewSectionReader(from, at, end-at), buf[:min(int64(len(buf)), end-at)])
			if err != nil {
				return err
			}
			for _, run := range pageRuns(buf[:n], zero) {
				hashPages(h, at+int64(run[0]), buf[run[0]:run[1]])
				if _, err := to.WriteAt(buf[run[0]:run[1]], at+int64(run[0])); err != nil {
					return err
				}
				data += int64(run[1] - run[0])
			}
			at += int64(n)
		}
		return nil
	})
	return data, hex.EncodeToString(h.Sum(nil)), errors.Join(err, to.Truncate(bytes))
}

// hashPages hashes pages one by one, each after its place: how many there are in a row may differ from file to file.
func hashPages(h hash.Hash, at int64, pages []byte) {
	for begin := 0; begin < len(pages); begin += pageBytes {
		var place [8]byte
		binary.LittleEndian.PutUint64(place[:], uint64(at+int64(begin)))
		h.Write(place[:])
		h.Write(pages[begin:min(begin+pageBytes, len(pages))])
	}
}

// pageRuns are begin and end of the longest runs of pages that are not zero.
func pageRuns(buf, zero []byte) (runs [][2]int) {
	for at := 0; at < len(buf); at += pageBytes {
		end := min(at+pageBytes, len(buf))
		switch {
		case string(buf[at:end]) == string(zero[:end-at]):
		case len(runs) > 0 && runs[len(runs)-1][1] == at:
			runs[len(runs)-1][1] = end
		default:
			runs = append(runs, [2]int{at, end})
		}
	}
	return runs
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}
