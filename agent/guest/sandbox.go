package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// ConfigureSandbox makes the guest this pod. Every step may be repeated: a call that failed half way is
// made good by the next one.
func (s *Server) ConfigureSandbox(ctx context.Context, req *agentpb.ConfigureSandboxRequest) (*agentpb.Empty, error) {
	s.sandbox.Lock()
	defer s.sandbox.Unlock()
	ctx = context.WithoutCancel(ctx)
	steps := []struct {
		name string
		do   func() error
	}{
		{"time_unix_nano", func() error { return setClock(req.TimeUnixNano) }},
		{"entropy", func() error { return addEntropy(req.Entropy) }},
		{"restored", func() error { return s.bindAnew(req.Restored) }},
		{"hardware", func() error { return s.takeHardware(req.Hardware) }},
		{"huge_pages", func() error { return reserveHugePages(req.HugePages) }},
		{"hostname", func() error { return setHostname(req.Hostname) }},
		{"scratch_disk", func() error { return s.mountScratch(ctx, req.ScratchDisk) }},
		{"shm_size_bytes", func() error { return s.mountShm(req.ShmSizeBytes) }},
		{"sandbox files", func() error { return s.writeSandboxFiles(req) }},
		{"users, groups", func() error { return s.startUserns(req) }},
		{"owners of sandbox files", s.ownSandboxFiles},
		{"network", func() error { return s.configurePodNetwork(ctx, req) }},
		{"limits", s.limits.followMemory}, // as they are before anybody of the pod sets one
		{"sysctls", func() error { return s.setPodSysctls(req.Sysctls) }},
		{"pod_pid_namespace", func() error { return s.startPause(req.PodPidNamespace) }},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return nil, fmt.Errorf("configure sandbox: %s: %w", step.name, err)
		}
	}
	s.configured.Store(true)
	return &agentpb.Empty{}, nil
}

// takeHardware gives devices their addresses. In a pod with a user namespace that was done before they were moved there.
func (s *Server) takeHardware(addresses []*agentpb.HardwareAddress) error {
	if s.userns.Load() != nil {
		return nil
	}
	return readdress(addresses)
}

func setClock(nano int64) error {
	if nano == 0 {
		return nil
	}
	tv := unix.NsecToTimeval(nano)
	return unix.Settimeofday(&tv)
}

// addEntropy mixes the bytes into the random pool, credits them, and has the kernel's generator begin anew from the pool, as random(4) describes.
func addEntropy(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	f, err := os.OpenFile("/dev/random", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const header = 8 // struct rand_pool_info: two ints, then the bytes
	buf := make([]int32, 2+(len(p)+3)/4)
	buf[0], buf[1] = int32(len(p)*8), int32(len(p))
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&buf[0])), len(buf)*4)[header:], p)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&buf[0])))
	if errno != 0 {
		return errno
	}
	// At once, and not when the kernel next does so by itself: another guest may have begun with the same pool.
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDRESEEDCRNG, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func setHostname(name string) error {
	if name == "" {
		return nil
	}
	return unix.Sethostname([]byte(name))
}

func (s *Server) mountScratch(ctx context.Context, serial string) error {
	target := filepath.Join(s.opts.Root, "scratch")
	if serial == "" || isMountPoint(target) {
		return nil
	}
	dev, err := findDisk(ctx, serial, bootDeviceTimeout)
	if err != nil {
		return err
	}
	// The disk lives no longer than the pod: no barriers, and freed blocks go back to the host.
	if err := unix.Mount(dev, target, "ext4", unix.MS_NOATIME, "discard,nobarrier"); err != nil {
		return fmt.Errorf("mount ext4 of disk %q (%s) at %s: %w", serial, dev, target, err)
	}
	return nil
}

func (s *Server) mountShm(size int64) error {
	target := filepath.Join(s.opts.Root, "sandbox", "shm")
	if size <= 0 || isMountPoint(target) {
		return nil
	}
	err := unix.Mount("shm", target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("mode=1777,size=%d", size))
	if err != nil {
		return fmt.Errorf("mount tmpfs at %s: %w", target, err)
	}
	return nil
}

// isMountPoint tells whether dir is on another file system than its parent.
func isMountPoint(dir string) bool {
	var in, above unix.Stat_t
	if unix.Stat(dir, &in) != nil || unix.Stat(filepath.Dir(dir), &above) != nil {
		return false
	}
	return in.Dev != above.Dev
}

