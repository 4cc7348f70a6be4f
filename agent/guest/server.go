// Package guest is the agent inside the guest: the service of package agentpb on top of crun and the
// kernel's own files, and the duties of PID 1.
//
// Invariants:
//   - Only the reaper waits for children.
//   - What a call has begun is finished even if the host goes away meanwhile; the host learns it by List.
//   - Output is kept until the host has acknowledged it, within a bound that blocks the writer.
//   - The end of a container's process ends all of the container.
//   - Connections made by Dial belong to the session and end with it; nothing else does.
package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// Options say where things are. The zero value is that of a guest.
type Options struct {
	// Root holds all files of the agent; "/run/vm" if empty.
	Root string
	// Crun is the path of the OCI runtime, CrunRoot its directory of states; "/usr/bin/crun" and
	// "/run/crun" if empty.
	Crun, CrunRoot string
	// Version is told by Info.
	Version string
	// PowerOff ends the guest after Shutdown.
	PowerOff func()
	Log      *slog.Logger
}

// Server is the agent's service. One Server lives as long as its guest.
type Server struct {
	opts   Options
	log    *slog.Logger
	reaper *reaper
	// crunFile is crun in a sealed memory file.
	crunFile *os.File
	images   imageMounts
	// work are the goroutines that follow processes.
	work sync.WaitGroup
	// consoles numbers the sockets for terminals.
	consoles atomic.Uint64
	// execRuns numbers the execs.
	execRuns atomic.Uint64

	sandbox    sync.Mutex // serialises ConfigureSandbox, MountShare, Shutdown
	configured atomic.Bool
	bound      bool         // the devices of a restored guest have been bound anew; sandbox guards it
	limits     memoryLimits // sandbox guards it
	files      sync.Mutex   // serialises PutFiles
	bringing   sync.Mutex   // serialises bringExec

	// machine says that the guest has booted an operating system of its own; see machine.go.
	machine bool

	mu         sync.Mutex
	containers map[string]*container
	pausePID   int
	prepared   *waiting // until the first container has it
	nextExec   nextExec
	lastExec   time.Time // when one came or was removed last

	// userns is set once, by ConfigureSandbox, if the pod has one.
	userns atomic.Pointer[userns]
}

var _ agentpb.AgentService = (*session)(nil)

// New makes the service. From then on it reaps all children of this process.
func New(opts Options) (*Server, error) {
	setDefault(&opts.Root, "/run/vm")
	setDefault(&opts.Crun, "/usr/bin/crun")
	setDefault(&opts.CrunRoot, "/run/crun")
	if opts.Log == nil {
		opts.Log = slog.Default()
	}
	s := &Server{
		opts: opts, log: opts.Log, containers: make(map[string]*container),
	}
	s.images = imageMounts{mount: s.mountImage, used: make(map[string]*imageMount)}
	for _, dir := range []string{"files", "shares", "images", "disks", "containers", "sandbox/shm", "scratch", execsDir} {
		if err := os.MkdirAll(filepath.Join(opts.Root, dir), 0o755); err != nil {
			return nil, err
		}
	}
	if err := becomeSubreaper(); err != nil {
		return nil, err
	}
	var err error
	if s.crunFile, err = sealedCopy(opts.Crun); err != nil {
		return nil, err
	}
	s.reaper = newReaper()
	return s, nil
}

func becomeSubreaper() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become a subreaper: %w", err)
	}
	return nil
}

func setDefault(field *string, value string) {
	if *field == "" {
		*field = value
	}
}

func (s *Server) containersDir() string { return filepath.Join(s.opts.Root, "containers") }

// consolePath gives a new socket path; short, since a Unix address has at most 107 bytes.
func (s *Server) consolePath() string {
	return filepath.Join(s.opts.Root, fmt.Sprintf("tty%d", s.consoles.Add(1)))
}

// Serve answers the host's sessions until the listener ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	var sessions sync.WaitGroup
	defer sessions.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		sessions.Go(func() { s.serveSession(ctx, c) })
	}
}

// Close kills the containers, ends what follows them and stops reaping.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if s.machine {
		return s.closeMachine(ctx)
	}
	err := s.removeAll(ctx)
	s.work.Wait()
	if w := s.takePrepared(&process{}); w != nil {
		err = errors.Join(err, s.endWaiting(w))
	}
	err = errors.Join(err, s.dropNextExec(s.takeExec(&process{})))
	s.reaper.close()
	return errors.Join(err, s.crunFile.Close())
}

