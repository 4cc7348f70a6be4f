package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/digitalocean/go-qemu/qmp"
)

// copyTimeout bounds the copy of a disk whose context has no deadline.
const copyTimeout = time.Hour

// copyID names the job that copies a disk, the block node of the copy and its descriptor set.
func (d Disk) copyID() string { return "copy-" + d.Serial }

var errCopying = fmt.Errorf("a disk of the VM is being copied, or its state saved; try again when that is done: %w", errdefs.ErrFailedPrecondition)

// CopyDisk writes all of a disk, as it is at one moment, to an image of the same size that has only zeros. It is "raw" or "qcow2", in a
// file that is open for reading and writing. The guest runs meanwhile and writes on; before is called when that moment is about to
// come, with nothing else to be waited for, and begun when it has passed, also on error. One copy of a VM's disks is made at a
// time, and none while its state is saved: another is errdefs.ErrFailedPrecondition.
func (v *VM) CopyDisk(ctx context.Context, serial string, to *os.File, format string, before, begun func()) error {
	if !v.copying.TryLock() {
		return errCopying
	}
	defer v.copying.Unlock()
	d := Disk{Serial: serial}
	ctx, cancel := context.WithTimeout(ctx, copyTimeout)
	defer cancel()
	events, err := v.beginCopy(ctx, d, to, format, before, begun)
	if err == nil {
		err = copied(ctx, events, d.copyID())
	}
	if err = errors.Join(err, v.endCopy(ctx, d)); err != nil {
		return fmt.Errorf("copy disk %s: %w", serial, err)
	}
	return nil
}

func (v *VM) endCopy(ctx context.Context, d Disk) error {
	v.plug.Lock()
	defer v.plug.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	return v.dropCopy(ctx, d)
}

// beginCopy returns when the moment that is copied has come.
func (v *VM) beginCopy(ctx context.Context, d Disk, to *os.File, format string, before, begun func()) (<-chan qmp.Event, error) {
	v.plug.Lock()
	defer v.plug.Unlock()
	before()
	defer begun()
	// What an attempt has left whose daemon was killed.
	if err := v.dropCopy(ctx, d); err != nil {
		return nil, err
	}
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := v.mon.Execute(ctx, "add-fd", props{"opaque": d.copyID()}, &set, to); err != nil {
		return nil, err
	}
	node := fileNode(d.copyID(), format, set.ID, false, false)
	node["detect-zeroes"] = "unmap"
	if err := v.mon.Execute(ctx, "blockdev-add", node, nil); err != nil {
		return nil, err
	}
	events, err := v.mon.Events(ctx)
	if err != nil {
		return nil, err
	}
	return events, v.mon.Execute(ctx, "blockdev-backup", props{"job-id": d.copyID(), "device": d.id(), "target": d.copyID(), "sync": "full"}, nil)
}

// copied waits for the end of the job.
func copied(ctx context.Context, events <-chan qmp.Event, job string) error {
	for e := range events {
		if e.Data["device"] != job {
			continue
		}
		switch e.Event {
		case "BLOCK_JOB_COMPLETED":
			if why, failed := e.Data["error"]; failed {
				return fmt.Errorf("QEMU says %v: %w", why, errdefs.ErrUnavailable)
			}
			return nil
		case "BLOCK_JOB_CANCELLED":
			return fmt.Errorf("the copy was cancelled: %w", errdefs.ErrAborted)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return fmt.Errorf("QEMU ended: %w", errdefs.ErrUnavailable)
}

// dropCopy ends a copy that is being made, and closes its file.
func (v *VM) dropCopy(ctx context.Context, d Disk) error {
	select {
	case <-v.done:
		return nil
	default:
	}
	for asked := false; ; asked = true {
		var jobs []struct {
			Device string `json:"device"`
		}
		if err := v.mon.Execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
			return err
		}
		there := false
		for _, j := range jobs {
			there = there || j.Device == d.copyID()
		}
		if !there {
			return v.dropNode(ctx, d.copyID())
		}
		if !asked {
			if err := v.mon.Execute(ctx, "block-job-cancel", props{"device": d.copyID(), "force": true}, nil); err != nil {
				return err
			}
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("QEMU does not give up the copy: %w", ctx.Err())
		}
	}
}
