package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/vmruntime/vmruntime/test/images"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A pod on plain containerd comes, answers, shows as a resource, and goes
// without a trace; so does the node.
func TestContainerdNode(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root and the built tools: run by make test")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes namespaces and mounts")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	n, err := Start(ctx, Options{})
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	defer func() {
		if !stopped {
			if err := n.Stop(); err != nil {
				t.Error(err)
			}
		}
	}()
	pod := runPod(ctx, t, n)
	if used, err := n.inUse(ctx); err != nil || !slicesContain(used, pod) {
		t.Errorf("with a pod that runs, in use are %q, %v, want lines with %s", used, err, pod)
	}
	if _, err := n.Crictl(ctx, "rmp", "--force", pod); err != nil {
		t.Error(err)
	}
	if leaks, err := n.Leaks(ctx); err != nil || len(leaks) > 0 {
		t.Errorf("Leaks = %q, %v, want none", leaks, err)
	}
	stopped = true
	if err := n.Stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(n.Root); !os.IsNotExist(err) {
		t.Errorf("the node's directory %s is left: %v", n.Root, err)
	}
}

func runPod(ctx context.Context, t *testing.T, n *Node) string {
	t.Helper()
	dir := t.TempDir()
	pod := writeJSON(t, dir, "pod.json", `{"metadata":{"name":"p","namespace":"default","uid":"u1"},"log_directory":"`+dir+`","linux":{"cgroup_parent":"`+n.CgroupParent()+`"}}`)
	container := writeJSON(t, dir, "container.json",
		`{"metadata":{"name":"c"},"image":{"image":"`+images.Busybox+`"},"command":["sleep","1000"],"log_path":"c.log","linux":{}}`)
	if _, err := n.Crictl(ctx, "pull", images.Busybox); err != nil {
		t.Fatal(err)
	}
	id, err := n.Crictl(ctx, "runp", pod)
	if err != nil {
		t.Fatal(err)
	}
	id = strings.TrimSpace(id)
	cid, err := n.Crictl(ctx, "create", id, container, pod)
	if err != nil {
		t.Fatal(err)
	}
	cid = strings.TrimSpace(cid)
	if _, err := n.Crictl(ctx, "start", cid); err != nil {
		t.Fatal(err)
	}
	out, err := n.Crictl(ctx, "exec", cid, "echo", "works")
	if err != nil || out != "works\n" {
		t.Fatalf("crictl exec printed %q, %v, want works", out, err)
	}
	return id
}

func writeJSON(t *testing.T, dir, name, text string) string {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func slicesContain(lines []string, part string) bool {
	for _, l := range lines {
		if strings.Contains(l, part) {
			return true
		}
	}
	return false
}
