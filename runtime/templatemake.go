package runtime

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
)

const templateVM = "template"

// makeTemplate boots a guest, has its agent prepare it, saves it, and proves that a copy of it answers.
func (rt *Runtime) makeTemplate(ctx context.Context, m qemu.Machine, memory *os.File) ([]byte, error) {
	var state bytes.Buffer
	err := rt.withOwnVM(ctx, templateVM, qemu.Spec{Machine: m, Memory: memory}, func(vm *qemu.VM) error {
		client, err := agent.Dial(ctx, vm.AgentSocket())
		if err != nil {
			return err
		}
		// The session ends before the guest is saved: each copy begins one of its own.
		_, err = client.Prepare(ctx, &agentpb.PrepareRequest{})
		if err = errors.Join(err, client.Close()); err != nil {
			return err
		}
		return vm.SaveDevices(ctx, &state)
	})
	if err != nil {
		return nil, fmt.Errorf("make a template: %w", err)
	}
	proof := m
	proof.Memory, proof.Incoming = qemu.MemoryPrivate, true
	err = rt.withOwnVM(ctx, templateVM, qemu.Spec{Machine: proof, Memory: memory, State: bytes.NewReader(state.Bytes())}, func(vm *qemu.VM) error {
		if err := vm.Resume(ctx); err != nil {
			return err
		}
		client, err := agent.Dial(ctx, vm.AgentSocket())
		if err != nil {
			return err
		}
		return client.Close()
	})
	if err != nil {
		return nil, fmt.Errorf("start a copy of a new template: %w", err)
	}
	return state.Bytes(), nil
}

// sweepTemplates ends what a daemon has left that was ended while it made a template.
func (rt *Runtime) sweepTemplates(ctx context.Context) error {
	group := rt.ownGroup(templateVM)
	return errors.Join(
		group.Kill(ctx), group.Delete(), os.RemoveAll(filepath.Join(rt.cfg.Server.State, templateVM)), rt.templates.sweep(),
	)
}

// shapeIdentity tells apart machines whose guests are not interchangeable.
type shapeIdentity struct {
	binary string

	mu    sync.Mutex
	files map[string]fileIdentity
}

// fileIdentity is the hash of a file as long as it is the same.
type fileIdentity struct {
	stat [5]int64
	hash string
}

// key is the hash of all that a saved guest depends on: QEMU and its arguments, kernel and initramfs, and, under KVM, the processor.
func (s *shapeIdentity) key(ctx context.Context, m qemu.Machine) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	binary, err := exec.LookPath(s.binary)
	if err != nil {
		return "", err
	}
	fds := qemu.Descriptors{NICs: make([]int, len(m.NICs))}
	parts := []any{templateFormat, m.Defaults().Args(fds)}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, path := range []string{binary, m.Kernel, m.Initrd} {
		h, err := s.hash(path)
		if err != nil {
			return "", err
		}
		parts = append(parts, h)
	}
	if m.Accel == accelKVM {
		info, err := os.ReadFile("/proc/cpuinfo")
		if err != nil {
			return "", err
		}
		parts = append(parts, processor(info))
	}
	text, err := json.Marshal(parts)
	return sum(text)[:32], err
}

// processor is what /proc/cpuinfo says of the first processor, but its speed.
func processor(info []byte) (out []string) {
	first, _, _ := bytes.Cut(info, []byte("\n\n"))
	for line := range bytes.Lines(first) {
		if !bytes.HasPrefix(line, []byte("cpu MHz")) && !bytes.HasPrefix(line, []byte("bogomips")) {
			out = append(out, string(line))
		}
	}
	return out
}

// hash reads a file once for as long as it does not change. The caller holds mu.
func (s *shapeIdentity) hash(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", err
	}
	now := [5]int64{int64(st.Dev), int64(st.Ino), st.Size, st.Mtim.Nano(), st.Ctim.Nano()}
	if have := s.files[path]; have.stat == now {
		return have.hash, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	s.files[path] = fileIdentity{now, hex.EncodeToString(h.Sum(nil))}
	return s.files[path].hash, nil
}
