// Package agent carries the calls of package agentpb between the node and a guest over one virtio-serial
// port, and is the node's client.
//
// A port is a pair of byte pipes that outlive both ends' programs: bytes that a dead daemon wrote may still
// reach the guest, and bytes for it may still reach its successor. So the port carries frames, and each
// frame carries the nonce of its session:
//
//	host                               guest
//	 | -- HELLO nonce (repeated) -------> |   ends any other session, begins this one
//	 | <------------------- ACK nonce --- |
//	 | <====== DATA nonce seq bytes ====> |   seq counts from 0 in each direction
//	 | <------------------- BYE nonce --- |   only if the guest gives the session up
//
// Invariants:
//   - A session delivers exactly the bytes that were sent, in order, or it ends. Frames are checked by a
//     checksum and by their number; a damaged or missing one ends the session.
//   - Frames of any other session are dropped in both directions.
//   - The guest has at most one session; a HELLO with a new nonce ends the old one at once, whether or not
//     the guest saw the host go away.
//   - The guest's reader never waits for the session's user for ever: a session whose user does not read
//     for stallTimeout is ended, so that the next HELLO is always seen.
package agent

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// PortName is the name of the virtio-serial port.
const PortName = "org.vmruntime.agent.0"

// MachineID is the container whose execs are the processes of a machine.
const MachineID = "machine"

const (
	// inboxFrames bounds what is received and not yet read: 64 frames of at most 16 KiB.
	inboxFrames  = 64
	stallTimeout = 10 * time.Second
)

var (
	errReplaced = errors.New("the host has begun another session")
	errStalled  = errors.New("received bytes are not being read")
	errGap      = errors.New("bytes were lost on the port")
	errBye      = errors.New("the guest has ended the session")
)

// port serialises writes of whole frames.
type port struct {
	rw  io.ReadWriteCloser
	mu  sync.Mutex
	buf []byte
}

// send writes one frame. check is asked under the lock, right before the write.
func (p *port) send(f frame, check func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if check != nil {
		if err := check(); err != nil {
			return err
		}
	}
	p.buf = p.buf[:0]
	if f.kind != kindData {
		// What a writer may have left half written ends here.
		p.buf = append(p.buf, 0)
	}
	p.buf = appendFrame(p.buf, f)
	_, err := p.rw.Write(p.buf)
	return err
}

// conn is one session as a net.Conn. Reads and writes may be used at the same time.
type conn struct {
	port  *port
	nonce uint64
	inbox chan []byte
	rest  []byte // of the frame being read; the reader's own
	// recvSeq belongs to the goroutine that reads the port.
	recvSeq uint32

	sendMu  sync.Mutex
	sendSeq uint32

	endOnce sync.Once
	done    chan struct{}
	err     error // why; readable when done is closed
	onClose func()
}

func newConn(p *port, nonce uint64, onClose func()) *conn {
	return &conn{
		port: p, nonce: nonce, onClose: onClose,
		inbox: make(chan []byte, inboxFrames),
		done:  make(chan struct{}),
	}
}

// end ends the session for the given reason. The first reason stays.
func (c *conn) end(err error) {
	c.endOnce.Do(func() {
		c.err = err
		close(c.done)
	})
}

func (c *conn) ended() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// deliver hands a received data frame to the session's reader.
func (c *conn) deliver(f frame) error {
	if f.seq != c.recvSeq {
		return errGap
	}
	c.recvSeq++
	select {
	case c.inbox <- f.payload:
		return nil
	default:
	}
	stall := time.NewTimer(stallTimeout)
	defer stall.Stop()
	select {
	case c.inbox <- f.payload:
		return nil
	case <-c.done:
		return nil
	case <-stall.C:
		return errStalled
	}
}

// Read gives the session's bytes; io.EOF once it has ended.
func (c *conn) Read(b []byte) (int, error) {
	if len(c.rest) == 0 {
		select {
		case c.rest = <-c.inbox:
		case <-c.done:
			return 0, io.EOF
		}
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Write sends b. It blocks while the port is full.
func (c *conn) Write(b []byte) (int, error) {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	sent := 0
	for sent < len(b) {
		part := b[sent:min(len(b), sent+maxPayload)]
		f := frame{nonce: c.nonce, kind: kindData, seq: c.sendSeq, payload: part}
		if err := c.port.send(f, c.ended); err != nil {
			return sent, err
		}
		c.sendSeq++
		sent += len(part)
	}
	return sent, nil
}

// Close ends the session.
func (c *conn) Close() error {
	c.end(net.ErrClosed)
	if c.onClose != nil {
		c.onClose()
	}
	return nil
}

func (c *conn) LocalAddr() net.Addr  { return portAddr{} }
func (c *conn) RemoteAddr() net.Addr { return portAddr{} }

// The session has no deadlines: every call above it has its own.
func (c *conn) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (c *conn) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (c *conn) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

type portAddr struct{}

func (portAddr) Network() string { return "virtio-serial" }
func (portAddr) String() string  { return PortName }

func nonceOf(b [8]byte) uint64 { return binary.BigEndian.Uint64(b[:]) }
