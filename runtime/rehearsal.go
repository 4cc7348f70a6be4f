package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/ocispec"
)

// A guest that waits for a pod runs a container first, so that what that takes has been done once: pages are there, code is translated.

const (
	// rehearsalID is the container that a guest runs before it has a pod, and the command and the disk that belong to it.
	rehearsalID = "rehearsal"
	// The container's program is a script of the disk, which the agent's own program holds still for. That has been translated already: QEMU's
	// room for translated code is bounded, and when it is full all of it goes.
	rehearsalScript = "#!" + rehearsalAgent + " pause\n"
	rehearsalAgent  = "/vmagent"
	guestAgent      = "/init" // in the guest
)

// packRehearsal makes the disk that a rehearsal runs from, which is like an image's.
func (rt *Runtime) packRehearsal() (path string, err error) {
	dir := filepath.Join(rt.cfg.Server.State, rehearsalID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.WriteFile(filepath.Join(dir, rehearsalID), []byte(rehearsalScript), 0o755); err != nil {
		return "", err
	}
	return rt.images.Pack(rt.ctx, dir, rehearsalID)
}

// rehearse has the guest stand by, run a container as pods without any settings have it, and stand by again.
func (rt *Runtime) rehearse(ctx context.Context, sp *spare) error {
	standby := &agentpb.StandbyRequest{ScratchDisk: scratchSerial, ShmSizeBytes: shmSize}
	if _, err := sp.client.Standby(ctx, standby); err != nil {
		return err
	}
	if err := rt.rehearseContainer(ctx, sp); err != nil {
		return fmt.Errorf("rehearse: %w", err)
	}
	if err := readyForMemory(ctx, sp.client); err != nil {
		return fmt.Errorf("rehearse: %w", err)
	}
	_, err := sp.client.Standby(ctx, standby)
	return err
}

// rehearseContainer runs a container that holds still, from a disk like an image's, and a command in it.
func (rt *Runtime) rehearseContainer(ctx context.Context, sp *spare) (err error) {
	oci, err := ocispec.Build(ocispec.Input{
		ID: rehearsalID, SandboxID: sp.id, Config: &runtimeapi.ContainerConfig{Command: []string{"/" + rehearsalID}},
		Sandbox: &runtimeapi.PodSandboxConfig{}, RootFS: os.DirFS(rt.runDir(sp.id)), // where there are no users
	})
	if err != nil {
		return err
	}
	oci.Mounts = append(oci.Mounts, specs.Mount{Destination: rehearsalAgent, Source: guestAgent, Type: "bind", Options: []string{"bind", "ro"}})
	spec, err := json.Marshal(oci)
	if err != nil {
		return err
	}
	if err := sp.vm.AddDisk(ctx, qemu.Disk{Serial: rehearsalID, Path: rt.spares.disk, Format: "raw", ReadOnly: true}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sp.vm.RemoveDisk(ctx, rehearsalID)) }()
	defer func() {
		_, removeErr := sp.client.RemoveContainer(ctx, &agentpb.RemoveContainerRequest{Id: rehearsalID})
		err = errors.Join(err, removeErr)
	}()
	if _, err := sp.client.CreateContainer(ctx, &agentpb.CreateContainerRequest{
		Id: rehearsalID, OciSpec: spec, RootfsDisk: rehearsalID, PidNamespace: agentpb.PidNamespace_PID_NAMESPACE_CONTAINER,
	}); err != nil {
		return err
	}
	if _, err := sp.client.StartContainer(ctx, &agentpb.StartContainerRequest{Id: rehearsalID}); err != nil {
		return err
	}
	return rehearseExec(ctx, sp.client)
}

// rehearseExec runs a command, which tells how it is to be called, and reads that.
func rehearseExec(ctx context.Context, client agentClient) error {
	ref := &agentpb.ProcessRef{ContainerId: rehearsalID, ExecId: rehearsalID}
	_, err := client.Exec(ctx, &agentpb.ExecRequest{ContainerId: ref.ContainerId, ExecId: ref.ExecId, Process: []byte(`{"args": ["` + rehearsalAgent + `"]}`)})
	if err != nil {
		return err
	}
	if _, err := client.ReadOutput(ctx, &agentpb.ReadOutputRequest{Process: ref, MaxBytes: 1 << 10}); err != nil {
		return err
	}
	if _, err := client.Wait(ctx, ref); err != nil {
		return err
	}
	_, err = client.RemoveExec(ctx, ref)
	return err
}
