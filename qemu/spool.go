package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// spoolBytes is how much a Spool keeps before it lets the guest wait.
	spoolBytes = 4 << 20
	// spoolBlock is what is given back to the file system at once.
	spoolBlock = 4 << 10
	// maxChunk is the most that Next returns.
	maxChunk = 64 << 10
	// maxMarks bounds the moves whose times are told apart.
	maxMarks = 256
	// spoolPause is between two moves: the guest writes single bytes.
	spoolPause = 5 * time.Millisecond
	// spoolRetry is the pause after a move that failed, as with a full disk.
	spoolRetry = time.Second
)

// Spool keeps what a guest has written to its console (Record.ConsoleFIFOs) until it is forgotten. Offsets count the bytes of
// the console from its beginning.
//
// The bytes go from the pipe into a file by splice(2): they are in the one or in the other, and in order, whenever this process is
// killed. Their offset in the file is the console's offset, so the file's size is all the state there is; what is
// forgotten is punched out of the file. The file is not synced: a node that goes down takes the guest along.
//
// One Spool to a FIFO. Its methods may be called at the same time, and several readers may follow it.
type Spool struct {
	fifo, file *os.File
	log        *slog.Logger

	mu       sync.Mutex
	begin    int64         // what is before is forgotten
	punched  int64         // what is before is given back
	end      int64         // what is before is in the file
	marks    []mark        // of the moves that may still be read, in order
	wake     chan struct{} // closed at the next change
	finished bool          // the console has ended and is all in the file

	finish, closing chan struct{}
	finishOnce      sync.Once
	owned           sync.WaitGroup
	close           func() error
}

// mark is the time of what is before end and behind the mark before.
type mark struct {
	end int64
	at  time.Time
}

// Chunk is a piece of the console.
type Chunk struct {
	Offset int64 // of the first byte
	Data   []byte
	Time   time.Time // when it came, or for what came before this Spool when the last of that did
}

// OpenSpool goes on to move what comes out of a FIFO into the file at path, which it makes if there is none.
func OpenSpool(fifo, path string, log *slog.Logger) (*Spool, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	s := &Spool{
		file: file, log: log, wake: make(chan struct{}), finish: make(chan struct{}), closing: make(chan struct{}),
	}
	if err := s.resume(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if s.fifo, err = openFIFO(fifo); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	s.close = sync.OnceValue(s.release)
	s.owned.Go(s.move)
	return s, nil
}

// resume reads from the file what an earlier Spool left.
func (s *Spool) resume() error {
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	s.end = info.Size()
	s.begin, err = unix.Seek(int(s.file.Fd()), 0, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // no data
		s.begin, err = s.end, nil
	}
	if err != nil {
		return fmt.Errorf("find the data of %s: %w", s.file.Name(), err)
	}
	s.punched = s.begin
	s.marks = []mark{{s.end, info.ModTime()}}
	return nil
}

// Bounds are the offset of the first byte that is kept, and of the next one to come.
func (s *Spool) Bounds() (begin, end int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.begin, s.end
}

// Next waits for what comes at offset, and returns at most 64 KiB of one time. What is forgotten is skipped: the chunk then begins
// behind offset. After Finish, when all is read, it is io.EOF; after Close os.ErrClosed.
func (s *Spool) Next(ctx context.Context, offset int64) (Chunk, error) {
	for {
		c, wake, err := s.peek(offset)
		if err != nil || len(c.Data) > 0 {
			return c, err
		}
		select {
		case <-wake:
		case <-s.closing:
			return Chunk{}, os.ErrClosed
		case <-ctx.Done():
			return Chunk{}, ctx.Err()
		}
	}
}

// peek reads what is there; otherwise it returns what to wait for.
func (s *Spool) peek(offset int64) (Chunk, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.closing:
		return Chunk{}, nil, os.ErrClosed
	default:
	}
	if offset < 0 || offset > s.end {
		return Chunk{}, nil, fmt.Errorf("offset %d of the console; it has to be from 0 to %d: %w", offset, s.end, errdefs.ErrOutOfRange)
	}
	offset = max(offset, s.begin)
	if offset == s.end {
		if s.finished {
			return Chunk{}, nil, io.EOF
		}
		return Chunk{}, s.wake, nil
	}
	i := 0
	for s.marks[i].end <= offset {
		i++
	}
	c := Chunk{Offset: offset, Data: make([]byte, min(maxChunk, s.marks[i].end-offset)), Time: s.marks[i].at}
	// Under the lock, or else it might be punched out.
	if _, err := s.file.ReadAt(c.Data, offset); err != nil {
		return Chunk{}, nil, err
	}
	return c, nil, nil
}

