package qemu

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/digitalocean/go-qemu/qmp"
)

// ErrGuestFailed is in the error of a VM whose guest ended by itself: it reset, panicked, was left by its watchdog, or
// powered off, as ExitError.Reason tells. Any other error of VM.Err means that QEMU or the host failed.
var ErrGuestFailed = errors.New("the guest failed")

// endTimeout bounds how long a guest that has ended may keep its QEMU.
const endTimeout = 5 * time.Second

// Record is what a later daemon needs to find a VM again.
type Record struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"` // clock ticks since boot, from /proc/PID/stat
	RunDir    string `json:"runDir"`

	// Of the machine, what tells one end of it from another.
	ResetInPlace bool `json:"resetInPlace,omitempty"`
	ConsolePipe  bool `json:"consolePipe,omitempty"`
	WatchdogEnds bool `json:"watchdogEnds,omitempty"`
	// MaxMemoryBytes is the machine's; QEMU does not tell it.
	MaxMemoryBytes int64 `json:"maxMemoryBytes,omitempty"`
}

// Values of ExitError.Reason, from QEMU's ShutdownCause where it has one.
const (
	ReasonPoweroff = "guest-shutdown" // the guest powered itself off
	ReasonReset    = "guest-reset"    // the guest reset, and the machine does not ResetInPlace
	ReasonPanic    = "guest-panic"    // the guest's kernel told the panic device that it has crashed
	ReasonWatchdog = "watchdog"       // the guest did not feed its watchdog
	// ReasonUnseen is a reset or a poweroff while no daemon was there, of a machine that does not ResetInPlace.
	ReasonUnseen = "while nobody watched"
)

// ExitError tells how a VM ended. Guest failure and host failure are told apart by Guest.
type ExitError struct {
	// Guest is true when the guest ended by itself.
	Guest bool
	// Reason is why the guest ended, such as ReasonPoweroff; empty if QEMU ended on its own.
	Reason string
	// Status is how the process ended, as far as it is known.
	Status string
	// Console is the end of what the guest wrote to its console; empty with Machine.ConsolePipe.
	Console string
	// Stderr is the end of QEMU's own messages.
	Stderr string
}

func (e *ExitError) Error() string {
	var b strings.Builder
	if e.Guest {
		fmt.Fprintf(&b, "%v (%s)", ErrGuestFailed, e.Reason)
	} else {
		fmt.Fprintf(&b, "QEMU ended: %s", e.Status)
	}
	if e.Stderr != "" {
		fmt.Fprintf(&b, "; QEMU said: %s", lastLines(e.Stderr))
	}
	if e.Console != "" {
		fmt.Fprintf(&b, "; the console says: %s", lastWords(e.Console))
	}
	return b.String()
}

// Is makes a guest's failure an ErrGuestFailed, and any other an errdefs.ErrUnavailable.
func (e *ExitError) Is(target error) bool {
	if e.Guest {
		return target == ErrGuestFailed
	}
	return target == errdefs.ErrUnavailable
}

// lastWords is why a kernel panicked, or else the end of the console.
func lastWords(console string) string {
	if _, panicked, found := strings.Cut(console, "Kernel panic - not syncing: "); found {
		line, _, _ := strings.Cut(panicked, "\n")
		return "Kernel panic - not syncing: " + lastLines(line)
	}
	return lastLines(console)
}

// lastLines is the part of a long text that fits into a message, without control characters but new lines.
func lastLines(s string) string {
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' {
			return -1
		}
		return r
	}, s))
	const most = 512
	if len(s) > most {
		s = "..." + strings.ToValidUTF8(s[len(s)-most:], "")
	}
	return s
}

// VM is a running machine. It owns its goroutines; Close ends them and leaves QEMU running.
type VM struct {
	rec Record
	p   *process
	out *tail // nil if another daemon started QEMU
	// fifo keeps what the guest wrote to its console; nil if that is no pipe.
	fifo *os.File
	mon  *Monitor
	log  *slog.Logger

	copying sync.Mutex // held while a disk is copied or the state saved; taken before plug, and never waited for
	plug    sync.Mutex // held while devices are plugged or unplugged

	mu      sync.Mutex
	reason  string // of the guest's end
	console []byte
	quit    bool // QEMU was asked to end

	ended chan struct{} // closed when the guest has ended and QEMU waits
	gone  chan struct{} // closed when the process is no more
	done  chan struct{} // closed when err is set
	err   error

	ctx    context.Context
	cancel context.CancelFunc
	owned  sync.WaitGroup
	close  func() error
}

func newVM(r Record, p *process, out *tail, fifo *os.File, log *slog.Logger) *VM {
	v := &VM{
		rec: r, p: p, out: out, fifo: fifo, log: log,
		ended: make(chan struct{}), gone: make(chan struct{}), done: make(chan struct{}),
	}
	v.ctx, v.cancel = context.WithCancel(context.Background())
	v.close = sync.OnceValue(v.release)
	v.owned.Go(v.watch)
	return v
}

