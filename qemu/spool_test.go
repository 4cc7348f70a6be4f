package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// pattern is a stream whose every eight bytes tell where they are.
func pattern(offset, n int64) []byte {
	first := offset / 8 * 8
	var b []byte
	for at := first; at < offset+n; at += 8 {
		b = binary.BigEndian.AppendUint64(b, uint64(at)*0x9e3779b97f4a7c15)
	}
	return b[offset-first:][:n]
}

// testFIFO makes a FIFO and holds it open as QEMU does.
func testFIFO(t *testing.T) (path string, fifo *os.File) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "console.out")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo, err := openFIFO(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = fifo.Close() })
	return path, fifo
}

func openSpool(t *testing.T, fifo, path string) *Spool {
	t.Helper()
	s, err := OpenSpool(fifo, path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func feed(t *testing.T, f *os.File, data []byte) {
	t.Helper()
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
}

// take reads n bytes from offset and holds that they are the pattern's.
func take(t *testing.T, s *Spool, offset, n int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for n > 0 {
		c, err := s.Next(ctx, offset)
		if err != nil {
			t.Fatalf("at %d, %d to come: %v", offset, n, err)
		}
		if len(c.Data) > maxChunk || c.Offset != offset || !bytes.Equal(c.Data, pattern(offset, int64(len(c.Data)))) {
			t.Fatalf("at %d: %d bytes of %d that are others", offset, len(c.Data), c.Offset)
		}
		offset, n = offset+int64(len(c.Data)), n-int64(len(c.Data))
	}
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestSpool(t *testing.T) {
	fifo, w := testFIFO(t)
	path := filepath.Join(t.TempDir(), "spool")
	s := openSpool(t, fifo, path)
	begin := time.Now()
	feed(t, w, pattern(0, 10))
	c, err := s.Next(t.Context(), 0)
	if err != nil || c.Time.Before(begin) || c.Time.After(time.Now()) {
		t.Errorf("%v, %v", c, err)
	}
	feed(t, w, pattern(10, 40000))
	take(t, s, 0, 40010)
	take(t, s, 5, 40005) // another reader
	if _, err := s.Next(t.Context(), 40011); !errdefs.IsOutOfRange(err) {
		t.Errorf("behind the end: %v", err)
	}
	if err := s.Forget(40011); !errdefs.IsOutOfRange(err) {
		t.Errorf("forget what is not there: %v", err)
	}
	before := blocks(t, path)
	for _, offset := range []int64{1, 30000, 20000} {
		if err := s.Forget(offset); err != nil {
			t.Fatal(err)
		}
	}
	if from, to := s.Bounds(); from != 30000 || to != 40010 {
		t.Errorf("keeps %d to %d", from, to)
	}
	if after := blocks(t, path); after > before-28<<10 {
		t.Errorf("the file has %d bytes before, %d after 30000 are forgotten", before, after)
	}
	if c, err := s.Next(t.Context(), 7); err != nil || c.Offset != 30000 {
		t.Errorf("what is forgotten: %d, %v", c.Offset, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Next(ctx, 40010); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nothing new: %v", err)
	}
	// The next daemon goes on, with what came while none was there.
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	if _, err := s.Next(t.Context(), 30000); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	feed(t, w, pattern(40010, 990))
	s = openSpool(t, fifo, path)
	if from, _ := s.Bounds(); from > 30000 || from <= 30000-spoolBlock {
		t.Errorf("begins at %d", from)
	}
	take(t, s, 30000, 11000)
}

func TestSpoolFinish(t *testing.T) {
	fifo, w := testFIFO(t)
	s := openSpool(t, fifo, filepath.Join(t.TempDir(), "spool"))
	feed(t, w, pattern(0, 60000))
	within(t, 5*time.Second, "all is moved", func() bool { _, end := s.Bounds(); return end == 60000 })
	ended := make(chan error, 1)
	go func() {
		_, err := s.Next(t.Context(), 60000)
		ended <- err
	}()
	s.Finish()
	s.Finish()
	if err := <-ended; !errors.Is(err, io.EOF) {
		t.Errorf("who waited gets %v", err)
	}
	take(t, s, 0, 60000)
	if _, err := s.Next(t.Context(), 60000); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

// A flood is bounded: what nobody reads makes the writer wait, and is all there in the end.
func TestSpoolIsBounded(t *testing.T) {
	fifo, w := testFIFO(t)
	path := filepath.Join(t.TempDir(), "spool")
	s := openSpool(t, fifo, path)
	const total = 3 * spoolBytes
	written := make(chan error, 1)
	go func() {
		_, err := w.Write(pattern(0, total))
		written <- err
	}()
	var last int64
	within(t, 20*time.Second, "the spool is full", func() bool {
		_, end := s.Bounds()
		still := end == last && end >= spoolBytes
		last = end
		return still
	})
	if last >= spoolBytes+fifoBytes {
		t.Errorf("keeps %d bytes", last)
	}
	select {
	case err := <-written:
		t.Fatalf("the writer does not wait: %v", err)
	default:
	}
	for offset := int64(0); offset < total; offset += maxChunk {
		take(t, s, offset, maxChunk)
		if err := s.Forget(offset + maxChunk); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
	if got := blocks(t, path); got > 2*spoolBlock {
		t.Errorf("the file still has %d bytes", got)
	}
}

func TestSpoolFinishesWhenFull(t *testing.T) {
	fifo, w := testFIFO(t)
	s := openSpool(t, fifo, filepath.Join(t.TempDir(), "spool"))
	go func() { _, _ = w.Write(pattern(0, spoolBytes)) }()
	within(t, 20*time.Second, "the spool is full", func() bool { _, end := s.Bounds(); return end == spoolBytes })
	feed(t, w, pattern(spoolBytes, 5000))
	s.Finish()
	take(t, s, 0, spoolBytes+5000)
	if _, err := s.Next(t.Context(), spoolBytes+5000); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

// What does not fit on the disk waits in the pipe.
func TestSpoolOnAFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatal(err)
	}
	fifo, w := testFIFO(t)
	s := openSpool(t, fifo, filepath.Join(dir, "spool"))
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), unix.Unmount(dir, unix.MNT_DETACH)); err != nil {
			t.Error(err)
		}
	})
	feed(t, w, pattern(0, 40000))
	within(t, 5*time.Second, "the disk is full", func() bool { _, end := s.Bounds(); return end == 16<<10 })
	for _, step := range []struct{ from, to int64 }{{0, 16 << 10}, {16 << 10, 32 << 10}, {32 << 10, 40000}} {
		take(t, s, step.from, step.to-step.from)
		if err := s.Forget(step.to); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSpoolTakesOnlyAFIFO(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, fifo := range []string{file, filepath.Join(dir, "none")} {
		if s, err := OpenSpool(fifo, filepath.Join(dir, "spool"), slog.Default()); err == nil {
			t.Errorf("%s: %v", fifo, s.Close())
		}
	}
}

// spoolMain is a daemon that spools, and copies what it reads to another file before it forgets it. It is killed.
func spoolMain(fifo, path, copied string) error {
	s, err := OpenSpool(fifo, path, slog.Default())
	if err != nil {
		return err
	}
	out, err := os.OpenFile(copied, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	info, err := out.Stat()
	if err != nil {
		return err
	}
	offset := info.Size()
	for {
		c, err := s.Next(context.Background(), offset)
		if err != nil {
			return err
		}
		if c.Offset != offset {
			return fmt.Errorf("want %d, got %d", offset, c.Offset)
		}
		if _, err := out.WriteAt(c.Data, offset); err != nil {
			return err
		}
		offset += int64(len(c.Data))
		if err := s.Forget(offset); err != nil {
			return err
		}
	}
}

func TestSpoolIsKilled(t *testing.T) {
	fifo, w := testFIFO(t)
	dir := t.TempDir()
	path, copied := filepath.Join(dir, "spool"), filepath.Join(dir, "copied")
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	stop := make(chan struct{})
	written := make(chan int64, 1)
	go func() {
		var total int64
		for {
			n := rand.Int64N(9000) + 1
			select {
			case <-stop:
				written <- total
				return
			default:
			}
			if _, err := w.Write(pattern(total, n)); err != nil {
				t.Error(err)
			}
			total += n
		}
	}()
	var killed int
	for range rounds {
		cmd := exec.Command("/proc/self/exe", "spool", fifo, path, copied)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		start, _ := os.Stat(copied)
		within(t, 10*time.Second, "the spooler works", func() bool {
			info, err := os.Stat(copied)
			return err == nil && (start == nil || info.Size() > start.Size())
		})
		time.Sleep(rand.N(15 * time.Millisecond)) // any moment
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if !cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled() {
			t.Fatalf("the spooler ended: %s", stderr.String())
		}
		killed++
	}
	close(stop)
	// The writer may wait for room, so the last one reads before it is asked how much there is.
	s := openSpool(t, fifo, path)
	info, err := os.Stat(copied)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(copied)
	if err != nil || !bytes.Equal(data, pattern(0, info.Size())) {
		t.Fatalf("%d bytes were copied and are others, %v", len(data), err)
	}
	var total int64
	within(t, 10*time.Second, "the writer ends", func() bool {
		select {
		case total = <-written:
			return true
		default:
			return false
		}
	})
	take(t, s, info.Size(), total-info.Size())
	s.Finish()
	if _, err := s.Next(t.Context(), total); !errors.Is(err, io.EOF) {
		t.Errorf("behind the %d bytes: %v", total, err)
	}
	t.Logf("%d kills, %d bytes", killed, total)
}
