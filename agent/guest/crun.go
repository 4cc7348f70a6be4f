package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// crunTimeout bounds one run of crun. A call that the host has given up on goes on until then, so that
// nothing is left half made.
const crunTimeout = 2 * time.Minute

// configName is the specification's file in a bundle.
const configName = "config.json"

// crunCall is one command line of crun.
type crunCall struct {
	// log is the path of crun's log, where errors are.
	log     string
	args    []string
	pidFile string
	console string // socket for the terminal
	// states is crun's directory of states, if it is not that of the containers.
	states string
	// last are the arguments behind all options.
	last []string
}

// crun runs crun and waits for it. The files are the standard streams, which run and exec hand to the
// container's process. The error has crun's own text.
func (s *Server) crun(ctx context.Context, c crunCall, files [3]uintptr) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), crunTimeout)
	defer cancel()
	_ = os.Remove(c.log)
	ended := make(chan exit, 1)
	pid, err := s.reaper.start(s.crunArgs(c), files[:], nil, func(e exit) { ended <- e })
	if err != nil {
		return err
	}
	return s.crunEnd(ctx, c, pid, ended)
}

// crunArgs is the command line, the program first.
func (s *Server) crunArgs(c crunCall) []string {
	states := c.states
	setDefault(&states, s.opts.CrunRoot)
	argv := append([]string{fmt.Sprintf("/proc/self/fd/%d", s.crunFile.Fd()), "--cgroup-manager=cgroupfs", "--root", states, "--log", c.log}, c.args...)
	if c.console != "" {
		argv = append(argv, "--console-socket", c.console)
	}
	if c.pidFile != "" {
		argv = append(argv, "--pid-file", c.pidFile)
	}
	return append(argv, c.last...)
}

// crunEnd waits for the end of a crun, which is killed when ctx ends.
func (s *Server) crunEnd(ctx context.Context, c crunCall, pid int, ended chan exit) error {
	code, err := s.reaper.await(ctx, pid, ended)
	if err != nil {
		return fmt.Errorf("crun %s: %w", c.args[0], err)
	}
	if code == 0 {
		return nil
	}
	return fmt.Errorf("crun %s: %s", c.args[0], crunError(c.log, code))
}

// runCall is the command that makes and starts the container whose bundle is dir.
func runCall(dir, id string) crunCall {
	return crunCall{
		log: filepath.Join(dir, "crun.log"), pidFile: filepath.Join(dir, "pid"),
		args: []string{"run", "--detach", "--bundle", dir}, last: []string{id},
	}
}

// crunQuiet is crun for commands without a process of their own.
func (s *Server) crunQuiet(ctx context.Context, c crunCall) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	return s.crun(ctx, c, [3]uintptr{null.Fd(), null.Fd(), null.Fd()})
}

// crunError reads the reasons out of crun's log: lines of "TIME: TEXT", the cause first.
func crunError(log string, code int) string {
	data, err := os.ReadFile(log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Sprintf("exit status %d, and its log: %v", code, err)
	}
	var reasons []string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if stamp, text, ok := strings.Cut(line, "Z: "); ok && strings.Contains(stamp, "T") {
			line = text
		}
		if line != "" {
			reasons = append(reasons, line)
		}
	}
	if len(reasons) == 0 {
		return fmt.Sprintf("exit status %d", code)
	}
	return strings.Join(reasons, "; ")
}

// sealedCopy copies a program into a sealed memory file. crun makes such a copy of itself and executes
// that, at every call, lest a container gets hold of the program and writes to it; called from one already,
// it need not.
func sealedCopy(program string) (*os.File, error) {
	data, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate(filepath.Base(program), unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memory file for %s: %w", program, err)
	}
	f := os.NewFile(uintptr(fd), program)
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	_, err = f.Write(data)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("memory file for %s: %w", program, err)
	}
	return f, nil
}

func readInt(path string) (int64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return n, nil
}
