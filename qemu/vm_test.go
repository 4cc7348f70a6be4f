package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/digitalocean/go-qemu/qmp/raw"
)

const testUID = 61234

// guestMachine is the guest of make guest under TCG.
func guestMachine(t *testing.T) Machine {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest under TCG as root: run by make test")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root for namespaces and the VM's own user")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64 in PATH")
	}
	dir := os.Getenv("VMRUNTIME_GUEST")
	if dir == "" {
		dir = filepath.Join("..", "out", "guest")
	}
	var man struct{ Kernel, Initramfs, Cmdline string }
	data, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err != nil {
		t.Skipf("needs the guest's kernel and initramfs (make guest): %v", err)
	}
	if err := json.Unmarshal(data, &man); err != nil {
		t.Fatal(err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		t.Fatal(err)
	}
	return Machine{
		Name: "vmruntime-test", Arch: ArchX86, Accel: AccelTCG, VCPUs: 2, Kernel: filepath.Join(dir, man.Kernel),
		Initrd: filepath.Join(dir, man.Initramfs), Cmdline: man.Cmdline, HotplugPorts: 2,
	}
}

// runDir is short enough for sockets whatever the test's name.
func runDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qemu-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func launcher() []string { return []string{"/proc/self/exe", "launch"} }

func spec(t *testing.T, m Machine) Spec {
	t.Helper()
	return Spec{Machine: m, Binary: "qemu-system-x86_64", Launcher: launcher(), RunDir: runDir(t), UID: testUID, GID: testUID}
}

// start runs a machine that is killed at the end of the test, and holds that nothing is left then.
func start(t *testing.T, s Spec) *VM {
	t.Helper()
	before := descriptors(t)
	v, err := Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := KillRecorded(ctx, v.Record()); err != nil {
			t.Error(err)
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
		if after := descriptors(t); after > before {
			t.Errorf("%d descriptors before, %d after", before, after)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", v.Record().PID)); err == nil {
			t.Errorf("process %d is left", v.Record().PID)
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil || strings.Contains(string(mounts), s.RunDir) {
			t.Errorf("mounts are left: %v\n%s", err, mounts)
		}
	})
	return v
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// within waits for a condition.
func within(t *testing.T, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", d, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestStartConfines(t *testing.T) {
	s := spec(t, guestMachine(t))
	var placed int
	s.Place = func(pid int) error {
		placed = pid
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err == nil && strings.Contains(exe, "qemu-system") {
			return fmt.Errorf("QEMU runs before it is placed")
		}
		return err
	}
	begin := time.Now()
	v := start(t, s)
	t.Logf("started in %s", time.Since(begin))
	pid := v.Record().PID
	if placed != pid {
		t.Errorf("placed %d, want %d", placed, pid)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	none := "0000000000000000"
	for _, want := range []string{
		"Uid:\t61234\t61234\t61234\t61234", "Gid:\t61234\t61234\t61234\t61234", "Groups:\t \n", "NoNewPrivs:\t1", "Seccomp:\t2",
		"CapInh:\t" + none, "CapPrm:\t" + none, "CapEff:\t" + none, "CapBnd:\t" + none, "CapAmb:\t" + none,
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("status lacks %q:\n%s", want, status)
		}
	}
	for _, ns := range []string{"mnt", "net", "ipc"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		its, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err1 != nil || err2 != nil || ours == its {
			t.Errorf("namespace %s: ours %s, its %s, %v, %v", ns, ours, its, err1, err2)
		}
	}
	root := fmt.Sprintf("/proc/%d/root", pid)
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.Contains(" boot dev etc lib lib32 lib64 libx32 usr ", " "+e.Name()+" ") {
			t.Errorf("root shows %s", e.Name())
		}
	}
	for _, file := range []string{"x", "usr/lib/x", "usr/share/qemu/x", "dev/x"} {
		if err := os.WriteFile(filepath.Join(root, file), nil, 0o600); err == nil {
			t.Errorf("could write %s", file)
		}
	}
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || strings.Fields(string(stat))[5] != fmt.Sprint(pid) {
		t.Errorf("no session of its own: %s, %v", stat, err)
	}
	if _, err := raw.NewMonitor(v.Monitor()).QueryVersion(); err != nil {
		t.Errorf("through go-qemu's seam: %v", err)
	}
}

