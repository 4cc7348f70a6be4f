// Package vm_test drives the CRI over its socket against a real node: containerd, vmruntime, QEMU and real
// images. One node serves all tests; each test has pods of its own and ends with a check that nothing of them
// is left on the node.
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

// theBed is the node of all tests, or why there is none.
var (
	theBed *bed
	noBed  string
)

// bed is the node with clients of its CRI.
type bed struct {
	*node.Node
	rt    runtimeapi.RuntimeServiceClient
	image runtimeapi.ImageServiceClient
	conn  *grpc.ClientConn
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	if noBed = reasonForNoBed(); noBed == "" {
		dir, err := os.MkdirTemp("", "v-") // short: sockets lie below it
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		b, err := newBed(dir)
		if err != nil {
			fmt.Fprintln(os.Stderr, "the node does not come up:", errors.Join(err, os.RemoveAll(dir)))
			return 1
		}
		theBed = b
		defer func() {
			if err := errors.Join(b.conn.Close(), b.Stop(), noRaces(b.LogFile("vmruntime")), os.RemoveAll(dir), goleak.Find()); err != nil {
				fmt.Fprintln(os.Stderr, "after all tests:", err)
				code = 1
			}
		}()
	}
	return m.Run()
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

func newBed(dir string) (*bed, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	guest, err := filepath.Abs(guestDir)
	if err != nil {
		return nil, err
	}
	binary := filepath.Join(dir, "bin", "vmruntime")
	args := append([]string{"build", "-o", binary}, raceFlags...)
	if out, err := exec.CommandContext(ctx, "go", append(args, "../../cmd/vmruntime")...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build vmruntime: %w\n%s", err, out)
	}
	n, err := node.Start(ctx, node.Options{Root: dir, VMRuntime: binary, GuestDir: guest, LogLevel: "debug"})
	if err != nil {
		return nil, err
	}
	b := &bed{Node: n}
	b.conn, err = grpc.NewClient("unix://"+n.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}))
	if err != nil {
		return nil, errors.Join(err, n.Stop())
	}
	b.rt, b.image = runtimeapi.NewRuntimeServiceClient(b.conn), runtimeapi.NewImageServiceClient(b.conn)
	for _, ref := range []string{images.Busybox, images.Nginx, images.Server, images.Users, images.Layers} {
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

// testTimeout bounds one test: an emulated guest boots in seconds, on a busy machine in tens of them.
const testTimeout = 3 * time.Minute

// use gives a test the node. When the test has ended, nothing of its pods may be left.
func use(t *testing.T) (context.Context, *bed) {
	t.Helper()
	if noBed != "" {
		t.Skip(noBed)
	}
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	from := fileSize(theBed.LogFile("vmruntime"))
	t.Cleanup(func() {
		cancel()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if leaks, err := theBed.Leaks(ctx); err != nil || len(leaks) > 0 {
			t.Errorf("left on the node after the test: %v\n  %s", err, strings.Join(leaks, "\n  "))
		}
		if t.Failed() {
			t.Logf("vmruntime's log:\n%s", logFrom(theBed.LogFile("vmruntime"), from))
		}
	})
	return ctx, theBed
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
