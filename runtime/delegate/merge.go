package delegate

import (
	"context"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// mergeStatus puts our status into containerd's. A condition is true only when it is on every side that knows it;
// handlers are the union, ours first where both have the name, since RunPodSandbox asks us first; a feature
// is promised for the node only when both sides have it.
func mergeStatus(theirs, ours *runtimeapi.StatusResponse) {
	if theirs.Status == nil {
		theirs.Status = &runtimeapi.RuntimeStatus{}
	}
	for _, c := range ours.GetStatus().GetConditions() {
		mergeCondition(theirs.Status, c)
	}
	for _, h := range ours.GetRuntimeHandlers() {
		theirs.RuntimeHandlers = slices.DeleteFunc(theirs.RuntimeHandlers, func(t *runtimeapi.RuntimeHandler) bool {
			return t.GetName() == h.GetName()
		})
		theirs.RuntimeHandlers = append(theirs.RuntimeHandlers, h)
	}
	if theirs.Features != nil {
		commonFeatures(theirs.Features.ProtoReflect(), ours.GetFeatures().ProtoReflect())
	}
	for key, value := range ours.GetInfo() {
		if theirs.Info == nil {
			theirs.Info = map[string]string{}
		}
		theirs.Info[key] = value
	}
}

func mergeCondition(s *runtimeapi.RuntimeStatus, ours *runtimeapi.RuntimeCondition) {
	i := slices.IndexFunc(s.Conditions, func(c *runtimeapi.RuntimeCondition) bool { return c.GetType() == ours.GetType() })
	switch {
	case i < 0:
		s.Conditions = append(s.Conditions, ours)
	case ours.GetStatus():
	case s.Conditions[i].GetStatus():
		s.Conditions[i] = ours
	default:
		s.Conditions[i].Message = strings.Join([]string{s.Conditions[i].GetMessage(), ours.GetMessage()}, "; ")
	}
}

// commonFeatures clears what the other does not have. All features are booleans.
func commonFeatures(features, other protoreflect.Message) {
	features.Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if f.Kind() == protoreflect.BoolKind && !other.Get(f).Bool() {
			features.Clear(f)
		}
		return true
	})
}

// mergeDescriptors appends our metric descriptors to containerd's; a name is described once.
func mergeDescriptors(theirs, ours *runtimeapi.ListMetricDescriptorsResponse) {
	known := map[string]bool{}
	for _, d := range theirs.GetDescriptors() {
		known[d.GetName()] = true
	}
	for _, d := range ours.GetDescriptors() {
		if !known[d.GetName()] {
			theirs.Descriptors = append(theirs.Descriptors, d)
		}
	}
}

// addUsage adds our usage to what containerd's file systems have of it. Where ours is on another one, it is an entry of its own, after
// containerd's: the kubelet reads the first.
func addUsage(theirs, ours *runtimeapi.ImageFsInfoResponse) {
	extra := ours.GetImageFilesystems()[0]
	theirs.ImageFilesystems = withUsage(theirs.GetImageFilesystems(), extra)
	if len(theirs.GetContainerFilesystems()) > 0 { // to the kubelet none are those of images
		theirs.ContainerFilesystems = withUsage(theirs.GetContainerFilesystems(), extra)
	}
}

func withUsage(entries []*runtimeapi.FilesystemUsage, extra *runtimeapi.FilesystemUsage) []*runtimeapi.FilesystemUsage {
	for _, e := range entries {
		if sameFilesystem(e.GetFsId().GetMountpoint(), extra.GetFsId().GetMountpoint()) {
			e.UsedBytes = sum(e.GetUsedBytes(), extra.GetUsedBytes())
			e.InodesUsed = sum(e.GetInodesUsed(), extra.GetInodesUsed())
			return entries
		}
	}
	return append(entries, extra)
}

// sameFilesystem tells whether two directories are on one file system.
func sameFilesystem(a, b string) bool {
	var inA, inB unix.Stat_t
	return unix.Stat(a, &inA) == nil && unix.Stat(b, &inB) == nil && inA.Dev == inB.Dev
}

func sum(a, b *runtimeapi.UInt64Value) *runtimeapi.UInt64Value {
	return &runtimeapi.UInt64Value{Value: a.GetValue() + b.GetValue()}
}

// imageService is the part of the image service that is not containerd's alone. What is not registered here
// passes unparsed.
func imageService() *grpc.ServiceDesc {
	desc := runtimeapi.ImageService_ServiceDesc
	desc.Methods = slices.DeleteFunc(slices.Clone(desc.Methods), func(m grpc.MethodDesc) bool {
		return m.MethodName != "ImageFsInfo"
	})
	desc.Streams = nil
	return &desc
}

// imageSide is the VM side of the image service.
type imageSide struct {
	runtimeapi.UnimplementedImageServiceServer
	server *Server
}

// ImageFsInfo gives our own usage as the one entry; merge adds it to containerd's.
func (i imageSide) ImageFsInfo(ctx context.Context, _ *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	usage, err := i.server.vm.ImageFilesystem(ctx)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{usage}}, nil
}
