package delegate

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var update = flag.Bool("update", false, "write golden files anew")

// methods walks both services of the CRI.
func methods() []string {
	var all []string
	services := runtimeapi.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			all = append(all, fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(j).Name()))
		}
	}
	slices.Sort(all)
	return all
}

// TestOwners fails for every method of the CRI that nobody has placed yet, and holds the placing to a golden file.
func TestOwners(t *testing.T) {
	table := owners()
	var got strings.Builder
	for _, m := range methods() {
		owner, placed := table[m]
		if !placed {
			t.Errorf("%s is new: place it in owners.go", m)
		}
		fmt.Fprintf(&got, "%-60s %s\n", m, owner)
		delete(table, m)
	}
	for m := range table {
		t.Errorf("%s is placed but not a method of the CRI", m)
	}
	golden := filepath.Join("testdata", "owners.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Error(diff)
	}
}

// TestOwnersFitTheirMethods holds every placing to the form of the method: its request has what it is routed by, and only
// streams are united.
func TestOwnersFitTheirMethods(t *testing.T) {
	table := owners()
	services := runtimeapi.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	field := map[Owner]string{ByHandler: "runtime_handler", ByPod: "pod_sandbox_id", ByContainer: "container_id"}
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			m := services.Get(i).Methods().Get(j)
			name := fmt.Sprintf("/%s/%s", services.Get(i).FullName(), m.Name())
			owner := table[name]
			if f := field[owner]; f != "" && m.Input().Fields().ByTextName(f) == nil {
				t.Errorf("%s is routed %s but has no field %s", name, owner, f)
			}
			if streams := m.IsStreamingServer(); streams != (owner == Union) && owner != Containerd {
				t.Errorf("%s is %s; it streams: %v", name, owner, streams)
			}
		}
	}
}

func TestNotReady(t *testing.T) {
	n := newNode(t)
	n.server.ready.Store(false)
	ctx := testContext(t)
	for _, m := range append(methods(), "/runtime.v2.Future/Method") {
		err := n.conn.Invoke(ctx, m, &frame{}, &frame{}, grpc.ForceCodecV2(codec{}))
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "recovering") {
			t.Errorf("%s: %v, want Unavailable", m, err)
		}
	}
	n.server.SetReady()
	_, err := n.cri.Version(ctx, &runtimeapi.VersionRequest{})
	wantCode(t, err, codes.OK)
}

func TestRouting(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	for _, tc := range []struct {
		name string
		call func() error
		want *side
	}{
		{"handler vm", func() error {
			_, err := n.cri.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{RuntimeHandler: "vm"})
			return err
		}, n.vm},
		{"default handler", func() error {
			_, err := n.cri.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{})
			return err
		}, n.containerd},
		{"unknown handler", func() error {
			_, err := n.cri.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{RuntimeHandler: "other"})
			return err
		}, n.containerd},
		{"VM pod", func() error {
			_, err := n.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id("aa")})
			return err
		}, n.vm},
		{"containerd's pod", func() error {
			_, err := n.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id("b")})
			return err
		}, n.containerd},
		{"unknown pod", func() error {
			_, err := n.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id("e")})
			return err
		}, n.containerd},
		{"prefix of two VM pods", func() error {
			_, err := n.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: "a"})
			return err
		}, n.containerd},
		{"no ID", func() error {
			_, err := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{})
			return err
		}, n.containerd},
		{"VM container", func() error {
			_, err := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id("ca")})
			return err
		}, n.vm},
		{"containerd's container", func() error {
			_, err := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id("d")})
			return err
		}, n.containerd},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := tc.call(); err != nil {
				t.Fatal(err)
			}
			vm, containerd := n.vm.takeCalls(), n.containerd.takeCalls()
			got := vm
			other := containerd
			if tc.want == n.containerd {
				got, other = containerd, vm
			}
			if len(got) != 1 || len(other) != 0 {
				t.Errorf("calls of the VM side %v, of containerd %v; want one, of %s", vm, containerd, tc.want.name)
			}
		})
	}
}

// A prefix that both sides have must reach neither.
func TestPrefixes(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	stop := func(prefix string) error {
		_, err := n.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: prefix})
		return err
	}
	wantCode(t, stop("ab"), codes.OK)
	wantCalls(t, n.vm, "StopPodSandbox")
	wantCalls(t, n.containerd, "PodSandboxStatus")

	n.containerd.pods = append(n.containerd.pods, id("ab7"))
	wantCode(t, stop("ab"), codes.InvalidArgument)
	wantCalls(t, n.vm)
	wantCode(t, stop("ab0"), codes.OK)
	wantCalls(t, n.vm, "StopPodSandbox")

	n.containerd.containers = append(n.containerd.containers, id("c8"))
	_, err := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: "c"})
	wantCode(t, err, codes.InvalidArgument)

	n.stop()
	wantCode(t, stop("ab"), codes.OK)
}

