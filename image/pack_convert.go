package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	nobody = 65534
	// The descriptors of a converter beside the usual three.
	sourceFD, targetFD = 3, 4
	convertGrace       = 10 * time.Second
	// confineFailed is the exit status of a launcher that could not become the program.
	confineFailed = 125
)

// convert makes a qcow2 disk of a disk in another format, with a confined qemu-img, and returns the file, which has no name.
func convert(ctx context.Context, o *PackOptions, src *os.File, format string) (_ *os.File, err error) {
	if len(o.Launcher) == 0 || os.Geteuid() != 0 {
		return nil, fmt.Errorf("only root can confine qemu-img; convert it to qcow2 first: %w", errdefs.ErrPermissionDenied)
	}
	binary, err := exec.LookPath("qemu-img")
	if err != nil {
		return nil, fmt.Errorf("qemu-img is not there, install qemu-utils, or convert the disk to qcow2: %w", errdefs.ErrFailedPrecondition)
	}
	if binary, err = filepath.EvalSymlinks(binary); err != nil {
		return nil, err
	}
	src, err = readableByNobody(o.TempDir, src)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	dst, err := unnamed(o.TempDir)
	if err != nil {
		return nil, err
	}
	if err := runConverter(ctx, o, binary, format, src, dst); err != nil {
		return nil, errors.Join(err, dst.Close())
	}
	return dst, nil
}

// unnamed makes a file of nobody's that goes with its last descriptor.
func unnamed(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "vmruntime-disk-")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.Remove(f.Name()), f.Chown(nobody, nobody)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// readableByNobody returns src, or a copy of it if others may not read it: qemu-img opens its descriptor anew.
func readableByNobody(dir string, src *os.File) (*os.File, error) {
	info, err := src.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o004 != 0 {
		fd, err := unix.FcntlInt(src.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), src.Name()), nil
	}
	f, err := unnamed(dir)
	if err != nil {
		return nil, err
	}
	if err := copySparse(f, src); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// runConverter runs qemu-img in a process that sees nothing but its libraries and the two descriptors.
func runConverter(ctx context.Context, o *PackOptions, binary, format string, src, dst *os.File) error {
	root, err := os.MkdirTemp(o.TempDir, "vmruntime-root-")
	if err != nil {
		return err
	}
	defer os.Remove(root)
	limit, err := freeSpace(dst)
	if err != nil {
		return err
	}
	job, err := json.Marshal(convertJob{Root: root, MaxBytes: limit, Argv: convertArgs(binary, format)})
	if err != nil {
		return err
	}
	var stderr bytes.Buffer
	cmd := confined(ctx, o.Launcher, job)
	cmd.ExtraFiles = []*os.File{src, dst}
	cmd.Stderr = &limitedWriter{w: &stderr, left: 4096}
	cmd.Stdout = &percentWriter{report: func(done int64) { o.Progress("converting", done, 10000) }}
	err = cmd.Run()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == confineFailed:
		return fmt.Errorf("confine qemu-img: %s", strings.TrimSpace(stderr.String()))
	}
	return fmt.Errorf("qemu-img: %w: %s: %w", err, strings.TrimSpace(stderr.String()), errdefs.ErrInvalidArgument)
}

// confined is the process that becomes the program of a job.
func confined(ctx context.Context, launcher []string, job []byte) *exec.Cmd {
	cmd := exec.CommandContext(ctx, launcher[0], launcher[1:]...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/bin:/bin"}
	cmd.Stdin = bytes.NewReader(job)
	cmd.WaitDelay = convertGrace
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWPID | unix.CLONE_NEWUTS,
		Setsid:     true,
	}
	return cmd
}

// convertArgs names formats and files; qemu-img probes nothing. A VMDK may name a parent, which is not opened.
func convertArgs(binary, format string) []string {
	fd := func(n int) string { return "/proc/self/fd/" + strconv.Itoa(n) }
	backing := ""
	if format == "vmdk" {
		backing = `"backing":null,`
	}
	source := fmt.Sprintf(`json:{"driver":%q,%s"file":{"driver":"file","filename":%q,"locking":"off"}}`, format, backing, fd(sourceFD))
	return []string{binary, "convert", "-p", "-O", "qcow2", "-o", "compat=1.1,cluster_size=65536,lazy_refcounts=off", source, fd(targetFD)}
}

// freeSpace is how much may be written: nearly all that is free where f is.
func freeSpace(f *os.File) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, err
	}
	return st.Bavail * uint64(st.Bsize) / 10 * 9, nil
}

// percentWriter reads qemu-img's progress: "    (12.34/100%)\r".
type percentWriter struct {
	report func(hundredths int64)
	line   []byte
}

func (p *percentWriter) Write(b []byte) (int, error) {
	for _, c := range b {
		switch {
		case c == '(':
			p.line = p.line[:0]
		case c == '/':
			if percent, err := strconv.ParseFloat(string(p.line), 64); err == nil && percent >= 0 && percent <= 100 {
				p.report(int64(percent * 100))
			}
			p.line = p.line[:0]
		case len(p.line) < 16:
			p.line = append(p.line, c)
		}
	}
	return len(b), nil
}

// limitedWriter keeps the beginning of what is written.
type limitedWriter struct {
	w    io.Writer
	left int
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	if _, err := l.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// convertJob is what a launched converter is told on its standard input.
type convertJob struct {
	Root     string // an empty directory for the new root
	MaxBytes uint64 // how large the new disk may become
	Argv     []string
}

// ConvertMain is the main function of a re-executed program that becomes qemu-img, in namespaces of its own that it was
// started in: with a root that has system libraries only, without network, as nobody, with limits. It never returns; when
// something cannot be done it says so on its error output and exits with status 125.
func ConvertMain() {
	var j convertJob
	err := json.NewDecoder(bufio.NewReader(os.Stdin)).Decode(&j)
	if err == nil {
		err = j.run()
	}
	fmt.Fprintln(os.Stderr, "confine:", err)
	os.Exit(confineFailed)
}
