package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/digitalocean/go-qemu/qmp"
)

func TestEndsAreToldApart(t *testing.T) {
	for name, tc := range map[string]struct {
		code   *sector
		change func(*Machine)
		want   string
	}{
		"poweroff": {bootSector().print("up\n").poweroff(), func(*Machine) {}, ReasonPoweroff},
		"panic":    {bootSector().print("up\n").panics(), func(m *Machine) { m.PanicDevice = true }, ReasonPanic},
		"watchdog": {bootSector().print("up\n").starve(), func(m *Machine) { m.Watchdog = WatchdogPoweroff }, ReasonWatchdog},
		"reset":    {bootSector().print("up\n").reset(), func(m *Machine) { m.ResetInPlace = false }, ReasonReset},
	} {
		machine := func(t *testing.T) Machine {
			m := bootable(t, tc.code)
			tc.change(&m)
			return m
		}
		t.Run(name, func(t *testing.T) {
			v := start(t, spec(t, machine(t)))
			c := follow(t, v.Record())
			c.until("up\n")
			checkReason(t, v, tc.want)
			c.Finish()
			if _, err := c.Next(t.Context(), 3); !errors.Is(err, io.EOF) {
				t.Errorf("after the console: %v", err)
			}
		})
		t.Run(name+" while the daemon is away", func(t *testing.T) {
			v := start(t, spec(t, machine(t)))
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
			within(t, 20*time.Second, "the guest has ended", func() bool { return !running(t, v.Record()) })
			again, err := Attach(t.Context(), v.Record())
			if err != nil {
				t.Fatal(err)
			}
			want := tc.want
			if want == ReasonReset {
				want = ReasonUnseen
			}
			checkReason(t, again, want)
			follow(t, v.Record()).until("up\n") // nothing of it is lost, as the VM is not closed
			if err := again.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func checkReason(t *testing.T, v *VM, want string) {
	t.Helper()
	select {
	case <-v.Done():
	case <-time.After(20 * time.Second):
		state, err := v.State(t.Context())
		t.Fatalf("the VM does not end: %s, %v", state, err)
	}
	var exit *ExitError
	if !errors.As(v.Err(), &exit) || !exit.Guest || exit.Reason != want || !errors.Is(v.Err(), ErrGuestFailed) {
		t.Errorf("the VM ends with %v, want %s", v.Err(), want)
	}
}

func TestQEMUDeathIsNoGuestEnd(t *testing.T) {
	v := start(t, spec(t, bootable(t, bootSector().print("up\n").halt())))
	c := follow(t, v.Record())
	c.until("up\n")
	if err := KillRecorded(t.Context(), v.Record()); err != nil {
		t.Fatal(err)
	}
	<-v.Done()
	var exit *ExitError
	if !errors.As(v.Err(), &exit) || exit.Guest || !errdefs.IsUnavailable(v.Err()) {
		t.Errorf("error %v", v.Err())
	}
}

// resets is a guest that resets once and then stays.
func resets() *sector {
	return bootSector().firstBoot((&sector{}).print("second\n").halt()).print("first\n").reset()
}

func TestResetInPlace(t *testing.T) {
	for name, tc := range map[string]struct {
		code     *sector
		watchdog string
	}{
		"guest":    {resets(), ""},
		"watchdog": {bootSector().firstBoot((&sector{}).print("second\n").halt()).print("first\n").starve(), WatchdogReset},
	} {
		t.Run(name, func(t *testing.T) {
			m := bootable(t, tc.code)
			m.Watchdog = tc.watchdog
			v := start(t, spec(t, m))
			events, err := v.Events(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			c := follow(t, v.Record())
			c.until("first\n")
			wait(t, events, "RESET")
			c.until("second\n")
			// And by the host.
			if err := v.Reset(t.Context()); err != nil {
				t.Fatal(err)
			}
			wait(t, events, "RESET")
			c.until("second\n")
			if err := v.Quit(t.Context()); err != nil || v.Err() != nil {
				t.Errorf("Quit: %v, %v", err, v.Err())
			}
		})
	}
}

func wait(t *testing.T, events <-chan qmp.Event, name string) {
	t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		select {
		case e := <-events:
			if e.Event == name {
				return
			}
		case <-timeout:
			t.Fatalf("no event %s", name)
		}
	}
}

func TestPauseAndResume(t *testing.T) {
	v := start(t, spec(t, bootable(t, bootSector().print("ready\n").echo())))
	c := follow(t, v.Record())
	c.until("ready\n")
	for range 2 {
		if err := v.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if state, err := v.State(t.Context()); err != nil || state != "paused" {
		t.Errorf("%s, %v", state, err)
	}
	if again, err := Attach(t.Context(), reattach(t, v)); err != nil {
		t.Fatal(err)
	} else {
		t.Cleanup(func() { _ = again.Close() })
		v = again
	}
	in, _, _ := v.Record().ConsoleFIFOs()
	if err := os.WriteFile(in, []byte("hello\n"), 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if chunk, err := c.Next(ctx, 6); err == nil {
		t.Errorf("a paused guest says %q", chunk.Data)
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.until("hello\n")
	if err := v.NMI(t.Context()); err != nil {
		t.Error(err)
	}
	for what, err := range map[string]error{
		"screenshot": second(v.Screenshot(t.Context())), "VNC": second(v.VNC(t.Context())), "console": second(v.Console(t.Context())),
	} {
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s of a machine without: %v", what, err)
		}
	}
	if _, err := v.MemoryStats(t.Context()); err == nil {
		t.Error("memory statistics of a machine without balloon")
	}
}

func second[T any](_ T, err error) error { return err }

func reattach(t *testing.T, v *VM) Record {
	t.Helper()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	return v.Record()
}

func TestScreen(t *testing.T) {
	for _, video := range []string{VideoStd, VideoVirtio} {
		t.Run(video, func(t *testing.T) {
			m := bootable(t, bootSector().print("up\n").halt())
			m.Video = video
			v := start(t, spec(t, m))
			follow(t, v.Record()).until("up\n")
			before := qemuDescriptors(t, v)
			for range 3 {
				data, err := v.Screenshot(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				screen, err := png.Decode(bytes.NewReader(data))
				if err != nil {
					t.Fatal(err)
				}
				// The BIOS has written its name in grey on black.
				colors := make(map[string]int)
				for y := range screen.Bounds().Dy() {
					for x := range screen.Bounds().Dx() {
						colors[fmt.Sprint(screen.At(x, y))]++
					}
				}
				if b := screen.Bounds(); b.Dx() != 720 || b.Dy() != 400 || len(colors) < 2 || colors["{0 0 0 255}"] < 720*200 {
					t.Errorf("%v, %v", b, colors)
				}
			}
			for range 3 { // the sessions are one after the other and at once
				for range 2 {
					conn, err := v.VNC(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
						t.Fatal(err)
					}
					hello := make([]byte, 12)
					if _, err := io.ReadFull(conn, hello); err != nil || !strings.HasPrefix(string(hello), "RFB 003.008") {
						t.Errorf("VNC says %q, %v", hello, err)
					}
					t.Cleanup(func() { _ = conn.Close() })
				}
			}
			if after := qemuDescriptors(t, v); after > before+6 {
				t.Errorf("QEMU has %d descriptors before, %d after", before, after)
			}
		})
	}
}

func TestReadPPM(t *testing.T) {
	img, err := readPPM([]byte("P6\n2 1\n255\n\x01\x02\x03\xff\xfe\xfd"))
	if err != nil || img.Bounds().Dx() != 2 {
		t.Fatal(img, err)
	}
	if r, g, b, _ := img.At(1, 0).RGBA(); r>>8 != 0xff || g>>8 != 0xfe || b>>8 != 0xfd {
		t.Errorf("the second pixel is %d %d %d", r>>8, g>>8, b>>8)
	}
	for _, bad := range []string{
		"", "P5\n2 1\n255\n______", "P6\n2 1\n65535\n______", "P6\n2 1\n255\n_____", "P6\n2 1\n255\n_______", "P6\n-1 -1\n255\n___", "P6\n0 0\n255\n",
		"P6\n99999999999 99999999999\n255\n", "P6\n4611686018427387904 4\n255\n",
	} {
		if _, err := readPPM([]byte(bad)); !errdefs.IsUnavailable(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestIgnitionAndUnreadableFiles(t *testing.T) {
	m := bootable(t, bootSector().print("up\n").halt())
	m.Ignition = filepath.Join(t.TempDir(), "config.ign")
	secret := []byte(`{"ignition": {"version": "3.4.0"}}`)
	if err := os.WriteFile(m.Ignition, secret, 0o600); err != nil {
		t.Fatal(err)
	}
	v := start(t, spec(t, m))
	follow(t, v.Record()).until("up\n")
	// QEMU has read it; what it shows is the copy in its own root.
	path := fmt.Sprintf("/proc/%d/root%s", v.Record().PID, ignitionPath)
	data, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(data, secret) {
		t.Errorf("%q, %v", data, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o400 {
		t.Errorf("%v, %v", info, err)
	}
}
