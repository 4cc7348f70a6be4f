package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/image"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

// buildOCI writes the container's OCI specification from what is decided, and the user that it resolves to.
func buildOCI(p *pod, id string, img *image.Image, spec *containerSpec) (err error) {
	seccomp, err := readSeccomp(ocispec.LocalhostSeccomp(spec.Config.M))
	if err != nil {
		return err
	}
	rootFS, closer, err := img.FS()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closer.Close()) }()
	in := ocispec.Input{
		ID:             id,
		SandboxID:      p.id,
		Config:         spec.Config.M,
		Sandbox:        p.config(),
		Image:          img.Config,
		ImageName:      spec.ImageName,
		RootFS:         rootFS,
		Hostname:       p.hostname(),
		BlockVolumes:   hostPaths(spec.BlockVolumes),
		SeccompProfile: seccomp,
	}
	for _, m := range spec.Mounts {
		in.MountSources = append(in.MountSources, m.GuestPath)
	}
	if spec.OCI, err = ocispec.Build(in); err != nil {
		return err
	}
	spec.User = message[*runtimeapi.ContainerUser]{ocispec.ContainerUser(spec.OCI)}
	return nil
}

// readSeccomp reads a Localhost seccomp profile on the node; no path is no profile.
func readSeccomp(path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("seccomp.localhost_ref %q must be an absolute path: %w", path, errdefs.ErrInvalidArgument)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("seccomp.localhost_ref: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return b, nil
}
