package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// statsInterval is how often the guest tells of its memory, in seconds.
	statsInterval = 5
	// maxScreen bounds a screenshot as QEMU makes it, three bytes a pixel.
	maxScreen = 64 << 20
)

// GuestAgentSocket is the path of the socket that leads to qemu-guest-agent's port, if Machine.GuestAgent. One client at a
// time.
func (v *VM) GuestAgentSocket() string { return filepath.Join(v.rec.RunDir, guestAgentSocket) }

// State is QEMU's run state, such as "running", "paused", "guest-panicked", "watchdog" or "io-error"; see RunState in
// QEMU's QMP reference.
func (v *VM) State(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := v.mon.Execute(ctx, "query-status", nil, &s)
	return s.Status, err
}

// Pause stops the guest's processors. A guest that is paused is no error.
func (v *VM) Pause(ctx context.Context) error { return v.mon.Execute(ctx, "stop", nil, nil) }

// Resume lets a paused guest go on.
func (v *VM) Resume(ctx context.Context) error { return v.mon.Execute(ctx, "cont", nil, nil) }

// Powerdown presses the guest's power button and does not wait.
func (v *VM) Powerdown(ctx context.Context) error {
	return v.mon.Execute(ctx, "system_powerdown", nil, nil)
}

// Reset presses the guest's reset button. QEMU's event RESET tells of it, as of a reset by the guest.
// Without Machine.ResetInPlace it is errdefs.ErrFailedPrecondition.
func (v *VM) Reset(ctx context.Context) error {
	if !v.rec.ResetInPlace {
		return fmt.Errorf("the machine does not reset in place: %w", errdefs.ErrFailedPrecondition)
	}
	return v.mon.Execute(ctx, "system_reset", nil, nil)
}

// NMI sends an interrupt that cannot be masked to all processors, on which guests may be set up to dump their memory. Not
// every architecture has one.
func (v *VM) NMI(ctx context.Context) error { return v.mon.Execute(ctx, "inject-nmi", nil, nil) }

// Accel is what runs the guest: AccelKVM or AccelTCG.
func (v *VM) Accel(ctx context.Context) (string, error) {
	var kvm struct {
		Enabled bool `json:"enabled"`
	}
	if err := v.mon.Execute(ctx, "query-kvm", nil, &kvm); err != nil {
		return "", err
	}
	if kvm.Enabled {
		return AccelKVM, nil
	}
	return AccelTCG, nil
}

// CtrlAltDel presses these keys, at which most operating systems boot again if they are set up to. A machine has a keyboard
// with ArchX86 or with video; without one it is errdefs.ErrFailedPrecondition.
func (v *VM) CtrlAltDel(ctx context.Context) error {
	var target struct {
		Arch string `json:"arch"`
	}
	if err := v.mon.Execute(ctx, "query-target", nil, &target); err != nil {
		return err
	}
	if target.Arch != ArchX86 {
		if err := v.needVideo(ctx); err != nil {
			return fmt.Errorf("no keyboard: %w", err)
		}
	}
	key := func(name string) props { return props{"type": "qcode", "data": name} }
	return v.mon.Execute(ctx, "send-key", props{"keys": []props{key("ctrl"), key("alt"), key("delete")}}, nil)
}

// VNC opens a VNC session (RFB). The caller closes it. Without Machine.Video it is errdefs.ErrFailedPrecondition.
func (v *VM) VNC(ctx context.Context) (net.Conn, error) {
	if err := v.needVideo(ctx); err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	ours, its := os.NewFile(uintptr(fds[0]), "vnc"), os.NewFile(uintptr(fds[1]), "vnc")
	conn, err := net.FileConn(ours)
	err = errors.Join(err, ours.Close())
	if err == nil {
		err = v.addClient(ctx, its)
	}
	if err = errors.Join(err, its.Close()); err != nil {
		if conn != nil {
			err = errors.Join(err, conn.Close())
		}
		return nil, err
	}
	return conn, nil
}