func TestMergedLists(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	resp, err := n.cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range resp.Items {
		got = append(got, p.Id)
	}
	if want := []string{id("b"), id("aa"), id("ab")}; !slices.Equal(got, want) {
		t.Errorf("pods %v, want %v", got, want)
	}
	for _, s := range []*side{n.vm, n.containerd} {
		s.setFault(func(string) error { return status.Error(codes.ResourceExhausted, "forced") })
		resp, err := n.cri.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
		if status.Code(err) != codes.ResourceExhausted || resp != nil {
			t.Errorf("with %s failing: %v, %v; want no list but its error", s.name, resp, err)
		}
		_, err = n.images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
		wantCode(t, err, codes.ResourceExhausted)
		s.setFault(nil)
	}
}

// Usage is added to that of the file system that it is on, and to no other.
func TestImageFsInfo(t *testing.T) {
	here, there := t.TempDir(), "/dev/shm"
	if sameFilesystem(here, there) {
		t.Skip("needs two file systems: the directory of temporary files is on the one of /dev/shm")
	}
	for _, tc := range []struct {
		name                 string
		ours, images, layers string
		wantImages           []*runtimeapi.FilesystemUsage
		wantLayers           []*runtimeapi.FilesystemUsage
	}{
		{
			"all on one", here, here, here,
			[]*runtimeapi.FilesystemUsage{filesystem(here, 1001, 11)},
			[]*runtimeapi.FilesystemUsage{filesystem(here, 1003, 11)},
		},
		{
			"ours apart", there, here, here,
			[]*runtimeapi.FilesystemUsage{filesystem(here, 1, 1), filesystem(there, 1000, 10)},
			[]*runtimeapi.FilesystemUsage{filesystem(here, 3, 1), filesystem(there, 1000, 10)},
		},
		{
			"images apart", here, there, here,
			[]*runtimeapi.FilesystemUsage{filesystem(there, 1, 1), filesystem(here, 1000, 10)},
			[]*runtimeapi.FilesystemUsage{filesystem(here, 1003, 11)},
		},
		{"layers are not told of apart from images", here, here, "", []*runtimeapi.FilesystemUsage{filesystem(here, 1001, 11)}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			n.vm.root, n.containerd.root, n.containerd.layers = tc.ours, tc.images, tc.layers
			got, err := n.images.ImageFsInfo(testContext(t), &runtimeapi.ImageFsInfoRequest{})
			if err != nil {
				t.Fatal(err)
			}
			want := &runtimeapi.ImageFsInfoResponse{ImageFilesystems: tc.wantImages, ContainerFilesystems: tc.wantLayers}
			if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	version := func() *runtimeapi.VersionResponse {
		v, err := n.cri.Version(ctx, &runtimeapi.VersionRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	want := &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "vm", RuntimeVersion: "1.0.0", RuntimeApiVersion: "v1-containerd"}
	if diff := cmp.Diff(want, version(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	n.stop()
	want.RuntimeApiVersion = "v1-vm"
	if diff := cmp.Diff(want, version(), protocmp.Transform()); diff != "" {
		t.Errorf("without containerd: %s", diff)
	}
}

// An older containerd lacks methods.
func TestOlderContainerd(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	driver := func() runtimeapi.CgroupDriver {
		c, err := n.cri.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return c.GetLinux().GetCgroupDriver()
	}
	if got := driver(); got != runtimeapi.CgroupDriver_SYSTEMD {
		t.Errorf("driver %s, want containerd's", got)
	}
	n.containerd.setFault(func(string) error { return status.Error(codes.Unimplemented, "unknown method") })
	if got := driver(); got != runtimeapi.CgroupDriver_CGROUPFS {
		t.Errorf("driver %s, want the VM side's", got)
	}
	ss, err := n.cri.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = ss.Recv()
	}
	wantCode(t, err, codes.Unimplemented)
}

func TestMergeStatus(t *testing.T) {
	cond := func(typ string, ok bool, reason, message string) *runtimeapi.RuntimeCondition {
		return &runtimeapi.RuntimeCondition{Type: typ, Status: ok, Reason: reason, Message: message}
	}
	theirs := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			cond("RuntimeReady", true, "", ""), cond("NetworkReady", false, "NoCNI", "theirs"), cond("Own", true, "", ""),
		}},
		Info: map[string]string{"config": "{}"},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{
			{Name: "", Features: &runtimeapi.RuntimeHandlerFeatures{UserNamespaces: true}}, {Name: "vm"}, {Name: "runc"},
		},
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, UserNamespacesHostNetwork: true},
	}
	ours := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			cond("RuntimeReady", false, "NoGuest", "no kernel"), cond("NetworkReady", false, "NoCNI", "ours"), cond("Guest", true, "", ""),
		}},
		Info:            map[string]string{"vmruntime": "{}"},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{{Name: "vm", Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true}}},
		Features:        &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true},
	}
	want := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			cond("RuntimeReady", false, "NoGuest", "no kernel"), cond("NetworkReady", false, "NoCNI", "theirs; ours"),
			cond("Own", true, "", ""), cond("Guest", true, "", ""),
		}},
		Info: map[string]string{"config": "{}", "vmruntime": "{}"},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{
			{Name: "", Features: &runtimeapi.RuntimeHandlerFeatures{UserNamespaces: true}},
			{Name: "runc"},
			{Name: "vm", Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true}},
		},
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true},
	}
	mergeStatus(theirs, ours)
	if diff := cmp.Diff(want, theirs, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestMergeDescriptors(t *testing.T) {
	d := func(name, help string) *runtimeapi.MetricDescriptor {
		return &runtimeapi.MetricDescriptor{Name: name, Help: help}
	}
	theirs := &runtimeapi.ListMetricDescriptorsResponse{Descriptors: []*runtimeapi.MetricDescriptor{d("cpu", "theirs")}}
	ours := &runtimeapi.ListMetricDescriptorsResponse{Descriptors: []*runtimeapi.MetricDescriptor{d("cpu", "ours"), d("boot", "ours")}}
	want := &runtimeapi.ListMetricDescriptorsResponse{Descriptors: []*runtimeapi.MetricDescriptor{d("cpu", "theirs"), d("boot", "ours")}}
	mergeDescriptors(theirs, ours)
	if diff := cmp.Diff(want, theirs, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// What containerd is told and what it answers must not change on the way.
func TestPassedUnchanged(t *testing.T) {
	n := newNode(t)
	t.Run("metadata, deadline, trailer", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(context.Background(), "traceparent", "00-1"), 9*time.Second)
		defer cancel()
		var trailer metadata.MD
		for _, call := range []func() error{
			func() error {
				_, err := n.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{}, grpc.Trailer(&trailer))
				return err
			},
			func() error {
				_, err := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id("d")})
				return err
			},
		} {
			n.containerd.md = nil
			if err := call(); err != nil {
				t.Fatal(err)
			}
			if got := n.containerd.md.Get("traceparent"); !slices.Equal(got, []string{"00-1"}) {
				t.Errorf("traceparent %v", got)
			}
			if left := time.Until(n.containerd.deadline); left <= 0 || left > 9*time.Second {
				t.Errorf("deadline in %s, want within 9s", left)
			}
		}
		if got := trailer.Get("side"); !slices.Equal(got, []string{"containerd"}) {
			t.Errorf("trailer %v", trailer)
		}
	})
	t.Run("status details", func(t *testing.T) {
		st, err := status.New(codes.FailedPrecondition, "forced").WithDetails(&errdetails.ErrorInfo{Reason: "why"})
		if err != nil {
			t.Fatal(err)
		}
		n.containerd.setFault(func(string) error { return st.Err() })
		defer n.containerd.setFault(nil)
		_, unary := n.cri.StopContainer(testContext(t), &runtimeapi.StopContainerRequest{ContainerId: id("d")})
		_, raw := n.images.ImageStatus(testContext(t), &runtimeapi.ImageStatusRequest{})
		_, merged := n.cri.ListContainers(testContext(t), &runtimeapi.ListContainersRequest{})
		for _, err := range []error{unary, raw, merged} {
			if diff := cmp.Diff(st.Proto(), status.Convert(err).Proto(), protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		}
	})
	t.Run("unknown method and service", func(t *testing.T) {
		want := &frame{bytes: bytes.Repeat([]byte("any bytes"), 1000)}
		for _, m := range []string{"/runtime.v1.RuntimeService/Future", "/runtime.v1.ImageService/Future", "/runtime.v2.New/Method"} {
			got := &frame{}
			if err := n.conn.Invoke(testContext(t), m, want, got, grpc.ForceCodecV2(codec{})); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.bytes, want.bytes) {
				t.Errorf("%s: %d bytes, want the %d sent", m, len(got.bytes), len(want.bytes))
			}
		}
	})
	t.Run("unknown stream in both directions", func(t *testing.T) {
		cs, err := n.conn.NewStream(testContext(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
			"/runtime.v1.RuntimeService/FutureStream", grpc.ForceCodecV2(codec{}))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			want, got := fmt.Sprint("message ", i), &frame{}
			if err := cs.SendMsg(&frame{bytes: []byte(want)}); err != nil {
				t.Fatal(err)
			}
			if err := cs.RecvMsg(got); err != nil || string(got.bytes) != want {
				t.Fatalf("%q, %v; want %q", got.bytes, err, want)
			}
		}
		if err := cs.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if err := cs.RecvMsg(&frame{}); !errors.Is(err, io.EOF) {
			t.Fatalf("%v, want EOF", err)
		}
	})
	t.Run("image stream", func(t *testing.T) {
		ss, err := n.images.StreamImages(testContext(t), &runtimeapi.StreamImagesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"i1", "i2"} {
			got, err := ss.Recv()
			if err != nil || got.Images[0].Id != want {
				t.Fatalf("%v, %v; want %s", got, err, want)
			}
		}
		if _, err := ss.Recv(); !errors.Is(err, io.EOF) {
			t.Fatalf("%v, want EOF", err)
		}
	})
}

