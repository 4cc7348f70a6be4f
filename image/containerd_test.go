package image

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"go.uber.org/goleak"

	"github.com/vmruntime/vmruntime/test/tools"
)

func TestMain(m *testing.M) {
	if os.Getenv(crashEnv) != "" {
		os.Exit(crashMain())
	}
	if os.Getenv(populateEnv) != "" {
		os.Exit(populateMain())
	}
	if os.Getenv(convertEnv) != "" {
		ConvertMain()
	}
	goleak.VerifyTestMain(m)
}

// node is a private containerd with its CRI plugin.
type testNode struct {
	t       testing.TB
	dir     string
	command *exec.Cmd
	client  *containerd.Client
}

const containerdConfig = `version = 3
root = %[1]q
state = %[2]q
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
  address = %[3]q
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
`

func startContainerd(t testing.TB) *testNode {
	t.Helper()
	if testing.Short() {
		t.Skip("needs containerd and root: run by make test")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: containerd mounts")
	}
	if _, err := tools.Dir("containerd"); err != nil {
		t.Skipf("needs containerd: %v", err)
	}
	n := &testNode{t: t, dir: t.TempDir()}
	config := fmt.Sprintf(containerdConfig, filepath.Join(n.dir, "root"), filepath.Join(n.dir, "state"), n.address())
	if err := os.WriteFile(filepath.Join(n.dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	t.Cleanup(n.kill)
	client, err := containerd.New(n.address(), containerd.WithDefaultNamespace(defaultNamespace))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	n.client = client
	n.awaitServing()
	return n
}

func (n *testNode) address() string { return filepath.Join(n.dir, "containerd.sock") }

func (n *testNode) start() {
	n.t.Helper()
	dir, err := tools.Dir("containerd")
	if err != nil {
		n.t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(n.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	n.command = exec.Command(filepath.Join(dir, "containerd"), "--config", filepath.Join(n.dir, "config.toml"))
	n.command.Stdout, n.command.Stderr = log, log
	if err := n.command.Start(); err != nil {
		n.t.Fatal(err)
	}
}

// kill ends containerd at once, as a crash would.
func (n *testNode) kill() {
	if n.command == nil {
		return
	}
	n.command.Process.Kill()
	n.command.Wait()
	n.command = nil
}

func (n *testNode) awaitServing() {
	n.t.Helper()
	await(n.t, "containerd serves", func() bool {
		ctx, cancel := context.WithTimeout(n.ctx(), time.Second)
		defer cancel()
		_, err := n.client.ImageService().List(ctx)
		return err == nil
	})
}

func (n *testNode) ctx() context.Context {
	return namespaces.WithNamespace(n.t.Context(), defaultNamespace)
}

// load puts an image into containerd under ref and waits until the CRI plugin has
// stored it under its ID too.
func (n *testNode) load(ref string, img v1.Image, snapshotter string) containerd.Image {
	n.t.Helper()
	tag, err := name.ParseReference(ref)
	if err != nil {
		n.t.Fatal(err)
	}
	var buf bytes.Buffer
	if err := tarball.Write(tag, img, &buf); err != nil {
		n.t.Fatal(err)
	}
	imported, err := n.client.Import(n.ctx(), &buf)
	if err != nil {
		n.t.Fatal(err)
	}
	got, err := n.client.GetImage(n.ctx(), imported[0].Name)
	if err != nil {
		n.t.Fatal(err)
	}
	if snapshotter != "" {
		if err := got.Unpack(n.ctx(), snapshotter); err != nil {
			n.t.Fatal(err)
		}
	}
	id, err := img.ConfigName()
	if err != nil {
		n.t.Fatal(err)
	}
	await(n.t, "the CRI knows image "+id.String(), func() bool {
		_, err := n.client.ImageService().Get(n.ctx(), id.String())
		return err == nil
	})
	return got
}

// await waits until done, which is asked again and again, bounded by 30 seconds.
func await(t testing.TB, what string, done func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not in 30 s: %s", what)
		}
	}
}
