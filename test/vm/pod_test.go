package vm_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

const handlerVM = "vm"

// pod is a sandbox of a test, removed when the test ends.
type pod struct {
	*bed
	t   *testing.T
	ctx context.Context
	cfg *runtimeapi.PodSandboxConfig
	id  string
}

// ctr is a container of a pod.
type ctr struct {
	*pod
	cfg *runtimeapi.ContainerConfig
	id  string
}

// podConfig is a small pod named after the test, with what change adds.
func (b *bed) podConfig(t *testing.T, change ...func(*runtimeapi.PodSandboxConfig)) *runtimeapi.PodSandboxConfig {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: fmt.Sprintf("uid-%d", time.Now().UnixNano())},
		Hostname:     name,
		LogDirectory: t.TempDir(),
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: b.CgroupParent(), SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}},
	}
	for _, c := range change {
		c(cfg)
	}
	return cfg
}

// vmPod runs a VM pod for the test.
func (b *bed) vmPod(ctx context.Context, t *testing.T, change ...func(*runtimeapi.PodSandboxConfig)) *pod {
	t.Helper()
	return b.runPod(ctx, t, handlerVM, b.podConfig(t, change...))
}

func (b *bed) runPod(ctx context.Context, t *testing.T, handler string, cfg *runtimeapi.PodSandboxConfig) *pod {
	t.Helper()
	resp, err := b.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
	if err != nil {
		t.Fatalf("RunPodSandbox: %v", err)
	}
	p := &pod{bed: b, t: t, ctx: ctx, cfg: cfg, id: resp.GetPodSandboxId()}
	t.Cleanup(p.remove)
	return p
}

// remove is idempotent, as the CRI's own stop and remove are.
func (p *pod) remove() {
	p.t.Helper()
	if _, err := p.rt.StopPodSandbox(p.ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.t.Errorf("StopPodSandbox: %v", err)
	}
	if _, err := p.rt.RemovePodSandbox(p.ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.t.Errorf("RemovePodSandbox: %v", err)
	}
}

func (p *pod) status() *runtimeapi.PodSandboxStatus {
	p.t.Helper()
	resp, err := p.rt.PodSandboxStatus(p.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		p.t.Fatalf("PodSandboxStatus: %v", err)
	}
	return resp.GetStatus()
}

func (p *pod) ip() string { return p.status().GetNetwork().GetIp() }

// shell is a container that runs a script with busybox.
func shell(name, script string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: images.Busybox},
		Command:  []string{"sh", "-c", script},
		LogPath:  name + ".log",
		Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}},
	}
}

// idle is a container that runs until it is told to end, and ends at once then.
func idle(name string) *runtimeapi.ContainerConfig {
	return shell(name, "trap 'exit 0' TERM; echo ready; while :; do sleep 3600 & wait; done")
}

// of is a container that runs what its image says.
func of(name, image string) *runtimeapi.ContainerConfig {
	cfg := shell(name, "")
	cfg.Image.Image, cfg.Command = image, nil
	return cfg
}

// with changes a container's configuration.
func with(cfg *runtimeapi.ContainerConfig, change func(*runtimeapi.ContainerConfig)) *runtimeapi.ContainerConfig {
	change(cfg)
	return cfg
}

