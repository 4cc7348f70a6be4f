package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/trace"
)

// Names below RunDir.
const (
	rootDir          = "root" // where QEMU's root is mounted, in its own namespace
	qmpSocket        = "qmp.sock"
	agentSocket      = "agent.sock"
	guestAgentSocket = "qga.sock"
	shareSocket      = "share.sock"
	tpmSocket        = "tpm.sock"
	endFile          = "end" // why the guest has ended, see Record.writeEnd
)

// maxSocketPath is what fits into the kernel's address of a Unix socket.
const maxSocketPath = 107

// Spec is everything that Start needs to run a machine.
type Spec struct {
	Machine Machine
	// Binary is qemu-system-x86_64 or qemu-system-aarch64; looked for in PATH if it has no slash.
	Binary string
	// Launcher is the command whose main function is LaunchMain.
	Launcher []string
	// RunDir is an existing directory for the VM's sockets and FIFOs, for root only. The caller removes it after the VM.
	RunDir string
	// UID and GID are the VM's own, never 0.
	UID, GID uint32
	// Taps are one for each NIC of the machine that is connected. They stay the caller's.
	Taps []*os.File
	// Memory is a file of Machine.MemoryBytes that the guest's memory is, or begins with; see Machine.Memory. For MemoryPrivate and
	// MemoryCopied a memfd that is sealed against writing is right. It stays the caller's.
	Memory *os.File
	// State is what a machine that is Incoming begins with, Plugged what it had then that it did not begin with.
	State   io.Reader
	Plugged Plugged
	// Place, if there, is called with the process while it has done nothing yet, to put it into its cgroup.
	Place func(pid int) error
	// Log takes what is not an error; slog.Default by default.
	Log *slog.Logger
}

func (s Spec) validate() error {
	var p problems
	p.rule(s.UID != 0, "uid", s.UID, "another user than root")
	p.rule(s.GID != 0, "gid", s.GID, "another group than root's")
	p.rule(len(s.Taps) == s.Machine.connected(), "taps", len(s.Taps), fmt.Sprintf("%d, one for each NIC", s.Machine.connected()))
	p.rule(filepath.IsAbs(s.RunDir), "runDir", s.RunDir, "an absolute path")
	p.rule((s.Memory != nil) == (s.Machine.Memory != MemoryOwn), "memory", s.Memory != nil, "a file exactly if the machine's memory is not its own")
	p.rule(s.Plugged == Plugged{} || s.Machine.Incoming, "plugged", s.Plugged, "empty unless the machine is incoming")
	p.rule((s.State != nil) == s.Machine.Incoming, "state", s.State != nil, "there exactly if the machine is incoming")
	return errors.Join(append(p, s.Machine.Validate())...)
}

// inheritance is what a program gets as descriptors.
type inheritance struct {
	files []*os.File
	own   []*os.File // those to close after the program has them
}

// add takes a file of our own and returns its number in the program.
func (i *inheritance) add(f *os.File) int {
	i.own = append(i.own, f)
	return i.lend(f)
}

// lend takes a file that stays another's.
func (i *inheritance) lend(f *os.File) int {
	i.files = append(i.files, f)
	return firstFD + len(i.files) - 1
}

func (i *inheritance) close() {
	for _, f := range i.own {
		_ = f.Close() // opened or duplicated here; nothing was written
	}
}

// Start runs a machine and returns when QEMU answers; the guest has begun to boot, or, if Incoming, waits for VM.Resume. On error nothing is left but what
// it made in RunDir.
func Start(ctx context.Context, s Spec) (*VM, error) {
	if s.Log == nil {
		s.Log = slog.Default()
	}
	s.Machine = s.Machine.Defaults()
	if err := s.validate(); err != nil {
		return nil, err
	}
	var in inheritance
	defer in.close()
	fds, err := s.open(ctx, &in)
	if err != nil {
		return nil, err
	}
	j, err := s.job(fds)
	if err != nil {
		return nil, err
	}
	var console *os.File
	if s.Machine.ConsolePipe {
		if console, err = s.makeFIFOs(); err != nil {
			return nil, err
		}
	}
	_, answered := trace.Start(ctx, "exec QEMU")
	p, out, err := launch(s.Launcher, j, in.files, s.Place)
	if err != nil {
		answered(err)
		return nil, errors.Join(err, closeFile(console))
	}
	v := newVM(s.record(p), p, out, console, s.Log)
	in.close() // so that a QEMU that ends early refuses the connection
	err = v.connect(ctx)
	answered(err)
	if err != nil {
		return nil, v.abandon(err)
	}
	if s.Machine.Incoming {
		if err := trace.Do(ctx, "load state", func(ctx context.Context) error {
			if err := v.plugAll(ctx, s.Plugged); err != nil {
				return err
			}
			return v.load(ctx, s.State, s.Machine.Memory != MemoryOwn)
		}); err != nil {
			return nil, v.abandon(err)
		}
	}
	if s.Machine.Balloon {
		if err := v.pollStats(ctx); err != nil {
			return nil, v.abandon(err)
		}
	}
	return v, nil
}