// addClient hands a connection to QEMU's VNC server. A descriptor of the same name is replaced by getfd, so the name lives no
// longer than the lock.
func (v *VM) addClient(ctx context.Context, f *os.File) error {
	v.plug.Lock()
	defer v.plug.Unlock()
	if err := v.mon.Execute(ctx, "getfd", props{"fdname": "vnc"}, nil, f); err != nil {
		return err
	}
	// Whoever may ask the daemon for this may see the screen: there is no password.
	return v.mon.Execute(ctx, "add_client", props{"protocol": "vnc", "fdname": "vnc", "skipauth": true}, nil)
}

func (v *VM) needVideo(ctx context.Context) error {
	there, err := v.hasDevice(ctx, videoID)
	if err == nil && !there {
		err = fmt.Errorf("the machine has no video: %w", errdefs.ErrFailedPrecondition)
	}
	return err
}

// Screenshot is what the guest shows, as PNG. Without Machine.Video it is errdefs.ErrFailedPrecondition.
func (v *VM) Screenshot(ctx context.Context) ([]byte, error) {
	if err := v.needVideo(ctx); err != nil {
		return nil, err
	}
	f, err := screenFile()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := v.screendump(ctx, f); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return nil, err
	}
	screen, err := readPPM(data)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = png.Encode(&out, screen)
	return out.Bytes(), err
}

// screenFile is memory that takes a screenshot, open for writing only: QEMU takes a descriptor out of a set by how
// it is open.
func screenFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("screen", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	mem := os.NewFile(uintptr(fd), "screen")
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	return f, errors.Join(err, mem.Close())
}

func (v *VM) screendump(ctx context.Context, f *os.File) error {
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := v.mon.Execute(ctx, "add-fd", props{"opaque": "screen"}, &set, f); err != nil {
		return err
	}
	err := v.mon.Execute(ctx, "screendump", props{"filename": fmt.Sprintf("/dev/fdset/%d", set.ID)}, nil)
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	return errors.Join(err, v.mon.Execute(undo, "remove-fd", props{"fdset-id": set.ID}, nil))
}

// readPPM reads the one form of PPM that QEMU writes. Not every QEMU can write PNG itself.
func readPPM(data []byte) (image.Image, error) {
	var width, height, most int
	n, err := fmt.Sscanf(string(data[:min(len(data), 64)]), "P6\n%d %d\n%d\n", &width, &height, &most)
	if err != nil || n != 3 || most != 255 || width < 1 || height < 1 || width > maxScreen/3/height {
		return nil, fmt.Errorf("QEMU's screenshot begins with %.20q; it has to be a PPM of one byte a color: %w", data, errdefs.ErrUnavailable)
	}
	header := len(fmt.Sprintf("P6\n%d %d\n%d\n", width, height, most))
	if len(data) != header+3*width*height {
		return nil, fmt.Errorf("QEMU's screenshot has %d bytes; it has to have %d: %w", len(data), header+3*width*height, errdefs.ErrUnavailable)
	}
	img := image.NewRGBA(image.Rect(0, 0, width, height))
	for i, pixel := 0, data[header:]; len(pixel) > 0; i, pixel = i+1, pixel[3:] {
		img.SetRGBA(i%width, i/width, color.RGBA{pixel[0], pixel[1], pixel[2], 255})
	}
	return img, nil
}

// pollStats has the guest tell of its memory from now on.
func (v *VM) pollStats(ctx context.Context) error {
	return v.mon.Execute(ctx, "qom-set", props{"path": "/machine/peripheral/" + balloonID, "property": "guest-stats-polling-interval", "value": statsInterval}, nil)
}

// SetMemory asks the guest's balloon driver to leave the guest this many bytes, of those of Machine.MemoryBytes. It does not wait;
// MemoryStats.Actual tells how far it has come. Without Machine.Balloon it fails.
func (v *VM) SetMemory(ctx context.Context, bytes int64) error {
	if bytes < mib {
		return fmt.Errorf("memory is %d; it has to be at least 1 MiB: %w", bytes, errdefs.ErrInvalidArgument)
	}
	return v.mon.Execute(ctx, "balloon", props{"value": bytes}, nil)
}