// connect waits for QEMU's answer, or its end.
func (v *VM) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	v.owned.Go(func() {
		select {
		case <-v.gone:
			cancel()
		case <-ctx.Done():
		}
	})
	mon, err := dialMonitor(ctx, filepath.Join(v.rec.RunDir, qmpSocket), v.event, v.log)
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.mon = mon
	v.mu.Unlock()
	v.owned.Go(v.finish)
	return nil
}

// abandon ends a VM that does not answer and adds to the error what QEMU had to say.
func (v *VM) abandon(err error) error {
	if killErr := v.p.kill(); killErr != nil {
		return errors.Join(err, killErr, v.Close())
	}
	<-v.gone
	<-v.out.done
	said := v.out.String()
	if said != "" {
		err = fmt.Errorf("QEMU ended: %s: %w", said, err)
	}
	return errors.Join(err, v.Close())
}

// Attach finds a VM that an earlier daemon started. A VM that is gone is errdefs.ErrNotFound, and an *ExitError too if the
// earlier daemon saw its guest's end. One whose guest has ended meanwhile is returned, and is done soon.
func Attach(ctx context.Context, r Record) (*VM, error) {
	v, err := attach(ctx, r)
	if err != nil {
		return nil, errors.Join(err, r.readEnd())
	}
	return v, nil
}

func attach(ctx context.Context, r Record) (*VM, error) {
	p, err := openProcess(r.PID, r.StartTime)
	if err != nil {
		return nil, err
	}
	fifo, err := r.holdConsole()
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	v := newVM(r, p, nil, fifo, slog.Default())
	if err := v.connect(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("attach to QEMU, process %d: %w", r.PID, err), v.Close())
	}
	var status struct {
		Status string `json:"status"`
	}
	if err := v.mon.Execute(ctx, "query-status", nil, &status); err != nil {
		return nil, errors.Join(err, v.Close())
	}
	if reason := r.endOf(status.Status); reason != "" {
		v.guestEnded(reason)
	}
	return v, nil
}

// endOf is why the guest has ended if QEMU is in this run state, or empty.
func (r Record) endOf(runState string) string {
	switch {
	case runState == "shutdown" && r.ResetInPlace:
		return ReasonPoweroff
	case runState == "shutdown":
		return ReasonUnseen
	case runState == "guest-panicked":
		return ReasonPanic
	case runState == "watchdog" && r.WatchdogEnds:
		return ReasonWatchdog
	}
	return ""
}

// writeEnd keeps why the guest has ended: a daemon that is killed while it ends QEMU would take that with it.
func (r Record) writeEnd(reason string) error {
	return os.WriteFile(filepath.Join(r.RunDir, endFile), fmt.Appendf(nil, "%d %d %s", r.PID, r.StartTime, reason), 0o600)
}

// readEnd returns the end that was kept as an *ExitError, or nil.
func (r Record) readEnd() error {
	data, err := os.ReadFile(filepath.Join(r.RunDir, endFile))
	reason, found := strings.CutPrefix(string(data), fmt.Sprintf("%d %d ", r.PID, r.StartTime))
	if err != nil || !found || reason == "" {
		return nil // none was kept, or that of a VM before this one
	}
	return &ExitError{Guest: true, Reason: reason, Status: "unknown"}
}

// KillRecorded ends the process of a record, and returns when it is gone. One that is gone already is no error.
func KillRecorded(ctx context.Context, r Record) error {
	p, err := openProcess(r.PID, r.StartTime)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.close() })
	defer stop()
	if err := p.kill(); err != nil {
		return errors.Join(err, p.close())
	}
	if err := p.wait(); err != nil {
		return fmt.Errorf("process %d does not end: %w", r.PID, errors.Join(err, ctx.Err()))
	}
	p.reap()
	return p.close()
}

// Record returns what Attach needs.
func (v *VM) Record() Record { return v.rec }

// AgentSocket is the path of the socket that leads to the guest's agent port. One client at a time.
func (v *VM) AgentSocket() string { return filepath.Join(v.rec.RunDir, agentSocket) }

// Done is closed when QEMU is gone. Close does not close it.
func (v *VM) Done() <-chan struct{} { return v.done }

// Err tells how the VM ended, as *ExitError, once Done is closed; nil if Quit ended it.
func (v *VM) Err() error {
	select {
	case <-v.done:
		return v.err
	default:
		return nil
	}
}

// Events subscribes to QEMU's events, see Monitor.Events.
func (v *VM) Events(ctx context.Context) (<-chan qmp.Event, error) { return v.mon.Events(ctx) }

// Monitor is the VM's QMP connection; it belongs to the VM.
func (v *VM) Monitor() *Monitor { return v.mon }

