package qemu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// A disk is copied as it is at one moment while its guest runs, and nothing of a copy stays in QEMU.
func TestCopyDisk(t *testing.T) {
	disk := diskFile(t, "before")
	g := boot(t, func(s *Spec) { s.Machine.Disks = []Disk{{Serial: "scratch", Path: disk, Format: "raw"}} })
	before := qemuDescriptors(t, g.VM)
	target := func() *os.File {
		f, err := os.Create(filepath.Join(t.TempDir(), "copy"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		if err := f.Truncate(1 << 20); err != nil {
			t.Fatal(err)
		}
		return f
	}
	for range 2 {
		to := target()
		ready, begun := 0, 0
		if err := g.CopyDisk(t.Context(), "scratch", to, "raw", func() { ready++ }, func() { begun++ }); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(to.Name())
		if err != nil {
			t.Fatal(err)
		}
		if len(data) != 1<<20 || !strings.HasPrefix(string(data), "before\x00") || strings.Trim(string(data[6:]), "\x00") != "" {
			t.Errorf("the copy has %d bytes and begins with %q", len(data), data[:min(len(data), 20)])
		}
		if ready != 1 || begun != 1 {
			t.Errorf("told %d times that it is about to begin and %d times that it has", ready, begun)
		}
	}
	told := 0
	tell := func() { told++ }
	over, cancel := context.WithCancel(t.Context())
	if err := g.CopyDisk(over, "scratch", target(), "raw", func() {}, cancel); !errors.Is(err, context.Canceled) && err != nil {
		t.Errorf("ended as it has begun: %v", err)
	}
	if err := g.CopyDisk(over, "scratch", target(), "raw", func() {}, tell); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that has ended: %v", err)
	}
	if err := g.CopyDisk(t.Context(), "nobody", target(), "raw", func() {}, tell); err == nil || !strings.Contains(err.Error(), "disk-nobody") {
		t.Errorf("an unknown disk: %v", err)
	}
	read, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if err := g.CopyDisk(t.Context(), "scratch", read, "raw", func() {}, tell); err == nil {
		t.Error("a file that is only open for reading was written")
	}
	if told != 3 {
		t.Errorf("told %d times that copies which fail have begun, want 3", told)
	}
	if got := g.do("head /dev/sda"); !strings.HasPrefix(got, "before\x00") {
		t.Errorf("the guest's disk is %q", got)
	}
	if after := qemuDescriptors(t, g.VM); after != before {
		t.Errorf("QEMU has %d descriptors before, %d after", before, after)
	}
	if err := g.SaveState(t.Context(), io.Discard); err != nil {
		t.Errorf("the state is not saved after copies: %v", err)
	}
}

// While a disk is copied, neither it nor any other of the VM is made ready for another copy, which waits for nobody, and what plugs devices
// goes on.
func TestCopyDiskWaits(t *testing.T) {
	target, err := os.Create(filepath.Join(t.TempDir(), "copy"))
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	var stopped atomic.Bool
	copying, finish := make(chan struct{}), make(chan struct{})
	v := &VM{done: make(chan struct{})}
	v.mon = peer(t, nil, func(conn *net.UnixConn, in *bufio.Scanner) {
		for r := nextRequest(in); r.ID != ""; r = nextRequest(in) {
			switch r.Execute {
			case "add-fd":
				answer(conn, r, `{"fdset-id": 1}`)
			case "query-block-jobs", "query-named-block-nodes", "query-fdsets":
				answer(conn, r, "[]")
			case "blockdev-backup":
				answer(conn, r, "{}")
				close(copying)
				<-finish
				fmt.Fprintln(conn, `{"event": "BLOCK_JOB_COMPLETED", "data": {"device": "copy-root"}}`)
			case "stop":
				stopped.Store(true)
				fallthrough
			default:
				answer(conn, r, "{}")
			}
		}
	})
	var ready, begun bool
	done := make(chan error)
	go func() {
		done <- v.CopyDisk(t.Context(), "root", target, "raw", func() {
			ready = true
			if v.plug.TryLock() {
				t.Error("it may wait for its turn when it has been made ready")
			}
		}, func() { begun = true })
	}()
	<-copying
	never := func() { t.Error("a copy that is refused is made ready") }
	if err := v.CopyDisk(t.Context(), "other", target, "raw", never, never); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another copy: %v", err)
	}
	if err := v.SaveState(t.Context(), io.Discard); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("saving the state: %v", err)
	}
	within(t, 10*time.Second, "devices can be plugged while a disk is copied", v.plug.TryLock)
	v.plug.Unlock()
	close(finish)
	if err := <-done; err != nil || !ready || !begun {
		t.Errorf("the copy: %v; made ready %v, begun %v", err, ready, begun)
	}
	if stopped.Load() {
		t.Error("the guest was stopped to save a state that cannot be")
	}
}
