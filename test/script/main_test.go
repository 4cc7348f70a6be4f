// Package script runs pods through the real daemon, launcher, network, image store and containerd with only QEMU
// replaced, so that a pod's whole life takes a fraction of a second and every fault can be had at will. The test binary
// is the QEMU: see fakeQEMU. Scripts lie in testdata; script_test.go says which commands they have.
package script

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/pelletier/go-toml/v2"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/node"
)

var update = flag.Bool("update", false, "rewrite the files that scripts compare with")

// testImage is what all containers are of, machineImage what all machines are: it holds a disk, and a kernel, which for the fake
// has its faults: to wait until the test has seen what it does.
const (
	testImage    = "vmruntime.test/tiny:1"
	machineImage = "vmruntime.test/machine:1"
)

// theBed is the node of all tests, or why there is none.
var (
	theBed *bed
	noBed  string
)

func TestMain(m *testing.M) {
	if isFakeQEMU(os.Args) {
		os.Exit(runFakeQEMU(os.Args))
	}
	flag.Parse()
	code := run(m)
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, "after all tests:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int) {
	if noBed = reasonForNoBed(); noBed == "" {
		b, err := newBed()
		if err != nil {
			fmt.Fprintln(os.Stderr, "the node does not come up:", err)
			return 1
		}
		theBed = b
		defer func() {
			if err := b.close(); err != nil {
				fmt.Fprintln(os.Stderr, "after all tests:", err)
				code = 1
			}
		}()
	}
	return m.Run()
}

// reasonForNoBed says what a node needs that is not here.
func reasonForNoBed() string {
	switch {
	case testing.Short():
		return "needs root, containerd and network namespaces: run by make test"
	case os.Geteuid() != 0:
		return "needs root: a node makes namespaces, mounts and cgroups"
	}
	return ""
}

// bed is a node whose QEMU is this test's program.
type bed struct {
	*node.Node
	control *controlServer
	dir     string
	config  []byte // vmruntime's configuration, as the node and we have made it
	records string // the directory of vmruntime's records, a mount
}

// Paths of the bed. The program lies where QEMU's would, and with what it needs beside it.
func (b *bed) qemu() string       { return filepath.Join(b.dir, "qemu", "bin", "qemu-system-x86_64") }
func (b *bed) program() string    { return filepath.Join(b.dir, "vmruntime") }
func (b *bed) guestDir() string   { return filepath.Join(b.dir, "guest") }
func (b *bed) cniDir() string     { return filepath.Join(b.dir, "cni-bin") }
func (b *bed) configFile() string { return filepath.Join(b.Root, "vmruntime", "vmruntime.toml") }

func newBed() (*bed, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "vmr-script-")
	if err != nil {
		return nil, err
	}
	b := &bed{dir: dir}
	if err := b.makeFiles(ctx); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if b.control, err = listenControl(controlPath(b.qemu())); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if err := b.startNode(ctx); err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

