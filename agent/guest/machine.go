package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// NewMachine makes the service for a guest that has booted an operating system of its own, of which this process is an
// ordinary daemon. Of the options it takes Version, Log and PowerOff, which Shutdown uses when the system's own ways
// fail. From then on it reaps all children of this process.
func NewMachine(opts Options) (*Server, error) {
	if opts.Log == nil {
		opts.Log = slog.Default()
	}
	if err := becomeSubreaper(); err != nil {
		return nil, err
	}
	s := &Server{opts: opts, log: opts.Log, machine: true, containers: make(map[string]*container)}
	all := &container{id: agent.MachineID, execs: make(map[string]*process)}
	all.main = &process{container: all.id, out: newOutput(0), exited: make(chan struct{})}
	all.main.pid, all.main.startedAt = 1, time.Now()
	s.containers[all.id] = all
	s.reaper = newReaper()
	return s, nil
}

// closeMachine ends what the host has started.
func (s *Server) closeMachine(ctx context.Context) error {
	c, err := s.container(agent.MachineID)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range c.processes() {
		if p.exec != "" {
			errs = append(errs, s.removeMachineExec(ctx, c, p))
		}
	}
	s.work.Wait()
	s.reaper.close()
	return errors.Join(errs...)
}

// machineSession is the service as a machine gives it.
type machineSession struct{ *session }

// Exec starts a process in a session of its own, by which RemoveExec kills its children too.
func (m *machineSession) Exec(_ context.Context, req *agentpb.ExecRequest) (*agentpb.ExecResponse, error) {
	if err := checkID("exec_id", req.ExecId); err != nil {
		return nil, err
	}
	c, err := m.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	spec, err := machineSpec(req.Process)
	if err != nil {
		return nil, err
	}
	p := &process{
		container: c.id, exec: req.ExecId, terminal: spec.Terminal, wantStdin: req.Stdin,
		out: newOutput(0), exited: make(chan struct{}),
	}
	if err := c.addExec(p); err != nil {
		return nil, err
	}
	if err := m.startMachineExec(p, spec); err != nil {
		c.dropExec(p)
		p.release()
		return nil, err
	}
	return &agentpb.ExecResponse{Pid: p.state().Pid}, nil
}

// machineSpec reads an exec's process. What it asks for and cannot have is an error.
func machineSpec(data []byte) (*specs.Process, error) {
	var p specs.Process
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(p.Args) == 0 || p.Args[0] == "" {
		return nil, fmt.Errorf("process.args is empty, want at least the program: %w", errdefs.ErrInvalidArgument)
	}
	for name, given := range map[string]bool{
		"capabilities": p.Capabilities != nil, "rlimits": len(p.Rlimits) > 0, "noNewPrivileges": p.NoNewPrivileges,
		"apparmorProfile": p.ApparmorProfile != "", "selinuxLabel": p.SelinuxLabel != "", "oomScoreAdj": p.OOMScoreAdj != nil,
		"scheduler": p.Scheduler != nil, "ioPriority": p.IOPriority != nil, "execCPUAffinity": p.ExecCPUAffinity != nil,
		"user.umask": p.User.Umask != nil, "user.username": p.User.Username != "",
	} {
		if given {
			return nil, fmt.Errorf("process.%s is not possible in a machine, leave it out: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	for _, s := range append(slices.Clip(p.Args), p.Env...) {
		if strings.IndexByte(s, 0) >= 0 {
			return nil, fmt.Errorf("process.args or env %q: a NUL byte is not possible: %w", s, errdefs.ErrInvalidArgument)
		}
	}
	if p.Cwd == "" {
		p.Cwd = "/"
	}
	p.Env = machineEnv(&p)
	return &p, nil
}

// machineEnv is what a login of the user has, and what is given.
func machineEnv(p *specs.Process) []string {
	env := map[string]string{"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/"}
	if p.Terminal {
		env["TERM"] = "xterm"
	}
	if u, err := user.LookupId(strconv.FormatUint(uint64(p.User.UID), 10)); err == nil {
		env["HOME"], env["USER"], env["LOGNAME"] = u.HomeDir, u.Username, u.Username
	}
	names := []string{"PATH", "HOME", "USER", "LOGNAME", "TERM"}
	for _, e := range p.Env {
		name, value, _ := strings.Cut(e, "=")
		if _, known := env[name]; !known {
			names = append(names, name)
		}
		env[name] = value
	}
	var list []string
	for _, name := range names {
		if value, ok := env[name]; ok {
			list = append(list, name+"="+value)
		}
	}
	return list
}

func (s *Server) startMachineExec(p *process, spec *specs.Process) error {
	program, err := lookPath(spec.Args[0], spec.Env)
	if err != nil {
		return err
	}
	st, err := p.openMachineStreams(spec)
	if err != nil {
		return err
	}
	attr := &syscall.ProcAttr{
		Dir: spec.Cwd, Env: spec.Env, Files: st.child[:],
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: p.terminal},
	}
	if u := spec.User; u.UID != 0 || u.GID != 0 || len(u.AdditionalGids) > 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.AdditionalGids}
	}
	defer s.reaper.starting()()
	pid, err := syscall.ForkExec(program, spec.Args, attr)
	if err != nil {
		st.close()
		return fmt.Errorf("start %q in %q: %w", program, spec.Cwd, err)
	}
	st.closeChild()
	p.begin(pid, st)
	s.reaper.watch(pid, func(e exit) { s.work.Go(func() { p.finish(e, false) }) })
	return nil
}

