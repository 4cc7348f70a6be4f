package delegate

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// call is one unary call: handler is its implementation on the VM side.
type call struct {
	method  string
	req     any
	handler grpc.UnaryHandler
}

// callVM runs the VM side's implementation. Here and in union error classes become gRPC codes.
func (s *Server) callVM(ctx context.Context, c call) (resp any, err error) {
	defer s.guard(c.method, &err)
	resp, err = c.handler(ctx, c.req)
	return resp, errgrpc.ToGRPC(err)
}

// callContainerd passes a call on. The answer stays bytes.
func (s *Server) callContainerd(ctx context.Context, c call) (any, error) {
	reply := new(frame)
	var header, trailer metadata.MD
	err := s.containerd.Invoke(outgoing(ctx), c.method, c.req, reply,
		grpc.ForceCodecV2(codec{}), grpc.Header(&header), grpc.Trailer(&trailer))
	if len(header) > 0 {
		_ = grpc.SetHeader(ctx, header) // fails only when the client is gone
	}
	if len(trailer) > 0 {
		_ = grpc.SetTrailer(ctx, trailer)
	}
	if err != nil {
		return nil, err
	}
	return reply, nil
}

// outgoing is the context for a call to containerd: the client's deadline and metadata.
func outgoing(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	delete(md, "grpc-accept-encoding") // belongs to the connection; FromIncomingContext gave a copy
	return metadata.NewOutgoingContext(ctx, md)
}

// answerer tells who answers a call. What is routed by handler, pod or container is of whom that is; what neither side knows is
// containerd's to answer, as the CRI has it for unknown IDs.
func (s *Server) answerer(ctx context.Context, owner Owner, req any) (answerer, error) {
	switch owner {
	case ByHandler, ByPod, ByContainer:
		ours, err := s.ours(ctx, owner, req)
		switch {
		case err != nil:
			return byNone, err
		case ours:
			return byVM, nil
		}
		return byContainerd, nil
	default:
		return owner.answerer(), nil
	}
}

// fullID is the length of an ID that is no prefix.
const fullID = 64

func (s *Server) ours(ctx context.Context, owner Owner, req any) (bool, error) {
	switch owner {
	case ByHandler:
		return s.vm.Handles(req.(interface{ GetRuntimeHandler() string }).GetRuntimeHandler()), nil
	case ByPod:
		id := req.(interface{ GetPodSandboxId() string }).GetPodSandboxId()
		if id == "" || !s.vm.OwnsPod(id) {
			return false, nil
		}
		return true, s.unambiguous(ctx, id, "pod", call{
			method: runtimeapi.RuntimeService_PodSandboxStatus_FullMethodName,
			req:    &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id},
		})
	default:
		id := req.(interface{ GetContainerId() string }).GetContainerId()
		if id == "" || !s.vm.OwnsContainer(id) {
			return false, nil
		}
		return true, s.unambiguous(ctx, id, "container", call{
			method: runtimeapi.RuntimeService_ContainerStatus_FullMethodName,
			req:    &runtimeapi.ContainerStatusRequest{ContainerId: id},
		})
	}
}

// unambiguous is an error if containerd, too, has something by that prefix of an ID, so that a short prefix
// typed by hand never stops the wrong pod. Full IDs, which is what the kubelet sends, cost nothing.
func (s *Server) unambiguous(ctx context.Context, prefix, what string, probe call) error {
	if len(prefix) == fullID {
		return nil
	}
	_, err := s.callContainerd(ctx, probe)
	switch status.Code(err) {
	case codes.NotFound, codes.Unavailable:
		return nil
	case codes.Canceled, codes.DeadlineExceeded:
		return err
	}
	return status.Errorf(codes.InvalidArgument,
		"%s ID %q is a prefix of a VM %s's and of one of containerd's; give more of it", what, prefix, what)
}

// merge asks both sides at once and makes their answers one. It fails whole if either fails.
func (s *Server) merge(ctx context.Context, c call) (any, error) {
	// containerd is asked in this goroutine: it answers last as a rule, and nobody need be woken then.
	var ours any
	g, both := errgroup.WithContext(ctx)
	both, cancel := context.WithCancel(both)
	defer cancel()
	g.Go(func() (err error) { ours, err = s.callVM(both, c); return err })
	bytes, theirs := s.callContainerd(both, c)
	if theirs != nil {
		cancel()
	}
	if err := g.Wait(); err != nil && status.Code(err) != codes.Canceled {
		return nil, err
	}
	if theirs != nil {
		return nil, theirs
	}
	switch ours := ours.(type) {
	case *runtimeapi.StatusResponse:
		return combine(bytes, ours, mergeStatus)
	case *runtimeapi.ImageFsInfoResponse:
		return combine(bytes, ours, addUsage)
	case *runtimeapi.ListMetricDescriptorsResponse:
		return combine(bytes, ours, mergeDescriptors)
	default:
		return concatenate(bytes, ours)
	}
}

// combine parses containerd's answer and puts ours into it.
func combine[T proto.Message](answer any, ours T, put func(theirs, ours T)) (any, error) {
	theirs, err := decode(answer, ours)
	if err != nil {
		return nil, err
	}
	put(theirs.(T), ours)
	return theirs, nil
}

// concatenate makes two lists one. To protobuf, two messages one after the other are their merge, so containerd's
// stays bytes.
func concatenate(answer, ours any) (any, error) {
	data, err := proto.Marshal(ours.(proto.Message))
	if err != nil {
		return nil, err
	}
	return &joined{answer.(*frame).bytes, data}, nil
}

// decode parses an answer of containerd as the type that the VM side's has.
func decode(answer, like any) (proto.Message, error) {
	m := like.(proto.Message).ProtoReflect().New().Interface()
	if err := (codec{}).Unmarshal(mem.BufferSlice{mem.SliceBuffer(answer.(*frame).bytes)}, m); err != nil {
		return nil, fmt.Errorf("decode containerd's %T: %w", m, err)
	}
	return m, nil
}

// identity answers Version: our name and version, and the API version of containerd. Without containerd it is
// the VM side's alone, so that crictl, which asks Version first, can still reach VM pods.
func (s *Server) identity(ctx context.Context, c call) (any, error) {
	resp, err := s.callVM(ctx, c)
	if err != nil {
		return nil, err
	}
	bytes, err := s.callContainerd(ctx, c)
	if status.Code(err) == codes.Unavailable {
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	theirs, err := decode(bytes, resp)
	if err != nil {
		return nil, err
	}
	ours := resp.(*runtimeapi.VersionResponse)
	v := theirs.(*runtimeapi.VersionResponse)
	v.RuntimeName, v.RuntimeVersion = ours.GetRuntimeName(), ours.GetRuntimeVersion()
	return v, nil
}

// fallback relays containerd's answer, or gives the VM side's where containerd is too old for the method.
func (s *Server) fallback(ctx context.Context, c call) (any, error) {
	resp, err := s.callContainerd(ctx, c)
	if status.Code(err) == codes.Unimplemented {
		return s.callVM(ctx, c)
	}
	return resp, err
}
