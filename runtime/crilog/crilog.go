// Package crilog writes a container's output to its log file in the CRI's format, so that after a kill at any
// moment no byte is missing or doubled.
//
// A line of the file is "TIME STREAM TAG CONTENT\n" (KEP 1205 in kubernetes/enhancements). Tag F ends a line of the
// output, and the newline is not part of the content; tag P is a piece that the next line of the stream goes on with.
//
// Invariants:
//   - An offset that Write returns is in the file: every byte of the stream before it. A line that has not ended is held,
//     at most MaxLine bytes, and not counted: whoever keeps the output keeps these bytes too.
//   - The file itself tells the offsets: a P line is as many bytes as its content, an F line one more. The checkpoint
//     file only says from where to count: the file's inode, its size and the offsets at that size. It is written
//     before the first byte goes to a file.
//   - The kubelet rotates by renaming the file and calling Reopen. Until Reopen all lines go to the renamed file, also
//     after a restart.
//
// Writes survive the end of the process, not of the node: the output's source ends with the node as well.
package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

const (
	// MaxLine is the most bytes of content in one line of the file; containerd's default.
	MaxLine = 16 << 10
	// checkpointEvery bounds how many bytes of the log a restart has to count.
	checkpointEvery = 4 << 20
	// keepBuffer is the largest buffer that is kept for the next batch.
	keepBuffer = 256 << 10
)

// Stream is one of a process's output streams. A terminal has only Stdout.
type Stream int

const (
	Stdout Stream = iota
	Stderr
	streams // how many there are
)

func (s Stream) String() string {
	if s == Stderr {
		return "stderr"
	}
	return "stdout"
}

// Offsets are positions in the two streams, in bytes from their start.
type Offsets struct {
	Stdout uint64 `json:"stdout"`
	Stderr uint64 `json:"stderr"`
}

// position is how far a stream has come.
type position struct {
	// durable is the offset up to which the file has the stream.
	durable uint64
	// held is the begun line that follows it.
	held []byte
}

func (p *position) next() uint64 { return p.durable + uint64(len(p.held)) }

// Writer writes one container's log. Its methods may be called at the same time.
type Writer struct {
	path       string
	checkpoint string

	mu sync.Mutex
	// file is open for appending; nil when closed.
	file    *os.File
	inode   uint64
	pos     [streams]position
	buf     []byte
	written int64 // since the last checkpoint
}

// Open opens the log at path for appending, and makes it and its directories where they are missing. When the checkpoint
// file is there, it goes on where an earlier Writer ended, however that was; otherwise the streams begin at 0, and what the
// log already has is somebody else's.
func Open(path, checkpoint string) (*Writer, error) {
	w := &Writer{path: path, checkpoint: checkpoint}
	var err error
	if w.file, err = w.resume(); err != nil {
		return nil, fmt.Errorf("open the container log: %w", err)
	}
	if w.inode, err = inodeOf(w.file); err == nil {
		err = w.save(w.file, w.inode)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the container log: %w", err), w.file.Close())
	}
	return w, nil
}

// openLog opens a log for appending, and makes it if it is missing.
func openLog(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o640)
}

// Offsets are the positions up to which the streams are in the file. The source may forget what is before them.
func (w *Writer) Offsets() Offsets {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.offsets()
}

func (w *Writer) offsets() Offsets {
	return Offsets{Stdout: w.pos[Stdout].durable, Stderr: w.pos[Stderr].durable}
}

// Next are the positions from which Write expects data: Offsets and what is held.
func (w *Writer) Next() Offsets {
	w.mu.Lock()
	defer w.mu.Unlock()
	return Offsets{Stdout: w.pos[Stdout].next(), Stderr: w.pos[Stderr].next()}
}

