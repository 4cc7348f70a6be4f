package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// nextExec is the crun that waits for the next exec, of whichever container. To crun it is an exec in a container that has the exec's name and
// whose status it waits to read. When the exec comes, the status that it is given and the files beside it are those of the exec's container.
type nextExec struct {
	waiting *waiting // nil while there is none
	resting bool     // one is started when there has been no exec for a while
}

const (
	// execRest is how long there has to be no exec before a crun is started for the next one. Execs that follow each other at once would
	// be slower for what is started beside them, which an emulated guest notices.
	execRest = time.Second

	// execsDir has a directory for each exec, by its name.
	execsDir = "execs"
	// statusName is the first file that crun reads of a container.
	statusName = "status"
)

func (s *Server) execDir(run string) string { return filepath.Join(s.opts.Root, execsDir, run) }

// newExecRun names an exec's files and cgroup.
func (s *Server) newExecRun() string { return fmt.Sprintf("exec-%d", s.execRuns.Add(1)) }

// keepExec has a crun wait for the next exec, when there has been none for a while, unless one waits.
func (s *Server) keepExec() {
	s.mu.Lock()
	s.lastExec = time.Now()
	begun := s.nextExec.waiting != nil || s.nextExec.resting
	if !begun {
		s.nextExec.resting = true
	}
	s.mu.Unlock()
	if begun {
		return
	}
	s.awaitExecRest()
	s.mu.Lock()
	s.nextExec.resting = false
	s.mu.Unlock()
	if err := s.bringExec(); err != nil {
		s.log.Warn("have a crun wait for the next exec", "error", err)
	}
}

// bringExec has a crun wait for the next exec, unless one does.
func (s *Server) bringExec() error {
	s.bringing.Lock()
	defer s.bringing.Unlock()
	s.mu.Lock()
	there := s.nextExec.waiting != nil
	s.mu.Unlock()
	if there {
		return nil
	}
	w, err := s.prepareExec()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextExec.waiting = w
	return err
}

// hasRunExec tells whether there has been an exec: where a command was run, there will be more.
func (s *Server) hasRunExec() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.lastExec.IsZero()
}

func (s *Server) awaitExecRest() {
	for rest := execRest; rest > 0; {
		<-time.After(rest)
		s.mu.Lock()
		rest = execRest - time.Since(s.lastExec)
		s.mu.Unlock()
	}
}

func (s *Server) prepareExec() (*waiting, error) {
	run := s.newExecRun()
	dir := s.execDir(run)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	call := execCall(dir, run, run)
	call.states, call.console = filepath.Dir(dir), s.consolePath()
	w, err := s.startWaiting(context.Background(), call, filepath.Join(dir, statusName))
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return w, nil
}

// takeExec names an exec and gives it the crun that waits, if it can be of that: it has no pipe for standard input.
func (s *Server) takeExec(p *process) *waiting {
	p.run = s.newExecRun()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastExec = time.Now()
	w := s.nextExec.waiting
	if w == nil || p.wantStdin && !p.terminal {
		return nil
	}
	s.nextExec.waiting = nil
	p.run = filepath.Base(w.dir())
	return w
}

// dropNextExec ends a crun that no exec has come for. It may be nil.
func (s *Server) dropNextExec(w *waiting) error {
	if w == nil {
		return nil
	}
	return errors.Join(s.endWaiting(w), os.RemoveAll(w.dir()))
}

// runNextExec runs an exec by the crun that waited for it.
func (s *Server) runNextExec(ctx context.Context, c *container, p *process, w *waiting, uid, gid int, onExit func(exit)) error {
	status, err := s.showContainer(c, w.dir())
	if err = errors.Join(err, w.fit(p, uid, gid)); err != nil {
		return errors.Join(err, s.endWaiting(w))
	}
	return p.follow(s, w.call, w.streams, func() error { return s.letGo(ctx, w, status) }, onExit)
}

// showContainer has what crun knows of a container in another directory too, but for its status, which is returned.
func (s *Server) showContainer(c *container, dir string) (status []byte, err error) {
	of := filepath.Join(s.opts.CrunRoot, c.crunID)
	for _, name := range []string{configName, "seccomp.bpf"} {
		if err := os.Symlink(filepath.Join(of, name), filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	return os.ReadFile(filepath.Join(of, statusName))
}

// fit gives a process that is to have a terminal its streams, any other one those that crun has.
func (w *waiting) fit(p *process, uid, gid int) error {
	if !p.terminal {
		return w.streams.own(uid, gid)
	}
	st, err := p.openStreams(w.call.console, uid, gid)
	if err == nil {
		w.streams.close()
		w.streams = st
	}
	return err
}
