package script

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/runtime"
)

// serial runs scripts one after the other: they share the node.
type serial struct{ *testing.T }

func (serial) Parallel() {}

func (s serial) Run(name string, f func(testscript.T)) {
	s.T.Run(name, func(t *testing.T) { f(serial{t}) })
}

func (s serial) Verbose() bool { return testing.Verbose() }

type worldKey struct{}

// Each script starts with a daemon that has no pods and has to end with nothing left. Its commands:
//
//	daemon start [-within=DURATION] [SECTION.KEY=VALUE...], daemon stop, daemon kill
//	guest LINE...             the faults of VMs that are started from now on, see faults
//	cni break|remove|repair PLUGIN
//	qemu remove|repair        the program itself
//	containerd stop|start
//	runp POD [NAME=VALUE...]  RunPodSandbox, with annotations of ours; race N POD calls it N times at once
//	create POD NAME STATEMENT...   CreateContainer of what process does; -stdin keeps standard input, -mount=DIR shares DIR,
//	                          -machine is a machine, which does nothing but boot
//	start NAME, stopc NAME GRACE, rmc NAME, stopp POD, rmp POD
//	execs TIMEOUT NAME STATEMENT...
//	status NAME, list, log NAME
//	logged NAME LINE          waits until the log has the line
//	wholelog NAME N           the log is that of the statement lines N
//	message NAME              the status's message
//	stats NAME
//	startwithin SECONDS NAME  StartContainer of a caller that waits no longer
//	reboot POD                takes away what a reboot would: the network namespace, and all of /run
//	until NAME STATE          waits until status prints STATE
//	within DURATION NAME STATE   the same, at most so long
//	event TYPE NAME           waits for an event
//	events POD                all events of a pod and its containers: type, name, the pod's state and those of its containers
//	metric VALUE SAMPLE       waits until vmruntime's sample, or the sum of those whose name and labels begin so, has the value
//	vm POD COMMAND            what fakeQEMU.command does, or: kill
//	untap POD                 takes away the tap of the pod's network
//	helpers POD NAME...       waits until these programs, and no others, run in the pod's cgroup beside QEMU
//	endhelper POD NAME        kills one
//	trace POD                 what a removed pod's VM was asked, normalised
//	count POD N TEXT          waits until the text is N times in that
//	limit MIB                 the memory limit of pods that are made from now on, 0 for none
//	template ready [N]        waits until the daemon that runs has so many templates
//	template unmade           waits until it could not make one
//	template damage|cut|remove|count FILE   does so to the template's memory, state or manifest.json, or prints how many there are
//	template waits [N]        waits until guests have begun to wait for their pods so many times
//	begins POD template|spare|boot [grown]  how the pod's VM has begun, and that it has the pod's size
//	leaks                     fails if anything of removed pods is left
//
// A command with ! before it has to fail; its error is then in stderr.
func TestScripts(t *testing.T) {
	if noBed != "" {
		t.Skip(noBed)
	}
	commands := map[string]func(*testscript.TestScript, bool, []string){}
	for name, f := range scriptCommands() {
		commands[name] = func(ts *testscript.TestScript, neg bool, args []string) {
			w := ts.Value(worldKey{}).(*world)
			out, err := f(w, args)
			fmt.Fprint(ts.Stdout(), out)
			if err != nil {
				fmt.Fprint(ts.Stderr(), sentence(err))
			}
			switch {
			case err != nil && !neg:
				ts.Fatalf("%s %s: %s", name, strings.Join(args, " "), sentence(err))
			case err == nil && neg:
				ts.Fatalf("%s %s succeeds, and should not", name, strings.Join(args, " "))
			}
		}
	}
	testscript.RunT(serial{t}, testscript.Params{
		Dir: "testdata", Cmds: commands, UpdateScripts: *update, RequireUniqueNames: true,
		Condition: func(name string) (bool, error) {
			if name != "virtiofsd" {
				return false, fmt.Errorf("no condition %q", name)
			}
			_, err := runtime.Default().QEMU.FindVirtiofsd()
			return err == nil, nil
		},
		Setup: func(e *testscript.Env) error { return setup(t, e) },
	})
}

func setup(t *testing.T, e *testscript.Env) error {
	w := newWorld(theBed, filepath.Join(e.WorkDir, "logs"))
	e.Values[worldKey{}] = w
	if err := w.repair(); err != nil {
		return err
	}
	from := fileSize(w.bed.LogFile("vmruntime"))
	tt := e.T().(serial).T
	e.Defer(func() {
		if err := w.close(); err != nil {
			tt.Error(err)
		}
		if err := w.repair(); err != nil {
			t.Error(err)
		}
		if tt.Failed() {
			tt.Logf("vmruntime's log:\n%s", logFrom(w.bed.LogFile("vmruntime"), from))
		}
	})
	return w.startDaemon(nil)
}

