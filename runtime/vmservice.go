package runtime

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/vmruntime/vmruntime/runtime/archive"
	"github.com/vmruntime/vmruntime/runtime/vmpb"
)

const (
	// listAtOnce is how many QEMUs are asked at a time.
	listAtOnce = 16
	// maxReplay is how many lines of a console may be asked for.
	maxReplay = 100_000
	// vncChunk bounds one message of a VNC session in bytes.
	vncChunk = 64 << 10
)

// vmService answers what an administrator of the node asks about VMs.
type vmService struct {
	vmpb.UnimplementedVMServiceServer
	rt *Runtime
	// pumps are the goroutines that read a client's messages; they end with their streams.
	pumps sync.WaitGroup
}

// List tells of all VM pods.
func (s *vmService) List(ctx context.Context, _ *vmpb.ListRequest) (*vmpb.ListResponse, error) {
	pods := s.rt.allPods()
	out := &vmpb.ListResponse{Vms: make([]*vmpb.VM, len(pods))}
	var work errgroup.Group
	work.SetLimit(listAtOnce)
	for i, p := range pods {
		work.Go(func() error {
			out.Vms[i] = p.summary(ctx)
			return nil
		})
	}
	if err := work.Wait(); err != nil {
		return nil, err
	}
	slices.SortFunc(out.GetVms(), func(a, b *vmpb.VM) int {
		return cmp.Or(cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()), cmp.Compare(a.GetPodId(), b.GetPodId()))
	})
	return out, nil
}

// Show tells all about one VM.
func (s *vmService) Show(ctx context.Context, req *vmpb.ShowRequest) (*vmpb.ShowResponse, error) {
	p, err := s.rt.findVM(req.GetVm())
	if err != nil {
		return nil, err
	}
	return p.describe(ctx)
}

// Pause stops the guest's processors.
func (s *vmService) Pause(ctx context.Context, req *vmpb.PauseRequest) (*vmpb.PauseResponse, error) {
	g, err := s.rt.findGuest(req.GetVm())
	if err != nil {
		return nil, err
	}
	if err := g.uncaptured(); err != nil {
		return nil, err
	}
	g.log.Info("paused by an administrator")
	return &vmpb.PauseResponse{}, g.vm.Pause(ctx)
}

// Resume lets a guest go on.
func (s *vmService) Resume(ctx context.Context, req *vmpb.ResumeRequest) (*vmpb.ResumeResponse, error) {
	g, err := s.rt.findGuest(req.GetVm())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(g.uncaptured(), g.started()); err != nil {
		return nil, err
	}
	g.log.Info("resumed by an administrator")
	return &vmpb.ResumeResponse{}, g.vm.Resume(ctx)
}

// Reset presses the reset button; a machine that is paused runs afterwards.
func (s *vmService) Reset(ctx context.Context, req *vmpb.ResetRequest) (*vmpb.ResetResponse, error) {
	g, err := s.rt.findMachine(req.GetVm(), "reset")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(g.uncaptured(), g.started()); err != nil {
		return nil, err
	}
	g.log.Info("reset by an administrator")
	if err := g.vm.Reset(ctx); err != nil {
		return nil, err
	}
	return &vmpb.ResetResponse{}, g.vm.Resume(ctx)
}

// Reboot asks the operating system to boot again.
func (s *vmService) Reboot(ctx context.Context, req *vmpb.RebootRequest) (*vmpb.RebootResponse, error) {
	g, err := s.rt.findMachine(req.GetVm(), "rebooted")
	if err != nil {
		return nil, err
	}
	if err := g.uncaptured(); err != nil {
		return nil, err
	}
	g.log.Info("rebooted by an administrator")
	by, err := g.reboot(ctx)
	return &vmpb.RebootResponse{By: by}, err
}

// NMI sends an interrupt that cannot be masked.
func (s *vmService) NMI(ctx context.Context, req *vmpb.NMIRequest) (*vmpb.NMIResponse, error) {
	g, err := s.rt.findGuest(req.GetVm())
	if err != nil {
		return nil, err
	}
	g.log.Info("NMI by an administrator")
	return &vmpb.NMIResponse{}, g.vm.NMI(ctx)
}

// Screenshot is what a machine shows.
func (s *vmService) Screenshot(ctx context.Context, req *vmpb.ScreenshotRequest) (*vmpb.ScreenshotResponse, error) {
	g, err := s.rt.findMachine(req.GetVm(), "seen: it has no video")
	if err != nil {
		return nil, err
	}
	png, err := g.vm.Screenshot(ctx)
	return &vmpb.ScreenshotResponse{Png: png}, err
}

