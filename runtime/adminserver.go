package runtime

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"

	"github.com/vmruntime/vmruntime/runtime/vmpb"
)

// AdminServer serves `vmruntime vm`. Whoever may open its socket may do everything with VMs.
type AdminServer struct {
	service *vmService
	grpc    *grpc.Server
	ready   atomic.Bool
	// stopping ends streams, which otherwise have no end.
	stopping context.Context
	stop     context.CancelFunc
}

// NewAdminServer makes a server that answers Unavailable until SetReady.
func NewAdminServer(rt *Runtime) *AdminServer {
	s := &AdminServer{service: &vmService{rt: rt}}
	s.stopping, s.stop = context.WithCancel(context.Background())
	s.grpc = grpc.NewServer(grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream))
	vmpb.RegisterVMServiceServer(s.grpc, s.service)
	return s
}

// Serve answers calls until Stop; then it returns nil. It closes the listener.
func (s *AdminServer) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil // Stop came first
}

// SetReady ends the time in which every call is Unavailable.
func (s *AdminServer) SetReady() { s.ready.Store(true) }

// Stop takes no more calls, ends streams, waits for other calls until ctx ends, then breaks them off. It returns when
// no handler runs any more.
func (s *AdminServer) Stop(ctx context.Context) {
	s.stop()
	defer context.AfterFunc(ctx, s.grpc.Stop)()
	s.grpc.GracefulStop()
	s.service.pumps.Wait()
}

var (
	errStopping = fmt.Errorf("vmruntime is stopping; the VM goes on: %w", errdefs.ErrUnavailable)
	errNotReady = fmt.Errorf("vmruntime is recovering its pods; try again: %w", errdefs.ErrUnavailable)
)

func (s *AdminServer) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer s.finish(info.FullMethod, &err)
	if !s.ready.Load() {
		return nil, errNotReady
	}
	return handler(ctx, req)
}

func (s *AdminServer) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer s.finish(info.FullMethod, &err)
	if !s.ready.Load() {
		return errNotReady
	}
	ctx, cancel := context.WithCancel(ss.Context())
	defer cancel()
	defer context.AfterFunc(s.stopping, cancel)()
	err = handler(srv, &boundStream{ss, ctx})
	if s.stopping.Err() != nil {
		return errStopping
	}
	return err
}

// finish gives an error its code, and makes one of a panic.
func (s *AdminServer) finish(method string, err *error) {
	if r := recover(); r != nil {
		s.service.rt.log.Error("panic", "method", method, "panic", r, "stack", string(debug.Stack()))
		*err = fmt.Errorf("%s: a defect in vmruntime, see its log: %w", method, errdefs.ErrInternal)
	}
	*err = errgrpc.ToGRPC(*err)
}

// boundStream is a stream with another context.
type boundStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context ends with the stream, or when the server stops.
func (s *boundStream) Context() context.Context { return s.ctx }
