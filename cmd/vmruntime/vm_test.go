package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/vmruntime/vmruntime/runtime/vmpb"
)

// refusing is a daemon that refuses everything; only its words matter. Its console echoes until it is told to end.
type refusing struct {
	vmpb.UnimplementedVMServiceServer
}

func (refusing) Pause(context.Context, *vmpb.PauseRequest) (*vmpb.PauseResponse, error) {
	return nil, status.Error(codes.FailedPrecondition, "the words of the daemon")
}

func (refusing) Console(stream vmpb.VMService_ConsoleServer) error {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return status.Error(codes.Unavailable, "the input has ended")
		}
		if err != nil {
			return err
		}
		if string(m.GetData()) == "end\n" {
			return nil
		}
		if err := stream.Send(&vmpb.ConsoleResponse{Data: m.GetData()}); err != nil {
			return err
		}
	}
}

func serveRefusing(t *testing.T) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	vmpb.RegisterVMServiceServer(s, refusing{})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

func TestVMErrors(t *testing.T) {
	socket := serveRefusing(t)
	missing := filepath.Join(t.TempDir(), "none.sock")
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"the daemon's own words": {[]string{"vm", "pause", "x", "--address", socket}, "the words of the daemon"},
		"no daemon":              {[]string{"vm", "list", "--address", missing}, "the daemon does not answer: dial unix " + missing + ": connect: no such file or directory; `vmruntime serve` has to run, with server.admin_socket at this path"},
		"unknown output":         {[]string{"vm", "list", "-o", "yaml", "--address", socket}, `--output is "yaml"; it has to be text or json`},
		"no VM":                  {[]string{"vm", "reset"}, "accepts 1 arg(s), received 0"},
		"two places to listen":   {[]string{"vm", "vnc", "x", "--port", "1", "--socket", "y"}, "if any flags in the group [port socket] are set none of the others can be; [port socket] were all set"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := command()
			cmd.SetArgs(tc.args)
			if err := cmd.ExecuteContext(t.Context()); err == nil || err.Error() != tc.want {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

// slow gives its parts one by one, as a terminal does, and then blocks or ends.
type slow struct {
	parts []string
	end   chan struct{}
}

func (s *slow) Read(b []byte) (int, error) {
	if len(s.parts) == 0 {
		<-s.end
		return 0, io.EOF
	}
	n := copy(b, s.parts[0])
	s.parts = s.parts[1:]
	return n, nil
}

func TestConsoleEnds(t *testing.T) {
	socket := serveRefusing(t)
	closed, open := make(chan struct{}), make(chan struct{})
	close(closed)
	t.Cleanup(func() { close(open) })
	for name, tc := range map[string]struct {
		in      *slow
		want    string
		wantErr string
	}{
		"by the escape":                {&slow{[]string{"ab\x1dcd"}, open}, "", ""},
		"by the other side":            {&slow{[]string{"ab", "c\x03", "end\n"}, open}, "abc\x03", ""},
		"not by the input's end alone": {&slow{[]string{"ab"}, closed}, "ab", "the input has ended"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			cmd := command()
			cmd.SetArgs([]string{"vm", "console", "x", "--address", socket})
			cmd.SetIn(tc.in)
			cmd.SetOut(&out)
			err := cmd.ExecuteContext(t.Context())
			if got := fmt.Sprint(err); tc.wantErr != "" && got != tc.wantErr || tc.wantErr == "" && err != nil {
				t.Errorf("ends with %v, want %q", err, tc.wantErr)
			}
			if !strings.HasPrefix(out.String(), tc.want) {
				t.Errorf("shows %q, want %q", &out, tc.want)
			}
			if strings.Contains(out.String(), "cd") {
				t.Error("what comes behind the escape is sent")
			}
		})
	}
}

func TestPrintVMs(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	vm := &vmpb.VM{
		PodId: "0123456789abcdef", Namespace: "prod", Name: "db", Form: "machine", State: "paused", Vcpus: 2, MemoryBytes: 1 << 30,
		Addresses: []string{"10.0.0.7", "fd00::7"}, StartedAtUnixNano: now.Add(-90 * time.Minute).UnixNano(),
	}
	var out strings.Builder
	if err := printList(&out, &vmpb.ListResponse{Vms: []*vmpb.VM{vm, {PodId: "fe", Namespace: "a", Name: "b", Form: "containers", State: "stopped", Vcpus: 1, MemoryBytes: 320 << 20}}}, now); err != nil {
		t.Fatal(err)
	}
	want := `POD ID         NAMESPACE  POD  FORM        STATE    VCPUS  MEMORY    IP        UPTIME
0123456789abc  prod       db   machine     paused   2      1024 MiB  10.0.0.7  1h30m0s
fe             a          b    containers  stopped  1      320 MiB   -         -
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
	out.Reset()
	show := &vmpb.ShowResponse{
		Vm: vm, Acceleration: "kvm", QemuPid: 77, Agent: true,
		Disks:      []*vmpb.Disk{{Serial: "root", ReadBytes: 5 << 20, Reads: 10, WriteBytes: 1 << 20, Writes: 3}},
		Memory:     &vmpb.Memory{ActualBytes: 1 << 30, TotalBytes: 1000 << 20, AvailableBytes: 600 << 20},
		Interfaces: []*vmpb.Interface{{Name: "eth0", Mac: "02:00:00:00:00:01", Mtu: 1450, Addresses: []string{"10.0.0.7/24"}}},
		Containers: []*vmpb.Container{{Id: "c1", Name: "db", Image: "db:1", State: "exited", ExitCode: 1, Reason: "GuestFailed", Message: "panic"}},
		Guest: &vmpb.Guest{
			Os: "Debian", Kernel: "6.1", Hostname: "db", Users: []string{"root", "bob"},
			Interfaces:  []*vmpb.Interface{{Name: "enp1s0", Mac: "02:00:00:00:00:01"}},
			FileSystems: []*vmpb.FileSystem{{MountPoint: "/", Type: "ext4", UsedBytes: 1 << 30, TotalBytes: 2 << 30}},
		},
		Info: map[string]string{"pod": `{"uid":200000}`},
	}
	if err := printVM(&out, show, now); err != nil {
		t.Fatal(err)
	}
	want = `pod            prod/db
pod ID         0123456789abcdef
form           machine
state          paused
vCPUs          2
memory         1.0 GiB (1073741824 bytes)
uptime         1h30m0s
QEMU           process 77, acceleration kvm
balloon        1.0 GiB (1073741824 bytes) for the guest
guest memory   600 MiB of 1000 MiB available
disk           root: read 5 MiB in 10, written 1 MiB in 3
network        eth0: 02:00:00:00:00:01, MTU 1450, 10.0.0.7/24
container      db c1, exited, exit code 1, GuestFailed panic
  image        db:1
agent          vmagent answers
guest agent    qemu-guest-agent answers
  system       Debian
  kernel       6.1
  host name    db
  network      enp1s0: 02:00:00:00:00:01, no addresses
  file system  /: ext4, 1024 MiB of 2048 MiB used
  users        root bob
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
	var buf bytes.Buffer
	if err := printJSON(&buf, show); err != nil {
		t.Fatal(err)
	}
	var parsed struct {
		Info map[string]struct{ UID int }
		VM   struct{ State string }
	}
	if err := json.Unmarshal(buf.Bytes(), &parsed); err != nil || parsed.Info["pod"].UID != 200000 || parsed.VM.State != "paused" {
		t.Errorf("JSON: %v, %+v in\n%s", err, parsed, &buf)
	}
}