// lookPath finds a program by the PATH that it will have. A name with a slash is one of the process's directory.
func lookPath(program string, env []string) (string, error) {
	if strings.Contains(program, "/") {
		return program, nil
	}
	for _, e := range env {
		path, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(path) {
			if !filepath.IsAbs(dir) {
				continue
			}
			file := filepath.Join(dir, program)
			if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return file, nil
			}
		}
	}
	return "", fmt.Errorf("executable file %q not found in $PATH: %w", program, exec.ErrNotFound)
}

// openMachineStreams makes pipes, or a terminal of which the process gets the far end.
func (p *process) openMachineStreams(spec *specs.Process) (*streams, error) {
	if !p.terminal {
		return p.openStreams("", int(spec.User.UID), int(spec.User.GID))
	}
	near, far, err := openTerminal()
	if err != nil {
		return nil, fmt.Errorf("open a terminal: %w", err)
	}
	st := &streams{stdin: near, ours: []*os.File{far}, child: [3]uintptr{far.Fd(), far.Fd(), far.Fd()}}
	err = far.Chown(int(spec.User.UID), -1)
	if size := spec.ConsoleSize; err == nil && size != nil {
		err = unix.IoctlSetWinsize(int(far.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(size.Height), Col: uint16(size.Width)})
	}
	if err != nil {
		st.close()
		return nil, fmt.Errorf("prepare a terminal: %w", err)
	}
	return st, nil
}

// openTerminal gives the controlling end of a new terminal, which is pollable, and the other one.
func openTerminal() (near, far *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("/dev/ptmx: %w", err)
	}
	near = os.NewFile(uintptr(fd), "terminal")
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		far, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		_ = near.Close()
		return nil, nil, err
	}
	return near, far, nil
}

// RemoveExec kills the process and all others of its session, if it still runs, and forgets it.
func (m *machineSession) RemoveExec(ctx context.Context, ref *agentpb.ProcessRef) (*agentpb.Empty, error) {
	if err := checkID("exec_id", ref.ExecId); err != nil {
		return nil, err
	}
	c, p, err := m.process(ref)
	if errdefs.IsNotFound(err) {
		return &agentpb.Empty{}, nil
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	return &agentpb.Empty{}, m.removeMachineExec(ctx, c, p)
}

func (s *Server) removeMachineExec(ctx context.Context, c *container, p *process) error {
	if pid := int(p.state().Pid); pid != 0 && !p.hasExited() {
		if err := s.killSession(ctx, pid); err != nil {
			return err
		}
		if st := p.wait(ctx); !st.Exited {
			return fmt.Errorf("%s has not ended after SIGKILL: %w", p.name(), context.DeadlineExceeded)
		}
	}
	p.release()
	c.dropExec(p)
	return nil
}

// killSession kills a process of ours and all processes of its session. The leader goes last: while it is there, its
// number means no other session.
func (s *Server) killSession(ctx context.Context, leader int) error {
	err := poll(ctx, 5*time.Millisecond, func() (bool, error) {
		if alive, err := s.reaper.kill(leader, 0); !alive || err != nil {
			return true, err
		}
		members, err := sessionMembers(leader)
		for _, pid := range members {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return false, err
			}
		}
		return len(members) == 0, err
	})
	if err != nil {
		return fmt.Errorf("kill the session of process %d: %w", leader, err)
	}
	_, err = s.reaper.kill(leader, unix.SIGKILL)
	return err
}