func (s *Server) removeAll(ctx context.Context) error {
	s.mu.Lock()
	var ids []string
	for id := range s.containers {
		ids = append(ids, id)
	}
	holders := []int{s.pausePID}
	s.mu.Unlock()
	var errs []error
	for _, id := range ids {
		_, err := s.RemoveContainer(ctx, &agentpb.RemoveContainerRequest{Id: id})
		errs = append(errs, err)
	}
	if ns := s.userns.Load(); ns != nil {
		holders = append(holders, ns.pid)
	}
	for _, pid := range holders {
		_, err := s.reaper.kill(pid, syscall.SIGKILL)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// serveSession serves one connection.
func (s *Server) serveSession(ctx context.Context, c net.Conn) {
	one := &oneListener{conns: make(chan net.Conn, 1), closed: make(chan struct{})}
	conn := &watchedConn{Conn: c, onClose: one.shut}
	one.conns <- conn
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(answerErrors))
	if err != nil {
		s.log.Error("serve the host", "error", err)
		_ = c.Close()
		return
	}
	ss := &session{Server: s, conns: make(map[uint64]*guestConn)}
	if s.machine {
		agentpb.RegisterAgentService(srv, &machineSession{ss})
	} else {
		agentpb.RegisterAgentService(srv, ss)
	}
	s.log.Info("session with the host begins")
	err = srv.Serve(ctx, one)
	ss.closeAll()
	_ = c.Close()
	s.log.Info("session with the host has ended", "reason", err)
}

// answerErrors gives errors their gRPC code.
func answerErrors(ctx context.Context, um ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	resp, err := method(ctx, um)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return resp, nil
}

// oneListener gives one connection and ends when that is closed.
type oneListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *oneListener) shut() { l.once.Do(func() { close(l.closed) }) }

func (l *oneListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *oneListener) Close() error   { l.shut(); return nil }
func (l *oneListener) Addr() net.Addr { return &net.UnixAddr{Name: "session", Net: "unix"} }

type watchedConn struct {
	net.Conn
	onClose func()
}

func (c *watchedConn) Close() error {
	defer c.onClose()
	return c.Conn.Close()
}

// Info tells what runs here.
func (s *Server) Info(context.Context, *agentpb.InfoRequest) (*agentpb.InfoResponse, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, err
	}
	var bootID []byte
	if s.configured.Load() || s.machine {
		var err error
		if bootID, err = os.ReadFile("/proc/sys/kernel/random/boot_id"); err != nil {
			return nil, err
		}
	}
	return &agentpb.InfoResponse{
		AgentVersion: s.opts.Version, KernelRelease: unix.ByteSliceToString(uts.Release[:]),
		BootId: strings.TrimSpace(string(bootID)), Configured: s.configured.Load(),
		CpusOnline: int32(runtime.NumCPU()), MemoryTotalBytes: int64(readMeminfo()["MemTotal"]), Machine: s.machine,
	}, nil
}

// longest bounds one wait; the host asks again.
const longest = time.Minute

// waitContext ends before the host's own deadline, so that the host gets an answer instead of an error.
func waitContext(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := longest
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline)*4/5)
	}
	return context.WithTimeout(ctx, limit)
}

// Wait answers with the state at the process's end; without an end, before the call's deadline.
func (s *Server) Wait(ctx context.Context, ref *agentpb.ProcessRef) (*agentpb.ProcessState, error) {
	_, p, err := s.process(ref)
	if err != nil {
		return nil, err
	}
	ctx, cancel := waitContext(ctx)
	defer cancel()
	return p.wait(ctx), nil
}

// maxOutput bounds the bytes of one answer.
const maxOutput = 256 << 10

// ReadOutput acknowledges and reads. An answer with neither chunks nor eof says that nothing came in time.
func (s *Server) ReadOutput(ctx context.Context, req *agentpb.ReadOutputRequest) (*agentpb.ReadOutputResponse, error) {
	_, p, err := s.process(req.Process)
	if err != nil {
		return nil, err
	}
	limit := int64(maxOutput)
	if req.MaxBytes > 0 {
		limit = min(limit, req.MaxBytes)
	}
	ctx, cancel := waitContext(ctx)
	defer cancel()
	offsets, acknowledged := [2]uint64{req.StdoutOffset, req.StderrOffset}, [2]uint64{req.StdoutAcknowledged, req.StderrAcknowledged}
	chunks, eof, err := p.out.read(ctx, offsets, acknowledged, limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.name(), err)
	}
	resp := &agentpb.ReadOutputResponse{Chunks: chunks, Eof: eof}
	if eof && p.hasExited() {
		resp.State = p.state()
	}
	return resp, nil
}

