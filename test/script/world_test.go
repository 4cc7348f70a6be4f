package script

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// callTimeout bounds one call of the CRI, waitTimeout the wait for a condition.
const (
	callTimeout = 40 * time.Second
	waitTimeout = time.Minute
)

// world is the kubelet's side of one test: a daemon, and pods and containers by names of its own.
type world struct {
	bed  *bed
	logs string // directory of the pods' logs

	conn *grpc.ClientConn
	rt   runtimeapi.RuntimeServiceClient

	pods       map[string]*sandbox
	containers map[string]*ctr
	lives      map[string]int // pods that were removed, by name
	limits     *runtimeapi.LinuxContainerResources
	changes    map[string]map[string]any // what the daemons of a crash test have for their configuration
	logFrom    int64                     // how long the log was when the daemon was started

	owned  sync.WaitGroup
	mu     sync.Mutex
	events []*runtimeapi.ContainerEventResponse
}

type sandbox struct {
	name string
	id   string
	cfg  *runtimeapi.PodSandboxConfig
}

type ctr struct {
	name string
	id   string
	pod  *sandbox
	cfg  *runtimeapi.ContainerConfig
}

func newWorld(b *bed, logs string) *world {
	return &world{bed: b, logs: logs, pods: make(map[string]*sandbox), containers: make(map[string]*ctr), lives: make(map[string]int)}
}

// startDaemon starts vmruntime with the given changes to its configuration, and listens to its events.
func (w *world) startDaemon(changes map[string]map[string]any) error {
	text, err := setKeys(w.bed.config, changes)
	if err != nil {
		return err
	}
	if err := os.WriteFile(w.bed.configFile(), text, 0o644); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	w.logFrom = fileSize(w.bed.LogFile("vmruntime"))
	if err := w.bed.StartVMRuntime(ctx); err != nil {
		return err
	}
	return w.connect()
}

func (w *world) connect() error {
	var err error
	w.conn, err = grpc.NewClient("unix://"+w.bed.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	w.rt = runtimeapi.NewRuntimeServiceClient(w.conn)
	stream, err := w.rt.GetContainerEvents(context.Background(), &runtimeapi.GetEventsRequest{})
	if err != nil {
		return err
	}
	w.owned.Go(func() {
		for {
			e, err := stream.Recv()
			if err != nil {
				return // the daemon or the connection has ended
			}
			w.mu.Lock()
			w.events = append(w.events, e)
			w.mu.Unlock()
		}
	})
	return nil
}

func (w *world) disconnect() error {
	if w.conn == nil {
		return nil
	}
	err := w.conn.Close()
	w.owned.Wait()
	w.conn = nil
	return err
}

// close ends the daemon, and is an error if something of the world's pods is left.
func (w *world) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*callTimeout)
	defer cancel()
	if w.bed.VMRuntimePID() == 0 {
		if err := errors.Join(w.disconnect(), w.startDaemon(nil)); err != nil {
			return err
		}
	}
	err := w.removeAll(ctx)
	left, lerr := w.leaks(ctx)
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("left when all pods were removed:\n  %s", strings.Join(left, "\n  ")))
	}
	return errors.Join(err, lerr, w.disconnect(), w.bed.StopVMRuntime())
}

func (w *world) removeAll(ctx context.Context) error {
	list, err := w.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range list.GetItems() {
		_, err := w.rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.GetId()})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// leaks is what the node's own check finds, and what that does not look at.
func (w *world) leaks(ctx context.Context) ([]string, error) {
	left, err := w.bed.Leaks(ctx)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{
		filepath.Join(w.bed.records, "logs"), filepath.Join(w.bed.records, "pods"), filepath.Join(w.bed.records, "containers"),
		filepath.Join(w.bed.Root, "run", "s", "pods"), filepath.Join(w.bed.Root, "run", "s", "netns"),
		filepath.Join(w.bed.Root, "run", "s", "template"),
	} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if line := filepath.Join(dir, e.Name()); !slices.ContainsFunc(left, func(l string) bool { return strings.Contains(l, line) }) {
				left = append(left, line)
			}
		}
	}
	making, err := filepath.Glob(filepath.Join(w.bed.records, "templates", "making-*"))
	if err != nil {
		return nil, err
	}
	left = append(left, making...)
	if !w.until(func() bool { return w.bed.control.running() == 0 }) {
		left = append(left, fmt.Sprintf("%d processes of fake QEMUs", w.bed.control.running()))
	}
	return left, nil
}