// Write takes a piece of a stream that begins at offset, and returns the offsets that are in the file now. The lines
// that end in it carry the time at. Bytes that were taken before are skipped; a gap, which the source no longer has, ends
// the held line as a piece. After an error the batch is lost, as with a full disk, and its bytes count as written: the
// log must not stop the container.
func (w *Writer) Write(s Stream, at time.Time, offset uint64, data []byte) (Offsets, error) {
	if s != Stdout && s != Stderr {
		return Offsets{}, fmt.Errorf("stream %d: it must be %d (stdout) or %d (stderr)", s, Stdout, Stderr)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return w.offsets(), fmt.Errorf("write to log %s: %w", w.path, fs.ErrClosed)
	}
	p := &w.pos[s]
	if next := p.next(); offset < next {
		skip := min(next-offset, uint64(len(data)))
		offset, data = offset+skip, data[skip:]
	}
	if len(data) == 0 {
		return w.offsets(), nil
	}
	head := newHead(at, s)
	w.buf = w.buf[:0]
	if offset > p.next() {
		w.buf = head.held(w.buf, p)
		p.durable = offset
	}
	w.encode(head, p, data)
	err := w.flush()
	return w.offsets(), err
}

// encode adds to the batch the lines that data completes, and holds the rest.
func (w *Writer) encode(head lineHead, p *position, data []byte) {
	rest := data
	if len(p.held) > 0 {
		rest = append(p.held, data...)
	}
	for {
		end := bytes.IndexByte(rest[:min(len(rest), MaxLine+1)], '\n')
		switch {
		case end >= 0:
			w.buf = head.line(w.buf, 'F', rest[:end])
			p.durable += uint64(end) + 1
			rest = rest[end+1:]
		case len(rest) > MaxLine:
			w.buf = head.line(w.buf, 'P', rest[:MaxLine])
			p.durable += MaxLine
			rest = rest[MaxLine:]
		default:
			p.held = bytes.Clone(rest)
			return
		}
	}
}

// Flush writes the held beginnings of lines as pieces. It is called when the streams have ended.
func (w *Writer) Flush(at time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return fmt.Errorf("flush log %s: %w", w.path, fs.ErrClosed)
	}
	w.buf = w.buf[:0]
	for s := range streams {
		w.buf = newHead(at, s).held(w.buf, &w.pos[s])
	}
	return w.flush()
}

// flush writes the batch by one system call. What was written of a batch that failed is taken back.
func (w *Writer) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	n, err := w.file.Write(w.buf)
	w.written += int64(n)
	if cap(w.buf) > keepBuffer {
		w.buf = nil
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write to log %s: %w", w.path, err), w.takeBack(n), w.save(w.file, w.inode))
	}
	if w.written >= checkpointEvery {
		return w.save(w.file, w.inode)
	}
	return nil
}

// takeBack cuts the last n bytes off the file.
func (w *Writer) takeBack(n int) error {
	if n == 0 {
		return nil
	}
	info, err := w.file.Stat()
	if err != nil {
		return err
	}
	return w.file.Truncate(info.Size() - int64(n))
}

// Reopen goes on with a new file at the log's path, after the old one was renamed. When it fails, the old file is
// kept. Lines are in the one file or in the other.
func (w *Writer) Reopen() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return fmt.Errorf("reopen log %s: %w", w.path, fs.ErrClosed)
	}
	file, err := openLog(w.path)
	if err != nil {
		return fmt.Errorf("reopen the container log: %w", err)
	}
	inode, err := inodeOf(file)
	if err == nil {
		err = w.save(file, inode)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("reopen log %s: %w", w.path, err), file.Close())
	}
	old := w.file
	w.file, w.inode = file, inode
	return old.Close()
}

// Close ends the Writer. What is held is not written: Flush does that, or the next Writer gets it again. Repeating it
// changes nothing.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return nil
	}
	err := errors.Join(w.save(w.file, w.inode), w.file.Close())
	w.file = nil
	return err
}

// lineHead is what lines of one batch begin with: time and stream.
type lineHead []byte

func newHead(at time.Time, s Stream) lineHead {
	return lineHead(at.Format(time.RFC3339Nano) + " " + s.String() + " ")
}

func (h lineHead) line(buf []byte, tag byte, content []byte) []byte {
	buf = append(append(buf, h...), tag, ' ')
	return append(append(buf, content...), '\n')
}

// held adds the held beginning of a line as a piece; it is held no more.
func (h lineHead) held(buf []byte, p *position) []byte {
	if len(p.held) == 0 {
		return buf
	}
	buf = h.line(buf, 'P', p.held)
	p.durable, p.held = p.next(), nil
	return buf
}
