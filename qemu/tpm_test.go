package qemu

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// startTPM runs a TPM until the end of the test.
func startTPM(t *testing.T, state string) *TPM {
	t.Helper()
	if testing.Short() {
		t.Skip("makes namespaces as root: run by make test")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root for namespaces and the VM's own user")
	}
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("needs swtpm in PATH")
	}
	before := descriptors(t)
	tpm, err := StartTPM(t.Context(), TPMSpec{
		Binary: "swtpm", Launcher: launcher(), StateDir: state, RunDir: runDir(t), UID: testUID, GID: testUID,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := errors.Join(tpm.Kill(ctx), tpm.Close()); err != nil {
			t.Error(err)
		}
		if after := descriptors(t); after > before {
			t.Errorf("%d descriptors before, %d after", before, after)
		}
	})
	return tpm
}

// Commands of the TPM 2.0 Library, part 3.
const (
	getRandom    = "8001" + "0000000c" + "0000017b" + "0008"
	readPCR0     = "8001" + "00000014" + "0000017e" + "00000001" + "000b" + "03010000"
	defineNV     = "8002" + "0000002d" + "0000012a" + "40000001" + "00000009" + "400000090000000000" + "0000" + "000e" + "01500000" + "000b" + "02060006" + "00000008"
	readNVPublic = "8001" + "0000000e" + "00000169" + "01500000"
)

// command sends a command from the guest, and returns the answer without its header of 10 bytes.
func (g *guest) command(command string) string {
	g.t.Helper()
	answer := g.do("tpm " + command)
	if len(answer) < 20 || answer[12:20] != "00000000" {
		g.t.Fatalf("command %s: %q", command, answer)
	}
	return answer[20:]
}

// TestTPM holds that a guest has a TPM 2.0 with what the firmware measured, that its memory outlives it, and that another one
// does not have that.
func TestTPM(t *testing.T) {
	state := filepath.Join(t.TempDir(), "tpm")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, round := range []string{"first", "second"} {
		tpm := startTPM(t, state)
		g := boot(t, func(s *Spec) { s.Machine.TPMSocket = tpm.Socket() })
		if one, two := g.command(getRandom), g.command(getRandom); len(one) != 20 || one == two {
			t.Errorf("random bytes %s and %s", one, two)
		}
		if pcr := g.command(readPCR0); !strings.HasSuffix(pcr[:len(pcr)-64], "0020") || strings.Trim(pcr[len(pcr)-64:], "0") == "" {
			t.Errorf("the firmware measured nothing: %s", pcr)
		}
		if round == "first" {
			if got := g.do("tpm " + readNVPublic); got[12:20] == "00000000" {
				t.Errorf("a new TPM knows what was never defined: %s", got)
			}
			g.command(defineNV)
		}
		g.command(readNVPublic)
		checkTPMProcess(t, tpm)
		other, err := AttachTPM(tpm.Record())
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(other.Close(), g.Quit(t.Context())); err != nil {
			t.Error(err)
		}
		select {
		case <-tpm.Done():
		case <-time.After(5 * time.Second):
			t.Fatalf("swtpm goes on without QEMU: %s", tpm.Stderr())
		}
		if _, err := AttachTPM(tpm.Record()); !errdefs.IsNotFound(err) {
			t.Errorf("attach after the end: %v", err)
		}
	}
}

func checkTPMProcess(t *testing.T, tpm *TPM) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d", tpm.Record().PID)
	status := content(proc + "/status")
	none := "0000000000000000"
	for _, want := range []string{
		"Uid:\t61234\t61234\t61234\t61234", "Gid:\t61234\t61234\t61234\t61234", "Groups:\t \n", "NoNewPrivs:\t1", "Seccomp:\t2",
		"CapInh:\t" + none, "CapPrm:\t" + none, "CapEff:\t" + none, "CapBnd:\t" + none, "CapAmb:\t" + none,
	} {
		if !strings.Contains(status, want) {
			t.Errorf("status lacks %q:\n%s", want, status)
		}
	}
	for _, ns := range []string{"mnt", "net", "ipc"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		its, err2 := os.Readlink(proc + "/ns/" + ns)
		if err1 != nil || err2 != nil || ours == its {
			t.Errorf("namespace %s: ours %s, its %s, %v, %v", ns, ours, its, err1, err2)
		}
	}
	root := proc + "/root"
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.Contains(" dev etc lib lib32 lib64 libx32 state usr ", " "+e.Name()+" ") {
			t.Errorf("root shows %s", e.Name())
		}
	}
	info, err := os.Stat(root + tpmState + "/tpm2-00.permall")
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != testUID || info.Mode().Perm() != 0o600 {
		t.Errorf("the state is user %d's with mode %s", st.Uid, info.Mode())
	}
}

func TestTPMFails(t *testing.T) {
	_, err := StartTPM(t.Context(), TPMSpec{StateDir: "state", RunDir: "run"})
	checkErrors(t, err, []string{`stateDir is "state"`, `runDir is "run"`, "uid is", "gid is"})
	if os.Getuid() != 0 || testing.Short() {
		return // giving a directory away takes root
	}
	s := TPMSpec{Binary: "/nonexistent", Launcher: launcher(), StateDir: t.TempDir(), RunDir: runDir(t), UID: testUID, GID: testUID}
	if _, err := StartTPM(t.Context(), s); !errdefs.IsNotFound(err) {
		t.Errorf("no program: %v", err)
	}
	s.Binary, s.StateDir = "true", "/nonexistent"
	if _, err := StartTPM(t.Context(), s); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no state directory: %v", err)
	}
}

func TestTPMCommandsAreWhole(t *testing.T) {
	for _, command := range []string{getRandom, readPCR0, defineNV, readNVPublic} {
		data, err := hex.DecodeString(command)
		if err != nil || len(data) != int(data[5]) {
			t.Errorf("%s: %v, %d bytes", command, err, len(data))
		}
	}
}
