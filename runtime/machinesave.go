package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/runtime/archive"
)

// checkpointMachine is what the snapshot of a machine tells of it.
type checkpointMachine struct {
	PodID   string      `json:"podID"`
	ImageID string      `json:"imageID"`
	Spec    machineSpec `json:"spec"`
	// Unmovable is why the guest cannot be told that it is another pod, so that it can be restored in its own sandbox only.
	Unmovable string `json:"unmovable,omitempty"`
	// Files are those of the machine that are streams of the snapshot.
	Files []checkpointFile `json:"files"`
}

type checkpointFile struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
}

// saved are the files of a machine that a snapshot has, as far as they are there.
func (f machineFiles) saved() []string {
	return []string{f.root(), f.vars(), f.seed(), f.ignition()}
}

// checkMachine refuses a machine that has a state outside of QEMU and its own files.
func (c *container) checkMachine() error {
	asked, err := c.pod.annotations()
	if err != nil {
		return err
	}
	if c.pod.rec.Status().Held != nil {
		return fmt.Errorf("the machine was restored and does not know its addresses yet; it cannot be saved until it does: %w", errdefs.ErrFailedPrecondition)
	}
	if len(c.rec.Spec().Mounts) > 0 || asked.GuestAgentInstall {
		return fmt.Errorf("the machine has volumes that are shared with the node by virtiofs, which holds state outside of the VM; it cannot be saved: %w", errdefs.ErrFailedPrecondition)
	}
	for _, v := range c.rec.Spec().Machine.Volumes {
		if !v.ReadOnly {
			return fmt.Errorf("the machine writes to the block volume at %s, whose content is in no snapshot; it cannot be saved: %w", v.Path, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

func (c *container) describeMachine(ctx context.Context, g *guest) *checkpointMachine {
	m := &checkpointMachine{PodID: c.pod.id, ImageID: c.rec.Spec().ImageID, Spec: *c.rec.Spec().Machine}
	if err := g.canBeTold(ctx); err != nil {
		m.Unmovable = err.Error()
	}
	return m
}

// captureMachine stops the machine, and writes its memory, and then its disk, to which QEMU has written all by then. It leaves both as
// they are.
func (c *container) captureMachine(ctx context.Context, g *guest, m *checkpointManifest, w *archive.Writer) error {
	if err := g.saveMemory(ctx, w); err != nil {
		return err
	}
	dir, err := c.rt.images.OpenMachine(c.id)
	if err != nil {
		return err
	}
	defer dir.Close()
	for _, path := range (machineFiles{}).saved() {
		if err := m.Machine.save(ctx, dir, path, w); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// save adds a file, if it is there.
func (m *checkpointMachine) save(ctx context.Context, dir *os.Root, name string, w *archive.Writer) error {
	f, err := dir.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	m.Files = append(m.Files, checkpointFile{Name: name, Size: info.Size()})
	return w.Stream(ctx, name, func(to io.Writer) error { return archive.WriteSparse(to, f) })
}

// restoreMachine ends the QEMU of a machine and lets another one go on where the snapshot was taken. Until that, the machine is what it
// was if something fails; then it has ended.
func (c *container) restoreMachine(ctx context.Context, m *checkpointManifest, r *archive.Reader) error {
	p := c.pod
	c.life.Lock()
	defer c.life.Unlock()
	p.life.Lock()
	defer p.life.Unlock()
	g, err := c.runningMachine()
	if err != nil {
		return err
	}
	if err := errors.Join(c.fitsMachine(m), c.checkMachine()); err != nil {
		return err
	}
	if err := c.rt.fitsNode(ctx, m); err != nil {
		return err
	}
	dir, err := c.rt.images.OpenMachine(c.id)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := m.Machine.unpack(dir, r, machineFiles{}.saved()); err != nil {
		return errors.Join(err, dropUnpacked(dir))
	}
	if !g.machine.decided.CompareAndSwap(false, true) {
		return errors.Join(fmt.Errorf("the machine of container %s has just ended: %w", c.id, errdefs.ErrFailedPrecondition), dropUnpacked(dir))
	}
	// From here on there is a way forward only.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), bootTimeout)
	defer cancel()
	if err := c.replaceMachine(ctx, g, m, dir, r); err != nil {
		err = fmt.Errorf("restore machine %s, which has ended: %w", c.id, err)
		c.finish(containerEnd{code: 128 + sigkill, reason: reasonVMFailed, message: err.Error(), at: time.Now()})
		return err
	}
	return nil
}

// fitsMachine refuses the snapshot of another machine.
func (c *container) fitsMachine(m *checkpointManifest) error {
	if m.Machine == nil {
		return fmt.Errorf("directory: it is the checkpoint of a pod of containers, not the snapshot of a machine; RestorePod takes it: %w", errdefs.ErrFailedPrecondition)
	}
	was, err := json.Marshal(m.Machine.Spec)
	if err != nil {
		return err
	}
	is, err := json.Marshal(c.rec.Spec().Machine)
	if err != nil {
		return err
	}
	for _, f := range []struct{ what, was, is string }{
		{"sandbox", m.Machine.PodID, c.pod.id},
		{"image", m.Machine.ImageID, c.rec.Spec().ImageID},
		{"machine", string(was), string(is)},
	} {
		if f.was != f.is {
			return fmt.Errorf("directory: the snapshot is of %s %s, not of %s: %w", f.what, f.was, f.is, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// unpacked is the name of a file until it takes its place.
func unpacked(name string) string { return name + ".restored" }

// unpack writes those of the snapshot's files that are wanted beside those that are in use.
func (m *checkpointMachine) unpack(dir *os.Root, r *archive.Reader, wanted []string) error {
	for _, file := range m.Files {
		if !slices.Contains(machineFiles{}.saved(), file.Name) {
			return fmt.Errorf("directory: a machine has no file %q: %w", file.Name, errdefs.ErrInvalidArgument)
		}
		if !slices.Contains(wanted, file.Name) {
			continue
		}
		f, err := dir.OpenFile(unpacked(file.Name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		err = r.Stream(file.Name, func(from io.Reader) error { return archive.ReadSparse(f, from, file.Size) })
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("unpack %s: %w", file.Name, err)
		}
	}
	return nil
}

// place puts what unpack has written where it is used.
func (m *checkpointMachine) place(dir *os.Root, wanted []string) error {
	for _, file := range m.Files {
		if !slices.Contains(wanted, file.Name) {
			continue
		}
		if err := dir.Rename(unpacked(file.Name), file.Name); err != nil {
			return err
		}
	}
	return nil
}

// dropUnpacked removes what unpack has written.
func dropUnpacked(dir *os.Root) error {
	var errs []error
	for _, name := range (machineFiles{}).saved() {
		if err := dir.Remove(unpacked(name)); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// replaceMachine ends the machine's QEMU and starts the one that goes on.
func (c *container) replaceMachine(ctx context.Context, g *guest, m *checkpointManifest, dir *os.Root, r *archive.Reader) error {
	p := c.pod
	if err := g.vm.Kill(ctx); err != nil {
		return errors.Join(err, dropUnpacked(dir))
	}
	<-g.machine.followed // its console is in the log
	if err := p.endGuest(ctx, g); err != nil {
		return errors.Join(err, dropUnpacked(dir))
	}
	if err := m.Machine.place(dir, machineFiles{}.saved()); err != nil {
		return err
	}
	next, err := c.bootSaved(ctx, machineFiles{dir: dir.Name(), there: true, seeded: true}, r)
	if err != nil {
		return errors.Join(err, p.endGuest(ctx, next))
	}
	c.watchMachine(next)
	next.owned.Go(next.setClock)
	return nil
}

// loadSaved starts QEMU with the snapshot's memory. On error it may return a guest that is to be ended.
func (c *container) loadSaved(ctx context.Context, files machineFiles, r *archive.Reader) (g *guest, err error) {
	p := c.pod
	err = r.Stream(memoryStream, func(state io.Reader) error {
		p.incoming.Store(&incoming{state: state})
		defer p.incoming.Store(nil)
		g, err = c.bootMachine(ctx, files)
		return err
	})
	return g, err
}

// bootSaved is loadSaved, and lets the guest go on, which a daemon that is killed meanwhile leaves to the next one.
func (c *container) bootSaved(ctx context.Context, files machineFiles, r *archive.Reader) (*guest, error) {
	p := c.pod
	boot := p.rec.Status().Guest.Boot + 1
	if err := errors.Join(
		c.rec.Update(func(s *containerStatus) error { s.Boot = boot; return nil }),
		p.update(func(s *podStatus) error { s.Capturing = true; return nil }),
	); err != nil {
		return nil, err
	}
	g, err := c.loadSaved(ctx, files, r)
	if err == nil {
		err = g.vm.Resume(ctx)
	}
	if err != nil {
		return g, err // which is ended; a daemon that finds it lets it go on
	}
	if s := p.rec.Status().Resized; s != nil && c.rec.Spec().Machine.HugePageBytes == 0 && s.Size.MemoryBytes < c.rec.Spec().Machine.MemoryBytes {
		err = g.vm.RequestMemory(ctx, s.Size.MemoryBytes)
	}
	return g, errors.Join(err, p.update(func(s *podStatus) error { s.Capturing = false; return nil }))
}

// setClock tells a guest that was restored what time it is, if it runs who can be told.
func (g *guest) setClock() {
	ctx, cancel := context.WithTimeout(g.ctx, askTimeout)
	defer cancel()
	ga, err := g.guestAgent(ctx)
	if err == nil {
		err = ga.SetTime(ctx, time.Now())
	}
	if err != nil {
		g.log.Info("nobody in the restored machine sets its clock", "error", err)
	}
}