// repair undoes what scripts break.
func (w *world) repair() error {
	if _, err := os.Stat(w.bed.qemu() + ".away"); err == nil {
		if err := os.Rename(w.bed.qemu()+".away", w.bed.qemu()); err != nil {
			return err
		}
	}
	if err := w.bed.linkPlugins(); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(w.bed.guestDir(), "kernel"), nil, 0o644)
}

func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// logFrom is what a log got since it had the size, without the lines of each CRI call.
func logFrom(path string, size int64) string {
	data, err := os.ReadFile(path)
	if err != nil || int64(len(data)) < size {
		return fmt.Sprint(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(data[size:])) {
		if !strings.Contains(line, "level=DEBUG") {
			out.WriteString(line)
		}
	}
	return out.String()
}

type command func(*world, []string) (string, error)

func scriptCommands() map[string]command {
	return map[string]command{
		"daemon": daemonCommand, "guest": guestCommand, "cni": cniCommand, "qemu": qemuCommand, "containerd": containerdCommand,
		"runp":  least(1, func(w *world, a []string) (string, error) { return "", w.run(a[0], a[1:]...) }),
		"limit": least(1, limitCommand),
		"race":  least(2, raceCommand), "create": least(2, createCommand),
		"start": least(1, func(w *world, a []string) (string, error) { return "", w.start(a[0]) }),
		"stopc": least(2, func(w *world, a []string) (string, error) {
			grace, err := strconv.ParseInt(a[1], 10, 64)
			if err != nil {
				return "", err
			}
			return "", w.stop(a[0], grace)
		}),
		"rmc":    least(1, func(w *world, a []string) (string, error) { return "", w.removeContainer(a[0]) }),
		"stopp":  least(1, func(w *world, a []string) (string, error) { return "", w.stopPod(a[0]) }),
		"rmp":    least(1, func(w *world, a []string) (string, error) { return "", w.removePod(a[0]) }),
		"execs":  least(3, execCommand),
		"status": least(1, func(w *world, a []string) (string, error) { return lineOf(w.containerLine(a[0])) }),
		"list":   func(w *world, _ []string) (string, error) { return w.list() },
		"log":    least(1, func(w *world, a []string) (string, error) { return w.logText(a[0]) }),
		"until": least(2, func(w *world, a []string) (string, error) {
			return "", w.untilState(a[0], strings.Join(a[1:], " "), waitTimeout)
		}),
		"within": least(3, withinCommand), "event": least(2, eventCommand),
		"vm": least(2, vmCommand), "trace": least(1, traceCommand), "count": least(3, countCommand),
		"message": least(1, messageCommand), "toldend": least(2, toldEndCommand), "stats": least(1, statsCommand), "startwithin": least(2, startWithinCommand),
		"reboot": least(1, rebootCommand), "untap": least(1, untapCommand), "helpers": least(1, helpersCommand), "endhelper": least(2, endHelperCommand),
		"events": least(1, eventsCommand), "metric": least(2, metricCommand),
		"template": least(1, templateCommand), "begins": least(2, beginsCommand),
		"logged": least(2, loggedCommand), "leaks": leaksCommand, "wholelog": least(2, wholeLogCommand),
	}
}

// least refuses a command with too few arguments.
func least(n int, c command) command {
	return func(w *world, args []string) (string, error) {
		if len(args) < n {
			return "", fmt.Errorf("%d arguments, at least %d are needed", len(args), n)
		}
		return c(w, args)
	}
}

func lineOf(s string, err error) (string, error) { return s + "\n", err }

func daemonCommand(w *world, args []string) (string, error) {
	if len(args) == 0 {
		return "", fmt.Errorf("daemon what?")
	}
	switch args[0] {
	case "start":
		changes := make(map[string]map[string]any)
		limit := callTimeout
		for _, a := range args[1:] {
			if within, ok := strings.CutPrefix(a, "-within="); ok {
				var err error
				if limit, err = time.ParseDuration(within); err != nil {
					return "", err
				}
				continue
			}
			key, value, _ := strings.Cut(a, "=")
			section, name, _ := strings.Cut(key, ".")
			if changes[section] == nil {
				changes[section] = make(map[string]any)
			}
			changes[section][name] = value
			if n, err := strconv.Atoi(value); err == nil {
				changes[section][name] = n
			} else if b, err := strconv.ParseBool(value); err == nil {
				changes[section][name] = b
			}
		}
		begin := time.Now()
		if err := w.startDaemon(changes); err != nil {
			return "", err
		}
		if took := time.Since(begin); took > limit {
			return "", fmt.Errorf("the daemon was ready after %s, it has to be within %s", took, limit)
		}
		return "", nil
	case "stop":
		if err := w.disconnect(); err != nil {
			return "", err
		}
		return "", w.bed.StopVMRuntime()
	case "kill":
		if err := w.bed.KillVMRuntime(); err != nil {
			return "", err
		}
		return "", w.disconnect()
	}
	return "", fmt.Errorf("daemon %s: no such command", args[0])
}

// guestCommand replaces the file in whole: VMs that run have the old one.
func guestCommand(w *world, args []string) (string, error) {
	path := filepath.Join(w.bed.guestDir(), "kernel")
	if err := os.WriteFile(path+".new", []byte(strings.Join(args, "\n")), 0o644); err != nil {
		return "", err
	}
	return "", os.Rename(path+".new", path)
}

func cniCommand(w *world, args []string) (string, error) {
	if len(args) != 2 {
		return "", fmt.Errorf("cni break|remove|repair PLUGIN")
	}
	if err := w.bed.linkPlugins(); err != nil || args[0] == "repair" {
		return "", err
	}
	path := filepath.Join(w.bed.cniDir(), args[1])
	if err := os.Remove(path); err != nil || args[0] == "remove" {
		return "", err
	}
	// As a plugin fails: a JSON error on stdout and a status; what it deletes it deletes.
	text := "#!/bin/sh\n[ \"$CNI_COMMAND\" = ADD ] || exit 0\necho '{\"cniVersion\":\"1.0.0\",\"code\":100,\"msg\":\"broken by the test\"}'\nexit 1\n"
	return "", os.WriteFile(path, []byte(text), 0o755)
}

func qemuCommand(w *world, args []string) (string, error) {
	if len(args) != 1 || args[0] != "remove" {
		return "", w.repair()
	}
	return "", os.Rename(w.bed.qemu(), w.bed.qemu()+".away")
}

func containerdCommand(w *world, args []string) (string, error) {
	ctx, cancel := call()
	defer cancel()
	if len(args) == 1 && args[0] == "stop" {
		return "", w.bed.StopContainerd()
	}
	return "", w.bed.StartContainerd(ctx)
}

// raceCommand prints how many of the calls made a sandbox; the others have to say why not.
func raceCommand(w *world, args []string) (string, error) {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return "", err
	}
	results := make([]error, n)
	var calls sync.WaitGroup
	for i := range n {
		calls.Go(func() { results[i] = w.run(args[1]) })
	}
	calls.Wait()
	made, refused := 0, make(map[string]bool)
	for _, err := range results {
		if err == nil {
			made++
		} else {
			refused[regexp.MustCompile(`[0-9a-f]{64}`).ReplaceAllString(sentence(err), "ID")] = true
		}
	}
	out := fmt.Sprintf("made %d\n", made)
	for line := range refused {
		out += line
	}
	return out, nil
}

