// Package delegate is the one CRI socket in front of two runtimes: our own for pods that become VMs, and
// containerd's for everything else.
//
//	            kubelet, crictl
//	                  |
//	   ready? -> log -> panic guard            every call
//	                  |
//	       owner of the method (owners.go)
//	    /             |             \
//	VM side        both, merged     containerd, bytes unparsed
//
// Invariants:
//
//   - Every method of both services is placed in owners.go; methods that the CRI gained since go to containerd as bytes.
//   - What goes to containerd and what comes back is not changed: metadata, deadlines, status details, fields
//     that we do not know.
//   - A merged answer is whole or an error. A list that lacked one side would make the kubelet kill or recreate that side's pods.
//   - Until SetReady every call answers Unavailable, Version too: a kubelet that starts meanwhile tries again.
//   - containerd being away touches only the calls that need it.
package delegate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage is what kubelet and containerd take as the largest message.
const maxMessage = 16 << 20

// window and bufferSize hold the usual lists whole, in bytes.
const (
	window     = 1 << 20
	bufferSize = 128 << 10
)

// VMSide is the runtime of the VM pods.
type VMSide interface {
	runtimeapi.RuntimeServiceServer
	// OwnsPod tells whether the ID, or a prefix that no other VM pod has, is that of a VM pod.
	OwnsPod(idOrPrefix string) bool
	// OwnsContainer is the same for containers.
	OwnsContainer(idOrPrefix string) bool
	// Handles tells whether pods of this runtime handler become VMs.
	Handles(runtimeHandler string) bool
	// ImageFilesystem is what caches and scratch disks use beside containerd's images, and where they are.
	ImageFilesystem(ctx context.Context) (*runtimeapi.FilesystemUsage, error)
}

// Options are what a Server consists of. All but Calls are required.
type Options struct {
	VM         VMSide
	Containerd *grpc.ClientConn
	Logger     *slog.Logger
	// Calls is told of every call, and may give it a context.
	Calls stats.Handler
}

// Server answers the CRI for both runtimes.
type Server struct {
	vm         VMSide
	containerd *grpc.ClientConn
	log        *slog.Logger
	owners     map[string]Owner
	calls      callMetrics
	grpc       *grpc.Server
	ready      atomic.Bool
	// stopping ends streams, which otherwise have no end.
	stopping context.Context
	stop     context.CancelFunc
	// pumps are the goroutines that pass a client's messages on; they end with their streams.
	pumps sync.WaitGroup
}

// Dial prepares a connection to containerd's socket. It is made when first used, and made again within about
// a second of containerd's return; calls meanwhile fail at once with Unavailable.
func Dial(socket string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix:"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// A list of 100 containers is longer than the usual window and buffers: it would come in several turns.
		grpc.WithInitialWindowSize(window),
		grpc.WithInitialConnWindowSize(window),
		grpc.WithReadBufferSize(bufferSize),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		}))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", socket, err)
	}
	return conn, nil
}

// New makes a server that answers Unavailable until SetReady.
func New(o Options) *Server {
	s := &Server{vm: o.VM, containerd: o.Containerd, log: o.Logger, owners: owners(), calls: newCallMetrics()}
	s.stopping, s.stop = context.WithCancel(context.Background())
	options := []grpc.ServerOption{
		grpc.ForceServerCodecV2(codec{}),
		grpc.WriteBufferSize(bufferSize),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.UnknownServiceHandler(s.forwardStream),
	}
	if o.Calls != nil {
		options = append(options, grpc.StatsHandler(o.Calls))
	}
	s.grpc = grpc.NewServer(options...)
	runtimeapi.RegisterRuntimeServiceServer(s.grpc, s.vm)
	s.grpc.RegisterService(imageService(), imageSide{server: s})
	return s
}

// Serve answers calls until Stop; then it returns nil. It closes the listener.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil // Stop came first
}

// SetReady ends the time in which every call is Unavailable.
func (s *Server) SetReady() { s.ready.Store(true) }

// Stop takes no more calls, ends streams, waits for unary calls until ctx ends, then breaks them off. It
// returns when no handler runs any more.
func (s *Server) Stop(ctx context.Context) {
	s.stop()
	breakOff := context.AfterFunc(ctx, s.grpc.Stop)
	defer breakOff()
	s.grpc.GracefulStop()
	s.pumps.Wait()
}

// unary is below every unary method of the services that are registered.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	owner, by := s.owner(info.FullMethod), byNone
	defer s.observe(ctx, info.FullMethod, &by, time.Now(), &err)
	defer s.guard(info.FullMethod, &err)
	if err := s.checkReady(); err != nil {
		return nil, err
	}
	c := call{method: info.FullMethod, req: req, handler: handler}
	if by, err = s.answerer(ctx, owner, req); err != nil {
		return nil, err
	}
	switch {
	case owner == Merged:
		return s.merge(ctx, c)
	case owner == Identity:
		return s.identity(ctx, c)
	case owner == Fallback:
		return s.fallback(ctx, c)
	case by == byVM:
		return s.callVM(ctx, c)
	default:
		return s.callContainerd(ctx, c)
	}
}

// stream is below every streaming method, and below what is not registered.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	owner, by := s.owner(info.FullMethod), byNone
	defer s.observe(ss.Context(), info.FullMethod, &by, time.Now(), &err)
	defer s.guard(info.FullMethod, &err)
	if err := s.checkReady(); err != nil {
		return err
	}
	by = owner.answerer()
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	defer context.AfterFunc(s.stopping, func() { cancel(errStopping) })()
	ss = &boundStream{ServerStream: ss, ctx: ctx}
	if owner == Union {
		err = s.union(ctx, ss, info.FullMethod, func(vm grpc.ServerStream) error { return handler(srv, vm) })
	} else {
		err = handler(srv, ss)
	}
	if cause := context.Cause(ctx); errors.Is(cause, errStopping) {
		return cause
	}
	return err
}

var (
	errStopping = status.Error(codes.Unavailable, "vmruntime is stopping")
	errNotReady = status.Error(codes.Unavailable, "vmruntime is recovering its pods; try again")
)

func (s *Server) checkReady() error {
	if !s.ready.Load() {
		return errNotReady
	}
	return nil
}

func (s *Server) owner(method string) Owner {
	if o, known := s.owners[method]; known {
		return o
	}
	return Containerd
}

// observe counts a call, and tells at level debug who answered it and how.
func (s *Server) observe(ctx context.Context, method string, by *answerer, start time.Time, err *error) {
	took := time.Since(start)
	s.calls.observe(method, *by, took, *err)
	if s.log.Enabled(ctx, slog.LevelDebug) {
		s.log.DebugContext(ctx, "CRI call", "method", method, "side", *by, "took", took, "code", status.Code(*err), "error", *err)
	}
}

// guard makes a panic an error of the one call. It has to be deferred itself.
func (s *Server) guard(method string, err *error) {
	if p := recover(); p != nil {
		s.log.Error("panic in a CRI call", "method", method, "panic", p, "stack", string(debug.Stack()))
		*err = status.Errorf(codes.Internal, "%s panicked: %v; the log has the stack", method, p)
	}
}

// boundStream is a stream that the server can end.
type boundStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (b *boundStream) Context() context.Context { return b.ctx }
