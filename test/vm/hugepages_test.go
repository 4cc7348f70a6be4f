package vm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// The kernel's pools of huge pages.
const (
	hugePool = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
	gibPool  = "/sys/kernel/mm/hugepages/hugepages-1048576kB/"
)

// hugePagesTaken is held by the test that has changed how many huge pages the node has.
var hugePagesTaken sync.Mutex

// reserveHugePages gives a pool of the node so many more pages for the time of the test, and tells how many are free.
func reserveHugePages(t *testing.T, pool string, want int) int {
	t.Helper()
	hugePagesTaken.Lock()
	t.Cleanup(hugePagesTaken.Unlock)
	number := pool + "nr_hugepages"
	before := numberIn(t, number)
	if err := os.WriteFile(number, fmt.Appendf(nil, "%d", before+want), 0o644); err != nil {
		t.Skipf("needs huge pages: %v", err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(number, fmt.Appendf(nil, "%d", before), 0o644); err != nil {
			t.Error(err)
		}
	})
	free := freeHugePages(t, pool)
	if free < want {
		t.Skipf("needs %d free pages in %s, the kernel finds %d", want, pool, free)
	}
	return free
}

func freeHugePages(t *testing.T, pool string) int {
	t.Helper()
	return numberIn(t, pool+"free_hugepages")
}

func numberIn(t *testing.T, file string) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(readFile(file), &n); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return n
}

// hugeLimits are limits as the kubelet gives them: every size of the node is named.
func hugeLimits(mib uint64) *runtimeapi.LinuxContainerResources {
	return &runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: mib << 20}, {PageSize: "1GB"}}}
}

// withPages is a container that can map huge pages, has a limit of so many MiB of them, and mounts.
func withPages(name string, mib uint64, mounts ...*runtimeapi.Mount) *runtimeapi.ContainerConfig {
	return with(idle(name), func(c *runtimeapi.ContainerConfig) {
		c.Image.Image, c.Linux.Resources, c.Mounts = images.Pages, hugeLimits(mib), mounts
	})
}

// mountHuge mounts what the kubelet mounts for an emptyDir of huge pages.
func mountHuge(t *testing.T, dir, page string) error {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("nodev", dir, "hugetlbfs", 0, "pagesize="+page); err != nil {
		return err
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return nil
}

// A pod's huge pages are the node's, beside its memory; each container has as many as its limit says.
func TestHugePages(t *testing.T) {
	ctx, b := use(t)
	had := reserveHugePages(t, hugePool, 32)
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Resources = hugeLimits(64)
		cfg.Linux.Resources.MemoryLimitInBytes = 128 << 20
	})
	if got := had - freeHugePages(t, hugePool); got != 32 {
		t.Errorf("the VM has %d huge pages of the node, want 32", got)
	}
	c := p.start(withPages("c", 16)).ready("ready")
	c.expect("awk '/^HugePages_(Total|Free)/ {print $2}' /proc/meminfo", "32\n32")
	var total, taken int
	if _, err := fmt.Sscan(c.sh("awk '/^(MemTotal|Hugetlb):/ {print $2}' /proc/meminfo"), &total, &taken); err != nil || total-taken < 128<<10 {
		t.Errorf("the guest has %d KiB, %d of them huge pages (%v); what is left is less than the pod's memory limit", total, taken, err)
	}
	c.expect("/pages 16777216", "8 pages")
	c.expect("! /pages 18874368 2>/dev/null", "")
	none := p.start(withPages("none", 0)).ready("ready")
	none.expect("! /pages 2097152 2>/dev/null", "")

	for _, limit := range []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 66 << 20}, {PageSize: "1GB", Limit: gib}} {
		cfg := withPages("more"+limit.GetPageSize(), 0)
		cfg.Linux.Resources.HugepageLimits = []*runtimeapi.HugepageLimit{limit}
		_, err := p.tryCreate(cfg)
		refused(t, err, codes.InvalidArgument, "hugepage_limits "+limit.GetPageSize(), fmt.Sprint(limit.GetLimit()))
	}
	update := func(mib uint64) error {
		_, err := b.rt.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: none.id, Linux: hugeLimits(mib)})
		return err
	}
	refused(t, update(66), codes.InvalidArgument, "69206016", "at most 67108864")
	if err := update(64); err != nil {
		t.Errorf("UpdateContainerResources: %v", err)
	}
	none.expect("/pages 67108864", "32 pages")
	refused(t, p.tryCheckpoint(t.TempDir(), c, none), codes.FailedPrecondition, "huge pages")

	// A guest that takes the place of one that ended has them too.
	if err := syscall.Kill(p.verboseInfo().Guest.QEMU.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.wait()
	p.start(withPages("again", 64)).ready("ready").expect("/pages 67108864", "32 pages")
	p.remove()
	p.until("the pages are given back", func() bool { return freeHugePages(t, hugePool) == had })
}

