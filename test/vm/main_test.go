// Package vm_test drives the CRI over its socket against a real node: containerd, vmruntime, QEMU and real
// images. Each test has one of two nodes to itself and pods of its own, and ends with a check that nothing of them
// is left on the node; a node serves one test after the other.
package vm_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
	"github.com/vmruntime/vmruntime/test/node"
)

// guestDir is what make guest builds.
const guestDir = "../../out/guest"

// maxBeds is how many tests run side by side: an emulated guest keeps about one processor busy.
const maxBeds = 2

// beds are the nodes of all tests; noBed is why there is none.
var (
	beds  pool
	noBed string
)

// pool has the nodes, each made for the first test that finds none free.
type pool struct {
	dir  string // of the program
	free chan *bed

	mu   sync.Mutex
	made []*bed
}

// bed is the node with clients of its CRI.
type bed struct {
	*node.Node
	program string // vmruntime
	rt      runtimeapi.RuntimeServiceClient
	image   runtimeapi.ImageServiceClient
	conn    *grpc.ClientConn
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	if noBed = reasonForNoBed(); noBed == "" {
		dir, err := os.MkdirTemp("", "vm-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		if err := build(filepath.Join(dir, "vmruntime")); err != nil {
			fmt.Fprintln(os.Stderr, errors.Join(err, os.RemoveAll(dir)))
			return 1
		}
		beds.dir, beds.free = dir, make(chan *bed, maxBeds)
		defer func() {
			if err := errors.Join(beds.close(), os.RemoveAll(dir), goleak.Find()); err != nil {
				fmt.Fprintln(os.Stderr, "after all tests:", err)
				code = 1
			}
		}()
	}
	return m.Run()
}

func build(program string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	args := append([]string{"build", "-o", program}, raceFlags...)
	if out, err := exec.CommandContext(ctx, "go", append(args, "../../cmd/vmruntime")...).CombinedOutput(); err != nil {
		return fmt.Errorf("build vmruntime: %w\n%s", err, out)
	}
	return nil
}

// take waits for a node that no test uses.
func (p *pool) take(t *testing.T) *bed {
	t.Helper()
	select {
	case b := <-p.free:
		return b
	default:
	}
	if b := p.another(t); b != nil {
		return b
	}
	return <-p.free
}

// another makes a node, unless there are enough.
func (p *pool) another(t *testing.T) *bed {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.made) == maxBeds {
		return nil
	}
	dir, err := os.MkdirTemp("", "v-") // short: sockets lie below it; its name is the node's
	if err != nil {
		t.Fatal(err)
	}
	b, err := newBed(dir, filepath.Join(p.dir, "vmruntime"))
	if err != nil {
		t.Fatal("the node does not come up: ", errors.Join(err, os.RemoveAll(dir)))
	}
	p.made = append(p.made, b)
	return b
}

func (p *pool) close() error {
	var errs []error
	for _, b := range p.made {
		errs = append(errs, b.conn.Close(), b.Stop(), noRaces(b.LogFile("vmruntime")), os.RemoveAll(b.Root))
	}
	return errors.Join(errs...)
}

// noRaces fails when the race detector has found something in the daemon.
func noRaces(log string) error {
	_, races, found := strings.Cut(readFile(log), "WARNING: DATA RACE")
	if found {
		return fmt.Errorf("the daemon has a data race:%s", races[:min(len(races), 8000)])
	}
	return nil
}

// reasonForNoBed says what a node needs that is not here.
func reasonForNoBed() string {
	switch {
	case testing.Short():
		return "boots VMs: run by make test"
	case os.Geteuid() != 0:
		return "needs root: a node makes namespaces, mounts and cgroups"
	}
	if _, err := os.Stat(filepath.Join(guestDir, "manifest.json")); err != nil {
		return "needs the guest: run make guest"
	}
	return ""
}

func newBed(dir, program string) (*bed, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	guest, err := filepath.Abs(guestDir)
	if err != nil {
		return nil, err
	}
	n, err := node.Start(ctx, node.Options{Root: dir, VMRuntime: program, GuestDir: guest, LogLevel: "debug"})
	if err != nil {
		return nil, err
	}
	b := &bed{Node: n, program: program}
	b.conn, err = grpc.NewClient("unix://"+n.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}))
	if err != nil {
		return nil, errors.Join(err, n.Stop())
	}
	b.rt, b.image = runtimeapi.NewRuntimeServiceClient(b.conn), runtimeapi.NewImageServiceClient(b.conn)
	for _, ref := range []string{images.Busybox, images.Nginx, images.Server, images.Users, images.Layers, images.Pages} {
		if err := b.pull(ctx, ref); err != nil {
			return nil, errors.Join(err, b.conn.Close(), n.Stop())
		}
	}
	return b, nil
}

func (b *bed) pull(ctx context.Context, ref string) error {
	_, err := b.image.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		return fmt.Errorf("pull %s: %w", ref, err)
	}
	return nil
}

// testTimeout bounds one test: an emulated guest boots in seconds, on a busy machine in tens of them, and another test runs beside it.
const testTimeout = 5 * time.Minute

// use gives a test a node, side by side with tests on other nodes. When the test has ended, nothing of its pods may be left.
func use(t *testing.T) (context.Context, *bed) {
	t.Helper()
	if noBed != "" {
		t.Skip(noBed)
	}
	t.Parallel()
	return another(t)
}

// another is use for a test's second node. Only one test may want it: two would wait for one another.
func another(t *testing.T) (context.Context, *bed) {
	t.Helper()
	b := beds.take(t)
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	from := fileSize(b.LogFile("vmruntime"))
	t.Cleanup(func() {
		cancel()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if leaks, err := b.Leaks(ctx); err != nil || len(leaks) > 0 {
			t.Errorf("left on the node after the test: %v\n  %s", err, strings.Join(leaks, "\n  "))
		}
		if t.Failed() {
			t.Logf("vmruntime's log:\n%s", logFrom(b.LogFile("vmruntime"), from))
		}
		beds.free <- b
	})
	return ctx, b
}

func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// logFrom is what a log got since it had the size, without the lines of each CRI call.
func logFrom(path string, size int64) string {
	data, err := os.ReadFile(path)
	if err != nil || int64(len(data)) < size {
		return fmt.Sprint(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(data[size:])) {
		if !strings.Contains(line, "level=DEBUG") {
			out.WriteString(line)
		}
	}
	return out.String()
}
