package delegate

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// forwardStream passes any method to containerd as bytes, whatever its form: grpc calls it for what is not registered.
func (s *Server) forwardStream(_ any, ss grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(ss)
	ctx, cancel := context.WithCancel(outgoing(ss.Context()))
	defer cancel()
	cs, err := s.openStream(ctx, method)
	if err != nil {
		return err
	}
	s.pumps.Go(func() {
		if err := sendAll(ss, cs); err != nil {
			cancel()
		}
	})
	if header, err := cs.Header(); err == nil && len(header) > 0 {
		if err := ss.SetHeader(header); err != nil {
			return err
		}
	}
	err = receiveAll(cs, ss)
	ss.SetTrailer(cs.Trailer())
	return err
}

func (s *Server) openStream(ctx context.Context, method string) (grpc.ClientStream, error) {
	desc := grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	return s.containerd.NewStream(ctx, &desc, method, grpc.ForceCodecV2(codec{}))
}

// sendAll passes on what the client sends, until it has sent all or either side is gone.
func sendAll(from grpc.ServerStream, to grpc.ClientStream) error {
	for {
		f := new(frame)
		err := from.RecvMsg(f)
		if errors.Is(err, io.EOF) {
			return to.CloseSend()
		}
		if err != nil {
			return err
		}
		if err := to.SendMsg(f); err != nil {
			return nil // containerd has answered; receiveAll has its status
		}
	}
}

// receiveAll passes on what containerd sends. It returns containerd's status.
func receiveAll(from grpc.ClientStream, to interface{ SendMsg(any) error }) error {
	for {
		f := new(frame)
		err := from.RecvMsg(f)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := to.SendMsg(f); err != nil {
			return err
		}
	}
}

// union answers with what both sides stream. It ends when both have ended, or at once when either fails: the
// kubelet then lists anew.
func (s *Server) union(ctx context.Context, ss grpc.ServerStream, method string, vm func(grpc.ServerStream) error) error {
	req := new(frame)
	if err := ss.RecvMsg(req); err != nil {
		return err
	}
	// Events have no end: if a side ends them, whoever listens has to be told.
	endless := method == runtimeapi.RuntimeService_GetContainerEvents_FullMethodName
	end := func(side string, err error) error {
		if err == nil && endless {
			return status.Errorf(codes.Unavailable, "%s ended its stream of events", side)
		}
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	out := &unionStream{ServerStream: ss, ctx: ctx, req: req}
	g.Go(func() error { return end("the VM side", s.streamVM(method, out, vm)) })
	g.Go(func() error { return end("containerd", s.streamContainerd(ctx, method, out)) })
	return g.Wait()
}

func (s *Server) streamVM(method string, out *unionStream, vm func(grpc.ServerStream) error) (err error) {
	defer s.guard(method, &err)
	return errgrpc.ToGRPC(vm(out))
}

func (s *Server) streamContainerd(ctx context.Context, method string, out *unionStream) error {
	ctx, cancel := context.WithCancel(outgoing(ctx))
	defer cancel()
	cs, err := s.openStream(ctx, method)
	if err != nil {
		return err
	}
	if err := cs.SendMsg(out.req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := cs.CloseSend(); err != nil {
		return err
	}
	return receiveAll(cs, out)
}

// unionStream is the client's stream for two senders, with the request that was already read.
type unionStream struct {
	grpc.ServerStream
	ctx context.Context
	req *frame
	mu  sync.Mutex
}

func (u *unionStream) Context() context.Context { return u.ctx }

// RecvMsg gives the one request.
func (u *unionStream) RecvMsg(m any) error {
	return (codec{}).Unmarshal(mem.BufferSlice{mem.SliceBuffer(u.req.bytes)}, m)
}

// SendMsg sends for one side at a time.
func (u *unionStream) SendMsg(m any) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.ServerStream.SendMsg(m)
}