func (b *bed) makeFiles(ctx context.Context) error {
	for _, d := range []string{b.dir, b.guestDir(), b.cniDir(), filepath.Dir(b.qemu()), filepath.Dir(controlPath(b.qemu()))} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(d, 0o755); err != nil { // QEMU's own user passes through
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := copyFile(self, b.qemu()); err != nil {
		return err
	}
	manifest := `{"kernel":"kernel","initramfs":"initramfs","cmdline":"console=ttyS0","arch":"x86_64","kernelRelease":"fake"}`
	for name, text := range map[string]string{"manifest.json": manifest, "kernel": "", "initramfs": ""} {
		if err := os.WriteFile(filepath.Join(b.guestDir(), name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", b.program(), "../../cmd/vmruntime")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build vmruntime: %w\n%s", err, out)
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// startNode brings the node up, and vmruntime on it once more with the fake as its QEMU.
func (b *bed) startNode(ctx context.Context) error {
	handler, err := tinyRegistry()
	if err != nil {
		return err
	}
	root, err := os.MkdirTemp("", "vmr-") // short: sockets lie below it
	if err != nil {
		return err
	}
	if err := b.mountRecords(root); err != nil {
		return errors.Join(err, os.RemoveAll(root))
	}
	b.Node, err = node.Start(ctx, node.Options{
		Root: root, Registry: handler,
		VMRuntime: b.program(), GuestDir: b.guestDir(), LogLevel: "debug",
	})
	if err != nil {
		return err
	}
	if err := b.linkPlugins(); err != nil {
		return err
	}
	base, err := os.ReadFile(b.configFile())
	if err != nil {
		return err
	}
	b.config, err = setKeys(base, map[string]map[string]any{
		"qemu": {"binary": b.qemu(), "uid_base": 300000}, "network": {"bin_dirs": []string{b.cniDir()}},
		// The room of a VM is so the same on every node.
		"vm": {"scratch_size": "16MiB", "max_memory": "1GiB", "max_vcpus": 1},
		// The scripts tell all that a VM is asked.
		"template": {"enabled": false},
	})
	if err != nil {
		return err
	}
	if err := b.StopVMRuntime(); err != nil {
		return err
	}
	return b.pull(ctx)
}

// mountRecords makes vmruntime's directory of records a mount of its own, before the node is there, which then takes it as
// a part of itself. See gate.
func (b *bed) mountRecords(root string) error {
	b.records = filepath.Join(root, "vmruntime", "root")
	if err := os.MkdirAll(b.records, 0o711); err != nil {
		return err
	}
	return unix.Mount(b.records, b.records, "", unix.MS_BIND, "")
}

// linkPlugins makes a directory of CNI plugins of which a script may break one.
func (b *bed) linkPlugins() error {
	for _, p := range []string{"bridge", "host-local", "portmap", "bandwidth", "firewall", "loopback"} {
		link := filepath.Join(b.cniDir(), p)
		_ = os.Remove(link) // may be missing, or broken by a script
		if err := os.Symlink(b.Tool("cni", p), link); err != nil {
			return err
		}
	}
	return nil
}

// setKeys sets keys of a TOML file.
func setKeys(text []byte, sections map[string]map[string]any) ([]byte, error) {
	all := make(map[string]map[string]any)
	if err := toml.Unmarshal(text, &all); err != nil {
		return nil, err
	}
	for section, keys := range sections {
		if all[section] == nil {
			all[section] = make(map[string]any)
		}
		maps.Copy(all[section], keys)
	}
	return toml.Marshal(all)
}

func (b *bed) pull(ctx context.Context) error {
	conn, err := grpc.NewClient("unix://"+b.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, image := range []string{testImage, machineImage} {
		_, err = runtimeapi.NewImageServiceClient(conn).PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
		if err != nil {
			return fmt.Errorf("pull %s: %w", image, err)
		}
	}
	return nil
}

func (b *bed) close() error {
	var errs []error
	if b.Node != nil {
		// Lazily: the daemon still has files open there.
		errs = append(errs, unix.Unmount(b.records, unix.MNT_DETACH), b.Stop(), os.RemoveAll(b.Root))
	}
	return errors.Join(append(errs, b.control.close(), os.RemoveAll(b.dir))...)
}

// tinyRegistry serves the images.
func tinyRegistry() (http.Handler, error) {
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	for ref, files := range map[string]map[string]string{
		testImage:    {"etc/passwd": "root:x:0:0::/:/bin/sh\n"},
		machineImage: {"disk/disk.img": strings.Repeat("\x00", 1<<20), "boot/kernel": "step\n"},
	} {
		img, err := imageOf(files)
		if err != nil {
			return nil, err
		}
		tag, err := name.NewTag(ref)
		if err != nil {
			return nil, err
		}
		if err := remote.Write(tag, img, remote.WithTransport(inProcess{h})); err != nil {
			return nil, err
		}
	}
	return h, nil
}

func imageOf(files map[string]string) (v1.Image, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, path := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: path, Mode: 0o644, Size: int64(len(files[path]))}); err != nil {
			return nil, err
		}
		if _, err := w.Write([]byte(files[path])); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, err
	}
	return mutate.ConfigFile(img, &v1.ConfigFile{
		Architecture: "amd64", OS: "linux", Config: v1.Config{Cmd: []string{"wait"}},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: diffIDs(l)},
	})
}

func diffIDs(l v1.Layer) []v1.Hash {
	h, err := l.DiffID()
	if err != nil {
		return nil // ConfigFile then makes an image that cannot be pulled
	}
	return []v1.Hash{h}
}

// inProcess hands requests to a handler in this process.
type inProcess struct{ http.Handler }

func (t inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body == nil {
		r.Body = http.NoBody
	}
	w := httptest.NewRecorder()
	t.ServeHTTP(w, r)
	resp := w.Result()
	resp.Request = r
	return resp, nil
}