// until waits for a condition and tells whether it came.
func (w *world) until(holds func() bool) bool {
	deadline := time.Now().Add(waitTimeout)
	for !holds() {
		if time.Now().After(deadline) {
			return false
		}
		<-time.After(5 * time.Millisecond)
	}
	return true
}

// call is the context of one call of the CRI.
func call() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), callTimeout)
}

// podConfig is that of a pod; each has a directory of logs for itself.
func (w *world) podConfig(name string) *runtimeapi.PodSandboxConfig {
	w.mu.Lock()
	defer w.mu.Unlock()
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name},
		Hostname:     name,
		LogDirectory: filepath.Join(w.logs, fmt.Sprintf("%s-%d", name, w.lives[name])),
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: w.bed.CgroupParent(), SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}, Resources: w.limits,
		},
	}
}

// processes are the directories in /proc of what runs in a pod's cgroup.
func (w *world) processes(p *sandbox) iter.Seq[string] {
	return func(yield func(string) bool) {
		files, _ := filepath.Glob("/proc/[0-9]*/cgroup") // the pattern is right
		for _, file := range files {
			cgroup, _ := os.ReadFile(file) // a process that has ended in the meantime reads as nothing
			if strings.Contains(string(cgroup), p.id) && !yield(filepath.Dir(file)) {
				return
			}
		}
	}
}

// run runs a pod with annotations of ours, each NAME=VALUE.
func (w *world) run(name string, annotations ...string) error {
	p := &sandbox{name: name, cfg: w.podConfig(name)}
	p.cfg.Annotations = make(map[string]string)
	for _, a := range annotations {
		key, value, _ := strings.Cut(a, "=")
		p.cfg.Annotations["vmruntime.io/"+key] = value
	}
	if err := os.MkdirAll(p.cfg.GetLogDirectory(), 0o755); err != nil {
		return err
	}
	ctx, cancel := call()
	defer cancel()
	resp, err := w.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.cfg, RuntimeHandler: "vm"})
	if err != nil {
		return err
	}
	p.id = resp.GetPodSandboxId()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pods[name] = p
	return nil
}

func (w *world) pod(name string) (*sandbox, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p := w.pods[name]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("the script has no pod %q", name)
}

func (w *world) ctr(name string) (*ctr, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c := w.containers[name]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("the script has no container %q", name)
}

func (w *world) containerConfig(name string, script []string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: testImage},
		Command:  script,
		LogPath:  name + ".log",
		Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}},
	}
}

// machine makes a container a machine.
func machine(c *runtimeapi.ContainerConfig) {
	c.Image.Image, c.Command = machineImage, nil
}

func (w *world) create(pod, name string, script []string, change ...func(*runtimeapi.ContainerConfig)) error {
	p, err := w.pod(pod)
	if err != nil {
		return err
	}
	c := &ctr{name: name, pod: p, cfg: w.containerConfig(name, script)}
	for _, f := range change {
		f(c.cfg)
	}
	ctx, cancel := call()
	defer cancel()
	resp, err := w.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: c.cfg, SandboxConfig: p.cfg})
	if err != nil {
		return err
	}
	c.id = resp.GetContainerId()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.containers[name] = c
	return nil
}

func (w *world) start(name string) error {
	c, err := w.ctr(name)
	if err != nil {
		return err
	}
	ctx, cancel := call()
	defer cancel()
	_, err = w.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.id})
	return err
}

func (w *world) stop(name string, grace int64) error {
	c, err := w.ctr(name)
	if err != nil {
		return err
	}
	ctx, cancel := call()
	defer cancel()
	_, err = w.rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.id, Timeout: grace})
	return err
}

