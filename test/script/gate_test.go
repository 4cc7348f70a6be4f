package script

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// gate stops the processes of a program at a file that they open: the kernel asks before every open below a directory, and
// the process waits for the answer (fanotify(7)). A record is written by opening a temporary file before and its directory after the
// rename, so killing the daemon there is killing it before and after each persist.
type gate struct {
	dir   string
	exe   string // the program
	fd    int
	wake  int // an eventfd that ends the reader
	owned sync.WaitGroup

	mu   sync.Mutex
	left int // opens to let through; below 0 all are
	seen []string
	hit  func(pid int, path string) // called when a process stands at the gate, which goes on when it returns
}

// newGate watches a directory that is a mount. Its error is errors.ErrUnsupported where the kernel cannot ask.
func newGate(dir, exe string) (*gate, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_CLOEXEC, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_LARGEFILE)
	if err != nil {
		return nil, fmt.Errorf("fanotify: %w: %w", err, errors.ErrUnsupported)
	}
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_OPEN_PERM|unix.FAN_ONDIR, unix.AT_FDCWD, dir); err != nil {
		return nil, errors.Join(fmt.Errorf("fanotify permission events: %w: %w", err, errors.ErrUnsupported), unix.Close(fd))
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	g := &gate{dir: dir, exe: exe, fd: fd, wake: wake, left: -1}
	g.owned.Go(g.read)
	return g, nil
}

// arm lets so many opens through and calls hit at the next one. With a negative number it only takes note.
func (g *gate) arm(opens int, hit func(pid int, path string)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left, g.hit, g.seen = opens, hit, nil
}

// opened are the files that were opened since arm, below the directory.
func (g *gate) opened() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.seen
}

func (g *gate) read() {
	buf := make([]byte, 4096)
	for {
		fds := []unix.PollFd{{Fd: int32(g.fd), Events: unix.POLLIN}, {Fd: int32(g.wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		if fds[0].Revents == 0 {
			continue
		}
		n, err := unix.Read(g.fd, buf)
		if err != nil {
			return
		}
		const size = int(unsafe.Sizeof(unix.FanotifyEventMetadata{}))
		for b := buf[:n]; len(b) >= size; {
			e := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&b[0]))
			g.answer(e)
			b = b[e.Event_len:]
		}
	}
}

func (g *gate) answer(e *unix.FanotifyEventMetadata) {
	if e.Fd < 0 {
		return
	}
	path, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", e.Fd))
	if hit := g.note(int(e.Pid), path); hit != nil {
		hit(int(e.Pid), path)
	}
	var response [8]byte
	binary.NativeEndian.PutUint32(response[:], uint32(e.Fd))
	binary.NativeEndian.PutUint32(response[4:], unix.FAN_ALLOW)
	_, _ = unix.Write(g.fd, response[:]) // a process that is dead by now needs none
	_ = unix.Close(int(e.Fd))
}

// note counts an open and returns what is to be done at it.
func (g *gate) note(pid int, path string) func(int, string) {
	exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	g.mu.Lock()
	defer g.mu.Unlock()
	rel, err := filepath.Rel(g.dir, path)
	if exe != g.exe || err != nil || strings.HasPrefix(rel, "..") {
		return nil
	}
	g.seen = append(g.seen, rel)
	if g.left--; g.left == -1 {
		hit := g.hit
		g.hit = nil
		return hit
	}
	return nil
}

// close opens the gate for good.
func (g *gate) close() error {
	one := make([]byte, 8)
	binary.NativeEndian.PutUint64(one, 1)
	_, err := unix.Write(g.wake, one)
	g.owned.Wait()
	return errors.Join(err, unix.Close(g.fd), unix.Close(g.wake))
}
