package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// userns is the user namespace of the pod's containers, with the network, IPC and UTS namespaces that belong to it: rights over
// those, as to listen on port 80, are rights in it. A process holds them.
type userns struct {
	pid           int
	users, groups *agentpb.IDRange
	moved         map[string]bool // network devices, by hardware address
}

// maxID is above all user and group IDs that a namespace may have: the last two of all are nobody's.
const maxID = 1<<32 - 2

// startUserns starts the holder of the user namespace that the pod asks for, if it does.
func (s *Server) startUserns(req *agentpb.ConfigureSandboxRequest) error {
	if s.userns.Load() != nil || req.Users == nil && req.Groups == nil {
		return nil
	}
	for _, r := range []*agentpb.IDRange{req.Users, req.Groups} {
		if r.GetCount() == 0 || uint64(r.GetFirst())+uint64(r.GetCount()) > maxID {
			return fmt.Errorf("{%v}: want at least one ID, and all of them below %d: %w", r, uint32(maxID), errdefs.ErrInvalidArgument)
		}
	}
	sys := &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UidMappings: idMap(req.Users), GidMappings: idMap(req.Groups), GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{}, // root in there
	}
	if req.PodPidNamespace {
		sys.Cloneflags |= unix.CLONE_NEWPID
	}
	pid, err := s.startHolder(sys)
	if err != nil {
		return err
	}
	if req.PodPidNamespace {
		s.mu.Lock()
		s.pausePID = pid
		s.mu.Unlock()
	}
	s.userns.Store(&userns{pid: pid, users: req.Users, groups: req.Groups, moved: make(map[string]bool)})
	return s.inPod(setLoopbackUp)
}

func idMap(r *agentpb.IDRange) []syscall.SysProcIDMap {
	return []syscall.SysProcIDMap{{HostID: int(r.First), Size: int(r.Count)}}
}

// outside is the guest's ID of one in a user namespace. What the namespace does not have becomes an ID that is nobody's in it.
func outside(r *agentpb.IDRange, id uint32) int { return int(r.First + min(id, r.Count)) }

// owner gives the guest's IDs of a user and a group of the containers.
func (s *Server) owner(uid, gid uint32) (int, int) {
	ns := s.userns.Load()
	if ns == nil {
		return int(uid), int(gid)
	}
	return outside(ns.users, uid), outside(ns.groups, gid)
}

// namespaces are what the pod's containers join.
func (ns *userns) namespaces() []specs.LinuxNamespace {
	dir := fmt.Sprintf("/proc/%d/ns", ns.pid)
	return []specs.LinuxNamespace{
		{Type: specs.UserNamespace, Path: dir + "/user"},
		{Type: specs.NetworkNamespace, Path: dir + "/net"},
		{Type: specs.IPCNamespace, Path: dir + "/ipc"},
		{Type: specs.UTSNamespace, Path: dir + "/uts"},
	}
}

// inPod runs f in the network and IPC namespaces of the pod's containers. Where these are not the guest's, it does so on a
// thread that ends with f.
func (s *Server) inPod(f func() error) error {
	ns := s.userns.Load()
	if ns == nil {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- ns.enter(f)
	}()
	return <-done
}

func (ns *userns) enter(f func() error) error {
	fd, err := unix.PidfdOpen(ns.pid, 0)
	if err != nil {
		return fmt.Errorf("the holder of the pod's namespaces: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET|unix.CLONE_NEWIPC); err != nil {
		return fmt.Errorf("enter the pod's namespaces: %w", err)
	}
	return f()
}

// configurePodNetwork is configureNetwork where the pod's containers are.
func (s *Server) configurePodNetwork(ctx context.Context, req *agentpb.ConfigureSandboxRequest) error {
	if ns := s.userns.Load(); ns != nil {
		if err := ns.moveInterfaces(ctx, req.Interfaces); err != nil {
			return err
		}
	}
	return s.inPod(func() error { return configureNetwork(ctx, req) })
}

// moveInterfaces gives the guest's network devices to the pod's network namespace.
func (ns *userns) moveInterfaces(ctx context.Context, in []*agentpb.Interface) error {
	for _, i := range in {
		if ns.moved[i.Mac] {
			continue
		}
		link, err := linkByMAC(ctx, i.Mac)
		if err != nil {
			return fmt.Errorf("interface %q: %w", i.Name, err)
		}
		if err := netlink.LinkSetNsPid(link, ns.pid); err != nil {
			return fmt.Errorf("interface %q: move it to the pod's network namespace: %w", i.Name, err)
		}
		ns.moved[i.Mac] = true
	}
	return nil
}

// ipcSysctl matches what belongs to an IPC namespace, below /proc/sys.
var ipcSysctl = regexp.MustCompile(`^(kernel/(shm|msg|sem)|fs/mqueue/)`)

// setPodSysctls sets sysctls where the pod's containers are. Those of an IPC namespace are for root of its user namespace only.
func (s *Server) setPodSysctls(values map[string]string) error {
	const all = "/proc/sys"
	if s.userns.Load() == nil {
		return setSysctls(all, values)
	}
	ipc, rest := make(map[string]string), make(map[string]string)
	for key, value := range values {
		if ipcSysctl.MatchString(sysctlPath(key)) {
			ipc[key] = value
		} else {
			rest[key] = value
		}
	}
	return errors.Join(
		s.inPod(func() error { return setSysctls(all, rest) }),
		s.inPod(func() error {
			uid, _ := s.owner(0, 0)
			// Of this thread alone, which ends with the function.
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
				return fmt.Errorf("become root of the pod: %w", errno)
			}
			return setSysctls(all, ipc)
		}),
	)
}

// ownSandboxFiles gives what containers share to root of the pod's user namespace.
func (s *Server) ownSandboxFiles() error {
	if s.userns.Load() == nil {
		return nil
	}
	var errs []error
	uid, gid := s.owner(0, 0)
	for _, name := range []string{"resolv.conf", "hosts", "hostname", "shm"} {
		errs = append(errs, os.Chown(filepath.Join(s.opts.Root, "sandbox", name), uid, gid))
	}
	return errors.Join(errs...)
}

// mountImage mounts an EROFS disk with its owners moved to those of the namespace.
func (ns *userns) mountImage(dev, target string) error {
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.FsconfigSetFlag(fd, "ro"), unix.FsconfigSetString(fd, "source", dev)); err != nil {
		return err
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return err
	}
	tree, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	user, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", ns.pid))
	if err != nil {
		return err
	}
	defer user.Close()
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(user.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, attr); err != nil {
		return fmt.Errorf("move the owners: %w", err)
	}
	return unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}
