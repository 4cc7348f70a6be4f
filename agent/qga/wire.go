package qga

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// sentinel begins the answer to guest-sync-delimited. It is no byte of UTF-8, so nothing else holds it.
const sentinel = 0xff

const (
	// maxMessage bounds an answer, maxCapture one that may hold captured output (16 MiB of each stream in base64).
	maxMessage = 4 << 20
	maxCapture = 46 << 20
)

var (
	errTooLong   = errors.New("the answer is longer than it may be")
	errMalformed = errors.New("the answer is not what the protocol allows")
)

// reader takes lines out of what the guest sends. It holds at most one line and what was read with it.
type reader struct {
	src  io.Reader
	rest []byte
	buf  []byte
}

func newReader(src io.Reader) *reader { return &reader{src: src, buf: make([]byte, 32<<10)} }

// fill reads something into rest.
func (r *reader) fill() error {
	n, err := r.src.Read(r.buf)
	r.rest = r.buf[:n]
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// skipSentinel drops everything up to the next sentinel, itself included.
func (r *reader) skipSentinel() error {
	for {
		if i := bytes.IndexByte(r.rest, sentinel); i >= 0 {
			r.rest = r.rest[i+1:]
			return nil
		}
		if err := r.fill(); err != nil {
			return err
		}
	}
}

// line gives the next line without its end.
func (r *reader) line(limit int) ([]byte, error) {
	line := []byte{}
	for {
		i := bytes.IndexByte(r.rest, '\n')
		part := r.rest
		if i >= 0 {
			part = r.rest[:i]
		}
		if len(line)+len(part) > limit {
			return nil, fmt.Errorf("%w: more than %d bytes", errTooLong, limit)
		}
		line = append(line, part...)
		if i >= 0 {
			r.rest = r.rest[i+1:]
			return line, nil
		}
		r.rest = nil
		if err := r.fill(); err != nil {
			return nil, err
		}
	}
}

// synced reads until the answer to guest-sync-delimited with the given number; all that comes before it is of a
// time that is over.
func (r *reader) synced(id int64) error {
	for {
		if err := r.skipSentinel(); err != nil {
			return err
		}
		// Of an answer that was cut, what follows the last sentinel counts.
		line, err := r.line(maxMessage)
		if errors.Is(err, errTooLong) {
			continue
		}
		if err != nil {
			return err
		}
		if i := bytes.LastIndexByte(line, sentinel); i >= 0 {
			line = line[i+1:]
		}
		var a struct {
			Return *int64 `json:"return"`
		}
		if json.Unmarshal(line, &a) == nil && a.Return != nil && *a.Return == id {
			return nil
		}
	}
}

// answer is one response: a value or an error.
type answer struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// answer reads the response to a command. Late answers to guest-sync-delimited, which was asked more than once, are
// not it.
func (r *reader) answer(limit int) (answer, error) {
	var a answer
	var line []byte
	for line == nil || len(line) > 0 && line[0] == sentinel {
		var err error
		if line, err = r.line(limit); err != nil {
			return a, err
		}
	}
	if bytes.IndexByte(line, sentinel) >= 0 {
		return a, fmt.Errorf("%w: a sentinel inside", errMalformed)
	}
	if err := json.Unmarshal(line, &a); err != nil {
		return a, fmt.Errorf("%w: %w", errMalformed, err)
	}
	if bytes.Equal(a.Return, []byte("null")) {
		a.Return = nil
	}
	if (a.Return == nil) == (a.Error == nil) {
		return a, fmt.Errorf("%w: want either a value or an error", errMalformed)
	}
	return a, nil
}
