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

// lowest is the priority of a crun that gets ready: nobody is to wait for it.
const lowest = 19

// waiting is a crun that was started before there was something to do for it. It has loaded its libraries and waits to read the first of its
// files, which is a FIFO. Who has one need not wait for the execution of crun, whose code an emulated guest has to translate at each start.
type waiting struct {
	call    crunCall
	fifo    *os.File // the writing end
	streams *streams
	pid     int
	ended   chan exit
}

// startWaiting starts a crun whose first file is path, and returns when it waits.
func (s *Server) startWaiting(ctx context.Context, call crunCall, path string) (*waiting, error) {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, fmt.Errorf("make %s: %w", path, err)
	}
	st, err := (&process{}).openStreams("", 0, 0)
	if err != nil {
		return nil, err
	}
	w := &waiting{call: call, streams: st, ended: make(chan exit, 1)}
	if w.pid, err = s.reaper.start(s.crunArgs(call), st.child[:], nil, func(e exit) { w.ended <- e }); err != nil {
		st.close()
		return nil, err
	}
	err = unix.Setpriority(unix.PRIO_PROCESS, w.pid, lowest)
	if err = errors.Join(err, w.await(ctx, path)); err != nil {
		return nil, errors.Join(err, s.endWaiting(w))
	}
	return w, nil
}

// await returns when crun has opened its file.
func (w *waiting) await(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, crunTimeout)
	defer cancel()
	err := poll(ctx, devicePoll, func() (bool, error) {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENXIO) && !w.hasEnded() { // nobody reads it yet
			return false, nil
		}
		if err != nil {
			return false, err
		}
		w.fifo = os.NewFile(uintptr(fd), path)
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("crun does not read %s: %w; %s", path, err, crunError(w.call.log, 0))
	}
	return nil
}

// dir is where its file is.
func (w *waiting) dir() string { return filepath.Dir(w.fifo.Name()) }

func (w *waiting) hasEnded() bool { return len(w.ended) > 0 }

// endWaiting kills a crun that still waits.
func (s *Server) endWaiting(w *waiting) error {
	_, err := s.reaper.kill(w.pid, unix.SIGKILL)
	w.streams.close()
	if w.fifo != nil {
		_ = w.fifo.Close() // it may be closed
	}
	return err
}

// letGo gives crun what it waits for, and waits for its end. EPIPE says that it had ended before, and has done nothing.
func (s *Server) letGo(ctx context.Context, w *waiting, data []byte) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, s.endWaiting(w))
		}
	}()
	// The container's process inherits it.
	if err := unix.Setpriority(unix.PRIO_PROCESS, w.pid, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("set the priority of crun: %w", err)
	}
	if err := w.fifo.SetWriteDeadline(time.Now().Add(crunTimeout)); err != nil {
		return err
	}
	_, err = w.fifo.Write(data)
	if err = errors.Join(err, w.fifo.Close()); err != nil {
		return fmt.Errorf("write what crun waits for: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), crunTimeout)
	defer cancel()
	return s.crunEnd(ctx, w.call, w.pid, w.ended)
}
