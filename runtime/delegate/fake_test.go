package delegate

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// side is a CRI runtime that holds a few pods and containers in memory. It stands for containerd where a
// fault has to be forced at a certain moment, and for our own runtime, which has its own tests.
type side struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	name       string
	pods       []string
	containers []string
	// root is where its images are, and layers, unless empty, where it says that its containers' writable layers are.
	root, layers string

	mu    sync.Mutex
	fault func(method string) error // asked before each answer
	calls []string
	md    metadata.MD
	// deadline is that of the last call.
	deadline time.Time
	// unknown are the unknown fields of the last RunPodSandbox, and those of every ListContainers.
	unknown  []byte
	events   chan *runtimeapi.ContainerEventResponse
	endEvent chan error
}

func newSide(name string, pods, containers []string) *side {
	return &side{
		name: name, pods: pods, containers: containers,
		events:   make(chan *runtimeapi.ContainerEventResponse),
		endEvent: make(chan error, 1),
	}
}

func (s *side) setFault(f func(method string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// enter records the call and gives the forced fault.
func (s *side) enter(ctx context.Context, method string) error {
	s.mu.Lock()
	s.calls = append(s.calls, method)
	s.md, _ = metadata.FromIncomingContext(ctx)
	s.deadline, _ = ctx.Deadline()
	fault := s.fault
	s.mu.Unlock()
	if fault != nil {
		return fault(method)
	}
	return nil
}

func (s *side) takeCalls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.calls
	s.calls = nil
	return c
}

func owns(ids []string, prefix string) bool {
	n := 0
	for _, id := range ids {
		if strings.HasPrefix(id, prefix) {
			n++
		}
	}
	return n == 1
}

func (s *side) OwnsPod(id string) bool       { return owns(s.pods, id) }
func (s *side) OwnsContainer(id string) bool { return owns(s.containers, id) }
func (s *side) Handles(h string) bool        { return h == "vm" }

func (s *side) ImageFilesystem(ctx context.Context) (*runtimeapi.FilesystemUsage, error) {
	return filesystem(s.root, 1000, 10), s.enter(ctx, "ImageFilesystem")
}

func filesystem(dir string, used, inodes uint64) *runtimeapi.FilesystemUsage {
	return &runtimeapi.FilesystemUsage{
		Timestamp: 7, FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: dir},
		UsedBytes: &runtimeapi.UInt64Value{Value: used}, InodesUsed: &runtimeapi.UInt64Value{Value: inodes},
	}
}

func (s *side) Version(ctx context.Context, _ *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	if err := s.enter(ctx, "Version"); err != nil {
		return nil, err
	}
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: s.name, RuntimeVersion: "1.0.0", RuntimeApiVersion: "v1-" + s.name}, nil
}

func (s *side) Status(ctx context.Context, _ *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	if err := s.enter(ctx, "Status"); err != nil {
		return nil, err
	}
	return &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{{Type: "RuntimeReady", Status: true}}},
	}, nil
}

func (s *side) RuntimeConfig(ctx context.Context, _ *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	if err := s.enter(ctx, "RuntimeConfig"); err != nil {
		return nil, err
	}
	driver := runtimeapi.CgroupDriver_SYSTEMD
	if s.name == "vm" {
		driver = runtimeapi.CgroupDriver_CGROUPFS
	}
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

func (s *side) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	s.unknown = r.ProtoReflect().GetUnknown()
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: s.name}, s.enter(ctx, "RunPodSandbox")
}

func (s *side) PodSandboxStatus(ctx context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	if err := s.enter(ctx, "PodSandboxStatus"); err != nil {
		return nil, err
	}
	if !owns(s.pods, r.PodSandboxId) {
		return nil, status.Error(codes.NotFound, s.name+" has no such pod")
	}
	return &runtimeapi.PodSandboxStatusResponse{Info: map[string]string{"side": s.name}}, nil
}

func (s *side) StopPodSandbox(ctx context.Context, _ *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	return &runtimeapi.StopPodSandboxResponse{}, s.enter(ctx, "StopPodSandbox")
}

func (s *side) StopContainer(ctx context.Context, _ *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	return &runtimeapi.StopContainerResponse{}, s.enter(ctx, "StopContainer")
}

func (s *side) ContainerStatus(ctx context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	if err := s.enter(ctx, "ContainerStatus"); err != nil {
		return nil, err
	}
	if !owns(s.containers, r.ContainerId) {
		return nil, status.Error(codes.NotFound, s.name+" has no such container")
	}
	return &runtimeapi.ContainerStatusResponse{}, nil
}

func (s *side) ListPodSandbox(ctx context.Context, _ *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	resp := &runtimeapi.ListPodSandboxResponse{}
	for _, id := range s.pods {
		resp.Items = append(resp.Items, &runtimeapi.PodSandbox{Id: id})
	}
	return resp, s.enter(ctx, "ListPodSandbox")
}

