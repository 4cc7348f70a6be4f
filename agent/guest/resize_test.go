package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// processors makes a directory like the kernel's; the first processor cannot go offline.
func processors(t *testing.T, online ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i, state := range online {
		addProcessor(t, dir, i, state)
	}
	if err := os.MkdirAll(filepath.Join(dir, "cpufreq"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func addProcessor(t *testing.T, dir string, i int, state string) {
	t.Helper()
	cpu := filepath.Join(dir, fmt.Sprintf("cpu%d", i))
	if err := os.MkdirAll(cpu, 0o755); err != nil {
		t.Fatal(err)
	}
	if i == 0 {
		return
	}
	file := filepath.Join(t.TempDir(), "online")
	if err := errors.Join(os.WriteFile(file, []byte(state+"\n"), 0o644), os.Rename(file, filepath.Join(cpu, "online"))); err != nil {
		t.Fatal(err)
	}
}

func onlineOf(t *testing.T, dir string, n int) (states string) {
	t.Helper()
	for i := 1; i < n; i++ {
		data, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("cpu%d/online", i)))
		if err != nil {
			t.Fatal(err)
		}
		states += string(data[:1])
	}
	return states
}

func TestSetProcessors(t *testing.T) {
	dir := processors(t, "1", "1", "0", "0")
	for n, want := range map[int]string{1: "000", 2: "100", 4: "111"} {
		if err := setProcessors(t.Context(), dir, n); err != nil {
			t.Fatal(err)
		}
		if got := onlineOf(t, dir, 4); got != want {
			t.Errorf("with %d processors the others are %s, want %s", n, got, want)
		}
	}
}

func TestProcessorsAreAwaited(t *testing.T) {
	dir := processors(t, "1")
	done := make(chan error, 1)
	go func() { done <- setProcessors(t.Context(), dir, 2) }()
	addProcessor(t, dir, 1, "0")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := onlineOf(t, dir, 2); got != "1" {
		t.Errorf("the processor that has come is %s, want 1", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := setProcessors(ctx, dir, 3); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a processor that does not come: %v", err)
	}
}
