package state

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if root := os.Getenv(crashRoot); root != "" {
		crashChild(root)
	}
	goleak.VerifyTestMain(m)
}

type spec struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels,omitempty"`
}

type status struct {
	Count int       `json:"count"`
	At    time.Time `json:"at,omitzero"`
	Disks []string  `json:"disks,omitempty"`
}

func open(t *testing.T, root string) *Store[spec, status] {
	t.Helper()
	s, err := Open[spec, status](root)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func create(t *testing.T, s *Store[spec, status], id string) *Record[spec, status] {
	t.Helper()
	r, err := s.Create(id, spec{Name: "n-" + id, Labels: map[string]string{"a": "b"}}, status{Count: 1})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// ids loads a directory anew and fails the test if any record is broken.
func ids(t *testing.T, root string) []string {
	t.Helper()
	records, broken, err := open(t, root).Load()
	if err != nil || len(broken) > 0 {
		t.Fatalf("load: %v, broken %v", err, broken)
	}
	var out []string
	for _, r := range records {
		out = append(out, r.ID())
	}
	return out
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestRecordSurvivesReload(t *testing.T) {
	root := filepath.Join(t.TempDir(), "pods")
	s := open(t, root)
	r := create(t, s, "abc")
	at := time.Now()
	err := r.Update(func(s *status) error {
		s.Count, s.At, s.Disks = 2, at, []string{"x"}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	records, broken, err := open(t, root).Load()
	if err != nil || len(broken) != 0 || len(records) != 1 {
		t.Fatalf("records %v, broken %v, error %v", records, broken, err)
	}
	if diff := cmp.Diff(r.Status(), records[0].Status()); diff != "" {
		t.Error("published and reloaded status differ:", diff)
	}
	if diff := cmp.Diff(spec{Name: "n-abc", Labels: map[string]string{"a": "b"}}, records[0].Spec()); diff != "" {
		t.Error(diff)
	}
	if got := names(t, root); !slices.Equal(got, []string{"abc"}) {
		t.Errorf("directory holds %v", got)
	}
	if got := names(t, filepath.Join(root, "abc")); !slices.Equal(got, []string{specFile, statusFile}) {
		t.Errorf("record holds %v", got)
	}
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	root := t.TempDir()
	r := create(t, open(t, root), "abc")
	before := r.Status()
	refused := errors.New("refused")
	err := r.Update(func(s *status) error {
		s.Count, s.Disks = 9, append(s.Disks, "y")
		return refused
	})
	if !errors.Is(err, refused) {
		t.Errorf("error %v", err)
	}
	if diff := cmp.Diff(before, r.Status()); diff != "" {
		t.Error(diff)
	}
	if err := os.Rename(filepath.Join(root, "abc"), filepath.Join(root, "away")); err != nil {
		t.Fatal(err)
	}
	if err := r.Update(func(s *status) error { s.Count = 10; return nil }); err == nil {
		t.Error("an update that cannot be written succeeds")
	}
	if diff := cmp.Diff(before, r.Status()); diff != "" {
		t.Error("what is not on disk was published:", diff)
	}
}

func TestUpdateDoesNotTouchWhatReadersHold(t *testing.T) {
	r := create(t, open(t, t.TempDir()), "abc")
	set := func(first string) func(*status) error {
		return func(s *status) error {
			s.Disks = append(s.Disks[:0], first)
			return nil
		}
	}
	if err := r.Update(set("one")); err != nil {
		t.Fatal(err)
	}
	held := r.Status()
	if err := r.Update(set("two")); err != nil {
		t.Fatal(err)
	}
	if held.Disks[0] != "one" || r.Status().Disks[0] != "two" {
		t.Errorf("held %v, published %v", held.Disks, r.Status().Disks)
	}
}

func TestCreateRefuses(t *testing.T) {
	s := open(t, t.TempDir())
	create(t, s, "abc")
	if _, err := s.Create("abc", spec{}, status{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second record of one ID: %v", err)
	}
	for _, id := range []string{"", ".", "..", ".new-x", "a/b", "/a", string(make([]byte, 201))} {
		if _, err := s.Create(id, spec{}, status{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("ID %q: %v", id, err)
		}
	}
}

func TestCreateOfOneIDAtOnce(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() { _, errs[i] = s.Create("abc", spec{}, status{Count: i}) })
	}
	wg.Wait()
	made := 0
	for _, err := range errs {
		if err == nil {
			made++
		} else if !errdefs.IsAlreadyExists(err) {
			t.Error(err)
		}
	}
	if made != 1 {
		t.Errorf("%d of 8 made the record", made)
	}
	if got := ids(t, root); !slices.Equal(got, []string{"abc"}) {
		t.Errorf("records %v", got)
	}
}

func TestRemove(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	r := create(t, s, "abc")
	for range 2 {
		if err := s.Remove("abc"); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Update(func(s *status) error { s.Count++; return nil }); !errdefs.IsNotFound(err) {
		t.Errorf("update after remove: %v", err)
	}
	if _, err := s.Get("abc"); !errdefs.IsNotFound(err) {
		t.Errorf("get after remove: %v", err)
	}
	if got := names(t, root); len(got) != 0 {
		t.Errorf("left on disk: %v", got)
	}
	create(t, s, "abc")
	if err := s.Remove("unknown"); err != nil {
		t.Error(err)
	}
}

func TestBrokenRecordsAreApart(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	for _, id := range []string{"good", "nospec", "badstatus", "empty"} {
		create(t, s, id)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Remove(filepath.Join(root, "nospec", specFile)))
	must(os.WriteFile(filepath.Join(root, "badstatus", statusFile), []byte("{\"count\":"), 0o600))
	must(os.WriteFile(filepath.Join(root, "empty", statusFile), nil, 0o600))
	must(os.WriteFile(filepath.Join(root, "file"), nil, 0o600))
	must(os.MkdirAll(filepath.Join(root, newPrefix+"half"), 0o700))
	must(os.MkdirAll(filepath.Join(root, gonePrefix+"half"), 0o700))
	must(os.WriteFile(filepath.Join(root, "good", "."+statusFile+"123"), []byte("torn"), 0o600))

	fresh := open(t, root)
	records, broken, err := fresh.Load()
	must(err)
	if len(records) != 1 || records[0].ID() != "good" {
		t.Errorf("records %v", records)
	}
	var bad []string
	for _, b := range broken {
		bad = append(bad, b.ID)
		if b.Err == nil {
			t.Errorf("%s is broken without an error", b.ID)
		}
		must(fresh.Remove(b.ID))
	}
	if want := []string{"badstatus", "empty", "file", "nospec"}; !slices.Equal(bad, want) {
		t.Errorf("broken %v, want %v", bad, want)
	}
	if got := names(t, root); !slices.Equal(got, []string{"good"}) {
		t.Errorf("left on disk: %v", got)
	}
	if got := names(t, filepath.Join(root, "good")); len(got) != 2 {
		t.Errorf("left in the good record: %v", got)
	}
}

func TestFind(t *testing.T) {
	s := open(t, t.TempDir())
	for _, id := range []string{"aab", "aac", "b", "bcd"} {
		create(t, s, id)
	}
	for _, tc := range []struct {
		prefix, want string
		class        func(error) bool
	}{
		{"aab", "aab", nil},
		{"bc", "bcd", nil},
		{"b", "b", nil}, // whole IDs win
		{"aa", "", errdefs.IsInvalidArgument},
		{"x", "", errdefs.IsNotFound},
		{"aabx", "", errdefs.IsNotFound},
		{"", "", errdefs.IsNotFound},
	} {
		got, err := s.Find(tc.prefix)
		if got != tc.want || (tc.class == nil) != (err == nil) || tc.class != nil && !tc.class(err) {
			t.Errorf("Find(%q) = %q, %v", tc.prefix, got, err)
		}
	}
}

func TestNames(t *testing.T) {
	n := NewNames()
	if err := errors.Join(n.Reserve("web", "1"), n.Reserve("web", "1")); err != nil {
		t.Fatal(err)
	}
	if err := n.Reserve("web", "2"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second holder: %v", err)
	}
	n.Release("web", "2")
	if err := n.Reserve("web", "2"); err == nil {
		t.Error("who does not hold a name released it")
	}
	n.Release("web", "1")
	if err := n.Reserve("web", "2"); err != nil {
		t.Error(err)
	}
}

func TestConcurrentUse(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	shared := create(t, s, "shared")
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 10 {
				id := fmt.Sprintf("w%d-%d", w, i)
				r, err := s.Create(id, spec{}, status{})
				if err != nil {
					t.Error(err)
					return
				}
				err = errors.Join(
					r.Update(func(s *status) error { s.Count = i; return nil }),
					shared.Update(func(s *status) error { s.Count++; return nil }),
				)
				if i%2 == 0 {
					err = errors.Join(err, s.Remove(id))
				}
				if err != nil {
					t.Error(err)
				}
				for _, r := range s.List() {
					_ = r.Status()
				}
			}
		})
	}
	wg.Wait()
	if got := shared.Status().Count; got != 41 {
		t.Errorf("40 increments of 1 gave %d", got)
	}
	if got := len(ids(t, root)); got != 21 {
		t.Errorf("%d records on disk, want 21", got)
	}
}

// BenchmarkList500 is what a list of 500 pods asks of the store.
func BenchmarkList500(b *testing.B) {
	s, err := Open[spec, status](b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	for i := range 500 {
		if _, err := s.Create(fmt.Sprintf("%064d", i), spec{}, status{}); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		for _, r := range s.List() {
			_, _ = r.Spec(), r.Status()
		}
	}
}

func BenchmarkUpdate(b *testing.B) {
	s, err := Open[spec, status](b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	r, err := s.Create("abc", spec{}, status{})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := r.Update(func(s *status) error { s.Count++; return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
