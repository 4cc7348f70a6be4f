package sshexec

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"sync"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// prelude is the writer of a command's output that takes out what comes before: what the login shell's start-up files
// print, and the line with the command's number.
type prelude struct {
	line *regexp.Regexp
	to   io.Writer
	pid  chan string // gets the number, once

	mu    sync.Mutex
	held  []byte
	begun bool
}

func newPrelude(mark string, to io.Writer) *prelude {
	return &prelude{line: regexp.MustCompile(mark + ` ([0-9]{1,10})\r?\n`), to: orDiscard(to), pid: make(chan string, 1)}
}

// Write passes on what follows the line.
func (p *prelude) Write(b []byte) (int, error) {
	p.mu.Lock()
	if p.begun {
		p.mu.Unlock()
		return p.to.Write(b)
	}
	p.held = append(p.held, b...)
	m := p.line.FindSubmatchIndex(p.held)
	if m == nil {
		if over := len(p.held) - maxPrelude; over > 0 {
			p.held = append(p.held[:0], p.held[over:]...)
		}
		p.mu.Unlock()
		return len(b), nil
	}
	p.pid <- string(p.held[m[2]:m[3]])
	rest := p.held[m[1]:]
	p.begun, p.held = true, nil
	p.mu.Unlock()
	if len(rest) > 0 {
		if _, err := p.to.Write(rest); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

// state tells whether the command has begun, and if not what was printed instead.
func (p *prelude) state() (text string, begun bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return string(bytes.ToValidUTF8(p.held[:min(len(p.held), 1<<10)], nil)), p.begun
}

// exitCode is the exit status, or 128 plus the signal's number.
func (e exitStatus) exitCode() int32 {
	if e.signal != "" {
		// Names that SSH does not have come as "SIG@openssh.com": 128.
		return 128 + int32(unix.SignalNum("SIG"+e.signal))
	}
	return int32(e.code)
}

func (e exitStatus) String() string {
	if e.signal != "" {
		return "signal " + string(ssh.Signal(e.signal))
	}
	return fmt.Sprintf("exit status %d", e.code)
}
