package vm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// logLine is a line of a CRI log: time, stream, tag (P: to be continued, F: the end) and content.
type logLine struct {
	at           time.Time
	stream, tag  string
	content, raw string
}

// readLog reads whole log files, the oldest first, and fails on a line that is not a CRI log's.
func readLog(t *testing.T, files ...string) []logLine {
	t.Helper()
	var out []logLine
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for raw := range strings.Lines(string(data)) {
			fields := strings.SplitN(strings.TrimSuffix(raw, "\n"), " ", 4)
			if len(fields) != 4 || !strings.HasSuffix(raw, "\n") {
				t.Fatalf("%s: %q is not a line of a CRI log", file, raw)
			}
			at, err := time.Parse(time.RFC3339Nano, fields[0])
			if err != nil || (fields[1] != "stdout" && fields[1] != "stderr") || (fields[2] != "P" && fields[2] != "F") {
				t.Fatalf("%s: %q is not a line of a CRI log: %v", file, raw, err)
			}
			out = append(out, logLine{at: at, stream: fields[1], tag: fields[2], content: fields[3], raw: raw})
		}
	}
	return out
}

// streamText puts the lines of a stream together again.
func streamText(t *testing.T, stream string, files ...string) string {
	t.Helper()
	var out strings.Builder
	for _, l := range readLog(t, files...) {
		if l.stream == stream {
			out.WriteString(l.content)
			if l.tag == "F" {
				out.WriteByte('\n')
			}
		}
	}
	return out.String()
}

func TestLogFormat(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	before := time.Now().Add(-time.Second)
	// 40000 bytes without a line feed, then both streams, an empty line, and an end without a line feed.
	long := "i=0; while [ $i -lt 4000 ]; do printf 0123456789; i=$((i+1)); done; echo"
	c := p.start(shell("c", long+`; echo out; echo err >&2; echo; printf tail`))
	c.wait()
	lines := readLog(t, c.logFile())
	if got := streamText(t, "stderr", c.logFile()); got != "err\n" {
		t.Errorf("stderr %q, want %q", got, "err\n")
	}
	want := strings.Repeat("0123456789", 4000) + "\nout\n\ntail"
	if got := strings.TrimSuffix(c.text(), "\n"); got != want {
		t.Errorf("stdout has %d bytes, want %d; its end is %q", len(got), len(want), got[max(0, len(got)-40):])
	}
	partial := 0
	for i, l := range lines {
		if l.tag == "P" {
			partial++
		}
		if l.at.Before(before) || l.at.After(time.Now().Add(time.Second)) {
			t.Errorf("line %d has the time %s, which is not now", i, l.at)
		}
	}
	if partial < 2 {
		t.Errorf("%d partial lines for a line of 40000 bytes, want at least 2", partial)
	}
	info, err := os.Stat(c.logFile())
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("the log's mode is %v (%v), want 0640", info.Mode(), err)
	}
}

// Rotation as the kubelet does it, renaming and reopening, while the container writes as fast as it can.
func TestLogRotation(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	const lines = 20000
	c := p.start(shell("c", fmt.Sprintf("seq 1 %d; echo end >&2", lines)))
	var files []string
	for i := range 5 {
		c.until("there is more to rotate", func() bool { return fileSize(c.logFile()) > 1000 || !c.running() })
		rotated := filepath.Join(c.pod.cfg.GetLogDirectory(), fmt.Sprintf("rotated-%d", i))
		if err := os.Rename(c.logFile(), rotated); err != nil {
			t.Fatal(err)
		}
		files = append(files, rotated)
		_, err := b.rt.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: c.id})
		if err != nil {
			if c.running() {
				t.Fatalf("ReopenContainerLog: %v", err)
			}
			break
		}
	}
	if len(files) < 2 {
		t.Errorf("the log was rotated %d times while it was written, want at least 2", len(files))
	}
	c.wait()
	if fileSize(c.logFile()) > 0 {
		files = append(files, c.logFile())
	}
	sameLines(t, streamText(t, "stdout", files...), lines)
	if got := streamText(t, "stderr", files...); got != "end\n" {
		t.Errorf("stderr %q, want %q", got, "end\n")
	}
	if _, err := b.rt.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: c.id}); err == nil {
		t.Error("ReopenContainerLog of an exited container succeeds, want an error")
	}
}

func (c *ctr) running() bool {
	return c.status().GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING
}

// sameLines fails unless the text is the numbers from 1 to last, each on its line, once and in order.
func sameLines(t *testing.T, text string, last int) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i, l := range lines {
		if l != fmt.Sprint(i+1) {
			t.Errorf("line %d of the log is %q: lost, doubled or out of order", i+1, l)
			return
		}
	}
	if len(lines) != last {
		t.Errorf("the log has %d lines, want %d", len(lines), last)
	}
}