func createCommand(w *world, args []string) (string, error) {
	var script []string
	var changes []func(*runtimeapi.ContainerConfig)
	for _, a := range args[2:] {
		switch dir, mount := strings.CutPrefix(a, "-mount="); {
		case a == "-machine":
			changes = append(changes, machine)
		case a == "-stdin":
			changes = append(changes, func(c *runtimeapi.ContainerConfig) { c.Stdin = true })
		case mount:
			changes = append(changes, func(c *runtimeapi.ContainerConfig) {
				c.Mounts = append(c.Mounts, &runtimeapi.Mount{HostPath: dir, ContainerPath: "/mnt"})
			})
		default:
			script = append(script, a)
		}
	}
	return "", w.create(args[0], args[1], script, changes...)
}

func execCommand(w *world, args []string) (string, error) {
	timeout, err := strconv.ParseInt(args[0], 10, 64)
	if err != nil {
		return "", err
	}
	resp, err := w.exec(args[1], timeout, args[2:])
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s%sexit %d\n", resp.GetStdout(), resp.GetStderr(), resp.GetExitCode()), nil
}

func (w *world) untilState(name, want string, limit time.Duration) error {
	begin, last := time.Now(), ""
	var err error
	if !w.until(func() bool {
		last, err = w.containerLine(name)
		return err == nil && last == want || time.Since(begin) > limit
	}) || last != want {
		return fmt.Errorf("container %s is %q (%w) after %s; it has to become %q within %s", name, last, err, time.Since(begin), want, limit)
	}
	return nil
}

