package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
)

// preparedID is what crun calls the container that a prepared run makes.
const preparedID = "prepared"

// prepareRun has a crun wait for the configuration of the first container.
func (s *Server) prepareRun(ctx context.Context) error {
	dir := filepath.Join(s.opts.Root, preparedID)
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil { // there may have been one before
		return err
	}
	w, err := s.startWaiting(ctx, runCall(dir, preparedID), filepath.Join(dir, configName))
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prepared = w
	return nil
}

// takePrepared gives the prepared run to a container that it can be of: with no terminal and no standard input. Nobody else gets it.
func (s *Server) takePrepared(p *process) *waiting {
	if p.terminal || p.wantStdin {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.prepared
	s.prepared = nil
	return w
}

// runPrepared runs a container by the crun that waits for its configuration.
func (s *Server) runPrepared(ctx context.Context, w *waiting, config []byte, uid, gid int) error {
	// crun reads the file a second time, to keep a copy.
	path := w.fifo.Name()
	if err := errors.Join(w.streams.own(uid, gid), os.WriteFile(path+".new", config, 0o600), os.Rename(path+".new", path)); err != nil {
		return errors.Join(err, s.endWaiting(w))
	}
	return s.letGo(ctx, w, config)
}