func (s Spec) record(p *process) Record {
	m := s.Machine
	return Record{
		PID: p.pid, StartTime: p.start, RunDir: s.RunDir,
		MaxMemoryBytes: m.MaxMemoryBytes,
		ResetInPlace:   m.ResetInPlace, ConsolePipe: m.ConsolePipe, WatchdogEnds: m.Watchdog == WatchdogPoweroff,
	}
}

func (s Spec) open(ctx context.Context, in *inheritance) (Descriptors, error) {
	var fds Descriptors
	for _, l := range []struct {
		name string
		fd   *int
	}{{qmpSocket, &fds.QMP}, {agentSocket, &fds.Agent}, {guestAgentSocket, &fds.GuestAgent}} {
		if l.name == guestAgentSocket && !s.Machine.GuestAgent {
			continue
		}
		f, err := listen(filepath.Join(s.RunDir, l.name))
		if err != nil {
			return fds, err
		}
		*l.fd = in.add(f)
	}
	if err := s.openDisks(in, &fds); err != nil {
		return fds, err
	}
	if err := s.connectSockets(ctx, in, &fds); err != nil {
		return fds, err
	}
	if s.Memory != nil {
		fds.Memory = in.lend(s.Memory)
	}
	for _, t := range s.Taps {
		fds.NICs = append(fds.NICs, in.lend(t))
	}
	return fds, nil
}

// openDisks opens disks, what is below them, and the firmware.
func (s Spec) openDisks(in *inheritance, fds *Descriptors) error {
	for _, d := range s.Machine.Disks {
		f, device, err := d.open()
		if err != nil {
			return err
		}
		fds.Disks, fds.Devices = append(fds.Disks, in.add(f)), append(fds.Devices, device)
		backing := 0
		if d.Backing != nil {
			if f, err = openImage("backing of disk "+d.Serial, d.Backing.Path, true); err != nil {
				return err
			}
			backing = in.add(f)
		}
		fds.Backing = append(fds.Backing, backing)
	}
	f := s.Machine.Firmware
	if f == nil {
		return nil
	}
	code, err := openImage("firmware", f.Code, true)
	if err != nil {
		return err
	}
	fds.Code = in.add(code)
	vars, err := openImage("variables of the firmware", f.Vars, false)
	if err != nil {
		return err
	}
	fds.Vars = in.add(vars)
	return nil
}

// connectSockets connects to the processes that serve devices.
func (s Spec) connectSockets(ctx context.Context, in *inheritance, fds *Descriptors) error {
	if s.Machine.TPMSocket != "" {
		f, err := dialFile(ctx, s.Machine.TPMSocket)
		if err != nil {
			return fmt.Errorf("connect to the TPM: %w", err)
		}
		fds.TPM = in.add(f)
	}
	for _, share := range s.Machine.Shares {
		f, err := dialFile(ctx, share.Socket)
		if err != nil {
			return fmt.Errorf("connect to share %s: %w", share.Tag, err)
		}
		fds.Shares = append(fds.Shares, in.add(f))
	}
	return nil
}

// listen makes a listening socket for root only, and returns it as a file to hand over.
func listen(path string) (*os.File, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("socket %s: the path has %d bytes; it has to have at most %d: %w", path, len(path), maxSocketPath, errdefs.ErrInvalidArgument)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	f, err := l.File()
	return f, errors.Join(err, l.Close())
}

// open tells too whether the disk is a block device.
func (d Disk) open() (f *os.File, device bool, err error) {
	f, err = openFile("disk "+d.Serial, d.Path, d.ReadOnly)
	if err != nil {
		return nil, false, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, false, errors.Join(err, f.Close())
	}
	device = info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0
	if !info.Mode().IsRegular() && !device {
		err := fmt.Errorf("disk %s: %s is a %s; it has to be a regular file or a block device: %w", d.Serial, d.Path, info.Mode().Type(), errdefs.ErrInvalidArgument)
		return nil, false, errors.Join(err, f.Close())
	}
	return f, device, nil
}