func TestStartFails(t *testing.T) {
	base := spec(t, guestMachine(t))
	for name, tc := range map[string]struct {
		change func(*Spec)
		want   string
	}{
		"no binary":      {func(s *Spec) { s.Binary = "/nonexistent/qemu" }, "find /nonexistent/qemu"},
		"no launcher":    {func(s *Spec) { s.Launcher = nil }, "launcher is empty"},
		"launcher fails": {func(s *Spec) { s.Launcher = append(launcher(), "x") }, `unexpected arguments ["x"]`},
		"place fails":    {func(s *Spec) { s.Place = func(int) error { return errdefs.ErrAborted } }, "place process"},
		"no disk":        {func(s *Spec) { s.Machine.Disks = []Disk{{Serial: "a", Path: "/nonexistent", Format: "raw"}} }, "disk a: /nonexistent does not exist"},
		"disk is a device": {func(s *Spec) {
			s.Machine.Disks = []Disk{{Serial: "a", Path: "/dev/null", Format: "raw", ReadOnly: true}}
		}, "has to be a regular file"},
		"CPU is unknown": {func(s *Spec) { s.Machine.CPUModel = "abacus" }, "unable to find CPU model 'abacus'"},
		"not qcow2": {func(s *Spec) {
			s.Machine.Disks = []Disk{{Serial: "a", Path: s.Machine.Kernel, Format: "qcow2", ReadOnly: true}}
		}, "not in qcow2 format"},
		"KVM, unknown CPU": {func(s *Spec) { s.Machine.Accel = AccelKVM; s.Machine.CPUModel = "abacus" }, "ended"},
		"kernel is none":   {func(s *Spec) { s.Machine.Kernel = "/etc/passwd" }, "QEMU ended"},
	} {
		t.Run(name, func(t *testing.T) {
			s := base
			s.Machine.Disks = nil
			tc.change(&s)
			before := descriptors(t)
			v, err := Start(t.Context(), s)
			if err == nil {
				t.Fatal(v.Kill(t.Context()), v.Close(), "it started")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if after := descriptors(t); after != before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
			if left := processesOf(t, testUID); len(left) > 0 {
				t.Errorf("processes are left: %v", left)
			}
		})
	}
}

// processesOf lists the processes of a user.
func processesOf(t *testing.T, uid uint32) (pids []string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		if info, err := os.Stat(dir); err == nil && info.Sys().(*syscall.Stat_t).Uid == uid {
			pids = append(pids, filepath.Base(dir))
		}
	}
	return pids
}

func TestKilledQEMUIsNoticed(t *testing.T) {
	v := start(t, spec(t, guestMachine(t)))
	begin := time.Now()
	if err := KillRecorded(t.Context(), v.Record()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-v.Done():
	case <-time.After(time.Second):
		t.Fatal("Done is not closed within a second")
	}
	t.Logf("noticed after %s: %v", time.Since(begin), v.Err())
	if !errdefs.IsUnavailable(v.Err()) {
		t.Errorf("error is %v", v.Err())
	}
	if err := v.Monitor().Execute(t.Context(), "query-status", nil, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("a command after the end: %v", err)
	}
	if _, err := Attach(t.Context(), v.Record()); !errdefs.IsNotFound(err) {
		t.Errorf("attach after the end: %v", err)
	}
	if err := v.Kill(t.Context()); err != nil {
		t.Errorf("kill after the end: %v", err)
	}
}

func TestAttach(t *testing.T) {
	v := start(t, spec(t, guestMachine(t)))
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	r := v.Record()
	r.StartTime++
	if _, err := Attach(t.Context(), r); !errdefs.IsNotFound(err) {
		t.Errorf("another start time: %v", err)
	}
	for range 3 {
		v, err := Attach(t.Context(), v.Record())
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Monitor().Execute(t.Context(), "query-status", nil, nil); err != nil {
			t.Error(err)
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	}
	again, err := Attach(t.Context(), v.Record())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Quit(t.Context()); err != nil {
		t.Error(err)
	}
	if err := again.Err(); err != nil {
		t.Errorf("after Quit: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

func TestLauncherWithoutJob(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil { // as when the daemon dies between fork and the job
		t.Fatal(err)
	}
	cmd := exec.Command(launcher()[0], launcher()[1:]...)
	cmd.ExtraFiles = []*os.File{r}
	out, err := cmd.CombinedOutput()
	if closeErr := r.Close(); closeErr != nil {
		t.Error(closeErr)
	}
	if cmd.ProcessState.ExitCode() != launchFailed || !strings.Contains(string(out), "no job came") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestVersion(t *testing.T) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64 in PATH")
	}
	v, err := Version(t.Context(), "qemu-system-x86_64")
	if major, _, ok := strings.Cut(v, "."); err != nil || !ok || major < "7" && len(major) < 2 {
		t.Errorf("version %q, %v", v, err)
	}
	if _, err := Version(t.Context(), "true"); err == nil || !strings.Contains(err.Error(), "has to be QEMU") {
		t.Errorf("another program: %v", err)
	}
	if _, err := Version(t.Context(), "/nonexistent"); !errdefs.IsNotFound(err) {
		t.Errorf("no program: %v", err)
	}
}
