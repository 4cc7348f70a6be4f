package runtime

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/state"
	"github.com/vmruntime/vmruntime/runtime/vmpb"
)

func TestLastLines(t *testing.T) {
	for _, tc := range []struct {
		text string
		n    int
		want string
	}{
		{"", 3, ""},
		{"a\nb\nc\n", 0, ""},
		{"a\nb\nc\n", -1, ""},
		{"a\nb\nc\n", 1, "c\n"},
		{"a\nb\nc\n", 2, "b\nc\n"},
		{"a\nb\nc\n", 3, "a\nb\nc\n"},
		{"a\nb\nc\n", 9, "a\nb\nc\n"},
		{"a\nb\nlogin: ", 1, "login: "},
		{"a\nb\nlogin: ", 2, "b\nlogin: "},
		{"a\n\n", 1, "\n"},
		{"no end", 1, "no end"},
	} {
		if got := string(lastLines([]byte(tc.text), tc.n)); got != tc.want {
			t.Errorf("the last %d lines of %q are %q, want %q", tc.n, tc.text, got, tc.want)
		}
	}
}

// What is remembered and what comes then are the whole output without a gap.
func TestBroadcasterRemembers(t *testing.T) {
	var b broadcaster
	send := func(i int) { b.send(&agentpb.OutputChunk{Data: fmt.Appendf(nil, "%04d\n", i)}) }
	send(0) // nobody has asked to remember yet
	b.remember(50)
	for i := 1; i <= 1000; i++ {
		send(i)
		if len(b.recent) > 100 {
			t.Fatalf("%d bytes are kept, want at most twice 50", len(b.recent))
		}
	}
	recent, ch, cancel := b.subscribeRecent()
	defer cancel()
	if want := "0991\n0992\n0993\n0994\n0995\n0996\n0997\n0998\n0999\n1000\n"; string(recent) != want {
		t.Errorf("remembered is %q, want %q", recent, want)
	}
	send(1001)
	if got := string((<-ch).GetData()); got != "1001\n" {
		t.Errorf("then comes %q", got)
	}
	b.close()
	if recent, ch, _ := b.subscribeRecent(); len(recent) != 50 || <-ch != nil {
		t.Errorf("after the end %q is remembered, want 50 bytes and no more to come", recent)
	}
}

// withPods is a runtime that knows pods and containers but runs none.
func withPods(t *testing.T) *Runtime {
	t.Helper()
	dir := t.TempDir()
	rt := &Runtime{log: slog.New(slog.DiscardHandler), pods: map[string]*pod{}, containers: map[string]*container{}}
	var err error
	if rt.podStore, err = state.Open[podSpec, podStatus](filepath.Join(dir, "pods")); err != nil {
		t.Fatal(err)
	}
	if rt.containerStore, err = state.Open[containerSpec, containerStatus](filepath.Join(dir, "containers")); err != nil {
		t.Fatal(err)
	}
	id := func(prefix string) string { return prefix + strings.Repeat("0", 64-len(prefix)) }
	for _, p := range []struct {
		id, name, container string
		stopped             bool
	}{
		{"aa1", "one", "cc1", false},
		{"aa2", "two", "aa3", false},
		{"bb1", "again", "cc2", true},
		{"bb2", "again", "bb1c", false},
		{"dd1", "twice", "dd1f", false},
		{"dd2", "twice", "ee1", false},
	} {
		s := podStatus{ReadyAt: time.Now()}
		if p.stopped {
			s.StoppedAt = time.Now()
		}
		rec, err := rt.podStore.Create(id(p.id), podSpec{Config: message[*runtimeapi.PodSandboxConfig]{&runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "ns", Name: p.name},
		}}}, s)
		if err != nil {
			t.Fatal(err)
		}
		made := &pod{rt: rt, id: id(p.id), rec: rec, log: rt.log}
		rt.pods[made.id] = made
		c, err := rt.containerStore.Create(id(p.container), containerSpec{PodID: made.id}, containerStatus{})
		if err != nil {
			t.Fatal(err)
		}
		rt.containers[c.ID()] = &container{rt: rt, id: c.ID(), pod: made, rec: c}
	}
	return rt
}

