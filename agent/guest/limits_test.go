package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestLimitsFollowMemory(t *testing.T) {
	dir := t.TempDir()
	write := func(name, value string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var l memoryLimits
	follow := func(mib uint64, want map[string]string) {
		t.Helper()
		if err := l.follow(dir, mib<<20); err != nil {
			t.Fatal(err)
		}
		for name, value := range want {
			got, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil || !sameValues(string(got), value) {
				t.Errorf("with %d MiB %s is %q, %v; want %s", mib, name, got, err, value)
			}
		}
	}
	write("kernel/threads-max", "2000")
	write("net/ipv4/tcp_mem", "300\t400\t600")
	write("fs/file-max", "9223372036854775807")
	write("user/max_pid_namespaces", "1000")
	write("kernel/other", "5")
	boot := map[string]string{
		"kernel/threads-max": "2000", "net/ipv4/tcp_mem": "300 400 600", "fs/file-max": "9223372036854775807", "user/max_pid_namespaces": "1000",
		"kernel/other": "5",
	}
	follow(256, boot)
	follow(1024, map[string]string{
		"kernel/threads-max": "8000", "net/ipv4/tcp_mem": "1200 1600 2400", "fs/file-max": "9223372036854775807", "user/max_pid_namespaces": "4000",
		"kernel/other": "5",
	})
	write("user/max_pid_namespaces", "7") // by the pod
	follow(512, map[string]string{"kernel/threads-max": "4000", "net/ipv4/tcp_mem": "600 800 1200", "user/max_pid_namespaces": "7"})
	boot["user/max_pid_namespaces"] = "7"
	follow(256, boot)
}

// Memory that does not come to be used is waited for as long as the call may take, and memory that is used is not.
func TestAwaitMemory(t *testing.T) {
	total, err := totalMemory()
	if err != nil {
		t.Fatal(err)
	}
	l := &memoryLimits{total: total - 64<<20, boot: map[string]string{}}
	if err := l.awaitMemory(t.Context(), 64<<20); err != nil {
		t.Errorf("memory that is used: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := l.awaitMemory(ctx, 1<<50); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("memory that does not come: %v", err)
	}
}
