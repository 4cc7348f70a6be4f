package runtime

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
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
		r.ContainerPath = m.GetContainerPath()
		r.Via, r.GuestPath, r.WriteBack = viaShare, "", false
		out = append(out, r)
	}
	return out, nil
}

// readInside reads a file of a volume, of at most limit bytes, without leaving the volume by a symbolic link.
func readInside(dir, name string, limit int64) ([]byte, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	var f *os.File
	if info.IsDir() {
		f, err = os.OpenInRoot(dir, name)
	} else {
		f, err = os.Open(dir) // a single file that is mounted
	}
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("the file has more than %d bytes: %w", limit, errdefs.ErrInvalidArgument)
	}
	return data, errors.Join(err, f.Close())
}
