package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
)

// Accelerators, as QEMU names them.
const (
	accelKVM  = "kvm"
	accelTCG  = "tcg"
	accelAuto = "auto"

	// proofTimeout bounds the boot that proves KVM. A stock kernel takes well below a second there; where
	// KVM opens but cannot run one, the guest dies or crawls.
	proofTimeout = 8 * time.Second
)

// accelVerdict is how the node's guests are run, and why.
type accelVerdict struct {
	Accel  string `json:"accel"`
	Reason string `json:"reason"`
	// BootID is the node's boot for which it holds.
	BootID string `json:"bootID"`
}

// acceleration decides once per boot of the node between KVM and TCG. It does not believe /dev/kvm: it boots
// the guest to its agent's answer.
type acceleration struct {
	configured string
	path       string // remembered verdict
	prove      func(ctx context.Context) error
	log        *slog.Logger

	mu   sync.Mutex
	done *accelVerdict
}

// verdict returns the accelerator for guests; the first caller waits for the proof.
func (a *acceleration) verdict(ctx context.Context) (accelVerdict, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.done != nil {
		return *a.done, nil
	}
	if err := ctx.Err(); err != nil {
		return accelVerdict{}, err
	}
	v := a.decide(ctx)
	a.done = &v
	a.log.Info("acceleration decided", "accel", v.Accel, "reason", v.Reason)
	return v, nil
}

func (a *acceleration) decide(ctx context.Context) accelVerdict {
	if a.configured != accelAuto {
		return accelVerdict{Accel: a.configured, Reason: "configured"}
	}
	boot := nodeBootID()
	if v, err := RememberedAccel(a.path); err == nil && v.BootID == boot {
		return v
	}
	v := accelVerdict{Accel: accelKVM, Reason: "a guest booted under KVM", BootID: boot}
	if err := a.tryKVM(ctx); err != nil {
		v.Accel, v.Reason = accelTCG, err.Error()
	}
	if err := a.remember(v); err != nil {
		a.log.Warn("the acceleration's proof is not remembered", "error", err)
	}
	return v
}

func (a *acceleration) tryKVM(ctx context.Context) error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("no KVM: %w", err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), proofTimeout)
	defer cancel()
	if err := a.prove(ctx); err != nil {
		return fmt.Errorf("/dev/kvm opens, but no guest boots under it within %v: %w", proofTimeout, err)
	}
	return nil
}

func (a *acceleration) remember(v accelVerdict) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return renameio.WriteFile(a.path, b, 0o644)
}

// RememberedAccel reads a verdict that a daemon has left.
func RememberedAccel(path string) (accelVerdict, error) {
	var v accelVerdict
	b, err := os.ReadFile(path)
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(b, &v)
}

func nodeBootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return string(b[:max(len(b)-1, 0)])
}

// proveKVM boots the guest under KVM until its agent answers.
func (rt *Runtime) proveKVM(ctx context.Context) error {
	m := rt.guestImage.machine(accelKVM)
	m.Name = "vmruntime-accel-proof"
	m.VCPUs, m.MemoryBytes = 1, 128<<20
	return rt.withOwnVM(ctx, "accel-proof", qemu.Spec{Machine: m}, func(vm *qemu.VM) error {
		client, err := agent.Dial(ctx, vm.AgentSocket())
		if err != nil {
			return err
		}
		_, err = client.Info(ctx, &agentpb.InfoRequest{})
		return errors.Join(err, client.Close())
	})
}

// withOwnVM runs a VM that is no pod's for as long as use takes. One of the same name that an earlier daemon has left is ended
// first; two of one name never run at once.
func (rt *Runtime) withOwnVM(ctx context.Context, name string, s qemu.Spec, use func(*qemu.VM) error) (err error) {
	dir, group := filepath.Join(rt.cfg.Server.State, name), rt.ownGroup(name)
	if err := errors.Join(group.Kill(ctx), os.RemoveAll(dir)); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, group.Delete(), os.RemoveAll(dir)) }()
	s.Binary, s.Launcher, s.RunDir, s.Place = rt.cfg.QEMU.Binary, rt.launcher, dir, group.Add
	s.UID = rt.cfg.QEMU.UIDBase + rt.cfg.QEMU.UIDCount
	s.GID = s.UID
	vm, err := qemu.Start(ctx, s)
	if err != nil {
		return err
	}
	defer func() {
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardownTimeout)
		defer cancel()
		err = errors.Join(err, vm.Kill(kill), vm.Close())
	}()
	return use(vm)
}

// ownGroup is the cgroup of a VM that is no pod's. Daemons with different state have different ones.
func (rt *Runtime) ownGroup(name string) cgroup.Group {
	return cgroup.For("/", "vmruntime-"+name+"-"+sum([]byte(rt.cfg.Server.State))[:16])
}
