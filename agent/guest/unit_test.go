package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// Many processes that end at once, before and after they are watched, are each reported once with their
// own status.
func TestReaper(t *testing.T) {
	r := newReaper()
	defer r.close()
	var work sync.WaitGroup
	for i := range 60 {
		work.Go(func() {
			ended := make(chan exit, 2)
			pid, err := r.start([]string{"/bin/sh", "-c", fmt.Sprintf("exit %d", i)}, nil, nil, func(e exit) { ended <- e })
			if err != nil {
				t.Error(err)
				return
			}
			select {
			case e := <-ended:
				if e.code() != i {
					t.Errorf("process %d ended with %d, want %d", pid, e.code(), i)
				}
			case <-time.After(20 * time.Second):
				t.Errorf("the end of process %d was not reported", pid)
			}
			if alive, err := r.kill(pid, unix.SIGKILL); alive || err != nil {
				t.Errorf("kill after the end: %v, %v", alive, err)
			}
		})
	}
	work.Wait()
	if len(r.watched) > 0 || len(r.strays) > 0 {
		t.Errorf("left over: %v %v", r.watched, r.strays)
	}
}

func TestReaperRunProgram(t *testing.T) {
	r := newReaper()
	defer r.close()
	if code, err := r.runProgram(t.Context(), []string{"/bin/sh", "-c", "kill -9 $$"}, nil); code != 137 || err != nil {
		t.Errorf("code %d, %v", code, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.runProgram(ctx, []string{"/bin/sleep", "100"}, nil); err == nil {
		t.Error("a program that was to be killed ended well")
	}
	if _, err := r.runProgram(t.Context(), []string{"/no/such/program"}, nil); err == nil {
		t.Error("a missing program ran")
	}
}

func TestCrunError(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	text := "2026-11-23T20:45:01.845000000Z: executable file `x` not found in $PATH: No such file or directory\n"
	if err := os.WriteFile(log, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := crunError(log, 1); got != "executable file `x` not found in $PATH: No such file or directory" {
		t.Errorf("%q", got)
	}
	if got := crunError(log+"none", 126); got != "exit status 126" {
		t.Errorf("%q", got)
	}
}

// What a user namespace lacks becomes an ID that is nobody's in it.
func TestOwner(t *testing.T) {
	s := &Server{}
	if uid, gid := s.owner(7, 8); uid != 7 || gid != 8 {
		t.Errorf("without a user namespace 7:8 is %d:%d", uid, gid)
	}
	s.userns.Store(&userns{users: &agentpb.IDRange{First: 1000, Count: 10}, groups: &agentpb.IDRange{First: 2000, Count: 20}})
	for _, c := range []struct {
		uid, gid         uint32
		wantUID, wantGID int
	}{{0, 0, 1000, 2000}, {9, 19, 1009, 2019}, {10, 20, 1010, 2020}, {1 << 31, 1<<32 - 1, 1010, 2020}} {
		if uid, gid := s.owner(c.uid, c.gid); uid != c.wantUID || gid != c.wantGID {
			t.Errorf("%d:%d is %d:%d in the guest, want %d:%d", c.uid, c.gid, uid, gid, c.wantUID, c.wantGID)
		}
	}
}

func TestExecSpecTakesFromContainer(t *testing.T) {
	of := &specs.Process{
		Env: []string{"A=1"}, Cwd: "/work", User: specs.User{UID: 7, GID: 8}, NoNewPrivileges: true,
		Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}},
	}
	p, err := execSpec([]byte(`{"args":["x"]}`), of)
	if err != nil {
		t.Fatal(err)
	}
	want := *of
	want.Args = []string{"x"}
	if diff := cmp.Diff(&want, p); diff != "" {
		t.Error(diff)
	}
	p, err = execSpec([]byte(`{"args":["x"],"user":{"uid":0,"gid":0},"cwd":"/","env":["B=2"],"capabilities":{}}`), of)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&specs.Process{Args: []string{"x"}, Cwd: "/", Env: []string{"B=2"}, Capabilities: &specs.LinuxCapabilities{}}, p); diff != "" {
		t.Error(diff)
	}
	if _, err := execSpec([]byte(`{}`), of); err == nil {
		t.Error("a process without args was taken")
	}
}

func TestSysctlPath(t *testing.T) {
	for key, want := range map[string]string{
		"net.ipv4.ip_forward":            "net/ipv4/ip_forward",
		"net/ipv4/conf/eth0.1/rp_filter": "net/ipv4/conf/eth0.1/rp_filter",
		"net.ipv4.conf.eth0/1.rp_filter": "net/ipv4/conf/eth0.1/rp_filter",
		"kernel.shm_rmid_forced":         "kernel/shm_rmid_forced",
	} {
		if got := sysctlPath(key); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
}

func TestDiskSerial(t *testing.T) {
	sys := t.TempDir()
	for path, data := range map[string]string{
		"sda/device/vpd_pg80": "\x00\x80\x00\x0aimg-1\x20\x20\x20\x20\x20",
		"vda/serial":          "img-2\n",
		"sr0/size":            "0",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(sys, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sys, path), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for serial, want := range map[string]string{"img-1": "/dev/sda", "img-2": "/dev/vda", "img-3": ""} {
		if got, err := lookupDisk(sys, serial); got != want || err != nil {
			t.Errorf("%s: %q, %v, want %q", serial, got, err, want)
		}
	}
}

func TestPressure(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cpu.pressure")
	text := "some avg10=1.50 avg60=0.25 avg300=0.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.10 total=5\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := readPressure(path)
	if p.Some.Avg10 != 1.5 || p.Some.Avg60 != 0.25 || p.Some.TotalUsec != 1234 || p.Full.Avg300 != 0.1 || p.Full.TotalUsec != 5 {
		t.Errorf("%v", p)
	}
	if p := readPressure(path + "none"); p != nil {
		t.Errorf("%v from no file", p)
	}
}

func TestUsageCountsLinksOnce(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
	var u usageCache
	bytes, inodes := u.measure(dir)
	if bytes < 64<<10 || bytes > 100<<10 || inodes != 2 {
		t.Errorf("%d bytes, %d inodes", bytes, inodes)
	}
	if err := os.Remove(filepath.Join(dir, "a")); err != nil {
		t.Fatal(err)
	}
	if again, _ := u.measure(dir); again != bytes {
		t.Error("measured again at once")
	}
}