func withinCommand(w *world, args []string) (string, error) {
	limit, err := time.ParseDuration(args[0])
	if err != nil {
		return "", err
	}
	return "", w.untilState(args[1], strings.Join(args[2:], " "), limit)
}

func eventCommand(w *world, args []string) (string, error) {
	var id string
	if c, err := w.ctr(args[1]); err == nil {
		id = c.id
	} else if p, err := w.pod(args[1]); err == nil {
		id = p.id
	} else {
		return "", err
	}
	if !w.until(func() bool { return w.hasEvent(args[0], id) }) {
		return "", fmt.Errorf("no event %s of %s came", args[0], args[1])
	}
	return "", nil
}

func vmCommand(w *world, args []string) (string, error) {
	p, err := w.pod(args[0])
	if err != nil {
		return "", err
	}
	var b *boot
	if !w.until(func() bool { b = w.bed.control.latest(p.id); return b != nil }) {
		return "", fmt.Errorf("pod %s has no QEMU", args[0])
	}
	if args[1] == "kill" {
		return "", syscall.Kill(b.pid, syscall.SIGKILL)
	}
	_, err = b.conn.Write([]byte(strings.Join(args[1:], " ") + "\n"))
	return "", err
}

func traceCommand(w *world, args []string) (string, error) {
	p, err := w.pod(args[0])
	if err != nil {
		return "", err
	}
	if !w.until(func() bool { return w.bed.control.latest(p.id) == nil }) {
		return "", fmt.Errorf("the QEMU of pod %s still runs", args[0])
	}
	var out strings.Builder
	for _, r := range w.bed.control.reports(p.id) {
		if strings.HasPrefix(r.Text, "RemoveExec ") {
			continue // comes some time after the exec's answer
		}
		if r.Kind == "args" {
			out.WriteString("qemu\n\t" + strings.ReplaceAll(r.Text, "\n", "\n\t") + "\n")
		} else {
			fmt.Fprintf(&out, "%-5s %s\n", r.Kind, r.Text)
		}
	}
	return w.normal(out.String()), nil
}

func countCommand(w *world, args []string) (string, error) {
	p, err := w.pod(args[0])
	if err != nil {
		return "", err
	}
	want, err := strconv.Atoi(args[1])
	if err != nil {
		return "", err
	}
	n, text := 0, strings.Join(args[2:], " ")
	if !w.until(func() bool {
		n = 0
		for _, r := range w.bed.control.reports(p.id) {
			if strings.Contains(r.Kind+" "+r.Text, text) {
				n++
			}
		}
		return n >= want
	}) || n != want {
		return "", fmt.Errorf("%q comes %d times, it has to come %d times", text, n, want)
	}
	return "", nil
}

// normal replaces what differs from run to run.
func (w *world) normal(text string) string {
	for _, p := range w.pods {
		uuid := p.id[0:8] + "-" + p.id[8:12] + "-8" + p.id[13:16] + "-8" + p.id[17:20] + "-" + p.id[20:32]
		text = strings.NewReplacer(uuid, "UUID", p.id, "POD", p.id[:16], "POD").Replace(text)
	}
	for _, c := range w.containers {
		text = strings.ReplaceAll(text, c.id, "CONTAINER-"+c.name)
	}
	for _, r := range []struct{ re, with string }{
		{`\b([0-9a-f]{2}:){5}[0-9a-f]{2}\b`, "MAC"},
		{`10\.88\.\d+\.\d+\b`, "IPV4"},
		{`fd00:88::[1-9a-f][0-9a-f:]*`, "IPV6"},
		{`fe80::[0-9a-f:]+`, "LINKLOCAL"},
	} {
		text = regexp.MustCompile(r.re).ReplaceAllString(text, r.with)
	}
	return text
}

func messageCommand(w *world, args []string) (string, error) {
	c, err := w.ctr(args[0])
	if err != nil {
		return "", err
	}
	ctx, cancel := call()
	defer cancel()
	resp, err := w.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.id})
	return lineOf(resp.GetStatus().GetMessage(), err)
}

// toldEndCommand holds how loudly the daemon says that a pod's guest ended.
func toldEndCommand(w *world, args []string) (string, error) {
	p, err := w.pod(args[0])
	if err != nil {
		return "", err
	}
	return "", w.awaitLog(fmt.Sprintf("level=%s msg=\"the guest ended\" pod=%s", args[1], p.id))
}