// Snapshot writes a VM that runs into a directory.
func (s *vmService) Snapshot(ctx context.Context, req *vmpb.SnapshotRequest) (_ *vmpb.SnapshotResponse, err error) {
	g, err := s.rt.findGuest(req.GetVm())
	if err != nil {
		return nil, err
	}
	var running []*container
	for _, c := range s.rt.containersOf(g.pod.id) {
		if c.rec.Status().running() {
			running = append(running, c)
		}
	}
	if len(running) == 0 {
		return nil, fmt.Errorf("no container of pod %s runs; there is nothing to save: %w", g.pod.id, errdefs.ErrFailedPrecondition)
	}
	if err := g.pod.checkSelected(running); err != nil {
		return nil, err
	}
	w, err := archive.Create("directory", req.GetDirectory())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	g.log.Info("saved by an administrator", "directory", req.GetDirectory())
	return &vmpb.SnapshotResponse{}, g.pod.checkpoint(ctx, running, w, func(*checkpointMachine) error { return nil })
}

// Restore makes a machine what it was at a snapshot.
func (s *vmService) Restore(ctx context.Context, req *vmpb.RestoreRequest) (_ *vmpb.RestoreResponse, err error) {
	g, err := s.rt.findMachine(req.GetVm(), "restored in its place: RestorePod of the CRI makes another pod of the snapshot")
	if err != nil {
		return nil, err
	}
	c, err := s.rt.containerByID(g.machine.container)
	if err != nil {
		return nil, err
	}
	m := &checkpointManifest{}
	r, err := archive.Open(ctx, "directory", req.GetDirectory(), m)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	g.log.Info("restored by an administrator", "directory", req.GetDirectory())
	return &vmpb.RestoreResponse{}, c.restoreMachine(ctx, m, r)
}

// Clone writes a machine's disk to a file.
func (s *vmService) Clone(ctx context.Context, req *vmpb.CloneRequest) (*vmpb.CloneResponse, error) {
	g, err := s.rt.findMachine(req.GetVm(), "cloned: it has no disk of its own")
	if err != nil {
		return nil, err
	}
	if err := g.uncaptured(); err != nil {
		return nil, err
	}
	g.log.Info("cloned by an administrator", "file", req.GetFile())
	frozen, err := g.clone(ctx, req.GetFile())
	return &vmpb.CloneResponse{Frozen: frozen}, err
}

// Console joins the client to the serial console.
func (s *vmService) Console(stream vmpb.VMService_ConsoleServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	open := first.GetOpen()
	if open == nil {
		return errNotOpened
	}
	if n := open.GetReplayLines(); n < 0 || n > maxReplay {
		return fmt.Errorf("replay_lines is %d; it has to be 0 to %d: %w", n, maxReplay, errdefs.ErrInvalidArgument)
	}
	g, err := s.rt.findGuest(open.GetVm())
	if err != nil {
		return err
	}
	out := consoleWriter{stream}
	if g.machine == nil {
		return g.showConsole(stream.Context(), open, out)
	}
	c, err := s.rt.containerByID(g.machine.container)
	if err != nil {
		return err
	}
	var in io.Reader
	if open.GetInput() {
		from, to := io.Pipe()
		defer func() { _ = from.Close() }() // never fails
		s.pumps.Go(func() { to.CloseWithError(pump(to, typedOn(stream))) })
		in = from
	}
	return c.attachConsole(stream.Context(), in, out, int(open.GetReplayLines()))
}

var errNotOpened = fmt.Errorf("the stream's first message has to open it: %w", errdefs.ErrInvalidArgument)

// consoleWriter sends what is written to it.
type consoleWriter struct{ stream vmpb.VMService_ConsoleServer }

