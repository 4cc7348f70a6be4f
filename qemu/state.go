package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/digitalocean/go-qemu/qmp"
)

const (
	// stateTimeout bounds saving and loading a state whose context has no deadline.
	stateTimeout = 5 * time.Minute
	// stateBandwidth, in bytes a second, is more than any node has: QEMU's default is meant for networks.
	stateBandwidth = 1 << 40
	stateFD        = "state"
)

// SaveState stops the guest and writes its whole state to w: processors, devices, and memory, of which pages of zeros
// take next to nothing. The disks are not part of it; they are flushed. The guest stays stopped, also on error, until Resume. While a
// disk is copied, which QEMU cannot do at the same time, it is errdefs.ErrFailedPrecondition.
func (v *VM) SaveState(ctx context.Context, w io.Writer) error { return v.save(ctx, w, false) }

// SaveDevices is SaveState without the memory, which is in the caller's Spec.Memory: only with MemoryShared.
func (v *VM) SaveDevices(ctx context.Context, w io.Writer) error { return v.save(ctx, w, true) }

func (v *VM) save(ctx context.Context, w io.Writer, skipMemory bool) error {
	if !v.copying.TryLock() {
		return errCopying
	}
	defer v.copying.Unlock()
	v.plug.Lock()
	defer v.plug.Unlock()
	ctx, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	if err := v.Pause(ctx); err != nil {
		return err
	}
	if err := v.prepareMigration(ctx, skipMemory); err != nil {
		return err
	}
	err := v.migrateThrough(ctx, "migrate", func(r, w *os.File) (its, ours *os.File) { return w, r }, func(pipe *os.File) error {
		_, err := io.Copy(w, pipe)
		return err
	})
	if err != nil {
		return errors.Join(fmt.Errorf("save the VM's state: %w", err), v.cancelMigration(ctx))
	}
	return nil
}

// load gives QEMU, which waits for it, the state that another one has saved.
func (v *VM) load(ctx context.Context, state io.Reader, skipMemory bool) error {
	ctx, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	if err := v.prepareMigration(ctx, skipMemory); err != nil {
		return err
	}
	err := v.migrateThrough(ctx, "migrate-incoming", func(r, w *os.File) (its, ours *os.File) { return r, w }, func(pipe *os.File) error {
		_, err := io.Copy(pipe, state)
		return errors.Join(err, pipe.Close()) // the end of the state
	})
	if err != nil {
		return fmt.Errorf("load the VM's state: %w", err)
	}
	return nil
}

func (v *VM) prepareMigration(ctx context.Context, skipMemory bool) error {
	capabilities := []props{{"capability": "events", "state": true}, {"capability": "x-ignore-shared", "state": skipMemory}}
	if err := v.mon.Execute(ctx, "migrate-set-capabilities", props{"capabilities": capabilities}, nil); err != nil {
		return err
	}
	// No announcements: the hardware addresses in a state are those of a template, or of a pod that may still be there.
	return v.mon.Execute(ctx, "migrate-set-parameters", props{"max-bandwidth": int64(stateBandwidth), "announce-rounds": 0}, nil)
}

// migrateThrough lets a command work on one end of a pipe and move on the other, until QEMU says how it went.
func (v *VM) migrateThrough(ctx context.Context, command string, ends func(r, w *os.File) (its, ours *os.File), move func(*os.File) error) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	its, ours := ends(r, w)
	events, err := v.mon.Events(ctx)
	if err == nil {
		err = v.mon.Execute(ctx, "getfd", props{"fdname": stateFD}, nil, its)
	}
	// QEMU has its own descriptor now; ours would keep the pipe from ending.
	if err = errors.Join(err, its.Close()); err != nil {
		return errors.Join(err, ours.Close())
	}
	moved := make(chan error, 1)
	go func() { moved <- move(ours) }()
	err = v.mon.Execute(ctx, command, props{"uri": "fd:" + stateFD}, nil)
	if err == nil {
		err = v.migrated(ctx, events, moved)
	} else {
		err = errors.Join(err, v.closeFD(ctx))
	}
	if err != nil {
		_ = ours.Close() // ends the mover, and with it QEMU's end
	}
	if moveErr := <-moved; err == nil {
		err = moveErr
	}
	if closeErr := ours.Close(); err == nil && !errors.Is(closeErr, os.ErrClosed) {
		err = closeErr
	}
	return err
}

// closeFD takes back a descriptor that no command has taken.
func (v *VM) closeFD(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	return v.mon.Execute(ctx, "closefd", props{"fdname": stateFD}, nil)
}

// migrated waits until QEMU says that it is done. A mover that fails earlier ends the wait; its result stays in moved.
func (v *VM) migrated(ctx context.Context, events <-chan qmp.Event, moved chan error) error {
	mover := moved
	for {
		select {
		case err := <-mover:
			moved <- err
			if err != nil {
				return err
			}
			mover = nil
		case e, more := <-events:
			if !more {
				return errors.Join(fmt.Errorf("QEMU ended: %w", errdefs.ErrUnavailable), ctx.Err())
			}
			if e.Event != "MIGRATION" {
				continue
			}
			switch e.Data["status"] {
			case "completed":
				return nil
			case "failed", "cancelled":
				return v.migrationError(ctx)
			}
		}
	}
}

func (v *VM) migrationError(ctx context.Context) error {
	var m struct {
		Status string `json:"status"`
		Desc   string `json:"error-desc"`
	}
	if err := v.mon.Execute(ctx, "query-migrate", nil, &m); err != nil {
		return err
	}
	return fmt.Errorf("QEMU says %s: %s: %w", m.Status, m.Desc, errdefs.ErrUnavailable)
}

// cancelMigration makes an attempt that failed leave nothing. It returns when the guest could be resumed.
func (v *VM) cancelMigration(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	if err := v.mon.Execute(ctx, "migrate_cancel", nil, nil); err != nil {
		return err
	}
	for {
		var m struct {
			Status string `json:"status"`
		}
		if err := v.mon.Execute(ctx, "query-migrate", nil, &m); err != nil {
			return err
		}
		switch m.Status {
		case "", "none", "failed", "cancelled", "completed":
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("QEMU does not give up saving its state: %w", ctx.Err())
		}
	}
}