// Forget gives up what is before offset. Going back is no error and does nothing.
func (s *Spool) Forget(offset int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if offset > s.end {
		return fmt.Errorf("offset %d of the console; it has to be at most %d: %w", offset, s.end, errdefs.ErrOutOfRange)
	}
	if offset <= s.begin {
		return nil
	}
	s.begin = offset
	for len(s.marks) > 1 && s.marks[0].end <= offset {
		s.marks = s.marks[1:]
	}
	s.changed()
	to := offset / spoolBlock * spoolBlock
	if to <= s.punched {
		return nil
	}
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := unix.Fallocate(int(s.file.Fd()), mode, s.punched, to-s.punched); err != nil {
		return fmt.Errorf("punch out of %s what was read: %w", s.file.Name(), err)
	}
	s.punched = to
	return nil
}

// changed wakes all that wait. The caller holds mu.
func (s *Spool) changed() {
	close(s.wake)
	s.wake = make(chan struct{})
}

// Finish is called when QEMU is gone. What the FIFO still has is moved, however much is kept; Next returns io.EOF behind it.
func (s *Spool) Finish() {
	s.finishOnce.Do(func() {
		close(s.finish)
		s.interrupt()
	})
}

// Close ends the mover. The FIFO and the file keep what they have, for the next Spool. It may be called more than once.
func (s *Spool) Close() error { return s.close() }

func (s *Spool) release() error {
	close(s.closing)
	s.interrupt()
	s.owned.Wait()
	s.mu.Lock() // a reader may be at the file
	defer s.mu.Unlock()
	return errors.Join(s.fifo.Close(), s.file.Close())
}

// interrupt ends the mover's wait for the FIFO, for good.
func (s *Spool) interrupt() {
	if err := s.fifo.SetReadDeadline(time.Unix(1, 0)); err != nil {
		s.log.Error("interrupting the console's mover", "file", s.file.Name(), "error", err)
	}
}

// move is the only one that reads the FIFO and writes the file.
func (s *Spool) move() {
	failed := false
	for s.room() {
		n, err := s.splice()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue // room knows why
		}
		s.moved(n)
		pause := spoolPause
		if err != nil {
			pause = spoolRetry
		}
		if err != nil && !failed {
			s.log.Warn("moving the guest's console; it waits", "file", s.file.Name(), "error", err)
		}
		failed = err != nil
		select {
		case <-time.After(pause):
		case <-s.closing:
		case <-s.finish:
		}
	}
}

// room waits until more may be moved. It is false when nothing more is to be moved.
func (s *Spool) room() bool {
	for {
		s.mu.Lock()
		full, wake := s.end-s.begin >= spoolBytes, s.wake
		s.mu.Unlock()
		select {
		case <-s.closing:
			return false
		case <-s.finish:
			s.drain()
			return false
		default:
		}
		if !full {
			return true
		}
		select {
		case <-wake:
		case <-s.closing:
		case <-s.finish:
		}
	}
}

// drain moves what is left in the FIFO, whose writer is gone.
func (s *Spool) drain() {
	conn, err := s.fifo.SyscallConn()
	for err == nil {
		var n int64
		var spliceErr error
		err = conn.Control(func(fd uintptr) { n, spliceErr = s.spliceOnce(int(fd)) })
		err = errors.Join(err, spliceErr)
		s.moved(n)
	}
	if !errors.Is(err, unix.EAGAIN) {
		s.log.Error("the end of the guest's console is lost", "file", s.file.Name(), "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finished = true
	s.changed()
}

// splice waits for the guest and moves some of what it wrote.
func (s *Spool) splice() (n int64, err error) {
	conn, err := s.fifo.SyscallConn()
	if err != nil {
		return 0, err
	}
	var spliceErr error
	err = conn.Read(func(fd uintptr) bool {
		n, spliceErr = s.spliceOnce(int(fd))
		return !errors.Is(spliceErr, unix.EAGAIN)
	})
	return n, errors.Join(err, spliceErr)
}

func (s *Spool) spliceOnce(fifo int) (int64, error) {
	for {
		end := s.end // only the mover changes it
		n, err := unix.Splice(fifo, nil, int(s.file.Fd()), &end, fifoBytes, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func (s *Spool) moved(n int64) {
	if n <= 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end += n
	if len(s.marks) < maxMarks {
		s.marks = append(s.marks, mark{s.end, time.Now()})
	} else {
		s.marks[len(s.marks)-1].end = s.end
	}
	s.changed()
}