// Fields of a newer CRI are kept in messages that are parsed on the way, to either side and back.
func TestUnknownFields(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	field := protowire.AppendString(protowire.AppendTag(nil, 900, protowire.BytesType), "new")
	for handler, s := range map[string]*side{"vm": n.vm, "": n.containerd} {
		req := &runtimeapi.RunPodSandboxRequest{RuntimeHandler: handler}
		req.ProtoReflect().SetUnknown(field)
		if _, err := n.cri.RunPodSandbox(ctx, req); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(s.unknown, field) {
			t.Errorf("handler %q got the unknown fields %x, want %x", handler, s.unknown, field)
		}
	}
	n.containerd.unknown = field
	resp, err := n.cri.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.ProtoReflect().GetUnknown(); !bytes.Contains(got, field) {
		t.Errorf("a merged list has the unknown fields %x, want containerd's %x", got, field)
	}
}

func TestErrorsOfTheVMSide(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	for want, class := range map[codes.Code]error{
		codes.NotFound:           errdefs.ErrNotFound,
		codes.InvalidArgument:    errdefs.ErrInvalidArgument,
		codes.FailedPrecondition: errdefs.ErrFailedPrecondition,
		codes.Unavailable:        errdefs.ErrUnavailable,
		codes.Unimplemented:      errdefs.ErrNotImplemented,
		codes.DeadlineExceeded:   context.DeadlineExceeded,
	} {
		n.vm.setFault(func(string) error { return fmt.Errorf("container x: %w", class) })
		_, unary := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id("ca")})
		wantCode(t, unary, want)
		_, merged := n.cri.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
		wantCode(t, merged, want)
		ss, err := n.cri.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = ss.Recv()
		wantCode(t, err, want)
	}
}

