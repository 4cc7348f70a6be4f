package qemu

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

// ShareSpec is what StartShareServer needs.
type ShareSpec struct {
	// Binary is virtiofsd: the Rust one, or the C one that came with QEMU up to 7.2.
	Binary string
	// Launcher as in Spec.
	Launcher []string
	// RunDir takes the listening socket; for root only. One server to a directory.
	RunDir string
	// Place as in Spec.
	Place func(pid int) error
	// Users and Groups, if set, are the guest's IDs for the node's from 0 on; other IDs of the node are nobody's to the guest,
	// and it has no power over their files. Otherwise every ID is itself.
	Users, Groups IDRange
	// Keep, if there, is called after Place with what a later daemon needs to know, while the process has done nothing
	// yet: if this process ends before that is kept, virtiofsd never comes to be.
	Keep func(ShareRecord) error
}

// IDRange are Count user or group IDs from First.
type IDRange struct{ First, Count uint32 }

// ShareRecord is what a later daemon needs to find a share server again.
type ShareRecord struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"`
	Socket    string `json:"socket"`
	// Tree is the number of the mount namespace with what is shared.
	Tree uint64 `json:"tree"`
}

// ShareServer is one virtiofsd. It serves one connection, and ends with that. Add and Remove change what it shows. It runs
// in a user namespace of its own, so that it has the powers of root over shared files and over nothing else of the node;
// and it confines itself: own mount, PID and network namespace, the share as its root, few capabilities, a seccomp filter.
type ShareServer struct {
	*helper
	rec ShareRecord
}

// StartShareServer runs virtiofsd with nothing to show yet. It listens when this returns.
func StartShareServer(ctx context.Context, s ShareSpec) (*ShareServer, error) {
	var p problems
	p.rule(filepath.IsAbs(s.RunDir), "runDir", s.RunDir, "an absolute path")
	if err := errors.Join(p...); err != nil {
		return nil, err
	}
	binary, err := program(s.Binary)
	if err != nil {
		return nil, err
	}
	args, err := shareArgs(ctx, binary)
	if err != nil {
		return nil, err
	}
	record := ShareRecord{Socket: filepath.Join(s.RunDir, shareSocket)}
	f, err := listen(record.Socket)
	if err != nil {
		return nil, err
	}
	var in inheritance
	defer in.close()
	args = append(args, "--fd="+strconv.Itoa(in.add(f)))
	start := func(cmd *exec.Cmd) (err error) {
		s.mapUsers(cmd.SysProcAttr)
		record.Tree, err = startInTree(cmd, s.RunDir, binary)
		return err
	}
	place := func(pid int) error {
		if s.Place != nil {
			if err := s.Place(pid); err != nil {
				return err
			}
		}
		if record.PID = pid; s.Keep == nil {
			return nil
		}
		if _, record.StartTime, err = readStat(pid); err != nil {
			return err
		}
		return s.Keep(record)
	}
	j := job{Argv: append([]string{binary}, args...), ServesFiles: true}
	proc, out, err := launchBy(start, s.Launcher, j, in.files, place)
	if err != nil {
		return nil, err
	}
	record.StartTime = proc.start
	return &ShareServer{newHelper("virtiofsd", proc, out), record}, nil
}

// mapUsers has virtiofsd know the node's IDs by those of the guest. It is root of its user namespace, and on the node a user who has
// nothing.
func (s ShareSpec) mapUsers(sys *syscall.SysProcAttr) {
	sys.UidMappings, sys.GidMappings, sys.GidMappingsEnableSetgroups = s.Users.idMap(), s.Groups.idMap(), true
	if s.Users.Count > 0 {
		sys.Credential = &syscall.Credential{}
	}
}

// nobody is the node's ID of a virtiofsd to whose guest the node's 0 is not 0.
const nobody = math.MaxUint32 - 1

func (r IDRange) idMap() []syscall.SysProcIDMap {
	switch {
	case r.Count == 0:
		return []syscall.SysProcIDMap{{Size: math.MaxUint32}}
	case r.First == 0:
		return []syscall.SysProcIDMap{{Size: int(r.Count)}}
	}
	return []syscall.SysProcIDMap{{HostID: nobody, Size: 1}, {ContainerID: int(r.First), Size: int(r.Count)}}
}

var rustRE = regexp.MustCompile(`^virtiofsd (backend )?v?[1-9]`)

// shareArgs asks which virtiofsd it is, for the two take different options.
func shareArgs(ctx context.Context, binary string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w", binary, err)
	}
	return renderShareArgs(string(out))
}

// renderShareArgs renders the options but for the socket. The limit of open files stays the inherited one: raising it takes
// a capability that a daemon may lack.
func renderShareArgs(version string) ([]string, error) {
	switch {
	case rustRE.MatchString(version):
		return []string{
			"--shared-dir=" + treeRoot, "--sandbox=namespace", "--seccomp=kill", "--cache=auto",
			"--announce-submounts", "--rlimit-nofile=0", "--log-level=error",
		}, nil
	case strings.HasPrefix(version, "virtiofsd version "):
		return []string{
			"-f", "-o", "source=" + treeRoot, "-o", "sandbox=namespace", "-o", "cache=auto",
			"-o", "announce_submounts", "-o", "log_level=err", "--rlimit-nofile=0",
		}, nil
	}
	return nil, fmt.Errorf("virtiofsd --version says %.100q; it has to be virtiofsd 1 or newer, or the one of QEMU 7.2: %w", version, errdefs.ErrInvalidArgument)
}

// AttachShareServer finds a server that an earlier daemon started. One that is gone is errdefs.ErrNotFound.
func AttachShareServer(r ShareRecord) (*ShareServer, error) {
	p, err := openProcess(r.PID, r.StartTime)
	if err != nil {
		return nil, err
	}
	return &ShareServer{newHelper("virtiofsd", p, nil), r}, nil
}

// Socket is the path to give to VM.AddShare.
func (s *ShareServer) Socket() string { return s.rec.Socket }

// Record returns what AttachShareServer needs.
func (s *ShareServer) Record() ShareRecord { return s.rec }
