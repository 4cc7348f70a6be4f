package qemu

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// ShareSpec is what StartShareServer needs.
type ShareSpec struct {
	// Binary is virtiofsd: the Rust one, or the C one that came with QEMU up to 7.2.
	Binary string
	// Launcher as in Spec.
	Launcher []string
	// Dir is shown to the guest. What is mounted below it later is seen too, if Dir lies on a shared mount.
	Dir string
	// RunDir takes the listening socket; for root only. One server to a directory.
	RunDir string
	// Place as in Spec.
	Place func(pid int) error
}

// ShareRecord is what a later daemon needs to find a share server again.
type ShareRecord struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"`
	Socket    string `json:"socket"`
}

// ShareServer is one virtiofsd. It serves one connection, and ends with that. It confines itself: own
// mount, PID and network namespace, the shared directory as its root, few capabilities, a seccomp filter.
type ShareServer struct {
	rec  ShareRecord
	p    *process
	out  *tail // nil if another daemon started it
	done chan struct{}

	owned sync.WaitGroup
	close func() error
}

// StartShareServer runs virtiofsd. It listens when this returns.
func StartShareServer(ctx context.Context, s ShareSpec) (*ShareServer, error) {
	var p problems
	p.rule(filepath.IsAbs(s.Dir), "dir", s.Dir, "an absolute path")
	p.rule(filepath.IsAbs(s.RunDir), "runDir", s.RunDir, "an absolute path")
	p.rule(!strings.ContainsAny(s.Dir, ",\\"), "dir", s.Dir, "without comma and backslash")
	if err := errors.Join(p...); err != nil {
		return nil, err
	}
	binary, err := program(s.Binary)
	if err != nil {
		return nil, err
	}
	args, err := shareArgs(ctx, binary, s.Dir)
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(s.RunDir, shareSocket)
	f, err := listen(socket)
	if err != nil {
		return nil, err
	}
	var in inheritance
	defer in.close()
	args = append(args, "--fd="+strconv.Itoa(in.add(f)))
	proc, out, err := launch(s.Launcher, job{Argv: append([]string{binary}, args...)}, in.files, s.Place)
	if err != nil {
		return nil, err
	}
	return newShareServer(ShareRecord{PID: proc.pid, StartTime: proc.start, Socket: socket}, proc, out), nil
}

var rustRE = regexp.MustCompile(`^virtiofsd (backend )?v?[1-9]`)

// shareArgs asks which virtiofsd it is, for the two take different options.
func shareArgs(ctx context.Context, binary, dir string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w", binary, err)
	}
	return renderShareArgs(string(out), dir)
}

// renderShareArgs renders the options but for the socket. The limit of open files stays the inherited one: raising it takes
// a capability that a daemon may lack.
func renderShareArgs(version, dir string) ([]string, error) {
	switch {
	case rustRE.MatchString(version):
		return []string{
			"--shared-dir=" + dir, "--sandbox=namespace", "--seccomp=kill", "--cache=auto",
			"--announce-submounts", "--rlimit-nofile=0", "--log-level=error",
		}, nil
	case strings.HasPrefix(version, "virtiofsd version "):
		return []string{
			"-f", "-o", "source=" + dir, "-o", "sandbox=namespace", "-o", "cache=auto",
			"-o", "announce_submounts", "-o", "log_level=err", "--rlimit-nofile=0",
		}, nil
	}
	return nil, fmt.Errorf("virtiofsd --version says %.100q; it has to be virtiofsd 1 or newer, or the one of QEMU 7.2: %w", version, errdefs.ErrInvalidArgument)
}

// AttachShareServer finds a server that an earlier daemon started. One that is gone is errdefs.ErrNotFound.
func AttachShareServer(r ShareRecord) (*ShareServer, error) {
	p, err := openProcess(r.PID, r.StartTime)
	if err != nil {
		return nil, err
	}
	return newShareServer(r, p, nil), nil
}

func newShareServer(r ShareRecord, p *process, out *tail) *ShareServer {
	s := &ShareServer{rec: r, p: p, out: out, done: make(chan struct{})}
	s.close = sync.OnceValue(s.release)
	s.owned.Go(func() {
		if p.wait() == nil {
			p.reap()
			close(s.done)
		}
	})
	return s
}

// Socket is the path to give to VM.AddShare.
func (s *ShareServer) Socket() string { return s.rec.Socket }

// Record returns what AttachShareServer needs.
func (s *ShareServer) Record() ShareRecord { return s.rec }

// Done is closed when the server is gone.
func (s *ShareServer) Done() <-chan struct{} { return s.done }

// Stderr is the end of the server's messages; empty after AttachShareServer.
func (s *ShareServer) Stderr() string {
	if s.out == nil {
		return ""
	}
	return s.out.String()
}

// Kill ends the server and its worker and returns when the server is gone. One that is gone is no error.
func (s *ShareServer) Kill(ctx context.Context) error {
	select {
	case <-s.done:
		return nil
	default:
	}
	if err := s.p.killGroup(); err != nil {
		return err
	}
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("virtiofsd, process %d, does not end: %w", s.rec.PID, ctx.Err())
	}
}

// Close detaches: the server goes on. It may be called more than once.
func (s *ShareServer) Close() error { return s.close() }

func (s *ShareServer) release() error {
	errs := []error{s.p.close()}
	if s.out != nil {
		errs = append(errs, s.out.Close())
	}
	s.owned.Wait()
	return errors.Join(errs...)
}
