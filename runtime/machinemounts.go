package runtime

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// machineMounts decides how a machine's mounts reach it: all of them through its share, so that what changes on the node changes in
// the guest. The two files that the kubelet gives to every container are not a machine's: its operating system has its own.
func machineMounts(id string, cfg *runtimeapi.ContainerConfig) ([]resolvedMount, error) {
	all, err := resolveMounts(id, cfg)
	if err != nil {
		return nil, err
	}
	var out []resolvedMount
	for i, r := range all {
		m := cfg.GetMounts()[i]
		if isKubeletFile(cfg, m) {
			continue
		}
		if r.Via == viaHugePages {
			return nil, fmt.Errorf("mounts[%d] to %q: host_path %q is a volume of huge pages; a machine's operating system mounts a hugetlbfs of its own: %w", i, m.GetContainerPath(), r.HostPath, errdefs.ErrInvalidArgument)
		}
		r.ContainerPath = m.GetContainerPath()
		r.Via, r.GuestPath, r.WriteBack = viaShare, "", false
		out = append(out, r)
	}
	return out, nil
}

// readInside reads a file of a volume, of at most limit bytes. Whoever writes the volume can lead it nowhere else by a symbolic link,
// nor let it wait: what is no regular file is refused, and never waited for.
func readInside(dir, name string, limit int64) ([]byte, error) {
	f, err := openInside(dir, name)
	if err != nil {
		return nil, err
	}
	data, err := readRegular(f, limit)
	return data, errors.Join(err, f.Close())
}

func openInside(dir, name string) (*os.File, error) {
	const flags = os.O_RDONLY | unix.O_NONBLOCK
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return os.OpenFile(dir, flags, 0) // a single file that is mounted
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	f, err := root.OpenFile(name, flags, 0)
	return f, errors.Join(err, root.Close())
}

func readRegular(f *os.File, limit int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("it is a %s; it has to be a file: %w", kindOf(info.Mode()), errdefs.ErrInvalidArgument)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("the file has more than %d bytes: %w", limit, errdefs.ErrInvalidArgument)
	}
	return data, err
}
