package vm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// How a container ends is told by exit code and reason.
func TestExit(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	tests := []struct {
		name   string
		cfg    *runtimeapi.ContainerConfig
		code   int32
		reason string
	}{
		{"success", shell("success", "exit 0"), 0, "Completed"},
		{"failure", shell("failure", "exit 42"), 42, "Error"},
		{"signal", shell("signal", "kill -KILL $$"), 137, "Error"},
		{"memory", with(shell("memory", "dd if=/dev/zero of=/dev/null bs=100M count=1"), func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}
		}), 137, "OOMKilled"},
	}
	for _, tt := range tests {
		s := p.start(tt.cfg).wait()
		if s.GetExitCode() != tt.code || s.GetReason() != tt.reason {
			t.Errorf("%s: exit code %d, reason %q (%s), want %d, %q", tt.name, s.GetExitCode(), s.GetReason(), s.GetMessage(), tt.code, tt.reason)
		}
	}

	missing := p.create(with(shell("missing", ""), func(c *runtimeapi.ContainerConfig) { c.Command = []string{"/no/such/program"} }))
	if err := missing.tryStart(); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("starting a missing program: %v, want an error that names it", err)
	}
	s := missing.status()
	if s.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || s.GetExitCode() != 128 || s.GetReason() != "StartError" || s.GetFinishedAt() == 0 {
		t.Errorf("after a failed start: %v, want EXITED, 128, StartError and a time", s)
	}
}

// StopContainer asks first, with the image's own signal or the container's, and kills after the grace period.
func TestStop(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	script := "for s in TERM QUIT USR1; do trap \"echo got $s; exit 0\" $s; done; echo ready; while :; do sleep 3600 & wait; done"
	asked := p.start(shell("asked", script)).ready("ready")
	asked.stop(30)
	if s := asked.wait(); s.GetExitCode() != 0 || asked.text() != "ready\ngot TERM\n" || s.GetStopSignal() != runtimeapi.Signal_SIGNAL_SIGTERM {
		t.Errorf("stopped with exit code %d, output %q, signal %s, want 0 after SIGTERM", s.GetExitCode(), asked.text(), s.GetStopSignal())
	}

	// The image's STOPSIGNAL is SIGQUIT.
	image := p.start(with(shell("image", script), func(c *runtimeapi.ContainerConfig) { c.Image.Image = images.Nginx })).ready("ready")
	image.stop(30)
	if s := image.wait(); image.text() != "ready\ngot QUIT\n" || s.GetStopSignal() != runtimeapi.Signal_SIGNAL_SIGQUIT {
		t.Errorf("stopped with output %q, signal %s, want SIGQUIT", image.text(), s.GetStopSignal())
	}

	own := p.start(with(shell("own", script), func(c *runtimeapi.ContainerConfig) {
		c.Image.Image, c.StopSignal = images.Nginx, runtimeapi.Signal_SIGNAL_SIGUSR1
	})).ready("ready")
	own.stop(30)
	if own.wait(); own.text() != "ready\ngot USR1\n" {
		t.Errorf("stopped with output %q, want SIGUSR1", own.text())
	}

	deaf := p.start(shell("deaf", "trap '' TERM; echo ready; while :; do sleep 1; done")).ready("ready")
	began := time.Now()
	deaf.stop(2)
	took := time.Since(began)
	if s := deaf.wait(); s.GetExitCode() != 137 || took < 2*time.Second || took > time.Minute {
		t.Errorf("exit code %d after %s, want 137 once 2 s of grace have passed", s.GetExitCode(), took)
	}

	// Without a grace period there is no asking.
	killed := p.start(shell("killed", script)).ready("ready")
	killed.stop(0)
	if s := killed.wait(); s.GetExitCode() != 137 || killed.text() != "ready\n" {
		t.Errorf("exit code %d, output %q, want 137 without a signal before", s.GetExitCode(), killed.text())
	}
}

// What the container leaves in its termination log is in the node's file when the container has exited.
func TestTerminationMessage(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	file := filepath.Join(t.TempDir(), "termination-log")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	c := p.start(with(shell("c", "echo the reason > /dev/termination-log; exit 1"), func(c *runtimeapi.ContainerConfig) {
		c.Annotations = map[string]string{"io.kubernetes.container.terminationMessagePath": "/dev/termination-log"}
		c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev/termination-log", HostPath: file}}
	}))
	c.wait()
	if got, err := os.ReadFile(file); err != nil || string(got) != "the reason\n" {
		t.Errorf("the termination log is %q, %v, want %q", got, err, "the reason\n")
	}
}
