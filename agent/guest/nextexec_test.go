package guest_test

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// watcher is a shell among all processes of the guest, so that they can be looked at without an exec.
type watcher struct {
	t    *testing.T
	c    *agent.Client
	ref  *agentpb.ProcessRef
	seen uint64
}

func watch(t *testing.T, c *agent.Client) *watcher {
	w := &watcher{t: t, c: c, ref: &agentpb.ProcessRef{ContainerId: "watch"}}
	spec := containerSpec("sh")
	caps := append(spec.Process.Capabilities.Bounding, "CAP_SYS_PTRACE") // for files below /proc/PID
	spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	runContainer(t, c, w.ref.ContainerId, spec, func(r *agentpb.CreateContainerRequest) {
		r.PidNamespace, r.Stdin = agentpb.PidNamespace_PID_NAMESPACE_GUEST, true
	})
	t.Cleanup(func() { removeContainer(t, c, w.ref.ContainerId) })
	return w
}

// do runs one line and gives what it prints.
func (w *watcher) do(line string) string {
	w.t.Helper()
	ctx := deadline(w.t, time.Minute)
	if _, err := w.c.WriteStdin(ctx, &agentpb.WriteStdinRequest{Process: w.ref, Data: []byte(line + "\necho .\n")}); err != nil {
		w.t.Fatal(err)
	}
	var out strings.Builder
	for out.String() != ".\n" && !strings.HasSuffix(out.String(), "\n.\n") {
		resp, err := w.c.ReadOutput(ctx, &agentpb.ReadOutputRequest{Process: w.ref, StdoutOffset: w.seen, StdoutAcknowledged: w.seen})
		if err != nil || resp.Eof {
			w.t.Fatalf("%s: %v, %v", line, resp, err)
		}
		for _, chunk := range resp.Chunks {
			out.Write(chunk.Data)
			w.seen += uint64(len(chunk.Data))
		}
	}
	return strings.TrimSuffix(out.String(), ".\n")
}

// waiting gives the PIDs of the cruns that wait for an exec, or run one.
func (w *watcher) waiting() []string {
	w.t.Helper()
	return strings.Fields(w.do(`ps -o pid,args | grep '[e]xec --detach' | while read pid rest; do echo $pid; done`))
}

// next waits until exactly one crun waits for an exec, and gives its PID.
func (w *watcher) next() string {
	w.t.Helper()
	var pids []string
	for ctx := deadline(w.t, time.Minute); ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		if pids = w.waiting(); len(pids) == 1 && strings.Contains(w.do("cat /proc/"+pids[0]+"/wchan; echo"), "pipe_read") {
			return pids[0]
		}
	}
	w.t.Fatalf("cruns %q wait for an exec, want one", pids)
	return ""
}

// used fails unless the crun has ended.
func (w *watcher) used(pid string) {
	w.t.Helper()
	if slices.Contains(w.waiting(), pid) {
		w.t.Errorf("crun %s still waits", pid)
	}
}

func removeExec(t *testing.T, c *agent.Client, ref *agentpb.ProcessRef) {
	t.Helper()
	if _, err := c.RemoveExec(deadline(t, time.Minute), ref); err != nil {
		t.Error(err)
	}
}

// probe prints what a process has been given.
const probe = `id; umask; pwd; env; cut -d' ' -f19 /proc/self/stat; cat /proc/self/cgroup /proc/self/oom_score_adj /proc/self/limits
grep -E 'Cap|NoNewPrivs|Seccomp|Groups|Sig' /proc/self/status; ls -l /proc/self/ns | cut -d'>' -f2
for fd in 0 1 2; do stat -L -c '%F %u %g %a' /proc/self/fd/$fd; done; ls /proc/self/fd; mkdir /tmp/x`

var execCgroup = regexp.MustCompile(`/exec-\d+`)