func (p *pod) tryCreate(cfg *runtimeapi.ContainerConfig) (*ctr, error) {
	resp, err := p.rt.CreateContainer(p.ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
	return &ctr{pod: p, cfg: cfg, id: resp.GetContainerId()}, err
}

func (p *pod) create(cfg *runtimeapi.ContainerConfig) *ctr {
	p.t.Helper()
	c, err := p.tryCreate(cfg)
	if err != nil {
		p.t.Fatalf("CreateContainer %s: %v", cfg.GetMetadata().GetName(), err)
	}
	return c
}

// start creates and starts a container.
func (p *pod) start(cfg *runtimeapi.ContainerConfig) *ctr {
	p.t.Helper()
	c := p.create(cfg)
	c.start()
	return c
}

// output runs a container to its end and returns what it wrote; it has to succeed.
func (p *pod) output(cfg *runtimeapi.ContainerConfig) string {
	p.t.Helper()
	c := p.start(cfg)
	s := c.wait()
	if s.GetExitCode() != 0 {
		p.t.Errorf("container %s: exit code %d, reason %s %s, output:\n%s", cfg.GetMetadata().GetName(), s.GetExitCode(), s.GetReason(), s.GetMessage(), c.text())
	}
	return c.text()
}

func (c *ctr) tryStart() error {
	_, err := c.rt.StartContainer(c.ctx, &runtimeapi.StartContainerRequest{ContainerId: c.id})
	return err
}

func (c *ctr) start() {
	c.t.Helper()
	if err := c.tryStart(); err != nil {
		c.t.Fatalf("StartContainer %s: %v", c.cfg.GetMetadata().GetName(), err)
	}
}

func (c *ctr) stop(grace int64) {
	c.t.Helper()
	if _, err := c.rt.StopContainer(c.ctx, &runtimeapi.StopContainerRequest{ContainerId: c.id, Timeout: grace}); err != nil {
		c.t.Fatalf("StopContainer: %v", err)
	}
}

func (c *ctr) remove() {
	c.t.Helper()
	if _, err := c.rt.RemoveContainer(c.ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.id}); err != nil {
		c.t.Fatalf("RemoveContainer: %v", err)
	}
}

func (c *ctr) status() *runtimeapi.ContainerStatus {
	c.t.Helper()
	resp, err := c.rt.ContainerStatus(c.ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.id})
	if err != nil {
		c.t.Fatalf("ContainerStatus: %v", err)
	}
	return resp.GetStatus()
}

// wait returns the status of the container when it has exited.
func (c *ctr) wait() *runtimeapi.ContainerStatus {
	c.t.Helper()
	var s *runtimeapi.ContainerStatus
	c.until("the container exits", func() bool {
		s = c.status()
		return s.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	return s
}

// until polls until the condition holds; the test fails when it does not hold in time.
func (p *pod) until(what string, holds func() bool) {
	p.t.Helper()
	until(p.ctx, p.t, what, holds)
}

func until(ctx context.Context, t *testing.T, what string, holds func() bool) {
	t.Helper()
	untilWithin(ctx, t, 2*time.Minute, what, holds)
}

// untilWithin is until for what takes longer.
func untilWithin(ctx context.Context, t *testing.T, limit time.Duration, what string, holds func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for !holds() {
		select {
		case <-ctx.Done():
			t.Fatalf("waited too long until %s", what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *ctr) logFile() string { return filepath.Join(c.pod.cfg.GetLogDirectory(), c.cfg.GetLogPath()) }

// text is what the container wrote to its standard output, without the log's own columns.
func (c *ctr) text() string {
	c.t.Helper()
	return streamText(c.t, "stdout", c.logFile())
}

// ready waits until the container has written a text.
func (c *ctr) ready(text string) *ctr {
	c.t.Helper()
	c.until(fmt.Sprintf("the log has %q", text), func() bool {
		data, _ := os.ReadFile(c.logFile()) // missing is as good as empty
		return strings.Contains(string(data), text)
	})
	return c
}

// execSync runs a command in the container.
func (c *ctr) execSync(timeout int64, cmd ...string) (*runtimeapi.ExecSyncResponse, error) {
	return c.rt.ExecSync(c.ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: cmd, Timeout: timeout})
}

// sh runs a script in the container, which has to succeed, and returns its output.
func (c *ctr) sh(script string) string {
	c.t.Helper()
	resp, err := c.execSync(60, "sh", "-c", script)
	if err != nil {
		c.t.Fatalf("ExecSync %q: %v", script, err)
	}
	if resp.GetExitCode() != 0 {
		c.t.Errorf("%q: exit code %d, stderr %q, stdout %q", script, resp.GetExitCode(), resp.GetStderr(), resp.GetStdout())
	}
	return string(resp.GetStdout())
}

// expect compares what a script prints, without the last line feed.
func (c *ctr) expect(script, want string) {
	c.t.Helper()
	if got := strings.TrimSuffix(c.sh(script), "\n"); got != want {
		c.t.Errorf("%q printed %q, want %q", script, got, want)
	}
}

// refused fails unless the error has the code and its sentence the words.
func refused(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("got %v, want code %s", err, code)
		return
	}
	for _, w := range words {
		if !strings.Contains(status.Convert(err).Message(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}