func TestFindVM(t *testing.T) {
	rt := withPods(t)
	for ref, want := range map[string]string{
		"aa1": "aa1", "aa2000": "aa2", "cc1": "aa1", "aa3": "aa2", "bb2": "bb2", "bb10": "bb1", "bb1c": "bb2", "ns/one": "aa1",
		"ns/again": "bb2", // the other one is stopped
	} {
		if p, err := rt.findVM(ref); err != nil || !strings.HasPrefix(p.id, want) {
			t.Errorf("%s: %v, %v; want pod %s", ref, p, err, want)
		}
	}
	for ref, want := range map[string]struct {
		code  codes.Code
		words string
	}{
		"":          {codes.InvalidArgument, "vm is empty"},
		"zz":        {codes.NotFound, `begins with "zz"`},
		"ns/none":   {codes.NotFound, "there is no VM pod ns/none"},
		"other/one": {codes.NotFound, "there is no VM pod other/one"},
		"aa":        {codes.InvalidArgument, "ambiguous"},
		"cc":        {codes.InvalidArgument, "ambiguous"},
		"bb1":       {codes.InvalidArgument, "it begins pod bb1"}, // of bb1 and of the container bb1c, which is of another pod
		"ns/twice":  {codes.InvalidArgument, "ns/twice is ambiguous: there are the sandboxes dd1"},
	} {
		_, err := rt.findVM(ref)
		var s AdminServer
		s.service = &vmService{rt: rt}
		s.finish("test", &err)
		if status.Code(err) != want.code || !strings.Contains(err.Error(), want.words) {
			t.Errorf("%q: %v, want %s with %q", ref, err, want.code, want.words)
		}
	}
}

// The server answers when it is ready, survives a panic, and its end ends streams.
func TestAdminServer(t *testing.T) {
	rt := withPods(t)
	s := NewAdminServer(rt)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := vmpb.NewVMServiceClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	code := func(want codes.Code, words string, err error) {
		t.Helper()
		if status.Code(err) != want || !strings.Contains(status.Convert(err).Message(), words) {
			t.Errorf("got %v, want %s with %q", err, want, words)
		}
	}
	_, err = client.List(ctx, &vmpb.ListRequest{})
	code(codes.Unavailable, "recovering", err)
	s.SetReady()
	list, err := client.List(ctx, &vmpb.ListRequest{})
	if err != nil || len(list.GetVms()) != 6 || list.GetVms()[0].GetName() != "again" || list.GetVms()[5].GetName() != "two" || list.GetVms()[5].GetState() != "stopped" {
		t.Errorf("the list is %v, %v", list, err)
	}
	_, err = client.Pause(ctx, &vmpb.PauseRequest{Vm: "ns/one"})
	code(codes.FailedPrecondition, "has no VM at the moment", err)
	rt.pods["broken"] = &pod{rt: rt, id: "broken"}
	_, err = client.Show(ctx, &vmpb.ShowRequest{Vm: "ns/one"})
	delete(rt.pods, "broken")
	code(codes.Internal, "a defect in vmruntime", err)
	for _, first := range []*vmpb.ConsoleRequest{{}, {Message: &vmpb.ConsoleRequest_Open_{Open: &vmpb.ConsoleRequest_Open{Vm: "aa1", ReplayLines: -1}}}} {
		stream, err := client.Console(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(first); err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		code(codes.InvalidArgument, "has to", err)
	}
	stop, cancelStop := context.WithTimeout(ctx, 10*time.Second)
	defer cancelStop()
	s.Stop(stop)
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// A VM that is being saved is left alone.
func TestSavedIsLeftAlone(t *testing.T) {
	rt := withPods(t)
	p, err := rt.findVM("aa1")
	if err != nil {
		t.Fatal(err)
	}
	p.setGuest(&guest{pod: p, vm: &qemu.VM{}, machine: newMachineParts("cc1"), log: rt.log})
	cut := context.CancelCauseFunc(func(error) {})
	p.cut.Store(&cut)
	s := &vmService{rt: rt}
	for what, ask := range map[string]func() error{
		"pause":  func() error { _, err := s.Pause(t.Context(), &vmpb.PauseRequest{Vm: "aa1"}); return err },
		"resume": func() error { _, err := s.Resume(t.Context(), &vmpb.ResumeRequest{Vm: "aa1"}); return err },
		"reset":  func() error { _, err := s.Reset(t.Context(), &vmpb.ResetRequest{Vm: "aa1"}); return err },
		"reboot": func() error { _, err := s.Reboot(t.Context(), &vmpb.RebootRequest{Vm: "aa1"}); return err },
		"clone":  func() error { _, err := s.Clone(t.Context(), &vmpb.CloneRequest{Vm: "aa1"}); return err },
	} {
		if err := ask(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "a checkpoint of the pod is being taken") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
