package script

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// fakeGuest is the agent's service with scripted processes instead of containers, over the real session.
type fakeGuest struct {
	faults *faults
	trace  func(kind, text string)
	off    func() // the guest powers off
	stands func() // waits while the guest's processors are stopped

	mu         sync.Mutex
	configured bool
	processes  []*process
	files      map[string][]byte
}

var _ agentpb.AgentService = (*fakeGuest)(nil)

// serve answers the host's sessions until the port is closed.
func (g *fakeGuest) serve(port io.ReadWriteCloser) error {
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(g.intercept))
	if err != nil {
		return err
	}
	agentpb.RegisterAgentService(server, g)
	return server.Serve(context.Background(), agent.Listen(port))
}

// untraced are calls whose number and order depend on time.
func untraced() []string { return []string{"Info", "Wait", "ReadOutput", "Stats"} }

func (g *fakeGuest) intercept(ctx context.Context, um ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	name := info.FullMethod[strings.LastIndex(info.FullMethod, "/")+1:]
	if g.stands != nil {
		g.stands()
	}
	<-time.After(g.faults.delay(name)) // the fault itself: an agent that is slow
	resp, err := method(ctx, func(v any) error {
		if err := um(v); err != nil {
			return err
		}
		if !slices.Contains(untraced(), name) {
			g.trace("agent", name+" "+render(v.(proto.Message)))
		}
		return g.faults.refusal(name)
	})
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return resp, nil
}

// render is a request as one line, without what differs each time.
func render(m proto.Message) string {
	m = proto.Clone(m)
	switch r := m.(type) {
	case *agentpb.ConfigureSandboxRequest:
		r.Entropy, r.TimeUnixNano = nil, 0
	case *agentpb.AdoptRequest:
		return "{}"
	case *agentpb.CreateContainerRequest:
		r.OciSpec = []byte(strings.Join(argsOf(r.GetOciSpec()), "; "))
		return fmt.Sprintf(`{"id":%q,"args":%q,"rootfsDisk":%q}`, r.GetId(), r.GetOciSpec(), r.GetRootfsDisk())
	case *agentpb.ExecRequest:
		var p specs.Process
		_ = json.Unmarshal(r.GetProcess(), &p) // what does not parse fails in Exec
		return fmt.Sprintf(`{"containerId":%q,"args":%q}`, r.GetContainerId(), strings.Join(p.Args, "; "))
	case *agentpb.ProcessRef:
		if r.GetExecId() != "" {
			r.ExecId = "EXEC"
		}
	case *agentpb.PutFilesRequest:
		for _, e := range r.Entries {
			e.Data = nil
		}
	}
	data, err := protojson.Marshal(m)
	if err != nil {
		return err.Error()
	}
	// protojson varies its spaces on purpose.
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		return err.Error()
	}
	data, _ = json.Marshal(v) // came out of JSON
	return string(data)
}

func argsOf(oci []byte) []string {
	var s specs.Spec
	if json.Unmarshal(oci, &s) != nil || s.Process == nil {
		return nil
	}
	return scriptOf(s.Process.Args)
}

// scriptOf is what a process does. What a guest runs before it has a pod holds still, and tells how the agent is called.
func scriptOf(args []string) []string {
	switch args[0] {
	case "/rehearsal":
		return []string{"wait"}
	case "/vmagent":
		return []string{"out usage", "exit 2"}
	}
	return args
}

func (g *fakeGuest) find(container, exec string) (*process, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.processes {
		if p.container == container && p.exec == exec {
			return p, nil
		}
	}
	return nil, fmt.Errorf("no process %q of container %q: %w", exec, container, errdefs.ErrNotFound)
}

