package qemu

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// process is a process that may be another's child, held by a pidfd.
type process struct {
	pid   int
	start uint64 // clock ticks since the node's boot
	fd    *os.File
}

// openProcess finds a process by number and start time; a start of 0 takes what is there. A process that is gone,
// or whose number belongs to another one by now, is errdefs.ErrNotFound.
func openProcess(pid int, start uint64) (*process, error) {
	gone := fmt.Errorf("process %d of start time %d is gone: %w", pid, start, errdefs.ErrNotFound)
	if pid <= 0 {
		return nil, gone
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, gone
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd of process %d: %w", pid, err)
	}
	// Not blocking, so that waiting for it can be ended by closing it.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	p := &process{pid: pid, fd: os.NewFile(uintptr(fd), "pidfd")}
	var state byte
	state, p.start, err = readStat(pid)
	if err != nil || start != 0 && (p.start != start || state == 'Z') {
		return nil, errors.Join(gone, p.fd.Close())
	}
	return p, nil
}

// readStat reads the state and the start time from /proc/PID/stat.
func readStat(pid int) (state byte, start uint64, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The command's name may hold anything, but ends with the last parenthesis. Field 3 follows.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has only %d fields", pid, len(fields))
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0][0], start, err
}

// wait returns when the process has ended. It fails when the pidfd is closed first.
func (p *process) wait() error {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n == 1 && err == nil
	})
}

// reap takes the status of a process that has ended, and says how it ended. Only its parent gets to know.
func (p *process) reap() string {
	var ws unix.WaitStatus
	for {
		pid, err := unix.Wait4(p.pid, &ws, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		switch {
		case err != nil || pid != p.pid:
			return "its status went to another process"
		case ws.Signaled():
			return "signal: " + ws.Signal().String()
		default:
			return fmt.Sprintf("exit status %d", ws.ExitStatus())
		}
	}
}

// kill sends SIGKILL. A process that has ended is no error.
func (p *process) kill() error {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	var killErr error
	if err := conn.Control(func(fd uintptr) {
		killErr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0)
	}); err != nil {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	if killErr != nil && !errors.Is(killErr, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.pid, killErr)
	}
	return nil
}

// killGroup kills the process with the children it has not moved elsewhere: a launcher leads its own session and group. The
// group's number cannot belong to another one while its leader is held and not reaped.
func (p *process) killGroup() error {
	if _, start, err := readStat(p.pid); err != nil || start != p.start {
		return nil
	}
	if err := unix.Kill(-p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process group %d: %w", p.pid, err)
	}
	return nil
}

func (p *process) close() error { return p.fd.Close() }

// firstFD is the number of the first inherited descriptor after the standard ones and the job.
const firstFD = jobFD + 1

// launch runs the launcher, puts it into its cgroup while it has done nothing yet, and gives it its job. The files
// become descriptors firstFD, firstFD+1, ... of the program. On error no process is left.
func launch(launcher []string, j job, files []*os.File, place func(pid int) error) (*process, *tail, error) {
	return launchBy((*exec.Cmd).Start, launcher, j, files, place)
}

// launchBy is launch with another way to start the launcher.
func launchBy(start func(*exec.Cmd) error, launcher []string, j job, files []*os.File, place func(pid int) error) (*process, *tail, error) {
	if len(launcher) == 0 {
		return nil, nil, fmt.Errorf("launcher is empty; it has to be a command: %w", errdefs.ErrInvalidArgument)
	}
	data, err := json.Marshal(j)
	if err != nil {
		return nil, nil, err
	}
	jobR, jobW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer jobW.Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, jobR.Close())
	}
	cmd := exec.Command(launcher[0], launcher[1:]...)
	cmd.Dir, cmd.Env = "/", []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = errW, errW
	cmd.ExtraFiles = append([]*os.File{jobR}, files...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = start(cmd)
	_, _ = jobR.Close(), errW.Close()
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("run the launcher %s: %w", launcher[0], err), errR.Close())
	}
	out := newTail(errR)
	p, err := openProcess(cmd.Process.Pid, 0)
	if err != nil {
		_ = jobW.Close() // without a job the launcher ends by itself
		return nil, nil, errors.Join(err, cmd.Wait(), out.Close())
	}
	if err := errors.Join(cmd.Process.Release(), give(p.pid, place, jobW, data)); err != nil {
		return nil, nil, errors.Join(err, end(p), out.Close())
	}
	return p, out, nil
}

func give(pid int, place func(pid int) error, w *os.File, job []byte) error {
	if place != nil {
		if err := place(pid); err != nil {
			return fmt.Errorf("place process %d: %w", pid, err)
		}
	}
	if _, err := w.Write(job); err != nil {
		return fmt.Errorf("give the launcher its job: %w", err)
	}
	return nil
}

// end kills a child and takes its status.
func end(p *process) error {
	err := errors.Join(p.kill(), p.wait())
	p.reap()
	return errors.Join(err, p.close())
}

// tail keeps the last of what a process writes to its error output. It owns the pipe and the goroutine
// that reads it.
type tail struct {
	r    *os.File
	done chan struct{} // closed at the end of the output

	mu   sync.Mutex
	data []byte
}

const tailBytes = 8 << 10

func newTail(r *os.File) *tail {
	t := &tail{r: r, done: make(chan struct{})}
	go t.read()
	return t
}

func (t *tail) read() {
	defer close(t.done)
	buf := make([]byte, 4096)
	for {
		n, err := t.r.Read(buf)
		t.mu.Lock()
		t.data = append(t.data, buf[:n]...)
		t.data = t.data[max(0, len(t.data)-tailBytes):]
		t.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(strings.ToValidUTF8(string(t.data), "?"))
}

// Close returns when nothing is read any more.
func (t *tail) Close() error {
	err := t.r.Close()
	<-t.done
	return err
}

var _ io.Closer = (*tail)(nil)
