package script

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// faults are what is wrong with a fake VM, one to a line of the file that it boots:
//
//	boot DURATION         how long the guest takes until its agent answers
//	silent                the agent never answers
//	dies TEXT             QEMU says TEXT and ends before it speaks QMP
//	refuse NAME TEXT      the QMP command or the agent's method fails
//	slow NAME DURATION    the agent's method takes so long
//	drop BYTES            the host's connection to the agent is lost each time after so many bytes
//	step                  before it does what it is asked, the fake waits until the test has seen that
//	saving DURATION       its state takes so long to be written
//	restless              it goes on when its state is saved
//	flaky N               the first N connections are lost as they begin
//	clone FAULT           one of those above, only of VMs of pods that begin as a template
type faults struct {
	boot     time.Duration
	saving   time.Duration
	silent   bool
	restless bool
	dies     string
	refuse   map[string]string
	slow     map[string]time.Duration
	drop     int
	step     bool
	flaky    atomic.Int32

	hung    atomic.Bool
	damaged atomic.Bool
}

func parseFaults(text string, clone bool) (*faults, error) {
	f := &faults{refuse: make(map[string]string), slow: make(map[string]time.Duration)}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		line, only := strings.CutPrefix(line, "clone ")
		if only && !clone {
			continue
		}
		word, rest, _ := strings.Cut(line, " ")
		name, value, _ := strings.Cut(rest, " ")
		var err error
		switch word {
		case "":
		case "boot":
			f.boot, err = time.ParseDuration(rest)
		case "saving":
			f.saving, err = time.ParseDuration(rest)
		case "step":
			f.step = true
		case "restless":
			f.restless = true
		case "silent":
			f.silent = true
		case "dies":
			f.dies = rest
		case "refuse":
			f.refuse[name] = value
		case "slow":
			f.slow[name], err = time.ParseDuration(value)
		case "drop":
			f.drop, err = strconv.Atoi(rest)
		case "flaky":
			var n int
			n, err = strconv.Atoi(rest)
			f.flaky.Store(int32(n))
		default:
			err = errors.New("no such fault")
		}
		if err != nil {
			return nil, fmt.Errorf("fault %q: %w", line, err)
		}
	}
	return f, nil
}

func (f *faults) refusal(name string) error {
	if text, ok := f.refuse[name]; ok {
		return errors.New(text)
	}
	return nil
}

func (f *faults) delay(name string) time.Duration { return f.slow[name] }
func (f *faults) hang()                           { f.hung.Store(true) }
func (f *faults) hangs() bool                     { return f.hung.Load() }
func (f *faults) damage()                         { f.damaged.Store(true) }

// loses tells whether a connection is to be lost that has carried so many bytes.
func (f *faults) loses(sent int) bool {
	if sent > 40 && f.flaky.Load() > 0 {
		f.flaky.Add(-1)
		return true
	}
	return f.drop > 0 && sent > f.drop
}

// damages tells once that bytes are to be damaged.
func (f *faults) damages() bool { return f.damaged.CompareAndSwap(true, false) }

// report is what a fake tells the test.
type report struct {
	Name string `json:"name"` // of the machine
	PID  int    `json:"pid"`
	Kind string `json:"kind"` // args, qmp or agent
	Text string `json:"text"`
	Step bool   `json:"step"` // the fake waits for the answer
}

// controlClient is a fake's connection to the test. When it ends, so does the fake: nobody else would end it.
type controlClient struct {
	name string
	seen chan struct{} // nil without step; gets a value for each report that the test has seen
	mu   sync.Mutex
	out  *json.Encoder
}

func dialControl(name string, step bool, command func(string)) (*controlClient, error) {
	conn, err := net.Dial("unix", controlPath(os.Args[0]))
	if err != nil {
		return nil, fmt.Errorf("connect to the test: %w", err)
	}
	c := &controlClient{name: name, out: json.NewEncoder(conn)}
	if step {
		c.seen = make(chan struct{}, 1)
	}
	go func() {
		lines := bufio.NewScanner(conn)
		for lines.Scan() {
			if lines.Text() == sawIt {
				c.seen <- struct{}{}
				continue
			}
			command(lines.Text())
		}
		os.Exit(4)
	}()
	return c, nil
}

// sawIt answers a report of a fake that steps.
const sawIt = "saw"

func (c *controlClient) trace(kind, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.out.Encode(report{Name: c.name, PID: os.Getpid(), Kind: kind, Text: text, Step: c.seen != nil}); err != nil {
		os.Exit(4)
	}
	if c.seen != nil {
		<-c.seen
	}
}

// controlServer is the test's end: it knows every fake that was started, and what it was asked.
type controlServer struct {
	listener net.Listener
	owned    sync.WaitGroup

	mu    sync.Mutex
	boots map[string][]*boot // by the machine's name
	hook  func(report)       // called with each report of a fake that steps, before it goes on
}

// watch sets the hook.
func (s *controlServer) watch(hook func(report)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hook = hook
}

// boot is one process of a fake QEMU.
type boot struct {
	pid     int
	conn    net.Conn
	reports []report
	ended   bool // the connection, and so the process
}

func listenControl(path string) (*controlServer, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o777); err != nil { // the fake has a user of its own
		return nil, errors.Join(err, l.Close())
	}
	s := &controlServer{listener: l, boots: make(map[string][]*boot)}
	s.owned.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.owned.Go(func() { s.collect(conn) })
		}
	})
	return s, nil
}

func (s *controlServer) collect(conn net.Conn) {
	defer conn.Close()
	in := json.NewDecoder(conn)
	var b *boot
	for {
		var r report
		if err := in.Decode(&r); err != nil {
			break
		}
		s.mu.Lock()
		if b == nil {
			b = &boot{pid: r.PID, conn: conn}
			s.boots[r.Name] = append(s.boots[r.Name], b)
		}
		b.reports = append(b.reports, r)
		hook := s.hook
		s.mu.Unlock()
		if r.Step {
			if hook != nil {
				hook(r)
			}
			_, _ = conn.Write([]byte(sawIt + "\n")) // a fake that has ended waits for nothing
		}
	}
	if b != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		b.ended = true
	}
}

// latest is the newest boot of a pod that runs, nil if there is none.
func (s *controlServer) latest(podID string) *boot {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.boots["vmruntime-"+podID[:16]]
	if len(all) == 0 || all[len(all)-1].ended {
		return nil
	}
	return all[len(all)-1]
}

// running tells how many fakes run.
func (s *controlServer) running() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, all := range s.boots {
		for _, b := range all {
			if !b.ended {
				n++
			}
		}
	}
	return n
}

// reports is what the pod's fakes were asked so far.
func (s *controlServer) reports(podID string) []report {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []report
	for _, b := range s.boots["vmruntime-"+podID[:16]] {
		out = append(out, b.reports...)
	}
	return out
}

// close ends all fakes that still run, and returns when nothing of the server runs.
func (s *controlServer) close() error {
	err := s.listener.Close()
	s.mu.Lock()
	for _, all := range s.boots {
		for _, b := range all {
			_ = b.conn.Close() // may be closed
		}
	}
	s.mu.Unlock()
	s.owned.Wait()
	return err
}
