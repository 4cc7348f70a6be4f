package crilog

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/renameio/v2"
)

// checkpoint says that the file with an inode has the streams up to the offsets in its first Size bytes.
type checkpoint struct {
	Inode uint64 `json:"inode"`
	Size  int64  `json:"size"`
	Offsets
}

// save writes the checkpoint of a file in its present size.
func (w *Writer) save(file *os.File, inode uint64) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	b, err := json.Marshal(checkpoint{Inode: inode, Size: info.Size(), Offsets: w.offsets()})
	if err != nil {
		return err
	}
	dir := filepath.Dir(w.checkpoint)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := renameio.WriteFile(w.checkpoint, b, 0o600, renameio.WithTempDir(dir)); err != nil {
		return fmt.Errorf("write the log's checkpoint: %w", err)
	}
	w.written = 0
	return nil
}

// resume finds the file to write to and the offsets that are in it.
func (w *Writer) resume() (*os.File, error) {
	b, err := os.ReadFile(w.checkpoint)
	if errors.Is(err, fs.ErrNotExist) {
		return openLog(w.path)
	}
	if err != nil {
		return nil, err
	}
	var cp checkpoint
	if err := json.Unmarshal(b, &cp); err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", w.checkpoint, err)
	}
	w.pos[Stdout].durable, w.pos[Stderr].durable = cp.Stdout, cp.Stderr
	last, err := findLast(w.path, cp)
	if err != nil {
		return nil, err
	}
	if last == nil {
		return openLog(w.path)
	}
	if err := w.count(last, cp.Size); err != nil {
		return nil, errors.Join(fmt.Errorf("count the lines of %s: %w", last.Name(), err), last.Close())
	}
	// A file at the path that is not the last one was made by a Reopen that did not come to its end, and is empty.
	if _, err := os.Lstat(w.path); errors.Is(err, fs.ErrNotExist) || last.Name() == w.path {
		return last, nil
	}
	file, err := openLog(w.path)
	return file, errors.Join(err, last.Close())
}

// findLast opens the file that the checkpoint is of: the log, or what it was renamed to. It is nil when that is
// gone.
func findLast(path string, cp checkpoint) (*os.File, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	base := filepath.Base(path)
	for _, e := range entries {
		rotated := strings.HasPrefix(e.Name(), base+".") && !strings.HasSuffix(e.Name(), ".gz") && !strings.HasSuffix(e.Name(), ".tmp")
		if !e.Type().IsRegular() || e.Name() != base && !rotated {
			continue
		}
		file, err := openIfInode(filepath.Join(filepath.Dir(path), e.Name()), cp.Inode)
		if file != nil || err != nil {
			return file, err
		}
	}
	return nil, nil
}

// openIfInode opens the file if it has the inode. A file that is gone meanwhile is not it.
func openIfInode(path string, want uint64) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	inode, err := inodeOf(file)
	if err == nil && inode == want {
		return file, nil
	}
	return nil, errors.Join(err, file.Close())
}

func inodeOf(file *os.File) (uint64, error) {
	info, err := file.Stat()
	if err != nil {
		return 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("%s: the file system tells no inode", file.Name())
	}
	return st.Ino, nil
}

// count advances the offsets by the lines behind the given size, and cuts off a line that is not whole.
func (w *Writer) count(file *os.File, from int64) error {
	if _, err := file.Seek(from, io.SeekStart); err != nil {
		return err
	}
	lines := bufio.NewReaderSize(file, 64<<10)
	for {
		line, err := lines.ReadBytes('\n')
		switch {
		case errors.Is(err, io.EOF) && len(line) > 0:
			return file.Truncate(from)
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		from += int64(len(line))
		w.countLine(line)
	}
}

// countLine advances the offset of a line's stream by what the line has of it. What is no line of a log
// counts nothing.
func (w *Writer) countLine(line []byte) {
	f := bytes.SplitN(bytes.TrimSuffix(line, []byte("\n")), []byte(" "), 4)
	if len(f) != 4 {
		return
	}
	n := uint64(len(f[3]))
	switch string(f[2]) {
	case "F":
		n++
	case "P":
	default:
		return
	}
	for s := range streams {
		if string(f[1]) == s.String() {
			w.pos[s].durable += n
		}
	}
}

// Begin writes the checkpoint file of a log that does not exist yet, whose streams begin at these offsets. One that is there
// stays as it is.
func Begin(checkpointFile string, at Offsets) error {
	if _, err := os.Lstat(checkpointFile); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := json.Marshal(checkpoint{Offsets: at})
	if err != nil {
		return err
	}
	dir := filepath.Dir(checkpointFile)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(checkpointFile, b, 0o600, renameio.WithTempDir(dir))
}