func (g *fakeGuest) add(p *process) error {
	if _, err := g.find(p.container, p.exec); err == nil {
		return fmt.Errorf("process %q of container %q: %w", p.exec, p.container, errdefs.ErrAlreadyExists)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.processes = append(g.processes, p)
	return nil
}

// drop kills and forgets the processes that match.
func (g *fakeGuest) drop(match func(*process) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.processes = slices.DeleteFunc(g.processes, func(p *process) bool {
		if match(p) {
			p.finish(128 + int32(syscall.SIGKILL))
			return true
		}
		return false
	})
}

func (g *fakeGuest) Info(context.Context, *agentpb.InfoRequest) (*agentpb.InfoResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return &agentpb.InfoResponse{AgentVersion: "fake", Configured: g.configured}, nil
}

func (g *fakeGuest) ConfigureSandbox(context.Context, *agentpb.ConfigureSandboxRequest) (*agentpb.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.configured = true
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) Standby(context.Context, *agentpb.StandbyRequest) (*agentpb.Empty, error) {
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) Prepare(context.Context, *agentpb.PrepareRequest) (*agentpb.Empty, error) {
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) Resize(context.Context, *agentpb.ResizeRequest) (*agentpb.Empty, error) {
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) PutFiles(_ context.Context, r *agentpb.PutFilesRequest) (*agentpb.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.files == nil {
		g.files = make(map[string][]byte)
	}
	for _, e := range r.GetEntries() {
		g.files[r.GetName()+"/"+e.GetPath()] = e.GetData()
	}
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) GetFile(_ context.Context, r *agentpb.GetFileRequest) (*agentpb.GetFileResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	data, ok := g.files[r.GetPath()]
	if !ok {
		return nil, fmt.Errorf("file %s: %w", r.GetPath(), errdefs.ErrNotFound)
	}
	return &agentpb.GetFileResponse{Data: data}, nil
}

func (g *fakeGuest) MountShare(context.Context, *agentpb.MountShareRequest) (*agentpb.Empty, error) {
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) CreateContainer(_ context.Context, r *agentpb.CreateContainerRequest) (*agentpb.Empty, error) {
	return &agentpb.Empty{}, g.add(newProcess(r.GetId(), "", argsOf(r.GetOciSpec())))
}

func (g *fakeGuest) StartContainer(_ context.Context, r *agentpb.StartContainerRequest) (*agentpb.StartContainerResponse, error) {
	p, err := g.find(r.GetId(), "")
	if err != nil {
		return nil, err
	}
	return &agentpb.StartContainerResponse{Pid: 100, StartedAtUnixNano: p.start().UnixNano()}, nil
}

func (g *fakeGuest) UpdateContainer(_ context.Context, r *agentpb.UpdateContainerRequest) (*agentpb.Empty, error) {
	_, err := g.find(r.GetId(), "")
	return &agentpb.Empty{}, err
}

func (g *fakeGuest) RemoveContainer(_ context.Context, r *agentpb.RemoveContainerRequest) (*agentpb.Empty, error) {
	g.drop(func(p *process) bool { return p.container == r.GetId() })
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) Exec(_ context.Context, r *agentpb.ExecRequest) (*agentpb.ExecResponse, error) {
	own, err := g.find(r.GetContainerId(), "")
	if err != nil {
		return nil, err
	}
	if s := own.state(); !s.GetStarted() || s.GetExited() {
		return nil, fmt.Errorf("container %s does not run: %w", r.GetContainerId(), errdefs.ErrFailedPrecondition)
	}
	var spec specs.Process
	if err := json.Unmarshal(r.GetProcess(), &spec); err != nil {
		return nil, fmt.Errorf("process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	p := newProcess(r.GetContainerId(), r.GetExecId(), scriptOf(spec.Args))
	if err := g.add(p); err != nil {
		return nil, err
	}
	p.start()
	return &agentpb.ExecResponse{Pid: 101}, nil
}

func (g *fakeGuest) RemoveExec(_ context.Context, r *agentpb.ProcessRef) (*agentpb.Empty, error) {
	g.drop(func(p *process) bool { return p.container == r.GetContainerId() && p.exec == r.GetExecId() })
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) Signal(_ context.Context, r *agentpb.SignalRequest) (*agentpb.Empty, error) {
	p, err := g.find(r.GetProcess().GetContainerId(), r.GetProcess().GetExecId())
	if err != nil {
		return nil, err
	}
	p.signal(syscall.Signal(r.GetSignal()))
	return &agentpb.Empty{}, nil
}

// soon ends a wait before the caller's deadline, as the agent does.
func soon(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := time.Minute
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline)*4/5)
	}
	return context.WithTimeout(ctx, limit)
}

