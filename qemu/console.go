package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	fifoName        = "console"
	fifoIn, fifoOut = ".in", ".out"
	// fifoBytes is what the guest may write while nobody reads: the most that a pipe may have without privileges.
	fifoBytes = 1 << 20
)

// ConsoleFIFOs are the paths of the guest's serial console: what is written to in comes to the guest, and out has what the
// guest writes. QEMU holds both open for reading and writing, so neither ever ends, and what was
// written stays there while nobody has them open. Both are errdefs.ErrFailedPrecondition without Machine.ConsolePipe.
// Each VM has out open too until Close, so that the end of what the guest wrote is there after QEMU is gone.
// Only a QEMU that dies while no daemon is there takes what is unread with it.
func (r Record) ConsoleFIFOs() (in, out string, err error) {
	if !r.ConsolePipe {
		return "", "", fmt.Errorf("the machine's console is not a pipe: %w", errdefs.ErrFailedPrecondition)
	}
	path := filepath.Join(r.RunDir, fifoName)
	return path + fifoIn, path + fifoOut, nil
}

// makeFIFOs makes both FIFOs for QEMU's user, and returns the one the guest writes to open, for a pipe forgets its size when
// nobody has it open.
func (s Spec) makeFIFOs() (*os.File, error) {
	path := filepath.Join(s.RunDir, fifoName)
	for _, p := range []string{path + fifoIn, path + fifoOut} {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if err := unix.Mkfifo(p, 0o600); err != nil {
			return nil, fmt.Errorf("make FIFO %s: %w", p, err)
		}
		if err := os.Lchown(p, int(s.UID), int(s.GID)); err != nil {
			return nil, err
		}
	}
	out, err := openFIFO(path + fifoOut)
	if err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(out.Fd(), unix.F_SETPIPE_SZ, fifoBytes); err != nil {
		return nil, errors.Join(fmt.Errorf("size of pipe %s: %w", out.Name(), err), out.Close())
	}
	return out, nil
}

// openFIFO opens both ends, so that it neither waits for another one nor comes to an end.
func openFIFO(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open FIFO %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, errors.Join(fmt.Errorf("%s has to be a FIFO: %w", path, errdefs.ErrInvalidArgument), err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), path), nil
}

// holdConsole opens the FIFO that the guest writes to, nil if there is none.
func (r Record) holdConsole() (*os.File, error) {
	if !r.ConsolePipe {
		return nil, nil
	}
	_, out, err := r.ConsoleFIFOs()
	if err != nil {
		return nil, err
	}
	return openFIFO(out)
}

func closeFile(f *os.File) error {
	if f == nil {
		return nil
	}
	return f.Close()
}
