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
	p := &process{
		container: c.id, exec: req.ExecId, terminal: spec.Terminal, wantStdin: req.Stdin,
		out: newOutput(0), exited: make(chan struct{}),
	}
	if err := c.addExec(p); err != nil {
		return nil, err
	}
	if err := s.startExec(ctx, c, p, spec); err != nil {
		c.dropExec(p)
		p.release()
		return nil, errors.Join(err, removeCgroup(ctx, c.execCgroup(p.exec)))
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

const execPrefix = "exec-"

func (c *container) execCgroup(exec string) string { return filepath.Join(c.cgroup, execPrefix+exec) }

func (s *Server) startExec(ctx context.Context, c *container, p *process, spec *specs.Process) error {
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	base := filepath.Join(c.dir, execPrefix+p.exec)
	defer func() {
		for _, suffix := range []string{".json", ".pid", ".log"} {
			_ = os.Remove(base + suffix)
		}
	}()
	if err := os.WriteFile(base+".json", data, 0o600); err != nil {
		return err
	}
	if err := os.Mkdir(c.execCgroup(p.exec), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	uid, gid := s.owner(spec.User.UID, spec.User.GID)
	st, err := p.openStreams(s.consolePath(), uid, gid)
	if err != nil {
		return err
	}
	call := crunCall{
		log: base + ".log", pidFile: base + ".pid",
		args: []string{"exec", "--detach", "--process", base + ".json", "--cgroup", execPrefix + p.exec},
		last: []string{c.crunID},
	}
	return p.run(ctx, s, call, st, func(e exit) {
		p.finish(e, oomKills(c.cgroup) > 0)
		// Children that go on keep the cgroup; it goes with RemoveExec or the container.
		_ = os.Remove(c.execCgroup(p.exec))
	})
}

// RemoveExec forgets an exec. One that still runs is killed with its children; the children of one that ended by itself
// are the container's from then on.
func (s *Server) RemoveExec(ctx context.Context, ref *agentpb.ProcessRef) (*agentpb.Empty, error) {
	if err := checkID("exec_id", ref.ExecId); err != nil {
		return nil, err
	}
	c, p, err := s.process(ref)
	if errdefs.IsNotFound(err) {
		return &agentpb.Empty{}, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if p.state().Exited {
		err = adopt(c.cgroup, c.execCgroup(p.exec))
	} else {
		err = s.killExec(ctx, c, p)
	}
	if err != nil {
		return nil, err
	}
	p.release()
	c.dropExec(p)
	return &agentpb.Empty{}, removeCgroup(ctx, c.execCgroup(p.exec))
}

func (s *Server) killExec(ctx context.Context, c *container, p *process) error {
	if pid := p.state().Pid; pid != 0 {
		if _, err := s.reaper.kill(int(pid), unix.SIGKILL); err != nil {
			return err
		}
	}
	if err := killCgroup(c.execCgroup(p.exec)); err != nil {
		return err
	}
	if st := p.wait(ctx); !st.Exited {
		return fmt.Errorf("%s has not ended after SIGKILL: %w", p.name(), context.DeadlineExceeded)
	}
	return nil
}
