package main

import (
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmruntime/vmruntime/test/critest"
)

func TestJudge(t *testing.T) {
	skips, err := critest.ReadSkips("listed # a reason")
	if err != nil {
		t.Fatal(err)
	}
	base := critest.Results{"a": critest.Passed, "listed": critest.Passed, "broken here": critest.Failed}
	for name, test := range map[string]struct {
		got  critest.Results
		fine bool
	}{
		"as listed":           {critest.Results{"a": critest.Passed, "listed": critest.Failed, "broken here": critest.Failed}, true},
		"a spec fails":        {critest.Results{"a": critest.Failed, "listed": critest.Failed}, false},
		"a spec was not run":  {critest.Results{"listed": critest.Failed}, false},
		"a listed one passes": {critest.Results{"a": critest.Passed, "listed": critest.Passed}, false},
		"listed, not run":     {critest.Results{"a": critest.Passed}, false},
	} {
		if err := judge(base, test.got, skips); (err == nil) != test.fine {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestResultsAreKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), resultsName)
	want := map[string]critest.Results{containers: {"a": critest.Passed}, vms: {"a": critest.Failed}}
	if err := write(file, want); err != nil {
		t.Fatal(err)
	}
	got := map[string]critest.Results{containers: {}, vms: {}}
	if err := read(file, got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if err := read(filepath.Join(t.TempDir(), "none"), got); err != nil {
		t.Errorf("without earlier runs: %v", err)
	}
}
