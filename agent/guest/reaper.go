package guest

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// exit is how and when a process ended.
type exit struct {
	status unix.WaitStatus
	at     time.Time
}

// code is the exit status, or 128 plus the signal's number.
func (e exit) code() int {
	if e.status.Signaled() {
		return 128 + int(e.status.Signal())
	}
	return e.status.ExitStatus()
}

// reaper collects every child of this process: its own, and those that crun leaves to it. It is the only
// one that waits for children. A process is reaped and forgotten under one lock, so a signal sent through
// the reaper never meets a number that has been given to another process.
type reaper struct {
	mu sync.Mutex
	// starts counts the starts under way. While there are any, exits that nobody watches yet are kept.
	starts  int
	strays  map[int]exit
	watched map[int]func(exit)

	signals chan os.Signal
	stop    chan struct{}
	loop    sync.WaitGroup
}

func newReaper() *reaper {
	r := &reaper{
		strays:  make(map[int]exit),
		watched: make(map[int]func(exit)),
		signals: make(chan os.Signal, 1),
		stop:    make(chan struct{}),
	}
	signal.Notify(r.signals, unix.SIGCHLD)
	r.loop.Go(r.run)
	return r
}

func (r *reaper) close() {
	signal.Stop(r.signals)
	close(r.stop)
	r.loop.Wait()
}

func (r *reaper) run() {
	for {
		select {
		case <-r.signals:
			r.collect()
		case <-r.stop:
			return
		}
	}
}

func (r *reaper) collect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var e exit
		pid, err := unix.Wait4(-1, &e.status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		e.at = time.Now()
		if report, ok := r.watched[pid]; ok {
			delete(r.watched, pid)
			report(e)
		} else if r.starts > 0 {
			r.strays[pid] = e
		}
	}
}

// starting must be called before a process is started that watch is to be called for, ended after that.
func (r *reaper) starting() (ended func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.starts++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.starts--; r.starts == 0 {
			clear(r.strays)
		}
	}
}

// watch calls report once when the process has ended, also if it has already. report must not block.
func (r *reaper) watch(pid int, report func(exit)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.strays[pid]; ok {
		delete(r.strays, pid)
		report(e)
		return
	}
	r.watched[pid] = report
}

// kill signals a watched process. It tells false when that has ended.
func (r *reaper) kill(pid int, sig syscall.Signal) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.watched[pid]; !ok {
		return false, nil
	}
	return true, unix.Kill(pid, sig)
}

// start starts a program and reports its end. The files become its descriptors 0, 1, 2.
func (r *reaper) start(argv []string, files []uintptr, sys *syscall.SysProcAttr, report func(exit)) (int, error) {
	defer r.starting()()
	pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Files: files, Sys: sys,
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", argv[0], err)
	}
	r.watch(pid, report)
	return pid, nil
}

// runProgram starts a program, waits for its end and gives its exit code. When ctx ends it is killed.
func (r *reaper) runProgram(ctx context.Context, argv []string, files []uintptr) (int, error) {
	ended := make(chan exit, 1)
	pid, err := r.start(argv, files, nil, func(e exit) { ended <- e })
	if err != nil {
		return 0, err
	}
	code, err := r.await(ctx, pid, ended)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", argv[0], err)
	}
	return code, nil
}

// await waits for the end of a process that was started, which ended tells, and gives its exit code. When ctx ends it is killed.
func (r *reaper) await(ctx context.Context, pid int, ended chan exit) (int, error) {
	select {
	case e := <-ended:
		return e.code(), nil
	case <-ctx.Done():
		if _, err := r.kill(pid, unix.SIGKILL); err != nil {
			return 0, fmt.Errorf("kill it: %w", err)
		}
		<-ended
		return 0, context.Cause(ctx)
	}
}
