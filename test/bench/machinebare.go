package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/qga"
	"github.com/vmruntime/vmruntime/image/qcow2"
	"github.com/vmruntime/vmruntime/qemu"
	vmruntime "github.com/vmruntime/vmruntime/runtime"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
	"github.com/vmruntime/vmruntime/test/images"
)

// bareMachine is QEMU as a plain child, as root and without any confinement but a cgroup like a pod's, with the arguments of a machine.
type bareMachine struct {
	dir   string
	group cgroup.Group
	cmd   *exec.Cmd
	pipes []*os.File // both ends of the console
	done  chan error // of the copy of the console
	said  bytes.Buffer
}

// startBareMachine boots a disk, behind an overlay of its own, and returns when it has booted. It is to be stopped also
// after an error. Its console is in the file "log", its guest agent behind "qga.sock", its tap, bareTap, in the node's
// network namespace.
func (b *bench) startBareMachine(ctx context.Context, disk string, shape machineShape, times *machineTimes) (m *bareMachine, err error) {
	ctx, cancel := context.WithTimeout(ctx, machineTimeout)
	defer cancel()
	m = &bareMachine{group: cgroup.For(b.node.CgroupParent(), "bare")}
	if m.dir, err = os.MkdirTemp(b.node.Root, "bare-"); err != nil {
		return m, err
	}
	if err := b.prepareBareMachine(m, disk, shape); err != nil {
		return m, err
	}
	defer closeAll(m.cmd.ExtraFiles)
	log, err := os.Create(m.path("log"))
	if err != nil {
		return m, err
	}
	m.done = make(chan error, 1)
	go func() {
		_, err := io.Copy(log, m.pipes[1])
		if errors.Is(err, os.ErrClosed) {
			err = nil
		}
		m.done <- errors.Join(err, log.Close())
	}()
	begun := time.Now()
	if err := m.cmd.Start(); err != nil {
		return m, err
	}
	// Beside whatever else runs, the scheduler gives a cgroup as much as it gives a single thread outside of any.
	if err := errors.Join(m.group.Add(m.cmd.Process.Pid), m.group.SetCPUQuota(machineQuota, machinePeriod)); err != nil {
		return m, err
	}
	return m, times.take(ctx, begun, m.path("log"))
}

func (m *bareMachine) path(name string) string { return filepath.Join(m.dir, name) }

// stop kills QEMU, as nothing of it is of use, and removes its files.
func (m *bareMachine) stop() error {
	if m.cmd != nil && m.cmd.Process != nil {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait() // it was killed
	}
	closeAll(m.pipes)
	err := m.group.Delete()
	if m.done != nil {
		err = errors.Join(err, <-m.done)
	}
	if m.dir == "" {
		return err
	}
	return errors.Join(err, os.RemoveAll(m.dir))
}

// prepareBareMachine makes the files and the command: what the runtime gives a machine without annotations, but no seed.
func (b *bench) prepareBareMachine(m *bareMachine, disk string, shape machineShape) (err error) {
	base, err := images.Disk(disk)
	if err != nil {
		return err
	}
	if err := qcow2.CreateOverlay(m.path("overlay.qcow2"), machineDisk); err != nil {
		return err
	}
	for _, name := range []string{"console.in", "console.out"} {
		if err := unix.Mkfifo(m.path(name), 0o600); err != nil {
			return err
		}
		f, err := os.OpenFile(m.path(name), os.O_RDWR|unix.O_NONBLOCK, 0) // as the daemon's end, it waits for nobody
		if err != nil {
			return err
		}
		m.pipes = append(m.pipes, f)
	}
	var files []*os.File
	defer func() {
		if err != nil {
			closeAll(files)
		}
	}()
	for _, open := range []func() (*os.File, error){
		func() (*os.File, error) { return listen(m.path("qmp.sock")) },
		func() (*os.File, error) { return listen(m.path("agent.sock")) },
		func() (*os.File, error) { return listen(m.path("qga.sock")) },
		func() (*os.File, error) { return os.OpenFile(m.path("overlay.qcow2"), os.O_RDWR, 0) },
		func() (*os.File, error) { return os.Open(base) },
		b.openBareTap,
	} {
		f, err := open()
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	machine := qemu.Machine{
		Name: "bench-bare", UUID: "00000000-0000-4000-8000-000000000001", Arch: qemu.ArchX86, Type: qemu.TypeX86, Accel: b.accel,
		VCPUs: shape.VCPUs, MemoryBytes: shape.MemoryBytes,
		Disks: []qemu.Disk{{
			Serial: "root", Path: m.path("overlay.qcow2"), Format: "qcow2", Bus: qemu.BusVirtio, BootIndex: 1,
			Backing: &qemu.Backing{Path: base, Format: "qcow2"},
		}},
		NICs:        []qemu.NIC{{ID: "net0", MAC: "52:54:00:00:00:01", MTU: 1500}},
		ConsolePipe: true, Video: qemu.VideoStd, PanicDevice: true, Balloon: true, GuestAgent: true, ResetInPlace: true,
	}.Defaults()
	if err := machine.Validate(); err != nil {
		return err
	}
	// Descriptors 0 to 2 are the standard ones.
	args := machine.Args(qemu.Descriptors{QMP: 3, Agent: 4, GuestAgent: 5, Disks: []int{6}, Backing: []int{7}, NICs: []int{8}})
	// The path rendered is that in a confined QEMU's own root.
	console := slices.IndexFunc(args, func(a string) bool { return strings.HasPrefix(a, "pipe,id=console,") })
	args[console] = "pipe,id=console,path=" + m.path("console")
	m.cmd = exec.Command(vmruntime.Default().QEMU.Binary, args...)
	m.cmd.ExtraFiles, m.cmd.Stderr = files, &m.said
	return nil
}

// bareTap is the tap of a bare machine on the node.
const bareTap = "bench0"

// openBareTap makes the tap in the node's network namespace. It goes with its file.
func (b *bench) openBareTap() (f *os.File, err error) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			ns, err := vnetns.GetFromName(filepath.Base(b.node.CgroupParent()))
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := vnetns.Set(ns); err != nil {
				return err
			}
			f, err = newTap(bareTap)
			return err
		}()
	}()
	err = <-done
	return f, err
}

// newTap makes a tap in the thread's network namespace.
func newTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return nil, errors.Join(fmt.Errorf("make a tap: %w", err), f.Close())
	}
	return f, nil
}

// exec runs a script in the guest by its agent and gives what it prints.
func (m *bareMachine) exec(ctx context.Context, script string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, machineTimeout)
	defer cancel()
	client, err := qga.Dial(ctx, m.path("qga.sock"))
	if err != nil {
		return "", err
	}
	defer client.Close()
	var out, said bytes.Buffer
	status, err := client.Exec(ctx, qga.Command{Args: []string{"/bin/sh", "-c", script}, Stdout: &out, Stderr: &said})
	if err == nil && status != 0 {
		err = fmt.Errorf("exit status %d: %s%s", status, &out, &said)
	}
	return out.String(), err
}
