package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// listBar is what a list of the stored pods may take at p99, in milliseconds.
const listBar = 5

// store is a directory of the daemon's records: "pods" or "containers".
func (b *bench) store(kind string) string {
	return filepath.Join(b.node.Root, "vmruntime", "root", kind)
}

// record is a record's two files.
type record struct{ spec, status map[string]any }

// storedPods measures lists of many VM pods, of which only the records are real. The daemon wrote one record of a
// running pod and one of its container; while it is down they are copied with other IDs and names, without QEMU's process.
// The copies' network namespace is the node's, so they count as ready, and are asked for at each list as any
// pod's is. Afterwards they are taken away in the same manner.
func (b *bench) storedPods(ctx context.Context) (err error) {
	podRecord, containerRecord, err := b.template(ctx)
	if err != nil {
		return err
	}
	empty, err := b.freshDaemon(ctx, nil, nil)
	if err != nil {
		return err
	}
	var written []string
	defer func() {
		err = errors.Join(err, b.restart(context.WithoutCancel(ctx), func() error { return removeDirs(written) }))
	}()
	full, err := b.freshDaemon(ctx, func() error {
		for i := range b.stored {
			dirs, err := b.clone(podRecord, containerRecord, i)
			written = append(written, dirs...)
			if err != nil {
				return err
			}
		}
		return nil
	}, nil)
	if err != nil {
		return err
	}
	if err := b.idleCPU(ctx, fmt.Sprintf("%d VM pods stored", b.stored), nil); err != nil {
		return err
	}
	if err := b.measureLists(ctx); err != nil {
		return err
	}
	b.report.add(fmt.Sprintf("daemon's memory per VM pod, of %d stored", b.stored), float64(full-empty)/float64(b.stored)/(1<<10), "KiB")
	return nil
}

func (b *bench) measureLists(ctx context.Context) error {
	for _, list := range []struct {
		name string
		call func(context.Context, *cri) error
	}{
		{"ListPodSandbox", func(ctx context.Context, c *cri) error {
			answer, err := c.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{
				Filter: &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}},
			})
			return errors.Join(err, count(len(answer.GetItems()), b.stored))
		}},
		{"ListContainers", func(ctx context.Context, c *cri) error {
			answer, err := c.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
			return errors.Join(err, count(len(answer.GetContainers()), b.stored))
		}},
	} {
		// What this program itself collects while it waits is no part of the daemon's answer.
		defer debug.SetGCPercent(debug.SetGCPercent(-1))
		var took durations
		var before time.Duration
		for i := range warmUps + b.lists {
			if i == warmUps {
				var err error
				if before, err = b.daemonCPU(); err != nil {
					return err
				}
			}
			d, err := unary(list.call)(ctx, b.vm)
			if err != nil {
				return fmt.Errorf("%s: %w", list.name, err)
			}
			if i >= warmUps {
				took = append(took, d)
			}
		}
		after, err := b.daemonCPU()
		if err != nil {
			return err
		}
		name := fmt.Sprintf("%s of %d VM pods", list.name, b.stored)
		b.report.add(name+", p50", took.median(), "ms")
		b.report.add(name+", p99", took.at(0.99), "ms").within(listBar)
		b.report.add("  processor time of the daemon for one", milliseconds(after-before)/float64(b.lists), "ms")
	}
	return nil
}

// daemonCPU is the processor time that vmruntime has used, which depends less on what else runs.
func (b *bench) daemonCPU() (time.Duration, error) { return processCPU(b.node.VMRuntimePID()) }

// processCPU is the processor time that a process has used.
func processCPU(pid int) (time.Duration, error) {
	file := fmt.Sprintf("/proc/%d/stat", pid)
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	// The name may hold anything, but ends with the last parenthesis; field 3 follows. Fields 14 and 15 are clock
	// ticks, of which Linux counts 100 in a second for every program.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("%s has only %d fields", file, len(fields))
	}
	var ticks time.Duration
	for _, field := range fields[11:13] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", file, err)
		}
		ticks += time.Duration(n)
	}
	return ticks * time.Second / 100, nil
}

// template is what the daemon writes for a running pod with one container.
func (b *bench) template(ctx context.Context) (podRecord, containerRecord record, err error) {
	p, err := b.runPod(ctx, b.vm, vmHandler, "template")
	if err != nil {
		return podRecord, containerRecord, err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	if err := b.startIn(ctx, p); err != nil {
		return podRecord, containerRecord, err
	}
	list, err := b.vm.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.id}})
	if err != nil {
		return podRecord, containerRecord, err
	}
	if err := count(len(list.Containers), 1); err != nil {
		return podRecord, containerRecord, err
	}
	if podRecord, err = readRecord(filepath.Join(b.store("pods"), p.id)); err != nil {
		return podRecord, containerRecord, err
	}
	containerRecord, err = readRecord(filepath.Join(b.store("containers"), list.Containers[0].Id))
	return podRecord, containerRecord, err
}

// restart ends the daemon, lets change work on its files, and starts it again, also when change fails.
func (b *bench) restart(ctx context.Context, change func() error) error {
	if err := b.node.StopVMRuntime(); err != nil {
		return err
	}
	var err error
	if change != nil {
		err = change()
	}
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	return errors.Join(err, b.node.StartVMRuntime(ctx))
}

// clone writes the records of one more pod and container and tells their directories.
func (b *bench) clone(podRecord, containerRecord record, i int) ([]string, error) {
	podID, containerID := newID(), newID()
	name := fmt.Sprintf("stored-%d", i)
	podDir, containerDir := filepath.Join(b.store("pods"), podID), filepath.Join(b.store("containers"), containerID)
	metadata := map[string]any{"name": name, "namespace": "bench", "uid": "uid-" + name}
	return []string{podDir, containerDir}, errors.Join(
		set(podRecord.spec, metadata, "config", "metadata"),
		set(podRecord.spec, 1000000+i, "uid"),
		set(podRecord.status, filepath.Join("/run/netns", filepath.Base(b.node.CgroupParent())), "network", "netns"),
		set(podRecord.status, map[string]any{"boot": 1}, "guest"),
		writeRecord(podDir, podRecord),
		set(containerRecord.spec, podID, "podID"),
		writeRecord(containerDir, containerRecord),
	)
}

func newID() string {
	var id [32]byte
	_, _ = rand.Read(id[:]) // it never fails
	return hex.EncodeToString(id[:])
}

// set replaces a field that is there already, so that a change of the records' form does not go unnoticed.
func set(object map[string]any, value any, path ...string) error {
	for _, key := range path[:len(path)-1] {
		next, ok := object[key].(map[string]any)
		if !ok {
			return fmt.Errorf("the daemon's record has no object %q on the way to %q", key, path)
		}
		object = next
	}
	last := path[len(path)-1]
	if _, ok := object[last]; !ok {
		return fmt.Errorf("the daemon's record has no field %q", path)
	}
	object[last] = value
	return nil
}

func readRecord(dir string) (r record, err error) {
	for file, object := range map[string]*map[string]any{"spec.json": &r.spec, "status.json": &r.status} {
		data, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return r, err
		}
		decoder := json.NewDecoder(bytes.NewReader(data))
		decoder.UseNumber() // numbers stay as they are
		if err := decoder.Decode(object); err != nil {
			return r, fmt.Errorf("%s: %w", filepath.Join(dir, file), err)
		}
	}
	return r, nil
}

func writeRecord(dir string, r record) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for file, object := range map[string]map[string]any{"spec.json": r.spec, "status.json": r.status} {
		data, err := json.Marshal(object)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func removeDirs(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}
