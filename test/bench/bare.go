package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/qemu"
	vmruntime "github.com/vmruntime/vmruntime/runtime"
)

// machineShape is what a pod's VM has, as its record says.
type machineShape struct {
	VCPUs          int   `json:"vcpus"`
	MemoryBytes    int64 `json:"memoryBytes"`
	MaxVCPUs       int   `json:"maxVCPUs"`
	MaxMemoryBytes int64 `json:"maxMemoryBytes"`
}

func (b *bench) shapeOf(p *pod) (s machineShape, err error) {
	data, err := os.ReadFile(filepath.Join(b.store("pods"), p.id, "spec.json"))
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, err
	}
	if s.VCPUs == 0 || s.MemoryBytes == 0 {
		return s, fmt.Errorf("the record of sandbox %s says %d vCPUs and %d bytes of memory", p.id, s.VCPUs, s.MemoryBytes)
	}
	return s, nil
}

// bootBare runs QEMU as a plain child, as root and without any confinement, with the arguments of a pod's VM: same
// devices, a scratch disk, a tap that leads nowhere. It takes the time from before the fork to the agent's answer.
func (b *bench) bootBare(ctx context.Context, shape machineShape) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	dir, err := os.MkdirTemp(b.node.Root, "bare-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	cmd, err := b.bareQEMU(dir, shape, func(*qemu.Machine) {})
	if err != nil {
		return 0, err
	}
	defer closeAll(cmd.ExtraFiles)
	var said bytes.Buffer
	cmd.Stderr = &said
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		if err != nil && said.Len() > 0 {
			err = fmt.Errorf("%w; QEMU said: %s", err, said.Bytes())
		}
	}()
	client, err := agent.Dial(ctx, filepath.Join(dir, "agent.sock"))
	if err != nil {
		return 0, err
	}
	took = time.Since(begun)
	return took, client.Close()
}

// bareQEMU prepares the command and all that it inherits, for a machine that is changed first.
func (b *bench) bareQEMU(dir string, shape machineShape, change func(*qemu.Machine)) (cmd *exec.Cmd, err error) {
	guest, err := b.manifest()
	if err != nil {
		return nil, err
	}
	var files []*os.File
	defer func() {
		if err != nil {
			closeAll(files)
		}
	}()
	for _, open := range []func() (*os.File, error){
		func() (*os.File, error) { return listen(filepath.Join(dir, "qmp.sock")) },
		func() (*os.File, error) { return listen(filepath.Join(dir, "agent.sock")) },
		func() (*os.File, error) { return sparse(filepath.Join(dir, "scratch")) },
		openTap,
	} {
		f, err := open()
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	m := qemu.Machine{
		Name: "bench-bare", UUID: "00000000-0000-4000-8000-000000000001", Arch: guest.Arch, Accel: b.accel,
		VCPUs: shape.VCPUs, MemoryBytes: shape.MemoryBytes, MaxVCPUs: shape.MaxVCPUs, MaxMemoryBytes: shape.MaxMemoryBytes,
		Kernel: filepath.Join(b.guest, guest.Kernel), Initrd: filepath.Join(b.guest, guest.Initramfs), Cmdline: guest.Cmdline,
		Disks:        []qemu.Disk{{Serial: "scratch", Path: filepath.Join(dir, "scratch"), Format: "raw"}},
		NICs:         []qemu.NIC{{ID: "net0", MAC: "52:54:00:00:00:01", MTU: 1500}},
		HotplugPorts: 3,
	}
	change(&m)
	m = m.Defaults()
	if err := m.Validate(); err != nil {
		return nil, err
	}
	// Descriptors 0 to 2 are the standard ones.
	args := m.Args(qemu.Descriptors{QMP: 3, Agent: 4, Disks: []int{5}, NICs: []int{6}})
	// The paths rendered are those in a confined QEMU's own root.
	args[slices.Index(args, "-kernel")+1] = m.Kernel
	args[slices.Index(args, "-initrd")+1] = m.Initrd
	cmd = exec.Command(vmruntime.Default().QEMU.Binary, args...)
	cmd.ExtraFiles = files
	return cmd, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing was written to it here
	}
}

func listen(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return f, errors.Join(err, l.Close())
}

// sparse is an empty disk of the size of a pod's.
func sparse(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(int64(vmruntime.Default().VM.ScratchSize)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// openTap makes a tap in a network namespace of its own; both go with the file.
func openTap() (f *os.File, err error) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("make a network namespace: %w", err)
			}
			var err error
			f, err = newTap("tap0")
			return err
		}()
	}()
	if err = <-done; err != nil && f != nil {
		_ = f.Close()
		return nil, err
	}
	return f, err
}
