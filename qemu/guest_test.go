package qemu

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/u-root/u-root/pkg/cpio"
)

// guest talks to the program of testdata/guest in a machine.
type guest struct {
	*VM
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

// boot starts a machine whose PID 1 is testdata/guest.
func boot(t *testing.T, change func(*Spec)) *guest {
	t.Helper()
	s := spec(t, guestMachine(t))
	s.Machine.Initrd = testInitrd(t, s.Machine.Initrd)
	s.Machine.Cmdline += " rdinit=/test-init"
	if change != nil {
		change(&s)
	}
	begin := time.Now()
	g := &guest{VM: start(t, s), t: t}
	g.dial()
	g.do("disks")
	t.Logf("the guest answers after %s", time.Since(begin))
	return g
}

func testInitrd(t *testing.T, base string) string {
	t.Helper()
	dir := runDir(t)
	program := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-o", program, "./testdata/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	// The kernel unpacks archives one after the other, and compressed ones only at the end.
	var extra bytes.Buffer
	w := cpio.Newc.Writer(&extra)
	if err := w.WriteRecord(cpio.StaticFile("test-init", string(data), 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "initrd")
	if err := os.WriteFile(path, append(extra.Bytes(), initrd...), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func (g *guest) dial() {
	g.t.Helper()
	conn, err := net.Dial("unix", g.AgentSocket())
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = conn.Close() })
	g.conn, g.in = conn, bufio.NewReader(conn)
}

func (g *guest) send(command string) {
	g.t.Helper()
	if _, err := fmt.Fprintln(g.conn, command); err != nil {
		g.t.Fatal(err)
	}
}

// do has the guest do something and returns its answer.
func (g *guest) do(command string) string {
	g.t.Helper()
	g.send(command)
	if err := g.conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		g.t.Fatal(err)
	}
	line, err := g.in.ReadString('\n')
	if err != nil {
		console, _ := g.Console(g.t.Context())
		g.t.Fatalf("%s: %v; console:\n%s", command, err, console)
	}
	answer, err := strconv.Unquote(strings.TrimSpace(line))
	if err != nil {
		g.t.Fatalf("%s: %q: %v", command, line, err)
	}
	return answer
}

func diskFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDisks(t *testing.T) {
	scratch := diskFile(t, "scratch")
	g := boot(t, func(s *Spec) { s.Machine.Disks = []Disk{{Serial: "scratch", Path: scratch, Format: "raw"}} })
	if got := g.do("disks"); got != "scratch=sda,ro=0" {
		t.Fatalf("at boot: %q", got)
	}
	image := Disk{Serial: "image-0123456789-abc", Path: diskFile(t, "image"), Format: "raw", ReadOnly: true}
	before := qemuDescriptors(t, g.VM)
	for round := range 3 {
		begin := time.Now()
		if err := g.AddDisk(t.Context(), image); err != nil {
			t.Fatal(err)
		}
		within(t, 10*time.Second, "the guest sees the disk", func() bool {
			return g.do("disks") == "scratch=sda,ro=0 image-0123456789-abc=sdb,ro=1"
		})
		t.Logf("round %d: seen %s after AddDisk began", round, time.Since(begin))
		if got := g.do("head /dev/sdb"); !strings.HasPrefix(got, "image\x00") {
			t.Errorf("content %q", got)
		}
		if err := g.AddDisk(t.Context(), image); !errdefs.IsAlreadyExists(err) {
			t.Errorf("the same disk again: %v", err)
		}
		// A later daemon sees and removes it.
		v, err := Attach(t.Context(), g.reattachable())
		if err != nil {
			t.Fatal(err)
		}
		g.VM = v
		t.Cleanup(func() { _ = v.Close() })
		if err := g.AddDisk(t.Context(), image); !errdefs.IsAlreadyExists(err) {
			t.Errorf("the same disk after Attach: %v", err)
		}
		if err := g.RemoveDisk(t.Context(), image.Serial); err != nil {
			t.Fatal(err)
		}
		if err := g.RemoveDisk(t.Context(), image.Serial); err != nil {
			t.Errorf("removed twice: %v", err)
		}
		within(t, 10*time.Second, "the guest lets go", func() bool { return g.do("disks") == "scratch=sda,ro=0" })
	}
	if after := qemuDescriptors(t, g.VM); after != before {
		t.Errorf("QEMU has %d descriptors before, %d after", before, after)
	}
	g.do("write /dev/sda changed")
	if err := g.AddDisk(t.Context(), Disk{Serial: "late", Path: scratch, Format: "qcow2"}); err == nil || errdefs.IsAlreadyExists(err) {
		t.Errorf("a raw file as qcow2: %v", err)
	}
	if err := g.AddDisk(t.Context(), Disk{Serial: "Bad!", Path: "x"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad disk: %v", err)
	}
}

// reattachable detaches, as a daemon that ends.
func (g *guest) reattachable() Record {
	if err := g.Close(); err != nil {
		g.t.Fatal(err)
	}
	return g.Record()
}

func qemuDescriptors(t *testing.T, v *VM) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", v.Record().PID))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestGuestEnds(t *testing.T) {
	for name, want := range map[string][]string{
		"panic":    {"guest-reset", "Kernel panic - not syncing: sysrq triggered crash"},
		"poweroff": {"guest-shutdown"},
	} {
		t.Run(name, func(t *testing.T) {
			g := boot(t, nil)
			g.send(name)
			checkGuestEnd(t, g.VM, want)
		})
		t.Run(name+" while the daemon is away", func(t *testing.T) {
			g := boot(t, nil)
			r := g.reattachable()
			g.send(name)
			within(t, 10*time.Second, "the guest has ended", func() bool { return !running(t, r) })
			v, err := Attach(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = v.Close() })
			checkGuestEnd(t, v, want[1:])
		})
	}
}

// running asks over a monitor of its own, as Attach would end the VM.
func running(t *testing.T, r Record) bool {
	t.Helper()
	m, err := dialMonitor(t.Context(), filepath.Join(r.RunDir, qmpSocket), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	var status struct{ Running bool }
	if err := errors.Join(m.Execute(t.Context(), "query-status", nil, &status), m.Disconnect()); err != nil {
		t.Fatal(err)
	}
	return status.Running
}

func checkGuestEnd(t *testing.T, v *VM, want []string) {
	t.Helper()
	begin := time.Now()
	select {
	case <-v.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the VM does not end after its guest")
	}
	t.Logf("done after %s: %v", time.Since(begin), v.Err())
	if !errors.Is(v.Err(), ErrGuestFailed) {
		t.Errorf("error %v is no guest failure", v.Err())
	}
	for _, w := range want {
		if !strings.Contains(v.Err().Error(), w) {
			t.Errorf("error lacks %q: %v", w, v.Err())
		}
	}
}

func TestConsoleFlood(t *testing.T) {
	g := boot(t, nil)
	before := rss(t, g.VM)
	g.do("flood")
	// The guest's terminal still has some of it when the guest answers.
	within(t, 10*time.Second, "the console ends with the last line", func() bool {
		text, err := g.Console(t.Context())
		if err != nil || len(text) > consoleBytes {
			t.Fatalf("%d bytes, %v", len(text), err)
		}
		return strings.HasSuffix(text, "x\r\n")
	})
	if grown := rss(t, g.VM) - before; grown > 16<<20 {
		t.Errorf("QEMU grew by %d bytes", grown)
	}
}

func rss(t *testing.T, v *VM) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", v.Record().PID))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(data))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}
