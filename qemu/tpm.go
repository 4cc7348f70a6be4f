package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// TPMSpec is what StartTPM needs.
type TPMSpec struct {
	// Binary is swtpm; looked for in PATH if it has no slash.
	Binary string
	// Launcher as in Spec.
	Launcher []string
	// StateDir is an existing directory for the TPM's memory, which outlives the process; it becomes the VM's user's.
	StateDir string
	// RunDir takes the listening socket; for root only. One TPM to a directory.
	RunDir string
	// UID and GID are the VM's own, never 0.
	UID, GID uint32
	// Place as in Spec.
	Place func(pid int) error
}

// TPMRecord is what a later daemon needs to find a TPM again.
type TPMRecord struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"`
	Socket    string `json:"socket"`
}

// TPM is one swtpm that emulates a TPM 2.0. It serves one connection, and ends with that. It is confined as QEMU is, and sees
// nothing but its state.
type TPM struct {
	*helper
	rec TPMRecord
}

// tpmState is the state directory as swtpm sees it.
const tpmState = "/state"

// StartTPM runs swtpm. It listens when this returns.
func StartTPM(ctx context.Context, s TPMSpec) (*TPM, error) {
	var p problems
	p.rule(filepath.IsAbs(s.StateDir), "stateDir", s.StateDir, "an absolute path")
	p.rule(filepath.IsAbs(s.RunDir), "runDir", s.RunDir, "an absolute path")
	p.rule(s.UID != 0, "uid", s.UID, "another user than root")
	p.rule(s.GID != 0, "gid", s.GID, "another group than root's")
	if err := errors.Join(append(p, ctx.Err())...); err != nil {
		return nil, err
	}
	binary, err := program(s.Binary)
	if err != nil {
		return nil, err
	}
	if err := s.giveState(); err != nil {
		return nil, fmt.Errorf("give the TPM's state to user %d: %w", s.UID, err)
	}
	root := filepath.Join(s.RunDir, rootDir)
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	record := TPMRecord{Socket: filepath.Join(s.RunDir, tpmSocket)}
	f, err := listen(record.Socket)
	if err != nil {
		return nil, err
	}
	var in inheritance
	defer in.close()
	proc, out, err := launch(s.Launcher, job{
		Argv: append([]string{binary}, tpmArgs(in.add(f))...),
		Confine: &confinement{
			UID: s.UID, GID: s.GID, Root: root,
			Binds: append(programBinds(binary), bind{Source: s.StateDir, Target: tpmState, Writable: true}),
		},
	}, in.files, s.Place)
	if err != nil {
		return nil, err
	}
	record.PID, record.StartTime = proc.pid, proc.start
	return &TPM{newHelper("swtpm", proc, out), record}, nil
}

// tpmArgs renders swtpm's options. It ends when the connection does.
func tpmArgs(listener int) []string {
	return []string{
		"socket", "--tpm2", "--tpmstate", "dir=" + tpmState + ",mode=0600", "--ctrl", fmt.Sprintf("type=unixio,fd=%d", listener),
		"--seccomp", "action=kill", "--terminate",
	}
}

// giveState makes the state the VM's user's. Another user may have had it before.
func (s TPMSpec) giveState() error {
	entries, err := os.ReadDir(s.StateDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Lchown(filepath.Join(s.StateDir, e.Name()), int(s.UID), int(s.GID)); err != nil {
			return err
		}
	}
	return os.Lchown(s.StateDir, int(s.UID), int(s.GID))
}

// AttachTPM finds a TPM that an earlier daemon started. One that is gone is errdefs.ErrNotFound.
func AttachTPM(r TPMRecord) (*TPM, error) {
	p, err := openProcess(r.PID, r.StartTime)
	if err != nil {
		return nil, err
	}
	return &TPM{newHelper("swtpm", p, nil), r}, nil
}

// Socket is the path for Machine.TPMSocket.
func (t *TPM) Socket() string { return t.rec.Socket }

// Record returns what AttachTPM needs.
func (t *TPM) Record() TPMRecord { return t.rec }