// WriteStdin answers when the bytes are in the pipe, or in time before the deadline with how many of them are.
func (s *Server) WriteStdin(ctx context.Context, req *agentpb.WriteStdinRequest) (*agentpb.WriteStdinResponse, error) {
	_, p, err := s.process(req.Process)
	if err != nil {
		return nil, err
	}
	ctx, cancel := waitContext(ctx)
	defer cancel()
	n, err := p.writeStdin(ctx, req.Data)
	if err != nil {
		return nil, err
	}
	return &agentpb.WriteStdinResponse{Written: int64(n)}, nil
}

// CloseStdin closes the pipe of an exec, or of a container with stdin_once. It does nothing to a terminal.
func (s *Server) CloseStdin(_ context.Context, ref *agentpb.ProcessRef) (*agentpb.Empty, error) {
	_, p, err := s.process(ref)
	if err != nil {
		return nil, err
	}
	p.closeStdin()
	return &agentpb.Empty{}, nil
}

// ResizeTerminal sets the size in characters.
func (s *Server) ResizeTerminal(_ context.Context, req *agentpb.ResizeTerminalRequest) (*agentpb.Empty, error) {
	_, p, err := s.process(req.Process)
	if err != nil {
		return nil, err
	}
	return &agentpb.Empty{}, p.resize(req.Width, req.Height)
}

// Signal signals one process, or all of a container.
func (s *Server) Signal(_ context.Context, req *agentpb.SignalRequest) (*agentpb.Empty, error) {
	c, p, err := s.process(req.Process)
	if err != nil {
		return nil, err
	}
	sig := syscall.Signal(req.Signal)
	if sig < 0 || sig > 64 {
		return nil, fmt.Errorf("signal %d: want 0 to 64: %w", req.Signal, errdefs.ErrInvalidArgument)
	}
	if req.All {
		return &agentpb.Empty{}, signalAll(c.cgroup, sig)
	}
	pid := p.state().Pid
	if pid == 0 {
		return nil, fmt.Errorf("%s has not been started: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	_, err = s.reaper.kill(int(pid), sig)
	return &agentpb.Empty{}, err
}

func signalAll(cgroup string, sig syscall.Signal) error {
	if sig == syscall.SIGKILL {
		return killCgroup(cgroup)
	}
	pids, err := cgroupProcs(cgroup)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// List tells all processes.
func (s *Server) List(context.Context, *agentpb.ListRequest) (*agentpb.ListResponse, error) {
	resp := &agentpb.ListResponse{}
	for _, c := range s.allContainers() {
		for _, p := range c.processes() {
			resp.Processes = append(resp.Processes, p.state())
		}
	}
	return resp, nil
}

func (s *Server) allContainers() []*container {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	return all
}

// Stats reads the figures of the guest and of the asked containers. An unknown ID is left out: it may
// have been removed meanwhile.
func (s *Server) Stats(_ context.Context, req *agentpb.StatsRequest) (*agentpb.StatsResponse, error) {
	resp := &agentpb.StatsResponse{TimeUnixNano: time.Now().UnixNano(), Guest: &agentpb.CgroupStats{
		ProcessCount: processesIn(s.cgroupRoot()), IoPressure: readPressure("/proc/pressure/io"),
	}}
	wanted := make(map[string]bool, len(req.ContainerIds))
	for _, id := range req.ContainerIds {
		wanted[id] = true
	}
	for _, c := range s.allContainers() {
		if len(wanted) > 0 && !wanted[c.id] {
			continue
		}
		st := &agentpb.ContainerStats{Id: c.id, Cgroup: cgroupStats(c.cgroup)}
		if c.upper != "" {
			st.WritableBytes, st.WritableInodes = c.usage.measure(c.upper)
			measureFileSystem(st, c.upper)
		}
		if req.GetDescriptors() {
			st.FileDescriptors, st.Sockets = descriptorsIn(c.cgroup)
		}
		resp.Containers = append(resp.Containers, st)
	}
	return resp, nil
}