// writeSandboxFiles writes the files that containers bind mount. They keep their inodes.
func (s *Server) writeSandboxFiles(req *agentpb.ConfigureSandboxRequest) error {
	hostname := req.Hostname
	if hostname != "" {
		hostname += "\n"
	}
	files := map[string]string{"resolv.conf": req.ResolvConf, "hosts": req.Hosts, "hostname": hostname}
	for name, text := range files {
		path := filepath.Join(s.opts.Root, "sandbox", name)
		if have, err := os.ReadFile(path); err == nil && string(have) == text {
			continue
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func setSysctls(root string, values map[string]string) error {
	dir, err := os.OpenRoot(root)
	if err != nil {
		return err
	}
	defer dir.Close()
	var errs []error
	for key, value := range values {
		f, err := dir.OpenFile(sysctlPath(key), os.O_WRONLY, 0)
		if err != nil {
			errs = append(errs, fmt.Errorf("sysctl %q: %w: %w", key, err, errdefs.ErrInvalidArgument))
			continue
		}
		_, err = f.WriteString(value)
		if err = errors.Join(err, f.Close()); err != nil {
			errs = append(errs, fmt.Errorf("sysctl %q = %q: %w: %w", key, value, err, errdefs.ErrInvalidArgument))
		}
	}
	return errors.Join(errs...)
}

// sysctlPath turns a name as in sysctl(8) into a path: the first of dot and slash that occurs separates,
// and the other one stands for itself.
func sysctlPath(key string) string {
	i := strings.IndexAny(key, "./")
	if i < 0 || key[i] == '/' {
		return key
	}
	return strings.Map(func(r rune) rune {
		switch r {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return r
	}, key)
}

// startPause starts the process that holds the pod's PID namespace.
func (s *Server) startPause(want bool) error {
	s.mu.Lock()
	running := s.pausePID != 0
	s.mu.Unlock()
	if !want || running {
		return nil
	}
	pid, err := s.startHolder(&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pausePID = pid
	return nil
}

// startHolder starts a process that does nothing but hold namespaces.
func (s *Server) startHolder(sys *syscall.SysProcAttr) (int, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	files := []uintptr{null.Fd(), null.Fd(), null.Fd()}
	return s.reaper.start([]string{"/proc/self/exe", "pause"}, files, sys, func(exit) {
		s.work.Go(s.pauseEnded)
	})
}

func (s *Server) pauseEnded() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pausePID = 0
	s.log.Warn("the holder of the pod's namespaces has ended")
}

// MountShare mounts the virtiofs device with the given tag, waiting for it to appear.
func (s *Server) MountShare(ctx context.Context, req *agentpb.MountShareRequest) (*agentpb.Empty, error) {
	s.sandbox.Lock()
	defer s.sandbox.Unlock()
	target := filepath.Join(s.opts.Root, "shares")
	if isMountPoint(target) {
		return &agentpb.Empty{}, nil
	}
	if req.Tag == "" {
		return nil, fmt.Errorf("tag is empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := loadLazy("virtiofs"); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, plugTimeout)
	defer cancel()
	var last error
	err := poll(ctx, devicePoll, func() (bool, error) {
		last = unix.Mount(req.Tag, target, "virtiofs", 0, "")
		if last != nil && !errors.Is(last, unix.EINVAL) && !errors.Is(last, unix.ENODEV) && !errors.Is(last, unix.ENOENT) {
			return false, last
		}
		return last == nil, nil
	})
	if err != nil {
		return nil, fmt.Errorf("mount virtiofs %q at %s: %w", req.Tag, target, errors.Join(err, last))
	}
	return &agentpb.Empty{}, nil
}

// Shutdown ends all containers, writes everything to disk and, after the answer, powers off.
func (s *Server) Shutdown(ctx context.Context, _ *agentpb.ShutdownRequest) (*agentpb.Empty, error) {
	s.sandbox.Lock()
	defer s.sandbox.Unlock()
	err := killCgroup(s.cgroupRoot())
	if err != nil {
		s.log.Error("shutdown: kill containers", "error", err)
	}
	wait, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, c := range s.allContainers() {
		if c.main.state().Started {
			c.main.wait(wait)
		}
	}
	unix.Sync()
	s.afterAnswer(s.opts.PowerOff)
	return &agentpb.Empty{}, nil
}

// afterAnswer runs f when the answer to the call under way has had the time to reach the host.
func (s *Server) afterAnswer(f func()) {
	s.work.Go(func() {
		time.Sleep(shutdownDelay)
		f()
	})
}

// shutdownDelay lets the answer reach the host before the power goes.
const shutdownDelay = 50 * time.Millisecond