func TestPanic(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	n.vm.setFault(func(string) error { panic("forced") })
	_, unary := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id("ca")})
	wantCode(t, unary, codes.Internal)
	_, merged := n.cri.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	wantCode(t, merged, codes.Internal)
	ss, err := n.cri.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = ss.Recv()
	wantCode(t, err, codes.Internal)
	n.vm.setFault(nil)
	_, err = n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id("ca")})
	wantCode(t, err, codes.OK)
}

func TestContainerdDown(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	n.stop()
	for name, call := range map[string]func() error{
		"list": func() error {
			_, err := n.cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			return err
		},
		"status": func() error { _, err := n.cri.Status(ctx, &runtimeapi.StatusRequest{}); return err },
		"routed": func() error {
			_, err := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id("d")})
			return err
		},
		"raw": func() error {
			_, err := n.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{})
			return err
		},
	} {
		start := time.Now()
		if err := call(); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v, want Unavailable", name, err)
		}
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("%s: answered after %s", name, took)
		}
	}
	_, err := n.cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id("ca")})
	wantCode(t, err, codes.OK)

	n.startContainerd(t)
	t.Cleanup(func() { n.stop() })
	start := time.Now()
	for {
		if _, err = n.cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}); err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("no list after containerd came back: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("lists work %s after containerd came back", time.Since(start).Round(time.Millisecond))
}

func TestLargestMessage(t *testing.T) {
	n := newNode(t)
	ctx := testContext(t)
	invoke := func(size int) error {
		return n.conn.Invoke(ctx, "/runtime.v1.ImageService/Future", &frame{bytes: make([]byte, size)}, &frame{}, grpc.ForceCodecV2(codec{}))
	}
	wantCode(t, invoke(maxMessage-1024), codes.OK)
	wantCode(t, n.conn.Invoke(ctx, "/runtime.v1.ImageService/Future", &frame{bytes: make([]byte, maxMessage+1)}, &frame{},
		grpc.ForceCodecV2(codec{}), grpc.MaxCallSendMsgSize(2*maxMessage)), codes.ResourceExhausted)
}