// testNextExec: the crun that waits for an exec gives the process what one of its own gives, and is in nobody's way.
func testNextExec(t *testing.T, _ *machine, c *agent.Client) {
	w := watch(t, c)
	spec := containerSpec("sleep", "1000")
	spec.Process.User = specs.User{UID: 5, GID: 6, AdditionalGids: []uint32{7, 8}}
	spec.Process.NoNewPrivileges, spec.Process.Cwd = true, "/tmp"
	spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 77, Hard: 78}}
	errno := uint(99)
	spec.Linux.Seccomp = &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &errno}},
	}
	runContainer(t, c, "held", spec, nil)
	defer removeContainer(t, c, "held")

	pid := w.next() // since the execs of earlier tests
	run := func(id string) (string, *agentpb.ProcessRef) {
		p := sh(probe)
		p.User = spec.Process.User
		ref := startExec(t, c, "held", id, p, false)
		stdout, stderr, st := readAll(t, c, ref)
		if st.ExitCode != 1 || !strings.Contains(stderr, "mkdir") {
			t.Errorf("%s: stderr %q, state %v; want mkdir to be refused", id, stderr, st)
		}
		return execCgroup.ReplaceAllString(stdout, "/exec-N"), ref
	}
	got, first := run("waiting")
	w.used(pid)
	want, second := run("own") // nothing has been removed yet, so none waits
	if got != want || !strings.Contains(got, "uid=5 gid=6") || !strings.Contains(got, "Seccomp:\t2") {
		t.Errorf("by the crun that waits:\n%s\nby one of its own:\n%s", got, want)
	}
	removeExec(t, c, first)
	pid = w.next()
	removeExec(t, c, second)
	if now := w.next(); now != pid {
		t.Errorf("crun %s waits, want %s still", now, pid)
	}
	stats, err := c.Stats(deadline(t, time.Minute), &agentpb.StatsRequest{ContainerIds: []string{"held"}})
	if err != nil || stats.Containers[0].Cgroup.ProcessCount != 1 {
		t.Errorf("stats %v, %v; want one process", stats, err)
	}

	// The first container's crun waited too: its process has the usual priority, not that of a crun that gets ready.
	ref := startExec(t, c, "main", "priority", sh("cut -d' ' -f19 /proc/1/stat"), false)
	if stdout, _, _ := readAll(t, c, ref); stdout != "0\n" {
		t.Errorf("priority of a container's process %q, want 0", stdout)
	}
	removeExec(t, c, ref)

	// A terminal, and a program that is not there.
	tty := sh("test -t 0 && test -t 2 && ls -l /proc/self/fd/1")
	tty.Terminal = true
	pid = w.next()
	ref = startExec(t, c, "held", "tty", tty, true)
	if stdout, _, st := readAll(t, c, ref); !strings.HasSuffix(stdout, "-> /dev/pts/0\r\n") || st.ExitCode != 0 {
		t.Errorf("terminal %q, state %v", stdout, st)
	}
	w.used(pid)
	removeExec(t, c, ref)
	for _, terminal := range []bool{false, true} {
		pid = w.next()
		missing := &specs.Process{Args: []string{"no-such-program"}, Terminal: terminal}
		req := &agentpb.ExecRequest{ContainerId: "held", ExecId: "missing", Process: encode(t, missing)}
		if _, err := c.Exec(deadline(t, time.Minute), req); err == nil || !strings.Contains(err.Error(), "no-such-program") {
			t.Errorf("exec of a missing program with terminal %v: %v", terminal, err)
		}
		w.used(pid)
		removeExec(t, c, &agentpb.ProcessRef{ContainerId: "held", ExecId: "missing"})
	}

	// One that has been killed is not waited for.
	pid = w.next()
	w.do(fmt.Sprintf("kill -9 %s; while kill -0 %s 2>/dev/null; do sleep 0.1; done", pid, pid))
	ref = startExec(t, c, "held", "killed", sh("echo here"), false)
	if stdout, _, st := readAll(t, c, ref); stdout != "here\n" || st.ExitCode != 0 {
		t.Errorf("after the crun was killed: stdout %q, state %v", stdout, st)
	}
	removeExec(t, c, ref)
	w.next()

	// Several at once, in several containers.
	var all sync.WaitGroup
	for i := range 6 {
		all.Go(func() {
			container, text := []string{"held", "main"}[i%2], fmt.Sprint("number ", i)
			ref := startExec(t, c, container, fmt.Sprint("many", i), sh("echo "+text), false)
			if stdout, _, st := readAll(t, c, ref); stdout != text+"\n" || st.ExitCode != 0 {
				t.Errorf("stdout %q, state %v, want %q", stdout, st, text)
			}
			removeExec(t, c, ref)
		})
	}
	all.Wait()
	w.next()
	if left := w.do("ls /proc/1/root/run/vm/execs"); len(strings.Fields(left)) != 1 {
		t.Errorf("files of execs %q, want those of the one that waits", left)
	}
}