func statsCommand(w *world, args []string) (string, error) {
	c, err := w.ctr(args[0])
	if err != nil {
		return "", err
	}
	ctx, cancel := call()
	defer cancel()
	resp, err := w.rt.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: c.id})
	s := resp.GetStats()
	return fmt.Sprintf("memory %d writable %d\n", s.GetMemory().GetWorkingSetBytes().GetValue(), s.GetWritableLayer().GetUsedBytes().GetValue()), err
}

func startWithinCommand(w *world, args []string) (string, error) {
	limit, err := strconv.Atoi(args[0])
	if err != nil {
		return "", err
	}
	c, err := w.ctr(args[1])
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(limit)*time.Second)
	defer cancel()
	_, err = w.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.id})
	return "", err
}

func untapCommand(w *world, args []string) (string, error) {
	p, err := w.pod(args[0])
	if err != nil {
		return "", err
	}
	netns := filepath.Join(w.bed.Root, "run", "s", "netns", p.id)
	out, err := exec.Command("nsenter", "--net="+netns, "--", "ip", "link", "delete", "tap-eth0").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("delete the tap: %w: %s", err, out)
	}
	return "", nil
}

// helpersOf is the programs by their processes.
func (w *world) helpersOf(pod string) (map[int]string, error) {
	p, err := w.pod(pod)
	if err != nil {
		return nil, err
	}
	found := make(map[int]string)
	for proc := range w.processes(p) {
		comm, _ := os.ReadFile(filepath.Join(proc, "comm")) // one that has ended in the meantime reads as nothing
		pid, err := strconv.Atoi(filepath.Base(proc))
		if name := strings.TrimSpace(string(comm)); err == nil && name != "" && !strings.HasPrefix(filepath.Base(w.bed.qemu()), name) {
			found[pid] = name
		}
	}
	return found, nil
}

func helpersCommand(w *world, args []string) (string, error) {
	var names []string
	var err error
	if !w.until(func() bool {
		var found map[int]string
		found, err = w.helpersOf(args[0])
		names = slices.Compact(slices.Sorted(maps.Values(found))) // virtiofsd has a child
		return err != nil || slices.Equal(names, args[1:])
	}) {
		return "", fmt.Errorf("beside QEMU run %q, it has to be %q", names, args[1:])
	}
	return "", err
}

// endHelperCommand returns when it has ended.
func endHelperCommand(w *world, args []string) (string, error) {
	found, err := w.helpersOf(args[0])
	if err != nil {
		return "", err
	}
	for pid, name := range found {
		if name != args[1] {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			return "", err
		}
	}
	if !w.until(func() bool {
		found, err = w.helpersOf(args[0])
		return err != nil || !slices.Contains(slices.Collect(maps.Values(found)), args[1])
	}) {
		return "", fmt.Errorf("%s does not end", args[1])
	}
	return "", err
}

// rebootCommand is for a daemon and a QEMU that are gone.
func rebootCommand(w *world, args []string) (string, error) {
	state := filepath.Join(w.bed.Root, "run", "s")
	entries, err := os.ReadDir(filepath.Join(state, "netns"))
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if err := syscall.Unmount(filepath.Join(state, "netns", e.Name()), syscall.MNT_DETACH); err != nil {
			return "", err
		}
	}
	return "", os.RemoveAll(state)
}

func leaksCommand(w *world, _ []string) (string, error) {
	ctx, cancel := call()
	defer cancel()
	left, err := w.leaks(ctx)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("left on the node:\n  %s", strings.Join(left, "\n  "))
	}
	return "", err
}

func loggedCommand(w *world, args []string) (string, error) {
	text, line := "", strings.Join(args[1:], " ")
	var err error
	if !w.until(func() bool {
		text, err = w.logText(args[0])
		return err == nil && slices.Contains(strings.Split(text, "\n"), line)
	}) {
		return text, fmt.Errorf("the log has no line %q: %w", line, err)
	}
	return "", nil
}

// wholeLogCommand holds that a log has so many lines of the statement lines, each once and in order.
func wholeLogCommand(w *world, args []string) (string, error) {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return "", err
	}
	text, err := w.logText(args[0])
	if err != nil {
		return "", err
	}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i := range min(n, len(lines)) {
		if want := "stdout " + lineText(i); lines[i] != want {
			return "", fmt.Errorf("line %d of %d in the log is %q, it has to be %q", i, len(lines), lines[i], want)
		}
	}
	if len(lines) != n {
		return "", fmt.Errorf("the log has %d lines, it has to have %d; the last is %q", len(lines), n, lines[len(lines)-1])
	}
	return "", nil
}
