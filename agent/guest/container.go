package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// container is one container with its execs. lifecycle serialises create, start, update and remove; mu
// guards the fields, and is never held over a call.
type container struct {
	id     string
	crunID string // what crun calls it
	dir    string
	spec   *specs.Spec
	pidNS  agentpb.PidNamespace
	target string // container whose PID namespace is shared
	mounts []string
	upper  string // of the overlay, for usage
	cgroup string // directory
	main   *process
	usage  usageCache

	lifecycle sync.Mutex
	removed   bool // under lifecycle

	mu    sync.Mutex
	execs map[string]*process
	// execsStarting is how many are being started. execsHeld, which is closed then, is there while none may be.
	execsStarting int
	execsHeld     chan struct{}
}

func checkID(field, id string) error {
	if !idPattern.MatchString(id) {
		return fmt.Errorf("%s %q: must match %s: %w", field, id, idPattern, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *Server) container(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.containers[id]
	if !ok {
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

func (s *Server) process(ref *agentpb.ProcessRef) (*container, *process, error) {
	c, err := s.container(ref.GetContainerId())
	if err != nil {
		return nil, nil, err
	}
	if ref.ExecId == "" {
		return c, c.main, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.execs[ref.ExecId]
	if !ok {
		return nil, nil, fmt.Errorf("exec %q of container %q: %w", ref.ExecId, c.id, errdefs.ErrNotFound)
	}
	return c, p, nil
}

// CreateContainer mounts the container's root and keeps its spec. An ID in use is ErrAlreadyExists.
func (s *Server) CreateContainer(ctx context.Context, req *agentpb.CreateContainerRequest) (*agentpb.Empty, error) {
	c, err := s.newContainer(req)
	if err != nil {
		return nil, err
	}
	c.lifecycle.Lock()
	defer c.lifecycle.Unlock()
	s.mu.Lock()
	_, taken := s.containers[c.id]
	if !taken {
		s.containers[c.id] = c
	}
	s.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("container %q: %w", c.id, errdefs.ErrAlreadyExists)
	}
	// What has begun is finished even if the host goes away.
	if err := s.prepare(context.WithoutCancel(ctx), c, req); err != nil {
		return nil, errors.Join(err, s.discardContainer(c))
	}
	return &agentpb.Empty{}, nil
}

func (s *Server) newContainer(req *agentpb.CreateContainerRequest) (*container, error) {
	if err := checkID("id", req.Id); err != nil {
		return nil, err
	}
	if err := checkID("rootfs_disk", req.RootfsDisk); err != nil {
		return nil, err
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(req.OciSpec, spec); err != nil {
		return nil, fmt.Errorf("oci_spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if spec.Process == nil || spec.Linux == nil {
		return nil, fmt.Errorf("oci_spec: process and linux must be given: %w", errdefs.ErrInvalidArgument)
	}
	if req.PidNamespace == agentpb.PidNamespace_PID_NAMESPACE_TARGET {
		if _, err := s.container(req.PidTargetContainer); err != nil {
			return nil, fmt.Errorf("pid_target_container: %w", err)
		}
	}
	c := &container{
		id: req.Id, crunID: req.Id, dir: filepath.Join(s.containersDir(), req.Id), spec: spec,
		pidNS: req.PidNamespace, target: req.PidTargetContainer,
		cgroup: filepath.Join(s.cgroupRoot(), req.Id), execs: make(map[string]*process),
	}
	c.main = &process{
		container: req.Id, terminal: spec.Process.Terminal, wantStdin: req.Stdin, keepStdin: !req.StdinOnce,
		out: newOutput(req.OutputBufferBytes), exited: make(chan struct{}),
	}
	return c, nil
}

// prepare mounts all that the container needs.
func (s *Server) prepare(ctx context.Context, c *container, req *agentpb.CreateContainerRequest) error {
	lower := filepath.Join(s.opts.Root, "disks", req.RootfsDisk)
	if err := s.useImage(ctx, c, lower, req.RootfsDisk); err != nil {
		return fmt.Errorf("rootfs_disk: %w", err)
	}
	for _, img := range req.Images {
		if err := checkID("images.name", img.Name); err != nil {
			return err
		}
		if err := s.useImage(ctx, c, filepath.Join(s.opts.Root, "images", img.Name), img.Disk); err != nil {
			return fmt.Errorf("images %q: %w", img.Name, err)
		}
	}
	for _, v := range req.HugeVolumes {
		if err := s.mountHugeVolume(v); err != nil {
			return fmt.Errorf("huge_volumes %q: %w", v.Name, err)
		}
	}
	for _, d := range req.BlockDevices {
		if err := addBlockDevice(ctx, c.spec, d); err != nil {
			return fmt.Errorf("block_devices %q: %w", d.Path, err)
		}
	}
	if err := enterSubmounts(req.Submounts); err != nil {
		return fmt.Errorf("submounts: %w", err)
	}
	// Even a read-only root gets an upper layer, for the mount points that its image lacks.
	layers := filepath.Join(s.opts.Root, "scratch", c.id)
	if req.RootfsReadonly {
		layers = c.dir
	}
	c.upper = filepath.Join(layers, "upper")
	work, root := filepath.Join(layers, "work"), filepath.Join(c.dir, "rootfs")
	for _, dir := range []string{c.upper, work, root} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := copyRootAttributes(lower, c.upper); err != nil {
		return err
	}
	// The layer lives no longer than the guest, so nothing of it need be synced: volatile.
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,volatile", lower, c.upper, work)
	if err := unix.Mount("overlay", root, "overlay", 0, opts); err != nil {
		return fmt.Errorf("mount overlay of container %q: %w", c.id, err)
	}
	return nil
}

// copyRootAttributes gives the upper layer's root the owner and mode of the image's root: overlay shows
// those of the upper one.
func copyRootAttributes(from, to string) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return fmt.Errorf("stat %s: %w", from, err)
	}
	return errors.Join(os.Lchown(to, int(st.Uid), int(st.Gid)), unix.Chmod(to, st.Mode&0o7777))
}

func (s *Server) useImage(ctx context.Context, c *container, target, disk string) error {
	if err := s.images.acquire(ctx, target, disk); err != nil {
		return err
	}
	c.mounts = append(c.mounts, target)
	return nil
}

// StartContainer runs the container's process. Repeated, it gives the answer of the first time.
func (s *Server) StartContainer(ctx context.Context, req *agentpb.StartContainerRequest) (*agentpb.StartContainerResponse, error) {
	c, err := s.container(req.Id)
	if err != nil {
		return nil, err
	}
	c.lifecycle.Lock()
	defer c.lifecycle.Unlock()
	if c.removed {
		return nil, fmt.Errorf("container %q: %w", c.id, errdefs.ErrNotFound)
	}
	if !c.main.state().Started {
		if err := s.startContainer(ctx, c); err != nil {
			return nil, err
		}
	}
	st := c.main.state()
	return &agentpb.StartContainerResponse{Pid: st.Pid, StartedAtUnixNano: st.StartedAtUnixNano}, nil
}

func (s *Server) startContainer(ctx context.Context, c *container) error {
	if err := s.adjustSpec(c); err != nil {
		return err
	}
	data, err := json.Marshal(c.spec)
	if err != nil {
		return err
	}
	s.loadTables(c.spec.Process)
	uid, gid := s.owner(c.spec.Process.User.UID, c.spec.Process.User.GID)
	onExit := func(e exit) { s.containerExited(c, e) }
	w := s.takePrepared(c.main)
	if w != nil {
		c.crunID = preparedID
		err = c.main.follow(s, w.call, w.streams, func() error { return s.runPrepared(ctx, w, data, uid, gid) }, onExit)
	}
	if errors.Is(err, unix.EPIPE) {
		s.log.Warn("the crun that waited for the first container had ended", "error", err)
		w, c.crunID = nil, c.id
	}
	if w == nil {
		err = s.runContainer(ctx, c, data, uid, gid, onExit)
	}
	if err != nil {
		// A failed run may leave its state and cgroup behind.
		err = errors.Join(err, s.forgetRun(ctx, c))
	}
	return err
}

// runContainer runs the container by a crun of its own.
func (s *Server) runContainer(ctx context.Context, c *container, config []byte, uid, gid int, onExit func(exit)) error {
	if err := os.WriteFile(filepath.Join(c.dir, configName), config, 0o600); err != nil {
		return err
	}
	st, err := c.main.openStreams(s.consolePath(), uid, gid)
	if err != nil {
		return err
	}
	return c.main.start(ctx, s, runCall(c.dir, c.id), st, onExit)
}

// adjustSpec sets what only the guest knows. The pod's network, IPC and UTS namespaces are the guest's own, or belong to the pod's
// user namespace.
func (s *Server) adjustSpec(c *container) error {
	c.spec.Root = &specs.Root{Path: filepath.Join(c.dir, "rootfs"), Readonly: c.spec.Root != nil && c.spec.Root.Readonly}
	c.spec.Hostname, c.spec.Domainname = "", ""
	c.spec.Linux.CgroupsPath = "/" + filepath.Join(podCgroup, c.id)
	c.spec.Linux.Sysctl = nil
	var kept []specs.LinuxNamespace
	for _, ns := range c.spec.Linux.Namespaces {
		switch ns.Type {
		case specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.TimeNamespace, specs.UserNamespace:
		default:
			kept = append(kept, ns)
		}
	}
	if ns := s.userns.Load(); ns != nil {
		kept = append(kept, ns.namespaces()...)
	}
	pid, shared, err := s.pidNamespace(c)
	if err != nil {
		return err
	}
	if shared {
		kept = append(kept, pid)
	}
	c.spec.Linux.Namespaces = kept
	return nil
}

// pidNamespace gives the namespace entry, or false when the container is to have the guest's.
func (s *Server) pidNamespace(c *container) (specs.LinuxNamespace, bool, error) {
	ns := specs.LinuxNamespace{Type: specs.PIDNamespace}
	var pid int
	switch c.pidNS {
	case agentpb.PidNamespace_PID_NAMESPACE_CONTAINER:
		return ns, true, nil
	case agentpb.PidNamespace_PID_NAMESPACE_GUEST:
		return ns, false, nil
	case agentpb.PidNamespace_PID_NAMESPACE_POD:
		s.mu.Lock()
		pid = s.pausePID
		s.mu.Unlock()
		if pid == 0 {
			return ns, false, fmt.Errorf("pid_namespace POD: the sandbox was not configured with pod_pid_namespace: %w", errdefs.ErrFailedPrecondition)
		}
	case agentpb.PidNamespace_PID_NAMESPACE_TARGET:
		target, err := s.container(c.target)
		if err != nil {
			return ns, false, fmt.Errorf("pid_target_container: %w", err)
		}
		st := target.main.state()
		if !st.Started || st.Exited {
			return ns, false, fmt.Errorf("pid_target_container %q is not running: %w", c.target, errdefs.ErrFailedPrecondition)
		}
		pid = int(st.Pid)
	default:
		return ns, false, fmt.Errorf("pid_namespace %d is unknown: %w", c.pidNS, errdefs.ErrInvalidArgument)
	}
	ns.Path = fmt.Sprintf("/proc/%d/ns/pid", pid)
	return ns, true, nil
}

// containerExited kills what the container's process has left behind and records its end.
func (s *Server) containerExited(c *container, e exit) {
	oom := oomKills(c.cgroup) > 0
	if err := killCgroup(c.cgroup); err != nil {
		s.log.Error("kill the rest of a container", "container", c.id, "error", err)
	}
	c.main.finish(e, oom)
}

// RemoveContainer kills and unmounts the container with its execs.
func (s *Server) RemoveContainer(ctx context.Context, req *agentpb.RemoveContainerRequest) (*agentpb.Empty, error) {
	c, err := s.container(req.Id)
	if errdefs.IsNotFound(err) {
		return &agentpb.Empty{}, nil
	}
	c.lifecycle.Lock()
	defer c.lifecycle.Unlock()
	if c.removed {
		return &agentpb.Empty{}, nil
	}
	if c.main.state().Started {
		if err := s.killContainer(ctx, c); err != nil {
			return nil, err
		}
		if err := s.forgetRun(ctx, c); err != nil {
			return nil, err
		}
	}
	return &agentpb.Empty{}, s.discardContainer(c)
}

func (s *Server) killContainer(ctx context.Context, c *container) error {
	if err := killCgroup(c.cgroup); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	for _, p := range c.processes() {
		if p.state().Started && !p.wait(ctx).Exited {
			return fmt.Errorf("%s has not ended after SIGKILL: %w", p.name(), context.DeadlineExceeded)
		}
	}
	return nil
}

// forgetRun removes what crun keeps of a container.
func (s *Server) forgetRun(ctx context.Context, c *container) error {
	if _, err := os.Stat(filepath.Join(s.opts.CrunRoot, c.crunID)); err == nil {
		call := crunCall{log: filepath.Join(c.dir, "crun.log"), args: []string{"delete", "--force"}, last: []string{c.crunID}}
		if err := s.crunQuiet(ctx, call); err != nil {
			return err
		}
	}
	return removeCgroup(ctx, c.cgroup)
}

// discardContainer undoes prepare and forgets the container. It runs all steps.
func (s *Server) discardContainer(c *container) error {
	var errs []error
	c.letExecsGo() // and fail
	for _, p := range c.processes() {
		p.release()
	}
	errs = append(errs, unmountDir(filepath.Join(c.dir, "rootfs")))
	for _, target := range c.mounts {
		errs = append(errs, s.images.release(target))
	}
	c.mounts = nil
	errs = append(errs, os.RemoveAll(filepath.Join(s.opts.Root, "scratch", c.id)), os.RemoveAll(c.dir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove container %q: %w", c.id, err)
	}
	c.removed = true
	s.mu.Lock()
	delete(s.containers, c.id)
	s.mu.Unlock()
	return nil
}

func (c *container) processes() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := []*process{c.main}
	for _, p := range c.execs {
		all = append(all, p)
	}
	return all
}

// UpdateContainer changes the limits of the container's cgroup. Before the start it changes the spec.
func (s *Server) UpdateContainer(ctx context.Context, req *agentpb.UpdateContainerRequest) (*agentpb.Empty, error) {
	c, err := s.container(req.Id)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(req.Resources, &specs.LinuxResources{}); err != nil {
		return nil, fmt.Errorf("resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	c.lifecycle.Lock()
	defer c.lifecycle.Unlock()
	if !c.main.state().Started {
		if c.spec.Linux.Resources == nil {
			c.spec.Linux.Resources = &specs.LinuxResources{}
		}
		// What is not given stays.
		return &agentpb.Empty{}, json.Unmarshal(req.Resources, c.spec.Linux.Resources)
	}
	if c.main.hasExited() {
		return nil, fmt.Errorf("container %q has ended: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	path := filepath.Join(c.dir, "resources.json")
	if err := os.WriteFile(path, req.Resources, 0o600); err != nil {
		return nil, err
	}
	call := crunCall{log: filepath.Join(c.dir, "crun-update.log"), args: []string{"update", "--resources", path}, last: []string{c.crunID}}
	return &agentpb.Empty{}, s.crunQuiet(ctx, call)
}