func (s *side) ListContainers(ctx context.Context, _ *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	resp := &runtimeapi.ListContainersResponse{}
	resp.ProtoReflect().SetUnknown(s.unknown)
	for _, id := range s.containers {
		resp.Containers = append(resp.Containers, &runtimeapi.Container{Id: id})
	}
	return resp, s.enter(ctx, "ListContainers")
}

func (s *side) StreamPodSandboxes(_ *runtimeapi.StreamPodSandboxesRequest, ss grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxesResponse]) error {
	if err := s.enter(ss.Context(), "StreamPodSandboxes"); err != nil {
		return err
	}
	for _, id := range s.pods {
		if err := ss.Send(&runtimeapi.StreamPodSandboxesResponse{PodSandboxes: []*runtimeapi.PodSandbox{{Id: id}}}); err != nil {
			return err
		}
	}
	return nil
}

func (s *side) GetContainerEvents(_ *runtimeapi.GetEventsRequest, ss grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	if err := s.enter(ss.Context(), "GetContainerEvents"); err != nil {
		return err
	}
	for {
		select {
		case e := <-s.events:
			if err := ss.Send(e); err != nil {
				return err
			}
		case err := <-s.endEvent:
			return err
		case <-ss.Context().Done():
			return ss.Context().Err()
		}
	}
}

func (s *side) ImageFsInfo(ctx context.Context, _ *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	if err := s.enter(ctx, "ImageFsInfo"); err != nil {
		return nil, err
	}
	info := &runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{filesystem(s.root, 1, 1)}}
	if s.layers != "" {
		info.ContainerFilesystems = []*runtimeapi.FilesystemUsage{filesystem(s.layers, 3, 1)}
	}
	return info, nil
}

func (s *side) ImageStatus(ctx context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	if err := s.enter(ctx, "ImageStatus"); err != nil {
		return nil, err
	}
	_ = grpc.SetTrailer(ctx, metadata.Pairs("side", s.name))
	return &runtimeapi.ImageStatusResponse{Info: map[string]string{"image": r.GetImage().GetImage()}}, nil
}

func (s *side) StreamImages(_ *runtimeapi.StreamImagesRequest, ss grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	for _, id := range []string{"i1", "i2"} {
		if err := ss.Send(&runtimeapi.StreamImagesResponse{Images: []*runtimeapi.Image{{Id: id}}}); err != nil {
			return err
		}
	}
	return nil
}

// echo answers any method that this version does not know with the bytes of the request.
func echo(_ any, ss grpc.ServerStream) error {
	for {
		f := new(frame)
		if err := ss.RecvMsg(f); err != nil {
			return nil
		}
		if err := ss.SendMsg(f); err != nil {
			return err
		}
	}
}

// node is both sides behind one socket, as on a node.
type node struct {
	vm, containerd *side
	server         *Server
	conn           *grpc.ClientConn
	cri            runtimeapi.RuntimeServiceClient
	images         runtimeapi.ImageServiceClient
	socket         string
	stop           func() // ends the stand-in for containerd
}

func newNode(t testing.TB) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{
		vm:         newSide("vm", []string{id("aa"), id("ab")}, []string{id("ca")}),
		containerd: newSide("containerd", []string{id("b")}, []string{id("d")}),
		socket:     filepath.Join(dir, "c.sock"),
	}
	n.startContainerd(t)
	t.Cleanup(func() { n.stop() })
	up := must(t)(Dial(n.socket))
	t.Cleanup(func() { _ = up.Close() })
	n.server = New(Options{VM: n.vm, Containerd: up, Logger: slog.New(slog.DiscardHandler)})
	front := filepath.Join(dir, "v.sock")
	l, err := net.Listen("unix", front)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- n.server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		n.server.Stop(ctx)
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	n.conn = must(t)(Dial(front))
	t.Cleanup(func() { _ = n.conn.Close() })
	n.cri, n.images = runtimeapi.NewRuntimeServiceClient(n.conn), runtimeapi.NewImageServiceClient(n.conn)
	n.server.SetReady()
	return n
}

func must(t testing.TB) func(*grpc.ClientConn, error) *grpc.ClientConn {
	return func(c *grpc.ClientConn, err error) *grpc.ClientConn {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
}

// startContainerd serves the stand-in on the node's socket.
func (n *node) startContainerd(t testing.TB) {
	t.Helper()
	l, err := net.Listen("unix", n.socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.ForceServerCodecV2(codec{}), grpc.UnknownServiceHandler(echo),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	runtimeapi.RegisterRuntimeServiceServer(srv, n.containerd)
	runtimeapi.RegisterImageServiceServer(srv, n.containerd)
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	n.stop = sync.OnceFunc(func() {
		srv.Stop()
		if err := <-ended; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("stand-in for containerd: %v", err)
		}
	})
}

// id makes an ID of full length.
func id(prefix string) string { return prefix + strings.Repeat("0", fullID-len(prefix)) }

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Fatalf("error %v: code %s, want %s", err, got, want)
	}
}

func wantCalls(t *testing.T, s *side, want ...string) {
	t.Helper()
	if got := s.takeCalls(); !slices.Equal(got, want) {
		t.Errorf("calls of %s: %v, want %v", s.name, got, want)
	}
}