// openImage opens a regular file.
func openImage(what, path string, readOnly bool) (*os.File, error) {
	f, err := openFile(what, path, readOnly)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: %s is a %s; it has to be a regular file: %w", what, path, info.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// openFile opens without following a symbolic link at the end of the path, and without waiting.
func openFile(what, path string, readOnly bool) (*os.File, error) {
	flags := unix.O_RDWR
	if readOnly {
		flags = unix.O_RDONLY
	}
	fd, err := unix.Open(path, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("%s: %s does not exist: %w", what, path, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: open %s: %w", what, path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (s Spec) job(fds Descriptors) (job, error) {
	binary, err := program(s.Binary)
	if err != nil {
		return job{}, err
	}
	binds := rootBinds(binary)
	for _, b := range []bind{
		{Source: s.Machine.Kernel, Target: kernelPath}, {Source: s.Machine.Initrd, Target: initrdPath}, {Source: s.Machine.Ignition, Target: ignitionPath},
	} {
		if b.Source == "" {
			continue
		}
		if b.Source, b.Copy, err = showable(b.Source); err != nil {
			return job{}, err
		}
		binds = append(binds, b)
	}
	if s.Machine.ConsolePipe {
		for _, suffix := range []string{fifoIn, fifoOut} {
			binds = append(binds, bind{Source: filepath.Join(s.RunDir, fifoName+suffix), Target: consolePath + suffix})
		}
	}
	// Not RunDir itself, whose FIFOs would be hidden.
	root := filepath.Join(s.RunDir, rootDir)
	if err := os.MkdirAll(root, 0o700); err != nil {
		return job{}, err
	}
	var copied *memoryCopy
	if s.Machine.Memory == MemoryCopied {
		copied = &memoryCopy{FD: fds.Memory, Bytes: s.Machine.MemoryBytes}
	}
	return job{
		Memory: copied,
		Argv:   append([]string{binary}, s.Machine.Args(fds)...),
		Confine: &confinement{
			UID: s.UID, GID: s.GID, Root: root, Binds: binds, KVM: s.Machine.Accel == AccelKVM, FDs: s.Machine.Memory != MemoryOwn,
		},
	}, nil
}

// program finds a program and resolves symbolic links to it.
func program(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find %s: %w: %w", name, err, errdefs.ErrNotFound)
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(path)
}

// showable resolves a path to a regular file, and tells whether QEMU's own user needs a copy to read it.
func showable(path string) (resolved string, needsCopy bool, err error) {
	path, err = filepath.EvalSymlinks(path)
	if err != nil {
		return "", false, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", false, err
	}
	if !info.Mode().IsRegular() {
		return "", false, fmt.Errorf("%s is a %s; it has to be a regular file: %w", path, info.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	return path, info.Mode().Perm()&0o004 == 0, nil
}

// rootBinds is what QEMU needs of the host's files: itself, libraries and firmware.
func rootBinds(binary string) []bind {
	var data []string
	for _, p := range []string{filepath.Dir(filepath.Dir(binary)), "/usr"} {
		for _, d := range []string{"share/qemu", "share/seabios", "share/edk2", "share/OVMF", "share/AAVMF"} {
			data = append(data, filepath.Join(p, d))
		}
	}
	return programBinds(binary, data...)
}

// programBinds is what a program needs of the host's files: itself, libraries, and some more if they are there.
func programBinds(binary string, more ...string) []bind {
	prefix := filepath.Dir(filepath.Dir(binary))
	paths := []string{binary, "/etc/ld.so.cache", "/lib", "/lib64", "/usr/lib", "/usr/lib64", filepath.Join(prefix, "lib"), filepath.Join(prefix, "lib64")}
	var binds []bind
	seen := make(map[string]bool)
	for _, p := range append(paths, more...) {
		if _, err := os.Lstat(p); err != nil || seen[p] {
			continue
		}
		seen[p] = true
		binds = append(binds, bind{Source: p, Target: p})
	}
	return binds
}

var versionRE = regexp.MustCompile(`(?m)^QEMU emulator version (\d+\.\d+\.\d+)`)

// Version asks a QEMU binary for its version, such as "7.2.22".
func Version(ctx context.Context, binary string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	path, err := program(binary)
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", binary, err)
	}
	match := versionRE.FindSubmatch(out)
	if match == nil {
		return "", fmt.Errorf("%s --version says %.100q; it has to be QEMU", binary, out)
	}
	return string(match[1]), nil
}
