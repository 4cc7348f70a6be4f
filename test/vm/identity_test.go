package vm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The runtime says who it is, that it is ready, which handlers there are, and with what VMs run.
func TestStatus(t *testing.T) {
	ctx, b := use(t)
	version, err := b.rt.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil || version.GetRuntimeName() != "vmruntime" || version.GetRuntimeApiVersion() != "v1" || version.GetRuntimeVersion() == "" {
		t.Errorf("Version: %v, %v, want vmruntime with a version and API v1", version, err)
	}
	resp, err := b.rt.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{runtimeapi.RuntimeReady, runtimeapi.NetworkReady} {
		if !slices.ContainsFunc(resp.GetStatus().GetConditions(), func(c *runtimeapi.RuntimeCondition) bool { return c.GetType() == kind && c.GetStatus() }) {
			t.Errorf("conditions %v, want %s true", resp.GetStatus().GetConditions(), kind)
		}
	}
	handlers := map[string]*runtimeapi.RuntimeHandlerFeatures{}
	for _, h := range resp.GetRuntimeHandlers() {
		handlers[h.GetName()] = h.GetFeatures()
	}
	for _, name := range []string{"", "runc", handlerVM} {
		if _, ok := handlers[name]; !ok {
			t.Errorf("handlers %v, want also %q", resp.GetRuntimeHandlers(), name)
		}
	}
	if !handlers[handlerVM].GetRecursiveReadOnlyMounts() || !handlers[handlerVM].GetUserNamespaces() {
		t.Errorf("features of VM pods: %v, want recursive read-only mounts and user namespaces", handlers[handlerVM])
	}
	var info struct {
		GuestKernel  string `json:"guestKernel"`
		Acceleration struct {
			Accel string `json:"accel"`
		} `json:"acceleration"`
	}
	if err := json.Unmarshal([]byte(resp.GetInfo()["vm"]), &info); err != nil || info.GuestKernel == "" || info.Acceleration.Accel != "tcg" {
		t.Errorf("verbose information %v, want the guest's kernel and its acceleration tcg", resp.GetInfo())
	}
	config, err := b.rt.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
	if err != nil || config.GetLinux().GetCgroupDriver() != runtimeapi.CgroupDriver_CGROUPFS {
		t.Errorf("RuntimeConfig: %v, %v, want containerd's cgroup driver, cgroupfs", config, err)
	}
}

// drain reads a stream of answers to its end.
func drain[T any](t *testing.T, stream grpc.ServerStreamingClient[T], err error) []*T {
	t.Helper()
	var out []*T
	for err == nil {
		var m *T
		if m, err = stream.Recv(); err == nil {
			out = append(out, m)
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Errorf("the stream ends with %v", err)
	}
	return out
}

// The Stream calls tell the same as the lists: of both sides, by the same filters.
func checkStreams(ctx context.Context, t *testing.T, p *pod, c *ctr) {
	t.Helper()
	var pods, containers, stats, podStats []string
	s1, err := p.rt.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.id}})
	for _, m := range drain(t, s1, err) {
		for _, i := range m.GetPodSandboxes() {
			pods = append(pods, i.GetId())
		}
	}
	s2, err := p.rt.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.id}})
	for _, m := range drain(t, s2, err) {
		for _, i := range m.GetContainers() {
			containers = append(containers, i.GetId())
		}
	}
	s3, err := p.rt.StreamContainerStats(ctx, &runtimeapi.StreamContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{Id: c.id}})
	for _, m := range drain(t, s3, err) {
		for _, i := range m.GetContainerStats() {
			stats = append(stats, i.GetAttributes().GetId())
		}
	}
	s4, err := p.rt.StreamPodSandboxStats(ctx, &runtimeapi.StreamPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: p.id}})
	for _, m := range drain(t, s4, err) {
		for _, i := range m.GetPodSandboxStats() {
			podStats = append(podStats, i.GetAttributes().GetId())
		}
	}
	for name, got := range map[string][]string{"pods": pods, "pods' statistics": podStats} {
		if !slices.Equal(got, []string{p.id}) {
			t.Errorf("the stream of %s has %v, want %s", name, got, p.id)
		}
	}
	for name, got := range map[string][]string{"containers": containers, "containers' statistics": stats} {
		if !slices.Equal(got, []string{c.id}) {
			t.Errorf("the stream of %s has %v, want %s", name, got, c.id)
		}
	}
}

// systemd hears that the daemon is ready when calls are answered and not before, and that it ends.
func TestReadiness(t *testing.T) {
	ctx, b := use(t)
	if err := b.StopVMRuntime(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		if err := b.StartVMRuntime(ctx); err != nil {
			t.Error(err)
		}
	})
	name := filepath.Join(b.Root, "notify")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	heard := func() string {
		t.Helper()
		message := make([]byte, 100)
		if err := socket.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, err := socket.Read(message)
		if err != nil {
			t.Fatal(err)
		}
		return string(message[:n])
	}
	var log bytes.Buffer
	daemon := b.Command(ctx, b.program, "serve", "--config", filepath.Join(b.Root, "vmruntime", "vmruntime.toml"))
	daemon.Env = append(os.Environ(), "NOTIFY_SOCKET="+name)
	daemon.Stdout, daemon.Stderr = &log, &log
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	ended := sync.OnceValue(daemon.Wait)
	defer func() {
		_ = daemon.Process.Kill() // if the test has not come to its end
		_ = ended()
	}()
	if got := heard(); got != "READY=1" {
		t.Errorf("systemd hears %q, want READY=1", got)
	}
	conn, err := grpc.NewClient("unix://"+b.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// One of the calls that are refused until all pods are found again.
	if _, err := runtimeapi.NewRuntimeServiceClient(conn).ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}); err != nil {
		t.Errorf("a daemon that is ready answers: %v", err)
	}
	if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := heard(); got != "STOPPING=1" {
		t.Errorf("systemd hears %q, want STOPPING=1", got)
	}
	if err := ended(); err != nil {
		t.Errorf("the daemon ends with %v:\n%s", err, log.String())
	}
}
