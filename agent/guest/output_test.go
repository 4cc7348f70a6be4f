package guest

import (
	"bytes"
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if isFakeCrun(os.Args) {
		runFakeCrun()
	}
	// os/signal keeps its own goroutine once it has been used.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("os/signal.signal_recv"), goleak.IgnoreTopFunction("os/signal.loop"))
}

func pipeInto(t *testing.T, o *output, id int) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	o.attach(id, r)
	return w
}

func readFrom(t *testing.T, o *output, offsets [2]uint64) (string, bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	chunks, eof, err := o.read(ctx, offsets, offsets, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, c := range chunks {
		text.Write(c.Data)
	}
	return text.String(), eof
}

func TestOutputIsKeptUntilAcknowledged(t *testing.T) {
	o := newOutput(0)
	w := pipeInto(t, o, stdout)
	o.attach(stderr, nil)
	if _, err := w.WriteString("hello"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got, _ := readFrom(t, o, [2]uint64{0, 0}); got != "hello" {
			t.Errorf("got %q", got)
		}
	}
	if got, _ := readFrom(t, o, [2]uint64{3, 0}); got != "lo" {
		t.Errorf("got %q", got)
	}
	if _, _, err := o.read(t.Context(), [2]uint64{2, 0}, [2]uint64{}, 10); !errdefs.IsOutOfRange(err) {
		t.Errorf("read of forgotten bytes: %v", err)
	}
	if _, _, err := o.read(t.Context(), [2]uint64{6, 0}, [2]uint64{}, 10); !errdefs.IsOutOfRange(err) {
		t.Errorf("read beyond the end: %v", err)
	}
	_ = w.Close()
	if got, eof := readFrom(t, o, [2]uint64{5, 0}); got != "" || !eof {
		t.Errorf("got %q, eof %v", got, eof)
	}
	o.stop()
}

// The beginning of a line is read, but only safe when the line is in the log: until then a new reader gets it again.
func TestOutputThatIsReadButNotAcknowledgedIsKept(t *testing.T) {
	o := newOutput(0)
	w := pipeInto(t, o, stdout)
	o.attach(stderr, nil)
	write := func(text string) {
		t.Helper()
		if _, err := w.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	read := func(at, safe uint64) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		chunks, _, err := o.read(ctx, [2]uint64{at, 0}, [2]uint64{safe, 0}, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		var text strings.Builder
		for _, c := range chunks {
			text.Write(c.Data)
		}
		return text.String()
	}
	write("line\nbegin")
	if got := read(0, 0); got != "line\nbegin" {
		t.Errorf("got %q", got)
	}
	write("ning")
	if got := read(10, 5); got != "ning" {
		t.Errorf("got %q, want only what was not read", got)
	}
	if got := read(5, 5); got != "beginning" {
		t.Errorf("got %q, want all that was not acknowledged", got)
	}
	if _, _, err := o.read(t.Context(), [2]uint64{5, 0}, [2]uint64{6, 0}, 10); !errdefs.IsInvalidArgument(err) {
		t.Errorf("acknowledged beyond what was read: %v", err)
	}
	_ = w.Close()
	o.stop()
}

// Chunks that were read and are not acknowledged lie wholly before what is read next.
func TestOutputBehindManyUnacknowledgedChunks(t *testing.T) {
	o := newOutput(0)
	for i := range 10 {
		o.add(i%2, []byte("0123456789"))
	}
	chunks, _, err := o.read(t.Context(), [2]uint64{30, 41}, [2]uint64{0, 5}, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range chunks {
		got = append(got, string(c.Data))
	}
	if want := []string{"0123456789", "0123456789", "123456789"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestOutputBlocksTheWriter(t *testing.T) {
	const bound = 8 << 10
	o := newOutput(bound)
	w := pipeInto(t, o, stdout)
	o.attach(stderr, nil)
	data := bytes.Repeat([]byte("0123456789abcdef"), 64<<10) // 1 MiB
	done := make(chan error, 1)
	go func() {
		_, err := w.Write(data)
		_ = w.Close()
		done <- err
	}()
	var got bytes.Buffer
	for {
		o.mu.Lock()
		held := o.streams[stdout].held
		o.mu.Unlock()
		if held > bound+chunkCost {
			t.Fatalf("%d bytes are held, the bound is %d", held, bound)
		}
		text, eof := readFrom(t, o, [2]uint64{uint64(got.Len()), 0})
		got.WriteString(text)
		if eof {
			break
		}
	}
	if err := <-done; err != nil || !bytes.Equal(got.Bytes(), data) {
		t.Errorf("%d of %d bytes, write %v", got.Len(), len(data), err)
	}
	o.stop()
}

func TestOutputKeepsOrderOfStreams(t *testing.T) {
	o := newOutput(0)
	for i := range 6 {
		o.add(i%2, []byte{byte('a' + i)})
	}
	if got, _ := readFrom(t, o, [2]uint64{}); got != "abcdef" {
		t.Errorf("got %q", got)
	}
	if got, _ := readFrom(t, o, [2]uint64{1, 2}); got != "cef" {
		t.Errorf("got %q", got)
	}
}

func TestOutputOfManyTinyWritesIsBounded(t *testing.T) {
	o := newOutput(64 << 10)
	for range 100 {
		o.add(stdout, []byte("x"))
		o.add(stderr, []byte("y"))
	}
	if held := o.streams[stdout].held; held < 100*chunkCost {
		t.Errorf("%d bytes are held for 100 chunks", held)
	}
	o2 := newOutput(64 << 10)
	for range 100 {
		o2.add(stdout, []byte("x"))
	}
	if n := len(o2.chunks); n > 10 {
		t.Errorf("%d chunks of bytes that came at once", n)
	}
}

// Children that keep the pipe open do not hold back the end.
func TestOutputEndsAfterSilence(t *testing.T) {
	o := newOutput(0)
	w := pipeInto(t, o, stdout)
	defer w.Close()
	o.attach(stderr, nil)
	if _, err := w.WriteString("last"); err != nil {
		t.Fatal(err)
	}
	o.finish()
	begin := time.Now()
	if got, _ := readFrom(t, o, [2]uint64{}); got != "last" {
		t.Errorf("got %q", got)
	}
	if _, eof := readFrom(t, o, [2]uint64{4, 0}); !eof || time.Since(begin) > 3*drainIdle {
		t.Errorf("eof %v after %s", eof, time.Since(begin))
	}
	o.stop()
}

// What a process has left is given whole, however late it is taken.
func TestOutputWaitsForItsReader(t *testing.T) {
	o := newOutput(1 << 10)
	o.drain = 100 * time.Millisecond
	w := pipeInto(t, o, stdout)
	o.attach(stderr, nil)
	wrote := strings.Repeat("x", 16<<10) // fits the pipe
	if _, err := w.WriteString(wrote); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	o.finish()
	time.Sleep(3 * o.drain)
	var got strings.Builder
	for eof := false; !eof; {
		var text string
		text, eof = readFrom(t, o, [2]uint64{uint64(got.Len()), 0})
		got.WriteString(text)
	}
	if got.String() != wrote {
		t.Errorf("%d bytes were given, want all %d", got.Len(), len(wrote))
	}
	o.stop()
}

// A child that writes on and on does not hold back the end for ever.
func TestOutputEndsInAFlood(t *testing.T) {
	o := newOutput(1 << 20)
	o.drain = time.Hour
	w := pipeInto(t, o, stdout)
	o.attach(stderr, nil)
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		for data := make([]byte, 64<<10); ; {
			if _, err := w.Write(data); err != nil { // nobody reads it any more
				return
			}
		}
	}()
	o.finish()
	var got uint64
	for eof := false; !eof && got < 2*drainBytes; {
		var text string
		text, eof = readFrom(t, o, [2]uint64{got, 0})
		got += uint64(len(text))
	}
	if got < drainBytes || got >= 2*drainBytes {
		t.Errorf("the stream ended after %d bytes, want about %d", got, drainBytes)
	}
	<-flooded
	o.stop()
}

func TestOutputWaitsForTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput(0)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begin := time.Now()
		chunks, eof, err := o.read(ctx, [2]uint64{}, [2]uint64{}, 10)
		if len(chunks) > 0 || eof || err != nil || time.Since(begin) != time.Minute {
			t.Errorf("%v %v %v after %s", chunks, eof, err, time.Since(begin))
		}
	})
}
