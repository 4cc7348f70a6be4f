package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func virtiofsd(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("mounts as root: run by make test")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	for _, path := range []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Skip("needs virtiofsd")
	return ""
}

// startShare runs a virtiofsd until the end of the test, and holds that nothing is left of it then.
func startShare(t *testing.T, change func(*ShareSpec)) *ShareServer {
	t.Helper()
	s := ShareSpec{Binary: virtiofsd(t), Launcher: launcher(), RunDir: runDir(t)}
	if change != nil {
		change(&s)
	}
	before := descriptors(t)
	server, err := StartShareServer(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := errors.Join(server.Kill(ctx), server.Close()); err != nil {
			t.Error(err)
		}
		if after := descriptors(t); after > before {
			t.Errorf("%d descriptors before, %d after", before, after)
		}
		within(t, 5*time.Second, "no mount namespace has the tree", func() bool { return len(seeing(t, s.RunDir)) == 0 })
	})
	return server
}

// seeing lists the processes in whose mount namespace a text is found.
func seeing(t *testing.T, text string) (procs []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/task/*/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil && strings.Contains(string(data), text) {
			procs = append(procs, f)
		}
	}
	return procs
}

// view is the share as virtiofsd sees it, in the child that it makes for the connection.
func view(t *testing.T, s *ShareServer) string {
	t.Helper()
	conn, err := net.Dial("unix", s.Socket())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	var root string
	within(t, 5*time.Second, "virtiofsd has made the share its root", func() bool {
		for _, file := range seeing(t, filepath.Dir(s.Socket())) {
			proc := filepath.Dir(file)
			if strings.Contains(content(proc+"/status"), fmt.Sprintf("PPid:\t%d\n", s.Record().PID)) && !strings.Contains(content(file), " "+treeRoot+" ") {
				root = proc + "/root"
				return true
			}
		}
		return false
	})
	return root
}

// volume is a directory on the node with a file system mounted below it. Mounts spread from it if it is shared.
func volume(t *testing.T, shared bool) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("volume", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	propagation := uintptr(unix.MS_PRIVATE)
	if shared {
		propagation = unix.MS_SHARED
	}
	if err := unix.Mount("", dir, "", propagation, ""); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "file"), "node")
	mountBelow(t, dir, "below")
	return dir
}

func mountBelow(t *testing.T, dir, name string) {
	t.Helper()
	target := filepath.Join(dir, name)
	if err := errors.Join(os.Mkdir(target, 0o755), unix.Mount("below", target, "tmpfs", 0, "size=1m")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(target, "file"), name)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// content is what a file has, or nothing.
func content(path string) string {
	data, _ := os.ReadFile(path)
	return string(data)
}

func TestShareTree(t *testing.T) {
	plain, shared := volume(t, false), volume(t, true)
	server := startShare(t, nil)
	for _, m := range []ShareMount{
		{Name: "rw", Source: plain},
		{Name: "ro", Source: plain, ReadOnly: true},
		{Name: "rro", Source: plain, ReadOnly: true, RecursiveReadOnly: true},
		{Name: "file", Source: filepath.Join(plain, "file")},
		{Name: "slave", Source: shared, Slave: true},
		{Name: "private", Source: shared},
	} {
		for range 2 {
			if err := server.Add(m); err != nil {
				t.Fatal(err)
			}
		}
	}
	root := view(t, server)
	for path, readOnly := range map[string]bool{
		"": true, "rw": false, "rw/below": false, "ro": true, "ro/below": false, "rro": true, "rro/below": true, "slave": false,
	} {
		err := os.WriteFile(filepath.Join(root, path, "new"), nil, 0o644)
		if errors.Is(err, unix.EROFS) != readOnly || !readOnly && err != nil {
			t.Errorf("write to %q: %v; read-only should be %t", path, err, readOnly)
		}
	}
	if got := content(filepath.Join(root, "file")); got != "node" {
		t.Errorf("the file has %q", got)
	}
	paths, err := server.Mounts("ro")
	if diff := cmp.Diff([]string{"", "/below"}, paths); err != nil || diff != "" {
		t.Errorf("%v, mounts (-want +got):\n%s", err, diff)
	}
	if mounts := content("/proc/self/mountinfo"); strings.Contains(mounts, "/targets") || strings.Count(mounts, " "+plain+"/below ") != 1 {
		t.Errorf("the node sees the tree:\n%s", mounts)
	}
	lateMounts(t, root, shared)
	removesEntries(t, server, root, plain)
}

// lateMounts holds that what the node mounts and unmounts later is followed where it is to be.
func lateMounts(t *testing.T, root, shared string) {
	t.Helper()
	mountBelow(t, shared, "late")
	if got := content(filepath.Join(root, "slave", "late", "file")); got != "late" {
		t.Errorf("a later mount of the node has %q", got)
	}
	if got := content(filepath.Join(root, "private", "late", "file")); got != "" {
		t.Errorf("a later mount of the node is seen where it should not: %q", got)
	}
	for _, name := range []string{"late", "below"} {
		target := filepath.Join(shared, name)
		if err := unix.Unmount(target, 0); err != nil {
			t.Errorf("%s is busy on the node: %v", name, err)
		}
		if got := content(filepath.Join(root, "slave", name, "file")); got != "" {
			t.Errorf("%s is unmounted on the node, and has %q in the share", name, got)
		}
	}
	// The private copy is still there, and must not keep the node from removing the directory.
	if got := content(filepath.Join(root, "private", "below", "file")); got != "below" {
		t.Errorf("a private copy has %q", got)
	}
	for _, name := range []string{"late", "below"} {
		if err := os.Remove(filepath.Join(shared, name)); err != nil {
			t.Errorf("remove a mount point on the node: %v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(root, "private", "below")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the removed directory in the share: %v", err)
	}
}

// removesEntries holds that entries go one by one, also for a later daemon, and that the node keeps its files.
func removesEntries(t *testing.T, server *ShareServer, root, plain string) {
	t.Helper()
	other, err := AttachShareServer(server.Record())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Close() })
	for range 2 {
		for _, name := range []string{"ro", "file"} {
			if err := other.Remove(name); err != nil {
				t.Error(err)
			}
		}
	}
	if err := other.Add(ShareMount{Name: "again", Source: plain}); err != nil {
		t.Error(err)
	}
	entries, err := os.ReadDir(root)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if diff := cmp.Diff([]string{"again", "private", "rro", "rw", "slave"}, names); err != nil || diff != "" {
		t.Errorf("%v, entries (-want +got):\n%s", err, diff)
	}
	if got := content(filepath.Join(root, "rw", "below", "file")) + content(filepath.Join(plain, "file")); got != "belownode" {
		t.Errorf("others after the removal: %q", got)
	}
	for _, name := range []string{"", ".", "..", "a/b", "/a"} {
		if err := errors.Join(other.Add(ShareMount{Name: name, Source: plain}), other.Remove(name)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if err := other.Add(ShareMount{Name: "x", Source: "/nonexistent"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no source: %v", err)
	}
	record := server.Record()
	record.Tree++
	impostor := &ShareServer{rec: record}
	if err := impostor.Add(ShareMount{Name: "x", Source: plain}); !errdefs.IsNotFound(err) {
		t.Errorf("another namespace behind the descriptor: %v", err)
	}
	if err := server.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := server.Remove("rw"); err != nil {
		t.Errorf("remove after the end: %v", err)
	}
	if err := server.Add(ShareMount{Name: "x", Source: plain}); !errdefs.IsNotFound(err) {
		t.Errorf("add after the end: %v", err)
	}
}

// TestShareUsers holds that virtiofsd knows the node's IDs by those of the guest, and is nobody on the node.
func TestShareUsers(t *testing.T) {
	server := startShare(t, func(s *ShareSpec) {
		s.Users, s.Groups = IDRange{First: 5000, Count: 100}, IDRange{First: 6000, Count: 200}
	})
	proc := fmt.Sprintf("/proc/%d/", server.Record().PID)
	for file, want := range map[string][]string{
		"uid_map": {"0", "4294967294", "1", "5000", "0", "100"}, "gid_map": {"0", "4294967294", "1", "6000", "0", "200"},
	} {
		if diff := cmp.Diff(want, strings.Fields(content(proc+file))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", file, diff)
		}
	}
	for _, want := range []string{"\nUid:\t4294967294\t", "\nGid:\t4294967294\t"} {
		if status := content(proc + "status"); !strings.Contains(status, want) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}
}

// TestShareIsKept holds that virtiofsd does not come to be when nobody could find it again.
func TestShareIsKept(t *testing.T) {
	s := ShareSpec{Binary: virtiofsd(t), Launcher: launcher(), RunDir: runDir(t)}
	var kept ShareRecord
	s.Keep = func(r ShareRecord) error {
		kept = r
		return errdefs.ErrAborted
	}
	if _, err := StartShareServer(t.Context(), s); !errors.Is(err, errdefs.ErrAborted) {
		t.Fatalf("got %v", err)
	}
	if _, err := AttachShareServer(kept); kept.Tree == 0 || !errdefs.IsNotFound(err) {
		t.Errorf("record %+v: %v", kept, err)
	}
	within(t, 5*time.Second, "the tree is gone", func() bool { return len(seeing(t, s.RunDir)) == 0 })
	s.Keep = func(r ShareRecord) error { kept = r; return nil }
	server := startShare(t, func(spec *ShareSpec) { s.RunDir = spec.RunDir; *spec = s })
	if diff := cmp.Diff(server.Record(), kept); diff != "" {
		t.Errorf("kept (-want +got):\n%s", diff)
	}
}

// TestShareIsPowerless holds that virtiofsd, and whoever takes it over, has no power over the node but over the shared files.
// The probe has left behind even what virtiofsd still has around it: its seccomp filter, the capabilities that it gave up.
func TestShareIsPowerless(t *testing.T) {
	dir := volume(t, false)
	server := startShare(t, nil)
	for _, m := range []ShareMount{{Name: "rw", Source: dir}, {Name: "ro", Source: dir, ReadOnly: true}} {
		if err := server.Add(m); err != nil {
			t.Fatal(err)
		}
	}
	worker := filepath.Dir(view(t, server))
	checkWorker(t, worker)
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		t.Skip("needs nsenter of util-linux")
	}
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", filepath.Join(dir, "probe"), "./testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := exec.Command(nsenter, "--target", filepath.Base(worker), "--user", "--mount", "--net", "--pid", "/rw/probe").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want := map[string]string{
		"make ro writable by mount": "operation not permitted", "make ro writable by mount_setattr": "operation not permitted",
		"make the root writable": "operation not permitted", "unmount ro": "invalid argument", "unmount what is below ro": "invalid argument",
		"bind what is under a mount": "invalid argument", "change the file system's own flags": "operation not permitted",
		"write to ro": "read-only file system", "write to the root": "read-only file system", "mount proc": "operation not permitted",
		"mount sysfs": "operation not permitted", "mount a block device's file system": "operation not permitted",
		"make a block device": "operation not permitted", "make a character device": "operation not permitted",
		"make a user namespace": "no space left on device", "set the node's host name": "operation not permitted",
		"set the node's clock":   "operation not permitted",
		"clear the kernel's log": "operation not permitted", "turn off accounting": "operation not permitted",
	}
	got := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		what, result, _ := strings.Cut(strings.TrimSpace(line), ": ")
		got[what] = result
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("attempts (-want +got):\n%s", diff)
	}
	t.Logf("attempts:\n%s", out)
}

// checkWorker holds what virtiofsd's worker has: all users of the node as themselves in a user namespace of its own, there
// only the capabilities over files, a seccomp filter, and namespaces of its own.
func checkWorker(t *testing.T, proc string) {
	t.Helper()
	if got := strings.Join(strings.Fields(content(proc+"/uid_map")+content(proc+"/gid_map")), " "); got != "0 0 4294967295 0 0 4294967295" {
		t.Errorf("identities %s", got)
	}
	var status map[string]string
	within(t, 5*time.Second, "the worker has its seccomp filter", func() bool {
		status = make(map[string]string)
		for line := range strings.Lines(content(proc + "/status")) {
			name, value, _ := strings.Cut(line, ":")
			status[name] = strings.TrimSpace(value)
		}
		return status["Seccomp"] == "2"
	})
	var caps uint64
	if _, err := fmt.Sscanf(status["CapEff"], "%x", &caps); err != nil {
		t.Fatal(err)
	}
	const allowed = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID | 1<<unix.CAP_SETGID |
		1<<unix.CAP_SETUID | 1<<unix.CAP_MKNOD | 1<<unix.CAP_SETFCAP | 1<<unix.CAP_DAC_READ_SEARCH
	if caps&^allowed != 0 || status["NoNewPrivs"] != "1" {
		t.Errorf("capabilities %s, NoNewPrivs %s", status["CapEff"], status["NoNewPrivs"])
	}
	for _, ns := range []string{"user", "mnt", "net", "pid", "ipc"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		its, err2 := os.Readlink(proc + "/ns/" + ns)
		if err1 != nil || err2 != nil || ours == its {
			t.Errorf("namespace %s: ours %s, its %s, %v, %v", ns, ours, its, err1, err2)
		}
	}
}

func TestShare(t *testing.T) {
	g := boot(t, nil)
	dir, placed := volume(t, true), 0
	server := startShare(t, func(s *ShareSpec) { s.Place = func(pid int) error { placed = pid; return nil } })
	if placed != server.Record().PID {
		t.Errorf("placed %d, want %d", placed, server.Record().PID)
	}
	begin := time.Now()
	share := Share{Tag: "shares", Socket: server.Socket()}
	if err := g.AddShare(t.Context(), share); err != nil {
		t.Fatalf("%v; virtiofsd: %s", err, server.Stderr())
	}
	if err := g.AddShare(t.Context(), share); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the same share again: %v", err)
	}
	within(t, 20*time.Second, "the guest mounts", func() bool { return g.do("mount shares /mnt") == "" })
	t.Logf("mounted %s after AddShare began", time.Since(begin))
	if err := errors.Join(server.Add(ShareMount{Name: "rw", Source: dir, Slave: true}), server.Add(ShareMount{Name: "ro", Source: dir, ReadOnly: true})); err != nil {
		t.Fatal(err)
	}
	if got := g.do("head /mnt/rw/file") + g.do("head /mnt/ro/below/file"); got != "nodebelow" {
		t.Errorf("content %q", got)
	}
	if got := g.do("write /mnt/rw/new text"); got != "" {
		t.Errorf("write: %s", got)
	}
	if got := content(filepath.Join(dir, "new")); got != "text" {
		t.Errorf("written by the guest: %q", got)
	}
	if got := g.do("write /mnt/ro/new text"); !strings.Contains(got, "read-only file system") {
		t.Errorf("write to what is read-only on the node alone: %q", got)
	}
	checkOwners(t, g, dir)
	mountBelow(t, dir, "late")
	within(t, 5*time.Second, "the guest sees the late mount", func() bool { return g.do("head /mnt/rw/late/file") == "late" })
	if err := server.Remove("ro"); err != nil {
		t.Error(err)
	}
	within(t, 5*time.Second, "the guest sees the removal", func() bool { return strings.Contains(g.do("head /mnt/ro/file"), "no such file") })
	if got := g.do("head /mnt/rw/file"); got != "node" {
		t.Errorf("the other entry after the removal: %q", got)
	}
	if err := g.Quit(t.Context()); err != nil {
		t.Error(err)
	}
	select {
	case <-server.Done():
	case <-time.After(5 * time.Second):
		t.Error("virtiofsd goes on without QEMU")
	}
}

// checkOwners holds that the guest's root is root over the files of all users, and its users are the node's.
func checkOwners(t *testing.T, g *guest, dir string) {
	t.Helper()
	private := filepath.Join(dir, "private")
	if err := errors.Join(os.WriteFile(private, []byte("secret"), 0o600), os.Chown(private, 4000000000, 1000)); err != nil {
		t.Fatal(err)
	}
	if got := g.do("head /mnt/rw/private"); got != "secret" {
		t.Errorf("root reads another's file: %q", got)
	}
	for _, file := range []struct {
		do, name string
		uid, gid uint32
		mode     uint32
	}{
		{"own /mnt/rw/owned 1234 4294967294 4755", "owned", 1234, 4294967294, unix.S_IFREG | 0o4755},
		{"as 1234 5678 /mnt/rw/theirs", "theirs", 1234, 5678, unix.S_IFREG | 0o644},
	} {
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		if got := g.do(file.do); got != "" {
			t.Errorf("%s: %s", file.do, got)
		}
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, file.name), &st); err != nil || st.Uid != file.uid || st.Gid != file.gid || st.Mode != file.mode {
			t.Errorf("%s: %d:%d, mode %o on the node, %v", file.do, st.Uid, st.Gid, st.Mode, err)
		}
	}
}