// MemoryStats is what the guest's balloon driver tells, in bytes; 0 is what it does not tell.
type MemoryStats struct {
	// Actual is what the guest has: its memory less the balloon. QEMU knows it without the guest.
	Actual int64
	// Updated is when the guest told the rest; zero if it never did: it has no driver, or has just started.
	Updated time.Time
	// Total is the memory that the guest's kernel manages; Free is not used at all; Available can be had without
	// swapping; Caches is file contents that can be dropped.
	Total, Free, Available, Caches int64
	// MajorFaults and MinorFaults are numbers of page faults since boot.
	MajorFaults, MinorFaults int64
}

// MemoryStats is at most some seconds old. Without Machine.Balloon it fails.
func (v *VM) MemoryStats(ctx context.Context) (MemoryStats, error) {
	var balloon struct {
		Actual int64 `json:"actual"`
	}
	if err := v.mon.Execute(ctx, "query-balloon", nil, &balloon); err != nil {
		return MemoryStats{}, err
	}
	var guest struct {
		Updated int64             `json:"last-update"`
		Stats   map[string]uint64 `json:"stats"`
	}
	if err := v.mon.Execute(ctx, "qom-get", props{"path": "/machine/peripheral/" + balloonID, "property": "guest-stats"}, &guest); err != nil {
		return MemoryStats{}, err
	}
	stat := func(name string) int64 { return max(0, int64(guest.Stats["stat-"+name])) } // -1 is unknown
	s := MemoryStats{
		Actual: balloon.Actual,
		Total:  stat("total-memory"), Free: stat("free-memory"), Available: stat("available-memory"), Caches: stat("disk-caches"),
		MajorFaults: stat("major-faults"), MinorFaults: stat("minor-faults"),
	}
	if guest.Updated > 0 {
		s.Updated = time.Unix(guest.Updated, 0)
	}
	return s, nil
}

// DiskStats counts what a guest has done with a disk since QEMU started.
type DiskStats struct {
	ReadBytes, WriteBytes, Reads, Writes, Flushes int64
	ReadTime, WriteTime, FlushTime                time.Duration // in all
}

// DiskStats are the counters of all disks by serial.
func (v *VM) DiskStats(ctx context.Context) (map[string]DiskStats, error) {
	var list []struct {
		Device string `json:"qdev"`
		Stats  struct {
			ReadBytes  int64 `json:"rd_bytes"`
			WriteBytes int64 `json:"wr_bytes"`
			Reads      int64 `json:"rd_operations"`
			Writes     int64 `json:"wr_operations"`
			Flushes    int64 `json:"flush_operations"`
			ReadTime   int64 `json:"rd_total_time_ns"`
			WriteTime  int64 `json:"wr_total_time_ns"`
			FlushTime  int64 `json:"flush_total_time_ns"`
		} `json:"stats"`
	}
	if err := v.mon.Execute(ctx, "query-blockstats", nil, &list); err != nil {
		return nil, err
	}
	disks := make(map[string]DiskStats)
	for _, e := range list {
		// Either the device's ID, or its path, which may go on below the device.
		id, _, _ := strings.Cut(strings.TrimPrefix(e.Device, "/machine/peripheral/"), "/")
		serial, isDisk := strings.CutPrefix(id, diskPrefix)
		if !isDisk {
			continue
		}
		disks[serial] = DiskStats{
			ReadBytes: e.Stats.ReadBytes, WriteBytes: e.Stats.WriteBytes, Reads: e.Stats.Reads, Writes: e.Stats.Writes, Flushes: e.Stats.Flushes,
			ReadTime: time.Duration(e.Stats.ReadTime), WriteTime: time.Duration(e.Stats.WriteTime), FlushTime: time.Duration(e.Stats.FlushTime),
		}
	}
	return disks, nil
}
