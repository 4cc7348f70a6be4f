package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// Exec starts one more process in a running container, in a cgroup of its own below the container's, by
// which RemoveExec kills its children too. An exec ID in use is ErrAlreadyExists.
func (s *Server) Exec(ctx context.Context, req *agentpb.ExecRequest) (*agentpb.ExecResponse, error) {
	if err := checkID("exec_id", req.ExecId); err != nil {
		return nil, err
	}
	c, err := s.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	spec, err := execSpec(req.Process, c.spec.Process)
	if err != nil {
		return nil, err
	}
	if st := c.main.state(); !st.Started || st.Exited {
		return nil, fmt.Errorf("container %q is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	p := &process{
		container: c.id, exec: req.ExecId, terminal: spec.Terminal, wantStdin: req.Stdin,
		out: newOutput(0), exited: make(chan struct{}), giveUp: giveUp,
	}
	w := s.takeExec(p)
	if err := c.addExec(p); err != nil {
		return nil, errors.Join(err, s.dropNextExec(w))
	}
	if err := s.beginExec(ctx, c, p, spec, w); err != nil {
		c.dropExec(p)
		p.finish(exit{status: neverRan, at: time.Now()}, false) // who has found it may wait for its end
		p.release()
		return nil, errors.Join(err, removeCgroup(ctx, c.execCgroup(p)))
	}
	return &agentpb.ExecResponse{Pid: p.state().Pid}, nil
}

// execSpec reads an exec's process and takes what it leaves out from the container's.
func execSpec(data []byte, of *specs.Process) (*specs.Process, error) {
	given := struct {
		specs.Process
		User *specs.User `json:"user"`
	}{}
	if err := json.Unmarshal(data, &given); err != nil {
		return nil, fmt.Errorf("process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	p := given.Process
	if len(p.Args) == 0 {
		return nil, fmt.Errorf("process.args is empty, want at least the program: %w", errdefs.ErrInvalidArgument)
	}
	p.User = of.User
	if given.User != nil {
		p.User = *given.User
	}
	if len(p.Env) == 0 {
		p.Env = of.Env
	}
	if p.Cwd == "" {
		p.Cwd = of.Cwd
	}
	if p.Capabilities == nil {
		p.Capabilities = of.Capabilities
		p.NoNewPrivileges = of.NoNewPrivileges
	}
	if p.Rlimits == nil {
		p.Rlimits = of.Rlimits
	}
	if p.OOMScoreAdj == nil {
		p.OOMScoreAdj = of.OOMScoreAdj
	}
	if p.ApparmorProfile == "" {
		p.ApparmorProfile = of.ApparmorProfile
	}
	return &p, nil
}

const (
	// processName is the file of an exec's process in its directory.
	processName = "process.json"
	// neverRan is the status of an exec that could not be started.
	neverRan unix.WaitStatus = 128 << 8
)

func (c *container) addExec(p *process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, taken := c.execs[p.exec]; taken {
		return fmt.Errorf("exec %q of container %q: %w", p.exec, c.id, errdefs.ErrAlreadyExists)
	}
	c.execs[p.exec] = p
	return nil
}

func (c *container) dropExec(p *process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execs[p.exec] == p {
		delete(c.execs, p.exec)
	}
}

func (c *container) execCgroup(p *process) string { return filepath.Join(c.cgroup, p.run) }

// beginExec starts the process when its container is not frozen.
func (s *Server) beginExec(ctx context.Context, c *container, p *process, spec *specs.Process, w *waiting) error {
	started, err := c.startingExec(ctx)
	if err != nil {
		return errors.Join(fmt.Errorf("%s: the container is frozen: %w", p.name(), err), s.dropNextExec(w))
	}
	defer started()
	return s.startExec(ctx, c, p, spec, w)
}

// startingExec waits until execs are not held, and keeps holdExecs waiting until what it returns is called.
func (c *container) startingExec(ctx context.Context) (started func(), err error) {
	for {
		c.mu.Lock()
		held := c.execsHeld
		if held == nil {
			c.execsStarting++
		}
		c.mu.Unlock()
		if held == nil {
			return c.execStarted, nil
		}
		select {
		case <-held:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (c *container) execStarted() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.execsStarting--
}

// holdExecs has execs wait before they are started, and waits for those that are being started: where a checkpoint is restored nobody can
// end one of which the crun has run half.
func (c *container) holdExecs(ctx context.Context) error {
	c.mu.Lock()
	if c.execsHeld == nil {
		c.execsHeld = make(chan struct{})
	}
	c.mu.Unlock()
	err := poll(ctx, 2*time.Millisecond, func() (bool, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.execsStarting == 0, nil
	})
	if err != nil {
		return fmt.Errorf("a command is still being started in container %q: %w", c.id, err)
	}
	return nil
}

// letExecsGo undoes holdExecs.
func (c *container) letExecsGo() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execsHeld != nil {
		close(c.execsHeld)
		c.execsHeld = nil
	}
}

// startExec starts the process by the crun w that waits, or by one of its own if w is nil.
func (s *Server) startExec(ctx context.Context, c *container, p *process, spec *specs.Process, w *waiting) error {
	dir := s.execDir(p.run)
	defer os.RemoveAll(dir)
	if err := writeExec(dir, c.execCgroup(p), spec); err != nil {
		return errors.Join(err, s.dropNextExec(w))
	}
	uid, gid := s.owner(spec.User.UID, spec.User.GID)
	onExit := func(e exit) {
		p.finish(e, oomKills(c.cgroup) > 0)
		// Children that go on keep the cgroup; it goes with RemoveExec or the container.
		_ = os.Remove(c.execCgroup(p))
	}
	if w != nil {
		err := s.runNextExec(ctx, c, p, w, uid, gid, onExit)
		if !errors.Is(err, unix.EPIPE) {
			return err
		}
		s.log.Warn("the crun that waited for the next exec had ended", "error", err)
	}
	st, err := p.openStreams(s.consolePath(), uid, gid)
	if err != nil {
		return err
	}
	return p.start(ctx, s, execCall(dir, p.run, c.crunID), st, onExit)
}

// writeExec makes what an exec needs besides its streams.
func writeExec(dir, cgroup string, spec *specs.Process) error {
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	for _, d := range []string{dir, cgroup} {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, processName), data, 0o600)
}

// execCall is the command of an exec whose files are in dir, with a cgroup below that of the container which crun calls id.
func execCall(dir, cgroup, id string) crunCall {
	return crunCall{
		log: filepath.Join(dir, "crun.log"), pidFile: filepath.Join(dir, "pid"),
		args: []string{"exec", "--detach", "--process", filepath.Join(dir, processName), "--cgroup", cgroup}, last: []string{id},
	}
}

// RemoveExec forgets an exec. One that still runs is killed with its children; the children of one that ended by itself
// are the container's from then on.
func (s *Server) RemoveExec(ctx context.Context, ref *agentpb.ProcessRef) (*agentpb.Empty, error) {
	if err := checkID("exec_id", ref.ExecId); err != nil {
		return nil, err
	}
	defer s.work.Go(s.keepExec) // where a command was run, there will be more
	c, p, err := s.process(ref)
	if errdefs.IsNotFound(err) {
		return &agentpb.Empty{}, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if p.state().Exited {
		err = adopt(c.cgroup, c.execCgroup(p))
	} else {
		err = s.killExec(ctx, c, p)
	}
	if err != nil {
		return nil, err
	}
	p.release()
	c.dropExec(p)
	return &agentpb.Empty{}, removeCgroup(ctx, c.execCgroup(p))
}

// killExec ends an exec, also one that is held or is being started.
func (s *Server) killExec(ctx context.Context, c *container, p *process) error {
	p.giveUp()
	err := poll(ctx, devicePoll, func() (bool, error) {
		// More than once: a process that is being started may not have been there yet.
		if pid := p.state().Pid; pid != 0 {
			if _, err := s.reaper.kill(int(pid), unix.SIGKILL); err != nil {
				return false, err
			}
		}
		return p.hasExited(), killCgroup(c.execCgroup(p))
	})
	if err != nil {
		return fmt.Errorf("kill %s: %w", p.name(), err)
	}
	return nil
}
