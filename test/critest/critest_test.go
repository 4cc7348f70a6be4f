package critest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const report = `<testsuites><testsuite>
<testcase name="[BeforeSuite]" status="passed"/>
<testcase name="[It] a works" status="passed"/>
<testcase name="[It] b fails" status="failed"><failure message="no"/></testcase>
<testcase name="[It] c is skipped" status="skipped"><skipped/></testcase>
</testsuite></testsuites>`

func TestReport(t *testing.T) {
	file := filepath.Join(t.TempDir(), "junit.xml")
	if err := os.WriteFile(file, []byte(report), 0o600); err != nil {
		t.Fatal(err)
	}
	r := Results{}
	if err := r.read(file); err != nil {
		t.Fatal(err)
	}
	if got, want := r.Summary("vm"), "critest vm: 1 passed, 1 failed, 1 skipped"; got != want {
		t.Errorf("Summary = %q, want %q", got, want)
	}
}

func TestJudge(t *testing.T) {
	skips, err := ReadSkips("# comment\n\nc .* # needs the host's IPC\n")
	if err != nil {
		t.Fatal(err)
	}
	base := Results{"a works": Passed, "c needs host": Passed, "d is skipped": Skipped}
	for name, test := range map[string]struct {
		got  Results
		want string // part of the error, "" for none
	}{
		"as wanted":       {Results{"a works": Passed, "c needs host": Skipped, "d is skipped": Skipped}, ""},
		"one fails":       {Results{"a works": Failed, "c needs host": Skipped}, "a works: failed, base line passed"},
		"one is not run":  {Results{"c needs host": Skipped}, "a works: not run"},
		"a skipped fails": {Results{"a works": Passed, "c needs host": Skipped, "d is skipped": Failed}, "d is skipped: failed"},
	} {
		err := Judge(base, test.got, skips)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: Judge = %v, want %q", name, err, test.want)
		}
	}
	if err := Judge(Results{"a works": Passed}, Results{"a works": Passed}, skips); err == nil {
		t.Error("Judge took a skip list entry that matches nothing")
	}
	if err := Compare(base, Results{"a works": Passed, "c needs host": Passed, "d is skipped": Passed}); err == nil {
		t.Error("Compare took a spec that was skipped in the base line and passes here")
	}
}

func TestJudgeSkipped(t *testing.T) {
	skips, err := ReadSkips("a .* # a reason\nb .* # a reason\n")
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		got  Results
		want []string // parts of the error
	}{
		"all fail":        {Results{"a 1": Failed, "b 1": Failed, "other": Skipped}, nil},
		"one passes":      {Results{"a 1": Failed, "a 2": Passed, "b 1": Failed}, []string{`a 2 passes; remove "a .*"`}},
		"one was not run": {Results{"a 1": Failed, "b 1": Skipped}, []string{`of "b .*" no spec fails`}},
		"nothing was run": {Results{"[BeforeSuite]": Failed}, []string{`of "a .*" no`, `of "b .*" no`}},
	} {
		err := JudgeSkipped(test.got, skips)
		if (err == nil) != (test.want == nil) {
			t.Errorf("%s: JudgeSkipped = %v, want %q", name, err, test.want)
		}
		for _, want := range test.want {
			if err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: JudgeSkipped = %v, want %q", name, err, want)
			}
		}
	}
	if got := AnyOf(skips); got != "(a .*)|(b .*)" {
		t.Errorf("AnyOf = %q", got)
	}
}

func TestReadSkips(t *testing.T) {
	_, err := ReadSkips("a b c\nx( # unbalanced\n")
	for _, want := range []string{"line 1", "no reason", "line 2"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ReadSkips = %v, want an error with %q", err, want)
		}
	}
	text, err := os.ReadFile("skip-vm.txt")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSkips(string(text)); err != nil {
		t.Error(err)
	}
}