// An emptyDir of huge pages is one of the guest's, which the pod's containers share.
func TestHugePageVolumes(t *testing.T) {
	ctx, b := use(t)
	reserveHugePages(t, hugePool, 8)
	pods := filepath.Join(t.TempDir(), "pods", "uid", "volumes", "kubernetes.io~empty-dir")
	volume, sub := filepath.Join(pods, "huge"), filepath.Join(pods, "huge", "sub")
	if err := mountHuge(t, volume, "2M"); err != nil {
		t.Skipf("needs hugetlbfs: %v", err)
	}
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(volume, 0, 1234); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(volume, 0o775|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	p := b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.Resources = hugeLimits(16) })
	one := p.start(withPages("one", 16, mount("/huge", volume))).ready("ready")
	two := p.start(withPages("two", 0, mount("/other", volume))).ready("ready")
	one.expect("stat -c '%a %u %g' /huge; awk '$2 == \"/huge\" {print $3}' /proc/mounts", "2775 0 1234\nhugetlbfs")
	one.expect("/pages 8388608 /huge/file", "4 pages")
	two.expect("stat -c %s /other/file; head -c 1 /other/file", "8388608\np")
	one.expect("! /pages 33554432 /huge/more 2>/dev/null", "")
	if _, err := os.Stat(filepath.Join(volume, "file")); !os.IsNotExist(err) {
		t.Errorf("the container's file is on the node: %v", err)
	}
	_, err := p.tryCreate(withPages("sub", 0, mount("/huge", sub)))
	refused(t, err, codes.InvalidArgument, sub, "subPath")
	if large := filepath.Join(pods, "large"); mountHuge(t, large, "1G") == nil {
		_, err := p.tryCreate(withPages("large", 0, mount("/huge", large)))
		refused(t, err, codes.InvalidArgument, large, "HugePages-2Mi")
	}
	plain := b.vmPod(ctx, t)
	_, err = plain.tryCreate(withPages("volume", 0, mount("/huge", volume)))
	refused(t, err, codes.InvalidArgument, volume, "hugepages-2Mi")
	_, err = plain.tryCreate(withPages("pages", 2))
	refused(t, err, codes.InvalidArgument, "2097152", "at most 0", b.CgroupParent())
}

// A sandbox whose huge pages cannot be had is refused, and leaves nothing.
func TestHugePagesRefused(t *testing.T) {
	ctx, b := use(t)
	try := func(l *runtimeapi.HugepageLimit) error {
		cfg := b.podConfig(t)
		cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{l}}
		_, err := b.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handlerVM})
		return err
	}
	refused(t, try(&runtimeapi.HugepageLimit{PageSize: "2 bananas", Limit: 2 << 20}), codes.InvalidArgument, "2 bananas", "like 2MB")
	refused(t, try(&runtimeapi.HugepageLimit{PageSize: "2MB", Limit: 3 << 20}), codes.InvalidArgument, "3145728", "multiple")
	refused(t, try(&runtimeapi.HugepageLimit{PageSize: "2MB", Limit: 1 << 45}), codes.ResourceExhausted, "free huge pages", "needs 16777216")
}
