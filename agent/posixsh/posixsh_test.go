package posixsh

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/test/tools"
)

// shells are the command lines by which a script is run: as sh -c, and as a login shell does.
func shells(t *testing.T) map[string]func(script string) []string {
	t.Helper()
	all := map[string]func(string) []string{
		"sh": func(s string) []string { return []string{"/bin/sh", "-c", s} },
	}
	debs := ""
	if !testing.Short() {
		// Where apt has none, those that the machine has must do.
		if dir, err := tools.Debs("zsh", "fish", "tcsh", "mksh", "libpcre2-32-0"); err == nil {
			debs = dir
			libs, _ := filepath.Glob(filepath.Join(dir, "usr/lib/*-linux-gnu"))
			t.Setenv("LD_LIBRARY_PATH", strings.Join(libs, ":"))
		}
	}
	for _, shell := range []string{"dash", "bash", "zsh", "fish", "tcsh", "mksh", "busybox"} {
		path, err := exec.LookPath(shell)
		for _, bin := range []string{"bin", "usr/bin"} {
			if err != nil && debs != "" {
				path, err = exec.LookPath(filepath.Join(debs, bin, shell))
			}
		}
		if err != nil {
			continue
		}
		first := []string{path}
		if shell == "busybox" {
			first = append(first, "sh")
			all["busybox itself"] = func(s string) []string { return []string{path, "sh", "-c", s} }
		}
		all["login shell "+shell] = func(s string) []string { return append(slices.Clone(first), "-c", LoginShell(s)) }
	}
	return all
}

func everyByte() string {
	var b strings.Builder
	for c := 1; c < 256; c++ {
		b.WriteByte(byte(c))
	}
	return b.String()
}

func TestCommandIsExact(t *testing.T) {
	args := []string{
		"", " ", "a b", "'", "''", `"`, `\`, `\\`, `a\'b`, "!", "!!x", "$HOME", "`id`", "$(id)", "*", "~", "#x", "-n", "--", ";&|<>(){}[]",
		"\n", "\n\n", "a\n", "\ttab", "ü", "日本語", "\xff", "\x81\x88\xfe", "a\xffb\n'\\!", everyByte(), "%s", "{a,b}", "^a", "_vmruntime_nl",
	}
	line, err := Command(append([]string{"printf", `%s\0`}, args...), nil)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(line, "\n") {
		t.Error("the line has a newline")
	}
	for name, argv := range shells(t) {
		t.Run(name, func(t *testing.T) {
			a := argv(line)
			out, err := exec.Command(a[0], a[1:]...).Output()
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
			if !slices.Equal(got, args) {
				for i := range min(len(got), len(args)) {
					if got[i] != args[i] {
						t.Errorf("argument %d is %q, want %q", i, got[i], args[i])
					}
				}
				t.Errorf("%d arguments, want %d", len(got), len(args))
			}
		})
	}
}

func TestCommandEnvironment(t *testing.T) {
	line, err := Command([]string{"env"}, []string{"A=it's\na=b", "x.y-z=1", "HOME=/h"})
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("/bin/sh", "-c", line).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"A=it's\na=b\n", "\nx.y-z=1\n", "\nHOME=/h\n", "\nPATH="} {
		if !strings.Contains("\n"+string(out), want) {
			t.Errorf("the environment lacks %q:\n%s", want, out)
		}
	}
}

func TestCommandExitStatus(t *testing.T) {
	dir := t.TempDir()
	odd := dir + "/a=b"
	if err := os.WriteFile(odd, []byte("#!/bin/sh\nexit 7\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	plain := dir + "/plain"
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want int
	}{
		{[]string{"no-such-program"}, 127},
		{[]string{plain}, 126},
		{[]string{odd}, 7},
		{[]string{"sh", "-c", "exit 3"}, 3},
	} {
		for _, env := range [][]string{nil, {"A=b"}} {
			line, err := Command(test.args, env)
			if err != nil {
				t.Fatal(err)
			}
			err = exec.Command("/bin/sh", "-c", line).Run()
			var ee *exec.ExitError
			if !errors.As(err, &ee) || ee.ExitCode() != test.want {
				t.Errorf("%q with environment %q: %v, want exit status %d", test.args, env, err, test.want)
			}
		}
	}
}

func TestCommandRefuses(t *testing.T) {
	for _, test := range []struct{ args, env []string }{
		{nil, nil},
		{[]string{""}, nil},
		{[]string{"a\x00"}, nil},
		{[]string{"a"}, []string{"B"}},
		{[]string{"a"}, []string{"=x"}},
		{[]string{"a"}, []string{"-i=x"}},
		{[]string{"a"}, []string{"B=\x00"}},
	} {
		if line, err := Command(test.args, test.env); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Command(%q, %q) = %q, %v", test.args, test.env, line, err)
		}
	}
}

func TestKillSession(t *testing.T) {
	interpreters := [][]string{{"/bin/sh"}}
	if path, err := exec.LookPath("busybox"); err == nil {
		interpreters = append(interpreters, []string{path, "sh"})
	}
	for _, sh := range interpreters {
		t.Run(strings.Join(sh, " "), func(t *testing.T) { killSession(t, sh) })
	}
}

func killSession(t *testing.T, sh []string) {
	// A session with a child, a grandchild in another process group and one with an odd name.
	dir := t.TempDir()
	odd := dir + "/a) b 1 2"
	if err := os.Symlink("/bin/sleep", odd); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/bash", "-c", fmt.Sprintf("set -m; sleep 600 & '%s' 600 & (sleep 600; true) & wait", odd))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Skipf("needs bash for a session with several process groups: %v", err)
	}
	other := exec.Command("sleep", "600")
	other.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	for len(inSession(cmd.Process.Pid)) < 5 {
		if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
			t.Fatal(err)
		}
	}
	args := append(sh[1:len(sh):len(sh)], "-c", KillSession+fmt.Sprintf("; kill_session %d", cmd.Process.Pid))
	if out, err := exec.Command(sh[0], args...).CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("kill_session: %v, %s", err, out)
	}
	if left := inSession(cmd.Process.Pid); len(left) > 0 {
		t.Errorf("processes %v of the session are left", left)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the leader ended by itself")
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("a process of another session has been killed: %v", err)
	}
}

// inSession lists the living processes of a session.
func inSession(sid int) []int {
	entries, _ := os.ReadDir("/proc")
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if got, err := unix.Getsid(pid); err != nil || got != sid {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err == nil && !strings.HasPrefix(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " Z") {
			pids = append(pids, pid)
		}
	}
	return pids
}