func (w *world) removeContainer(name string) error {
	c, err := w.ctr(name)
	if err != nil {
		return err
	}
	ctx, cancel := call()
	defer cancel()
	_, err = w.rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.id})
	return err
}

func (w *world) stopPod(name string) error {
	p, err := w.pod(name)
	if err != nil {
		return err
	}
	ctx, cancel := call()
	defer cancel()
	_, err = w.rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id})
	return err
}

func (w *world) removePod(name string) error {
	p, err := w.pod(name)
	if err != nil {
		return err
	}
	ctx, cancel := call()
	defer cancel()
	_, err = w.rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id})
	if err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.lives[name]++
	}
	return err
}

func (w *world) exec(name string, timeout int64, cmd []string) (*runtimeapi.ExecSyncResponse, error) {
	c, err := w.ctr(name)
	if err != nil {
		return nil, err
	}
	ctx, cancel := call()
	defer cancel()
	return w.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: cmd, Timeout: timeout})
}

// containerLine is a container's state as one line: "created", "running" or "exited CODE REASON".
func (w *world) containerLine(name string) (string, error) {
	c, err := w.ctr(name)
	if err != nil {
		return "", err
	}
	ctx, cancel := call()
	defer cancel()
	resp, err := w.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.id})
	if err != nil {
		return "", err
	}
	return stateLine(resp.GetStatus()), nil
}

func stateLine(s *runtimeapi.ContainerStatus) string {
	state := strings.ToLower(strings.TrimPrefix(s.GetState().String(), "CONTAINER_"))
	if s.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED {
		return fmt.Sprintf("%s %d %s", state, s.GetExitCode(), s.GetReason())
	}
	return state
}

// list is every pod and container that the daemon lists, by our names, sorted.
func (w *world) list() (string, error) {
	ctx, cancel := call()
	defer cancel()
	pods, err := w.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return "", err
	}
	containers, err := w.rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return "", err
	}
	var lines []string
	for _, p := range pods.GetItems() {
		state := strings.ToLower(strings.TrimPrefix(p.GetState().String(), "SANDBOX_"))
		lines = append(lines, fmt.Sprintf("pod %s %s", p.GetMetadata().GetName(), state))
	}
	for _, c := range containers.GetContainers() {
		state := strings.ToLower(strings.TrimPrefix(c.GetState().String(), "CONTAINER_"))
		lines = append(lines, fmt.Sprintf("container %s %s", c.GetMetadata().GetName(), state))
	}
	slices.Sort(lines)
	return strings.Join(append(lines, ""), "\n"), nil
}

func (w *world) logFile(c *ctr) string {
	return filepath.Join(c.pod.cfg.GetLogDirectory(), c.cfg.GetLogPath())
}

// logText is a container's log without its times: "STREAM TEXT" for each line, parts joined.
func (w *world) logText(name string) (string, error) {
	c, err := w.ctr(name)
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(w.logFile(c))
	if err != nil {
		return "", err
	}
	var out strings.Builder
	part, stream := "", ""
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(fields) != 4 || fields[2] != "F" && fields[2] != "P" {
			return "", fmt.Errorf("%s has the line %q, which is not one of a CRI log", w.logFile(c), line)
		}
		if fields[2] == "P" {
			part, stream = part+fields[3], fields[1]
			continue
		}
		fmt.Fprintf(&out, "%s %s%s\n", fields[1], part, fields[3])
		part = ""
	}
	if part != "" {
		fmt.Fprintf(&out, "%s %s\n", stream, part)
	}
	return out.String(), nil
}

// hasEvent tells whether an event of a type came for a container or pod.
func (w *world) hasEvent(kind, id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.events, func(e *runtimeapi.ContainerEventResponse) bool {
		return e.GetContainerId() == id && e.GetContainerEventType().String() == "CONTAINER_"+kind+"_EVENT"
	})
}

// sentence is an error of the CRI as its code and message.
func sentence(err error) string {
	s := status.Convert(err)
	return fmt.Sprintf("%s: %s\n", s.Code(), s.Message())
}
