package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// preparedID is what crun calls the container that a prepared run makes.
const preparedID = "prepared"

// preparedRun is a crun that Prepare has started: it has loaded its libraries and waits to read its configuration, which is a FIFO. A
// copy's first container needs no execution of crun, whose code an emulated guest would have to translate first.
type preparedRun struct {
	call    crunCall
	config  *os.File // the FIFO's writing end
	streams *streams
	pid     int
	ended   chan exit
}

// prepareRun starts a crun that waits, and returns when it does.
func (s *Server) prepareRun(ctx context.Context) (err error) {
	dir := filepath.Join(s.opts.Root, preparedID)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(dir, configName)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	st, err := (&process{}).openStreams("", 0, 0)
	if err != nil {
		return err
	}
	r := &preparedRun{call: runCall(dir, preparedID), streams: st, ended: make(chan exit, 1)}
	if r.pid, err = s.reaper.start(s.crunArgs(r.call), st.child[:], nil, func(e exit) { r.ended <- e }); err != nil {
		st.close()
		return err
	}
	if err := r.await(ctx, path); err != nil {
		return errors.Join(err, s.endPrepared(r))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prepared = r
	return nil
}

// await returns when crun has opened its configuration.
func (r *preparedRun) await(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, crunTimeout)
	defer cancel()
	err := poll(ctx, devicePoll, func() (bool, error) {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENXIO) && len(r.ended) == 0 { // nobody reads it yet
			return false, nil
		}
		if err != nil {
			return false, err
		}
		r.config = os.NewFile(uintptr(fd), path)
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("crun does not read its configuration: %w; %s", err, crunError(r.call.log, 0))
	}
	return nil
}

// endPrepared kills a crun that still waits.
func (s *Server) endPrepared(r *preparedRun) error {
	_, err := s.reaper.kill(r.pid, unix.SIGKILL)
	r.streams.close()
	if r.config != nil {
		_ = r.config.Close() // it may be closed
	}
	return err
}

// takePrepared gives the prepared run to a container that it can be of: with no terminal and no standard input. Nobody else gets it.
func (s *Server) takePrepared(p *process) *preparedRun {
	if p.terminal || p.wantStdin {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.prepared
	s.prepared = nil
	return r
}

// finish lets crun go on with a configuration, and waits for its end.
func (r *preparedRun) finish(ctx context.Context, s *Server, config []byte, uid, gid int) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, s.endPrepared(r))
		}
	}()
	for _, fd := range r.streams.child[1:] {
		if err := unix.Fchown(int(fd), uid, gid); err != nil {
			return fmt.Errorf("chown pipe: %w", err)
		}
	}
	// crun reads the file a second time, to keep a copy.
	path := r.config.Name()
	if err := errors.Join(os.WriteFile(path+".new", config, 0o600), os.Rename(path+".new", path)); err != nil {
		return err
	}
	if err := r.config.SetWriteDeadline(time.Now().Add(crunTimeout)); err != nil {
		return err
	}
	_, err = r.config.Write(config)
	if err = errors.Join(err, r.config.Close()); err != nil {
		return fmt.Errorf("give crun its configuration: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), crunTimeout)
	defer cancel()
	return s.crunEnd(ctx, r.call, r.pid, r.ended)
}
