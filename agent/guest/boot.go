package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent"
)

const portTimeout = 30 * time.Second

// Boot does what PID 1 of an initramfs does before the service can run: file systems, modules, loopback.
func Boot() error {
	unix.Umask(0)
	if err := leaveRootfs(); err != nil {
		return err
	}
	if err := mountAll(); err != nil {
		return err
	}
	if err := loadBoot(); err != nil {
		return err
	}
	// From here on, so that the kernel's questions while it boots, which have no answer here, cost no process.
	if err := answerKernel(); err != nil {
		return err
	}
	if err := prepareCgroups(); err != nil {
		return err
	}
	if err := setLoopbackUp(); err != nil {
		return err
	}
	// Containers may have as many processes as their cgroups let them, as under a usual containerd, however much memory there was at boot.
	most := &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Setrlimit(unix.RLIMIT_NPROC, most); err != nil {
		return fmt.Errorf("RLIMIT_NPROC: %w", err)
	}
	// Process numbers are not used again soon.
	return os.WriteFile("/proc/sys/kernel/pid_max", []byte("4194304"), 0)
}

func setLoopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback device: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("loopback device: %w", err)
	}
	return nil
}

// leaveRootfs puts a mount of its own over the kernel's first one, from which pivot_root(2), and so crun,
// cannot move away.
func leaveRootfs() error {
	const place = "/newroot"
	if err := os.MkdirAll(place, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", place, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind root: %w", err)
	}
	if err := unix.Chdir(place); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Chdir("/")
}

func mountAll() error {
	const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	mounts := []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"proc", "/proc", "proc", quiet, ""},
		{"sysfs", "/sys", "sysfs", quiet, ""},
		{"dev", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", cgroupMount, "cgroup2", quiet, "nsdelegate,memory_recursiveprot"},
	}
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data)
		if err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s at %s: %w", m.kind, m.target, err)
		}
	}
	for link, target := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	// As on any host, so that containers can ask for mount propagation.
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// prepareCgroups enables every controller for the containers' cgroups.
func prepareCgroups() error {
	dir := filepath.Join(cgroupMount, podCgroup)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, d := range []string{cgroupMount, dir} {
		names, err := os.ReadFile(filepath.Join(d, "cgroup.controllers"))
		if err != nil {
			return err
		}
		for name := range strings.FieldsSeq(string(names)) {
			if err := os.WriteFile(filepath.Join(d, "cgroup.subtree_control"), []byte("+"+name), 0); err != nil {
				return fmt.Errorf("enable cgroup controller %s: %w", name, err)
			}
		}
	}
	return nil
}

// OpenPort opens the agent's virtio-serial port, waiting for it to appear.
func OpenPort(ctx context.Context) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, portTimeout)
	defer cancel()
	var dev string
	err := poll(ctx, 2*time.Millisecond, func() (bool, error) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, path := range names {
			if name, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(name)) == agent.PortName {
				dev = "/dev/" + filepath.Base(filepath.Dir(path))
				_, err := os.Stat(dev)
				return err == nil, nil
			}
		}
		return false, err
	})
	if err != nil {
		return nil, fmt.Errorf("virtio-serial port %q: %w", agent.PortName, err)
	}
	return os.OpenFile(dev, os.O_RDWR|unix.O_NONBLOCK, 0)
}

// PowerOff ends the machine. It does not return.
func PowerOff(log *slog.Logger) {
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	log.Error("power off", "error", err)
}

// Pause holds a pod's namespaces. It is PID 1 of its PID namespace, if it has one: no signal from inside ends it, and its
// children, being ignored, leave no zombies. It does not return.
func Pause() {
	signal.Ignore()
	for {
		_ = unix.Pause()
	}
}