// watch waits for the end of the process and tells how it was.
func (v *VM) watch() {
	if err := v.p.wait(); err != nil {
		return // closed
	}
	status := v.p.reap()
	close(v.gone)
	if v.out != nil {
		<-v.out.done
	}
	v.mu.Lock()
	mon := v.mon
	v.mu.Unlock()
	if mon != nil {
		<-mon.closed // all events are seen
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.quit || v.reason != "" {
		e := &ExitError{Guest: v.reason != "", Reason: v.reason, Status: status, Console: strings.ToValidUTF8(string(v.console), "?")}
		if v.out != nil {
			e.Stderr = v.out.String()
		}
		v.err = e
	}
	close(v.done)
}

// event is called by the monitor's reader.
func (v *VM) event(e qmp.Event) {
	action, _ := e.Data["action"].(string)
	switch {
	case e.Event == "SHUTDOWN":
		if guest, _ := e.Data["guest"].(bool); guest {
			reason, _ := e.Data["reason"].(string)
			v.guestEnded(reason)
		}
	case e.Event == "GUEST_PANICKED" && action == "pause":
		v.guestEnded(ReasonPanic)
	case e.Event == "WATCHDOG" && action == "pause" && v.rec.WatchdogEnds:
		v.guestEnded(ReasonWatchdog)
	}
}

func (v *VM) guestEnded(reason string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.reason == "" {
		v.reason = reason
		close(v.ended)
	}
}

func (v *VM) endReason() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.reason
}

// finish ends QEMU after its guest, having read the end of the console.
func (v *VM) finish() {
	select {
	case <-v.ended:
	case <-v.gone:
		return
	case <-v.ctx.Done():
		return
	}
	ctx, cancel := context.WithTimeout(v.ctx, endTimeout)
	defer cancel()
	if _, err := v.Console(ctx); err != nil && !v.rec.ConsolePipe {
		v.log.Warn("reading the guest's console", "pid", v.rec.PID, "error", err)
	}
	if err := v.rec.writeEnd(v.endReason()); err != nil {
		v.log.Warn("keeping why the guest ended", "pid", v.rec.PID, "error", err)
	}
	err := v.mon.Execute(ctx, "quit", nil, nil)
	select {
	case <-v.gone:
		return
	case <-ctx.Done():
	}
	if v.ctx.Err() != nil {
		return
	}
	v.log.Warn("QEMU does not end after its guest; it is killed", "pid", v.rec.PID, "error", err)
	if err := v.p.kill(); err != nil {
		v.log.Error("killing QEMU", "pid", v.rec.PID, "error", err)
	}
}

// Console returns the end of what the guest has written to its console since this daemon watches it, at
// most 64 KiB, or longer ago if no daemon has read it. With Machine.ConsolePipe it is errdefs.ErrFailedPrecondition.
func (v *VM) Console(ctx context.Context) (string, error) {
	if v.rec.ConsolePipe {
		return "", fmt.Errorf("the console goes to a pipe: %w", errdefs.ErrFailedPrecondition)
	}
	var text string
	args := props{"device": "console", "size": consoleBytes, "format": "base64"}
	if err := v.mon.Execute(ctx, "ringbuf-read", args, &text); err != nil {
		return "", err
	}
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return "", fmt.Errorf("ringbuf-read: %w", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.console = append(v.console, data...)
	v.console = v.console[max(0, len(v.console)-consoleBytes):]
	return string(v.console), nil
}

// Quit ends QEMU in order, its disks flushed, and returns when it is gone. Err is nil then.
func (v *VM) Quit(ctx context.Context) error {
	v.mu.Lock()
	v.quit = true
	v.mu.Unlock()
	err := v.mon.Execute(ctx, "quit", nil, nil)
	if err != nil && !errdefs.IsUnavailable(err) {
		return err
	}
	return v.waitDone(ctx)
}

// Kill ends QEMU at once and returns when it is gone. A VM that is done is no error.
func (v *VM) Kill(ctx context.Context) error {
	select {
	case <-v.done:
		return nil
	default:
	}
	if err := v.p.kill(); err != nil {
		return err
	}
	return v.waitDone(ctx)
}

func (v *VM) waitDone(ctx context.Context) error {
	select {
	case <-v.done:
		return nil
	case <-v.ctx.Done():
		return fmt.Errorf("the VM was closed: %w", errdefs.ErrFailedPrecondition)
	case <-ctx.Done():
		return fmt.Errorf("QEMU, process %d, does not end: %w", v.rec.PID, ctx.Err())
	}
}

// Close detaches: the goroutines end, QEMU goes on. It may be called more than once.
func (v *VM) Close() error { return v.close() }

func (v *VM) release() error {
	v.cancel()
	errs := []error{v.p.close()}
	if v.mon != nil {
		errs = append(errs, v.mon.Disconnect())
	}
	if v.out != nil {
		errs = append(errs, v.out.Close())
	}
	v.owned.Wait()
	return errors.Join(append(errs, closeFile(v.fifo))...)
}
