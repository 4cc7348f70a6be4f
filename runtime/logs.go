package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/runtime/crilog"
)

// logSink is a container's log file while it is written. Without a log path, output is taken and dropped.
type logSink struct {
	mu     sync.Mutex
	writer *crilog.Writer
	taken  offsets
}

// openLog opens the container's log where the last daemon, if any, left it.
func (c *container) openLog() error {
	path := c.rec.Spec().LogPath
	if path == "" {
		return nil
	}
	w, err := crilog.Open(path, c.logRecord())
	if err != nil {
		return fmt.Errorf("open the container's log: %w", err)
	}
	c.logs.mu.Lock()
	defer c.logs.mu.Unlock()
	c.logs.writer = w
	return nil
}

// logRecord is the file that tells which output is in the log.
func (c *container) logRecord() string {
	return filepath.Join(c.rt.cfg.Server.Root, "logs", c.id+".json")
}

func (c *container) removeLogRecord() error {
	if err := os.Remove(c.logRecord()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// begin says that what is before the offsets was taken by somebody else.
func (l *logSink) begin(at offsets) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.taken = at
}

// cursor tells what is to be read next, and what need not be kept any more.
func (l *logSink) cursor() cursor {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.writer == nil {
		return cursor{next: l.taken, safe: l.taken}
	}
	next, safe := l.writer.Next(), l.writer.Offsets()
	return cursor{next: offsets{next.Stdout, next.Stderr}, safe: offsets{safe.Stdout, safe.Stderr}}
}

// write puts one chunk into the log.
func (l *logSink) write(ch *agentpb.OutputChunk) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.taken.advance(ch)
	if l.writer == nil {
		return nil
	}
	stream := crilog.Stdout
	if ch.GetStream() == agentpb.OutputChunk_STDERR {
		stream = crilog.Stderr
	}
	_, err := l.writer.Write(stream, time.Unix(0, ch.GetTimeUnixNano()), ch.GetOffset(), ch.GetData())
	return err
}

func (l *logSink) reopen() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.writer == nil {
		return nil
	}
	return l.writer.Reopen()
}

// close writes what is held of unfinished lines and closes the file.
func (l *logSink) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.writer == nil {
		return nil
	}
	err := errors.Join(l.writer.Flush(time.Now()), l.writer.Close())
	l.writer = nil
	return err
}