// sessionMembers lists the living processes of a session but its leader.
func sessionMembers(leader int) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var members []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == leader {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue // gone meanwhile
		}
		// What follows the name, which may hold anything: state, parent, process group, session.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) > 3 && fields[3] == strconv.Itoa(leader) && fields[0] != "Z" && fields[0] != "X" {
			members = append(members, pid)
		}
	}
	return members, nil
}

// Signal signals one process that Exec has started.
func (m *machineSession) Signal(ctx context.Context, req *agentpb.SignalRequest) (*agentpb.Empty, error) {
	if req.All || req.Process.GetExecId() == "" {
		return nil, notInMachine("Signal of anything but a process started by Exec")
	}
	return m.session.Signal(ctx, req)
}

// Stats reads the figures of the guest. There are none of containers.
func (m *machineSession) Stats(context.Context, *agentpb.StatsRequest) (*agentpb.StatsResponse, error) {
	return &agentpb.StatsResponse{TimeUnixNano: time.Now().UnixNano(), Guest: machineStats()}, nil
}

// Shutdown has the system shut itself down, after the answer.
func (m *machineSession) Shutdown(context.Context, *agentpb.ShutdownRequest) (*agentpb.Empty, error) {
	m.afterAnswer(m.shutdownMachine)
	return &agentpb.Empty{}, nil
}

// shutdownTime bounds each attempt to have the system shut down. The command only begins it.
const shutdownTime = time.Minute

func (s *Server) shutdownMachine() {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		s.log.Error("shutdown", "error", err)
		return
	}
	defer null.Close()
	for _, command := range [][]string{{"systemctl", "poweroff"}, {"poweroff"}} {
		program, err := lookPath(command[0], machineEnv(&specs.Process{}))
		if err != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), shutdownTime)
		code, err := s.reaper.runProgram(ctx, append([]string{program}, command[1:]...), []uintptr{null.Fd(), null.Fd(), null.Fd()})
		cancel()
		if err == nil && code == 0 {
			return
		}
		s.log.Error("shutdown", "command", command, "exit status", code, "error", err)
	}
	s.opts.PowerOff()
}

func notInMachine(what string) error {
	return fmt.Errorf("%s: this guest is a machine, which has no containers and configures itself: %w", what, errdefs.ErrNotImplemented)
}

// ConfigureSandbox is not for machines.
func (m *machineSession) ConfigureSandbox(context.Context, *agentpb.ConfigureSandboxRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("ConfigureSandbox")
}

// PutFiles is not for machines.
func (m *machineSession) PutFiles(context.Context, *agentpb.PutFilesRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("PutFiles")
}

// GetFile is not for machines.
func (m *machineSession) GetFile(context.Context, *agentpb.GetFileRequest) (*agentpb.GetFileResponse, error) {
	return nil, notInMachine("GetFile")
}

// Prepare is not for machines.
func (m *machineSession) Prepare(context.Context, *agentpb.PrepareRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("Prepare")
}

// Standby is not for machines.
func (m *machineSession) Standby(context.Context, *agentpb.StandbyRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("Standby")
}

// Resize is not for machines.
func (m *machineSession) Resize(context.Context, *agentpb.ResizeRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("Resize")
}

// MountShare is not for machines.
func (m *machineSession) MountShare(context.Context, *agentpb.MountShareRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("MountShare")
}

// CreateContainer is not for machines.
func (m *machineSession) CreateContainer(context.Context, *agentpb.CreateContainerRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("CreateContainer")
}

// StartContainer is not for machines.
func (m *machineSession) StartContainer(context.Context, *agentpb.StartContainerRequest) (*agentpb.StartContainerResponse, error) {
	return nil, notInMachine("StartContainer")
}

// UpdateContainer is not for machines.
func (m *machineSession) UpdateContainer(context.Context, *agentpb.UpdateContainerRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("UpdateContainer")
}

// RemoveContainer is not for machines.
func (m *machineSession) RemoveContainer(context.Context, *agentpb.RemoveContainerRequest) (*agentpb.Empty, error) {
	return nil, notInMachine("RemoveContainer")
}
