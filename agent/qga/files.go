package qga

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// readSize is how much one guest-file-read asks for, and readsInTurn how many of them one stream may do until the other
// one's turn.
const (
	readSize    = 128 << 10
	readsInTurn = 8
)

// openFile gives 0 when the file cannot be opened.
func (c *Client) openFile(ctx context.Context, path, mode string) (int64, error) {
	var handle int64
	err := c.call(ctx, "guest-file-open", map[string]string{"path": path, "mode": mode}, &handle)
	var e *Error
	if errors.As(err, &e) && e.Class == "GenericError" {
		return 0, nil
	}
	return handle, err
}

func (c *Client) closeFile(ctx context.Context, handle int64) error {
	return c.call(ctx, "guest-file-close", map[string]int64{"handle": handle}, nil)
}

func (c *Client) readFile(ctx context.Context, handle int64) ([]byte, error) {
	var r struct {
		Data []byte `json:"buf-b64"`
	}
	err := c.call(ctx, "guest-file-read", map[string]int64{"handle": handle, "count": readSize}, &r)
	return r.Data, restarted(err)
}

// empty makes a file empty.
func (c *Client) empty(ctx context.Context, path string) error {
	handle, err := c.openFile(ctx, path, "w")
	if err != nil || handle == 0 {
		return err
	}
	return c.closeFile(ctx, handle)
}

// outputStream is the reader of one stream's files.
type outputStream struct {
	name  string // of the files, without their numbers
	to    io.Writer
	index int
	file  int64 // the open one's handle; 0: none
	some  bool  // the open file has had bytes
	ended bool
	moved int64
}

// move writes what is there and tells whether that was anything.
func (s *outputStream) move(ctx context.Context, c *Client) (bool, error) {
	if s.ended {
		return false, nil
	}
	moved := false
	for range readsInTurn {
		if s.file == 0 {
			var err error
			if s.file, err = c.openFile(ctx, s.path(s.index), "r"); err != nil || s.file == 0 {
				return moved, err
			}
		}
		n, err := s.copy(ctx, c)
		if err != nil {
			return false, err
		}
		if n > 0 {
			moved = true
			continue
		}
		if advanced, err := s.advance(ctx, c); err != nil || !advanced {
			return moved, err
		}
	}
	return moved, nil
}

func (s *outputStream) path(index int) string { return s.name + strconv.Itoa(index) }

// copy moves one piece.
func (s *outputStream) copy(ctx context.Context, c *Client) (int, error) {
	data, err := c.readFile(ctx, s.file)
	if err != nil || len(data) == 0 {
		return 0, err
	}
	s.some = true
	s.moved += int64(len(data))
	if _, err := s.to.Write(data); err != nil {
		return 0, fmt.Errorf("write output: %w", err)
	}
	return len(data), nil
}

// advance goes on to the next file, or finds the end.
func (s *outputStream) advance(ctx context.Context, c *Client) (bool, error) {
	if !s.some {
		// Nothing may follow a file that stays empty.
		end, err := c.openFile(ctx, s.name+"end", "r")
		if err != nil || end == 0 {
			return false, err
		}
		s.ended = true
		return false, c.closeFile(ctx, end)
	}
	next, err := c.openFile(ctx, s.path(s.index+1), "r")
	if err != nil || next == 0 {
		return false, err
	}
	// The next one is there, so this one will grow no more.
	for n := 1; n > 0 && err == nil; {
		n, err = s.copy(ctx, c)
	}
	old, oldIndex := s.file, s.index
	s.file, s.index, s.some = next, s.index+1, false
	err = errors.Join(err, c.closeFile(ctx, old))
	if err != nil {
		return false, err
	}
	return true, c.empty(ctx, s.path(oldIndex))
}