func (w consoleWriter) Write(b []byte) (int, error) {
	if err := w.stream.Send(&vmpb.ConsoleResponse{Data: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// typedOn returns the messages after the first.
func typedOn(stream vmpb.VMService_ConsoleServer) func() ([]byte, error) {
	return func() ([]byte, error) {
		m, err := stream.Recv()
		return m.GetData(), err
	}
}

// pump writes what is received, to the end.
func pump(to io.Writer, receive func() ([]byte, error)) error {
	for {
		data, err := receive()
		if err != nil {
			return err // io.EOF at the end
		}
		if _, err := to.Write(data); err != nil {
			return err
		}
	}
}

// showConsole sends what is kept of the console of a guest of ours, which nobody can type on.
func (g *guest) showConsole(ctx context.Context, open *vmpb.ConsoleRequest_Open, out io.Writer) error {
	if open.GetInput() {
		return fmt.Errorf("the console of a pod of containers can only be read; open it without input (--read-only): %w", errdefs.ErrFailedPrecondition)
	}
	text, err := g.vm.Console(ctx)
	if err != nil {
		return err
	}
	if n := open.GetReplayLines(); n > 0 {
		text = string(lastLines([]byte(text), int(n)))
	}
	_, err = io.WriteString(out, text)
	return err
}

// lastLines is the end of a text; what has no line feed at its end is a line too.
func lastLines(text []byte, n int) []byte {
	if n <= 0 {
		return nil
	}
	from := len(text)
	if from > 0 && text[from-1] == '\n' {
		from--
	}
	for from > 0 {
		if text[from-1] == '\n' {
			if n--; n == 0 {
				break
			}
		}
		from--
	}
	return text[from:]
}

// VNC carries a session between the client and QEMU; nothing listens for it.
func (s *vmService) VNC(stream vmpb.VMService_VNCServer) (err error) {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if first.GetOpen() == nil {
		return errNotOpened
	}
	g, err := s.rt.findMachine(first.GetOpen().GetVm(), "seen: it has no video")
	if err != nil {
		return err
	}
	conn, err := g.vm.VNC(stream.Context())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ignoreClosed(conn.Close())) }()
	defer context.AfterFunc(stream.Context(), func() { _ = conn.Close() })()
	if err := stream.Send(&vmpb.VNCResponse{}); err != nil {
		return err
	}
	s.pumps.Go(func() {
		// However the client's side ends, the session does.
		_ = pump(conn, func() ([]byte, error) {
			m, err := stream.Recv()
			return m.GetData(), err
		})
		_ = conn.Close()
	})
	buf := make([]byte, vncChunk)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if err := stream.Send(&vmpb.VNCResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return ignoreClosed(err)
		}
	}
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// findVM finds the pod that a reference means: its ID or that of one of its containers, or the beginning of either, or NAMESPACE/NAME.
func (rt *Runtime) findVM(ref string) (*pod, error) {
	if ref == "" {
		return nil, fmt.Errorf("vm is empty; it has to be the ID of a pod or container, or NAMESPACE/NAME of a pod: %w", errdefs.ErrInvalidArgument)
	}
	if namespace, name, ok := strings.Cut(ref, "/"); ok {
		return rt.findNamed(namespace, name)
	}
	p, podErr := rt.podByID(ref)
	c, containerErr := rt.containerByID(ref)
	switch {
	case errdefs.IsInvalidArgument(podErr):
		return nil, podErr
	case errdefs.IsInvalidArgument(containerErr):
		return nil, containerErr
	case podErr == nil && containerErr == nil && c.pod != p:
		return nil, fmt.Errorf("%q is ambiguous: it begins pod %s and container %s; give more of the ID: %w", ref, p.id, c.id, errdefs.ErrInvalidArgument)
	case podErr == nil:
		return p, nil
	case containerErr == nil:
		return c.pod, nil
	}
	return nil, fmt.Errorf("no VM pod, and no container of one, has an ID that begins with %q; `vmruntime vm list` lists them: %w", ref, errdefs.ErrNotFound)
}

// findNamed prefers what is ready: the sandboxes of a pod that came before it keep its name until they are removed.
func (rt *Runtime) findNamed(namespace, name string) (*pod, error) {
	var ready, others []*pod
	for _, p := range rt.allPods() {
		m := p.config().GetMetadata()
		if m.GetNamespace() != namespace || m.GetName() != name {
			continue
		}
		if p.rec.Status().StoppedAt.IsZero() {
			ready = append(ready, p)
		} else {
			others = append(others, p)
		}
	}
	if len(ready) == 0 {
		ready = others
	}
	switch len(ready) {
	case 0:
		return nil, fmt.Errorf("there is no VM pod %s/%s; `vmruntime vm list` lists them: %w", namespace, name, errdefs.ErrNotFound)
	case 1:
		return ready[0], nil
	}
	ids := make([]string, len(ready))
	for i, p := range ready {
		ids[i] = p.id
	}
	slices.Sort(ids)
	return nil, fmt.Errorf("%s/%s is ambiguous: there are the sandboxes %s; give the ID of one: %w", namespace, name, strings.Join(ids, ", "), errdefs.ErrInvalidArgument)
}

// findGuest finds a VM that runs, or is paused.
func (rt *Runtime) findGuest(ref string) (*guest, error) {
	p, err := rt.findVM(ref)
	if err != nil {
		return nil, err
	}
	g := p.currentGuest()
	if g == nil || !g.alive() {
		return nil, fmt.Errorf("pod %s has no VM at the moment; a machine has one while its container runs: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	return g, nil
}

// findMachine is findGuest for what only a machine can be.
func (rt *Runtime) findMachine(ref, what string) (*guest, error) {
	g, err := rt.findGuest(ref)
	if err == nil && g.machine == nil {
		return nil, fmt.Errorf("pod %s is one of containers, and no machine; its guest cannot be %s: %w", g.pod.id, what, errdefs.ErrFailedPrecondition)
	}
	return g, err
}