func (g *fakeGuest) Wait(ctx context.Context, r *agentpb.ProcessRef) (*agentpb.ProcessState, error) {
	p, err := g.find(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	ctx, cancel := soon(ctx)
	defer cancel()
	return p.wait(ctx), nil
}

func (g *fakeGuest) ReadOutput(ctx context.Context, r *agentpb.ReadOutputRequest) (*agentpb.ReadOutputResponse, error) {
	p, err := g.find(r.GetProcess().GetContainerId(), r.GetProcess().GetExecId())
	if err != nil {
		return nil, err
	}
	ctx, cancel := soon(ctx)
	defer cancel()
	return p.read(ctx, [2]uint64{r.GetStdoutOffset(), r.GetStderrOffset()},
		[2]uint64{r.GetStdoutAcknowledged(), r.GetStderrAcknowledged()}, r.GetMaxBytes())
}

func (g *fakeGuest) WriteStdin(_ context.Context, r *agentpb.WriteStdinRequest) (*agentpb.WriteStdinResponse, error) {
	p, err := g.find(r.GetProcess().GetContainerId(), r.GetProcess().GetExecId())
	if err != nil {
		return nil, err
	}
	return &agentpb.WriteStdinResponse{Written: int64(len(r.GetData()))}, p.writeStdin(r.GetData())
}

func (g *fakeGuest) CloseStdin(_ context.Context, r *agentpb.ProcessRef) (*agentpb.Empty, error) {
	p, err := g.find(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	p.closeStdin()
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) ResizeTerminal(_ context.Context, r *agentpb.ResizeTerminalRequest) (*agentpb.Empty, error) {
	_, err := g.find(r.GetProcess().GetContainerId(), r.GetProcess().GetExecId())
	return &agentpb.Empty{}, err
}

func (g *fakeGuest) List(context.Context, *agentpb.ListRequest) (*agentpb.ListResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	resp := &agentpb.ListResponse{}
	for _, p := range g.processes {
		resp.Processes = append(resp.Processes, p.state())
	}
	return resp, nil
}

// Stats gives every container the same figures.
func (g *fakeGuest) Stats(context.Context, *agentpb.StatsRequest) (*agentpb.StatsResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	resp := &agentpb.StatsResponse{TimeUnixNano: time.Now().UnixNano(), Guest: &agentpb.CgroupStats{MemoryUsageBytes: 64 << 20}}
	for _, p := range g.processes {
		if p.exec == "" {
			resp.Containers = append(resp.Containers, &agentpb.ContainerStats{
				Id: p.container, WritableBytes: 4096,
				Cgroup: &agentpb.CgroupStats{CpuUsageNano: 5e6, MemoryUsageBytes: 3 << 20, MemoryWorkingSetBytes: 2 << 20},
			})
		}
	}
	return resp, nil
}

func notInFake(what string) error {
	return fmt.Errorf("the fake guest has no %s: %w", what, errdefs.ErrNotImplemented)
}

func (g *fakeGuest) Dial(context.Context, *agentpb.DialRequest) (*agentpb.DialResponse, error) {
	return nil, notInFake("network")
}

func (g *fakeGuest) ConnRead(context.Context, *agentpb.ConnReadRequest) (*agentpb.ConnReadResponse, error) {
	return nil, notInFake("network")
}

func (g *fakeGuest) ConnWrite(context.Context, *agentpb.ConnWriteRequest) (*agentpb.Empty, error) {
	return nil, notInFake("network")
}

func (g *fakeGuest) ConnClose(context.Context, *agentpb.ConnCloseRequest) (*agentpb.Empty, error) {
	return nil, notInFake("network")
}

// Shutdown powers off a moment after the answer.
func (g *fakeGuest) Shutdown(context.Context, *agentpb.ShutdownRequest) (*agentpb.Empty, error) {
	g.drop(func(*process) bool { return true })
	time.AfterFunc(20*time.Millisecond, g.off)
	return &agentpb.Empty{}, nil
}

// fakePort is the guest's end of the agent's port as a guest's driver gives it: the host comes and goes.
type fakePort struct {
	listener *net.UnixListener
	faults   *faults

	mu   sync.Mutex
	conn net.Conn
	sent int // bytes since the last drop
}

func (p *fakePort) host() (net.Conn, error) {
	p.mu.Lock()
	c := p.conn
	p.mu.Unlock()
	if c != nil {
		return c, nil
	}
	c, err := p.listener.Accept()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conn = c
	return c, nil
}

// hangUp loses the host's connection, whichever it is.
func (p *fakePort) hangUp() {
	p.mu.Lock()
	c := p.conn
	p.mu.Unlock()
	p.lose(c)
}

// lose closes a connection to the host, unless there is another one by now.
func (p *fakePort) lose(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c != nil && p.conn == c {
		_ = c.Close() // lost anyway
		p.conn, p.sent = nil, 0
	}
}

// Read gives io.EOF when the host has gone. A guest that hangs takes the bytes and does nothing with them.
func (p *fakePort) Read(b []byte) (int, error) {
	for {
		c, err := p.host()
		if err != nil {
			return 0, err
		}
		n, err := c.Read(b)
		if err != nil {
			p.lose(c)
			return 0, io.EOF
		}
		if !p.faults.hangs() {
			return n, nil
		}
	}
}

// Write loses what no host takes.
func (p *fakePort) Write(b []byte) (int, error) {
	p.mu.Lock()
	c := p.conn
	p.sent += len(b)
	lose := p.faults.loses(p.sent)
	p.mu.Unlock()
	if c == nil || p.faults.hangs() {
		return len(b), nil
	}
	out := b
	switch {
	case lose:
		out = b[:len(b)/2]
	case p.faults.damages() && len(b) > 64:
		out = slices.Clone(b)
		out[32] ^= 0x55
	}
	if _, err := c.Write(out); err != nil || lose {
		p.lose(c)
	}
	return len(b), nil
}

func (p *fakePort) Close() error {
	err := p.listener.Close()
	p.hangUp()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// guestImage is what a saved guest is.
type guestImage struct {
	Configured bool
	Processes  []image
	Files      map[string][]byte
}

func (g *fakeGuest) save() ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := guestImage{Configured: g.configured, Files: g.files}
	for _, p := range g.processes {
		i.Processes = append(i.Processes, p.save())
	}
	return json.Marshal(i)
}

// load makes the guest what was saved; its processes are frozen.
func (g *fakeGuest) load(data []byte) error {
	var i guestImage
	if err := json.Unmarshal(data, &i); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.configured, g.files = i.Configured, i.Files
	for _, saved := range i.Processes {
		p := loadProcess(saved)
		g.processes = append(g.processes, p)
		if !saved.Started.IsZero() && saved.Exited.IsZero() {
			go p.run()
		}
	}
	return nil
}

func (g *fakeGuest) Freeze(_ context.Context, r *agentpb.FreezeRequest) (*agentpb.FreezeResponse, error) {
	resp := &agentpb.FreezeResponse{}
	for _, id := range r.GetContainerIds() {
		p, err := g.find(id, "")
		if err != nil {
			return nil, err
		}
		end := p.freeze()
		resp.Ends = append(resp.Ends, &agentpb.OutputEnd{ContainerId: id, Stdout: end[0], Stderr: end[1]})
	}
	return resp, nil
}

func (g *fakeGuest) Thaw(_ context.Context, r *agentpb.ThawRequest) (*agentpb.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.processes {
		if len(r.GetContainerIds()) == 0 || slices.Contains(r.GetContainerIds(), p.container) {
			p.thaw()
		}
	}
	return &agentpb.Empty{}, nil
}

func (g *fakeGuest) Adopt(context.Context, *agentpb.AdoptRequest) (*agentpb.Empty, error) {
	return &agentpb.Empty{}, nil
}
