package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const (
	cpuDir    = "/sys/devices/system/cpu"
	memoryDir = "/sys/devices/system/memory"
	// onlinePolicy decides which zone new memory goes to.
	onlinePolicy = "/sys/module/memory_hotplug/parameters/online_policy"
)

// Resize makes use of processors and memory that have come, and lets go of those that are to go. What the kernel had derived at boot from
// its memory follows what there is now.
func (s *Server) Resize(ctx context.Context, req *agentpb.ResizeRequest) (*agentpb.Empty, error) {
	s.sandbox.Lock()
	defer s.sandbox.Unlock()
	if err := s.limits.awaitMemory(ctx, req.GetMoreMemoryBytes()); err != nil {
		s.log.Warn("limits will not follow all of the memory", "error", err)
	}
	if err := s.limits.followMemory(); err != nil {
		return nil, err
	}
	if req.GetMemory() {
		if err := readyMemory(); err != nil {
			return nil, err
		}
	}
	if n := int(req.GetProcessors()); n > 0 {
		if err := setProcessors(ctx, cpuDir, n); err != nil {
			return nil, err
		}
	}
	return &agentpb.Empty{}, nil
}

// readyMemory puts memory to use as soon as it comes: for what can be moved, so that it can go again, as far as the kernel keeps enough
// for itself beside it.
func readyMemory() error {
	for _, set := range []struct{ file, value string }{{onlinePolicy, "auto-movable"}, {filepath.Join(memoryDir, "auto_online_blocks"), "online"}} {
		if err := os.WriteFile(set.file, []byte(set.value), 0); err != nil {
			return err
		}
	}
	for _, module := range []string{"virtio_mem", "virtio_balloon"} {
		if err := Modprobe(module); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// setProcessors has the first n processors online and no other. It waits for those that are not there yet.
func setProcessors(ctx context.Context, dir string, n int) error {
	last := filepath.Join(dir, fmt.Sprintf("cpu%d", n-1))
	if n > 1 {
		last = filepath.Join(last, "online") // the first processor has none: it stays
	}
	err := poll(ctx, 10*time.Millisecond, func() (bool, error) {
		_, err := os.Stat(last)
		if errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		return fmt.Errorf("processor %d does not come: %w", n-1, err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "cpu[0-9]*", "online"))
	if err != nil {
		return err
	}
	for _, file := range files {
		i, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(file)), "cpu"))
		if err != nil {
			return err
		}
		want := "1"
		if i >= n {
			want = "0"
		}
		have, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(string(have)) != want {
			err = os.WriteFile(file, []byte(want), 0)
		}
		if err != nil {
			return fmt.Errorf("processor %d online %s: %w", i, want, err)
		}
	}
	return nil
}
