package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// How a mount's source reaches the guest.
const (
	// viaShare: a directory or file on the node, through virtiofs.
	viaShare = "share"
	// viaFiles: a small tree pushed by the agent, kept live by watching.
	viaFiles = "files"
	// viaFile: one small file pushed once and, where written back, read again when the container ends.
	viaFile = "file"
	// viaImage: an image volume, an EROFS disk.
	viaImage = "image"
	// viaHugePages: a hugetlbfs of the guest's own.
	viaHugePages = "hugepages"
)

// resolvedMount is one mount of a container with the way it takes to the guest decided.
type resolvedMount struct {
	Via       string `json:"via"`
	HostPath  string `json:"hostPath,omitempty"`
	GuestPath string `json:"guestPath"`
	// ContainerPath is where a machine's guest mounts it.
	ContainerPath string `json:"containerPath,omitempty"`
	// Name is the entry below /run/vm/shares, files, images or hugepages.
	Name     string `json:"name"`
	ReadOnly bool   `json:"readOnly,omitempty"`
	// Recursive read-only.
	RecursiveReadOnly bool `json:"recursiveReadOnly,omitempty"`
	// WriteBack copies the file from the guest to HostPath when the container ends.
	WriteBack bool `json:"writeBack,omitempty"`
	// Slave lets mounts made later on the node appear.
	Slave bool `json:"slave,omitempty"`
}

const (
	guestShares = "/run/vm/shares"
	guestFiles  = "/run/vm/files"
	guestImages = "/run/vm/images"

	guestHugePages = "/run/vm/hugepages"

	terminationPathAnnotation = "io.kubernetes.container.terminationMessagePath"
	// maxPushedBytes bounds a tree that the agent pushes; larger ones go through virtiofs.
	maxPushedBytes = 2 << 20
)

// projection matches the kubelet's directories of volumes that it projects from API objects.
var projection = regexp.MustCompile(`/volumes/kubernetes\.io~(configmap|secret|projected|downward-api)/[^/]+$`)

// resolveMounts decides for every mount of a container how its source reaches the guest. It makes missing
// host directories, as containerd does, and refuses what a VM cannot have.
func resolveMounts(id string, cfg *runtimeapi.ContainerConfig) ([]resolvedMount, error) {
	var out []resolvedMount
	var errs []error
	for i, m := range cfg.GetMounts() {
		r, err := resolveMount(fmt.Sprintf("%s-%d", id[:16], i), cfg, m)
		if err != nil {
			errs = append(errs, fmt.Errorf("mounts[%d] to %q: %w", i, m.GetContainerPath(), err))
			continue
		}
		out = append(out, r)
	}
	return out, errors.Join(errs...)
}

func resolveMount(name string, cfg *runtimeapi.ContainerConfig, m *runtimeapi.Mount) (resolvedMount, error) {
	r := resolvedMount{
		Name:              name,
		ReadOnly:          m.GetReadonly(),
		RecursiveReadOnly: m.GetRecursiveReadOnly(),
		Slave:             m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
	}
	if m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL {
		return r, fmt.Errorf("propagation Bidirectional: a mount made inside a VM cannot appear on the node; use None or HostToContainer: %w", errdefs.ErrInvalidArgument)
	}
	if m.GetImage().GetImage() != "" {
		r.Via, r.ReadOnly = viaImage, true
		sub, err := cleanSubPath(m.GetImageSubPath())
		r.GuestPath = filepath.Join(guestImages, name, sub)
		return r, err
	}
	if m.GetHostPath() == "" {
		return r, fmt.Errorf("host_path is empty; it must name a file or directory of the node: %w", errdefs.ErrInvalidArgument)
	}
	return resolveHostMount(r, cfg, m)
}

func resolveHostMount(r resolvedMount, cfg *runtimeapi.ContainerConfig, m *runtimeapi.Mount) (resolvedMount, error) {
	path, info, err := statOrMake(m.GetHostPath())
	if err != nil {
		return r, err
	}
	r.HostPath = path
	switch {
	case onHugetlbfs(path):
		return resolveHugeVolume(r)
	case info.IsDir() && projection.MatchString(m.GetHostPath()) && treeFits(path):
		r.Via, r.GuestPath = viaFiles, filepath.Join(guestFiles, r.Name)
	case info.Mode().IsRegular() && isKubeletFile(cfg, m) && info.Size() <= maxPushedBytes:
		r.Via, r.GuestPath = viaFile, filepath.Join(guestFiles, r.Name, "file")
		r.WriteBack = isTerminationLog(cfg, m)
	case info.IsDir() || info.Mode().IsRegular():
		r.Via, r.GuestPath = viaShare, filepath.Join(guestShares, r.Name)
	default:
		return r, fmt.Errorf("host_path %q is a %s; a VM can have files and directories of the node, not sockets, FIFOs or devices: %w",
			m.GetHostPath(), kindOf(info.Mode()), errdefs.ErrInvalidArgument)
	}
	return r, nil
}

// statOrMake follows symbolic links as bind mounts do and makes a directory where nothing is.
func statOrMake(path string) (string, fs.FileInfo, error) {
	if !filepath.IsAbs(path) {
		return "", nil, fmt.Errorf("host_path %q is not absolute: %w", path, errdefs.ErrInvalidArgument)
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return "", nil, fmt.Errorf("host_path %q is missing and cannot be made: %w", path, err)
		}
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", nil, fmt.Errorf("host_path %q: %w", path, err)
	}
	info, err := os.Stat(real)
	return real, info, err
}

// isKubeletFile tells the two files that the kubelet gives to every container. They are small, so no
// pod needs virtiofs for them.
func isKubeletFile(cfg *runtimeapi.ContainerConfig, m *runtimeapi.Mount) bool {
	return isTerminationLog(cfg, m) || m.GetContainerPath() == "/etc/hosts"
}

func isTerminationLog(cfg *runtimeapi.ContainerConfig, m *runtimeapi.Mount) bool {
	path := cfg.GetAnnotations()[terminationPathAnnotation]
	return path != "" && path == m.GetContainerPath()
}

// treeFits tells whether a directory is small enough, and of such kinds of file, that it can be pushed.
func treeFits(dir string) bool {
	var total int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if t := d.Type(); !t.IsDir() && !t.IsRegular() && t != fs.ModeSymlink {
			return errdefs.ErrFailedPrecondition
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if total += info.Size() + 256; total > maxPushedBytes {
			return errdefs.ErrOutOfRange
		}
		return nil
	})
	return err == nil
}

func cleanSubPath(sub string) (string, error) {
	if sub == "" {
		return "", nil
	}
	if !filepath.IsLocal(sub) {
		return "", fmt.Errorf("image_sub_path %q leaves the image; it must be a relative path without ..: %w", sub, errdefs.ErrInvalidArgument)
	}
	return filepath.Clean(sub), nil
}

func kindOf(m fs.FileMode) string {
	switch {
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeNamedPipe != 0:
		return "FIFO"
	case m&fs.ModeDevice != 0:
		return "device"
	default:
		return strings.TrimSpace(m.String())
	}
}
