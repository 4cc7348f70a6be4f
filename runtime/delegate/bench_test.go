package delegate

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// BenchmarkDelegated measures a call through the server against the same call straight to the stand-in for
// containerd, in turns, and reports the difference of the medians.
func BenchmarkDelegated(b *testing.B) {
	n := newNode(b)
	n.containerd.containers = nil
	for i := range 100 {
		n.containerd.containers = append(n.containerd.containers, id(fmt.Sprintf("d%02d", i)))
	}
	straight := must(b)(Dial(n.socket))
	b.Cleanup(func() { _ = straight.Close() })
	for _, bench := range []struct {
		name string
		call func(context.Context, *grpc.ClientConn) error
	}{
		{"Version", func(ctx context.Context, c *grpc.ClientConn) error {
			_, err := runtimeapi.NewRuntimeServiceClient(c).Version(ctx, &runtimeapi.VersionRequest{})
			return err
		}},
		{"ContainerStatus", func(ctx context.Context, c *grpc.ClientConn) error {
			_, err := runtimeapi.NewRuntimeServiceClient(c).ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id("d00")})
			return err
		}},
		{"ListContainers100", func(ctx context.Context, c *grpc.ClientConn) error {
			_, err := runtimeapi.NewRuntimeServiceClient(c).ListContainers(ctx, &runtimeapi.ListContainersRequest{})
			return err
		}},
		{"ImageStatus", func(ctx context.Context, c *grpc.ClientConn) error {
			_, err := runtimeapi.NewImageServiceClient(c).ImageStatus(ctx, &runtimeapi.ImageStatusRequest{})
			return err
		}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			ctx := context.Background()
			var through, direct []time.Duration
			for b.Loop() {
				for conn, took := range map[*grpc.ClientConn]*[]time.Duration{n.conn: &through, straight: &direct} {
					start := time.Now()
					if err := bench.call(ctx, conn); err != nil {
						b.Fatal(err)
					}
					*took = append(*took, time.Since(start))
				}
			}
			slices.Sort(through)
			slices.Sort(direct)
			for name, q := range map[string]float64{"added-p50-us": 0.5, "added-p99-us": 0.99} {
				at := func(d []time.Duration) float64 {
					return float64(d[int(q*float64(len(d)-1))]) / float64(time.Microsecond)
				}
				b.ReportMetric(at(through)-at(direct), name)
			}
			n.containerd.takeCalls()
			n.vm.takeCalls()
		})
	}
}
