package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// cri is a CRI socket.
type cri struct {
	runtimeapi.RuntimeServiceClient
	conn *grpc.ClientConn
}

func dial(socket string) (*cri, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return nil, err
	}
	return &cri{runtimeapi.NewRuntimeServiceClient(conn), conn}, nil
}

func (c *cri) close() { _ = c.conn.Close() }

func (c *cri) pull(ctx context.Context, image string) error {
	_, err := runtimeapi.NewImageServiceClient(c.conn).PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	return err
}

// podTimeout bounds a pod's start, and its removal.
const podTimeout = 60 * time.Second

// pod is a sandbox on one of the sockets.
type pod struct {
	cri    *cri
	id     string
	config *runtimeapi.PodSandboxConfig
}

// runPod starts a sandbox. The handler of containers is "".
func (b *bench) runPod(ctx context.Context, c *cri, handler, name string) (*pod, error) {
	return b.runPodWith(ctx, c, handler, name, func(*runtimeapi.PodSandboxConfig) {})
}

// runPodWith starts a sandbox whose configuration is changed first.
func (b *bench) runPodWith(ctx context.Context, c *cri, handler, name string, change func(*runtimeapi.PodSandboxConfig)) (*pod, error) {
	p := &pod{cri: c, config: &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: "uid-" + name},
		Hostname:     name,
		LogDirectory: filepath.Join(b.logs, name),
		Labels:       map[string]string{"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "bench", "io.kubernetes.pod.uid": "uid-" + name},
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: b.node.CgroupParent()},
	}}
	change(p.config)
	if err := os.MkdirAll(p.config.LogDirectory, 0o755); err != nil {
		return nil, err
	}
	answer, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config, RuntimeHandler: handler})
	if err != nil {
		return nil, fmt.Errorf("RunPodSandbox %s: %w", name, err)
	}
	p.id = answer.PodSandboxId
	return p, nil
}

// remove takes the pod away, also when the run was broken off.
func (p *pod) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), podTimeout)
	defer cancel()
	if _, err := p.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("StopPodSandbox: %w", err)
	}
	if _, err := p.cri.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("RemovePodSandbox: %w", err)
	}
	return os.RemoveAll(p.config.LogDirectory)
}

// removeAll removes pods and joins what goes wrong.
func removeAll(ctx context.Context, pods []*pod) error {
	var errs []error
	for _, p := range pods {
		errs = append(errs, p.remove(ctx))
	}
	return errors.Join(errs...)
}

// create creates a container that writes a line and then waits.
func (p *pod) create(ctx context.Context, name string) (string, error) {
	return p.createOn(ctx, p.cri, name)
}

// createOn creates it through another socket of the same node.
func (p *pod) createOn(ctx context.Context, c *cri, name string) (string, error) {
	return p.createOf(ctx, c, name, images.Busybox, []string{"sh", "-c", "echo up; exec sleep 100000"})
}

// createOf creates a container of an image.
func (p *pod) createOf(ctx context.Context, c *cri, name, image string, command []string) (string, error) {
	answer, err := c.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  p.id,
		SandboxConfig: p.config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: name},
			Image:    &runtimeapi.ImageSpec{Image: image},
			Command:  command,
			Labels:   map[string]string{"io.kubernetes.container.name": name},
			LogPath:  name + ".log",
			Linux:    &runtimeapi.LinuxContainerConfig{},
		},
	})
	if err != nil {
		return "", fmt.Errorf("CreateContainer %s: %w", name, err)
	}
	return answer.ContainerId, nil
}

// start creates and starts a container, and returns when its first line is in the log file.
func (p *pod) start(ctx context.Context, name string) (created, started, logged time.Time, err error) {
	id, err := p.create(ctx, name)
	if err != nil {
		return created, started, logged, err
	}
	created = time.Now()
	if _, err := p.cri.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		return created, started, logged, fmt.Errorf("StartContainer %s: %w", name, err)
	}
	started = time.Now()
	err = firstLine(ctx, filepath.Join(p.config.LogDirectory, name+".log"))
	return created, started, time.Now(), err
}

// firstLine returns when a log file has a whole line.
func firstLine(ctx context.Context, file string) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		data, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if bytes.ContainsRune(data, '\n') {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no line in %s: %w", file, ctx.Err())
		case <-tick.C:
		}
	}
}
