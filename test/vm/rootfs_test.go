package vm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// An image of two layers is what the layers make together, with what the second one removed.
func TestRootFilesystem(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) { c.Image.Image = images.Layers })).ready("ready")
	c.expect("find /data /opaque | sort", "/data\n/data/keep\n/data/replaced\n/opaque\n/opaque/c")
	c.expect("cat /data/replaced; stat -c %a /data/replaced", "new\n600")
	c.sh("echo mine > /data/keep; rm /opaque/c; mkdir /opaque/c")

	// Each container has a layer of its own over the same image.
	other := p.start(with(idle("other"), func(c *runtimeapi.ContainerConfig) { c.Image.Image = images.Layers })).ready("ready")
	other.expect("cat /data/keep /opaque/c", "keep\nc")
	c.expect("cat /data/keep; test -d /opaque/c && echo directory", "mine\ndirectory")
	if disks := p.verboseInfo().Guest.Disks; len(disks) != 1 {
		t.Errorf("the guest has the image disks %v, want one for two containers of one image", disks)
	}
}

// Two pods share one file per image; the scratch disk grows with what is written and goes with the pod.
func TestStorage(t *testing.T) {
	ctx, b := use(t)
	one, two := b.vmPod(ctx, t), b.vmPod(ctx, t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-2" })
	first, second := one.start(idle("c")).ready("ready"), two.start(idle("c")).ready("ready")
	if a, b := first.rootFile(), second.rootFile(); a != b || fileSize(a) == 0 {
		t.Errorf("two pods of one image have the root filesystems %s and %s, want one file", a, b)
	}
	if a, b := one.verboseInfo().UID, two.verboseInfo().UID; a == b || a == 0 {
		t.Errorf("two VMs run as users %d and %d, want two that are not root", a, b)
	}

	used := b.fsUsed(ctx, t)
	first.sh("dd if=/dev/zero of=/big bs=1M count=40 2>/dev/null")
	// The guest writes to the disk when it has to: nothing on it outlives the guest.
	first.until("ImageFsInfo tells of the 40 MiB", func() bool { return b.fsUsed(ctx, t)-used >= 40<<20 })
	if grown := b.fsUsed(ctx, t) - used; grown > 60<<20 {
		t.Errorf("ImageFsInfo grew by %d bytes when 40 MiB were written in a VM", grown)
	}
	if w := first.stats().GetWritableLayer().GetUsedBytes().GetValue(); w < 40<<20 || w > 60<<20 {
		t.Errorf("the writable layer is said to have %d bytes, want 40 MiB and little more", w)
	}
	one.remove()
	if left := b.fsUsed(ctx, t) - used; left > 20<<20 {
		t.Errorf("%d bytes of what the pod wrote are left when it is gone", left)
	}
	second.expect("echo still; cat /etc/passwd | head -c 4", "still\nroot")
}

// With the daemon's directory on a file system of its own, what VMs write is told of that one and not of containerd's.
func TestSplitFilesystem(t *testing.T) {
	ctx, b := use(t)
	root := filepath.Join(b.Root, "split")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=2g"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(root, 0), os.Remove(root)); err != nil {
			t.Error(err)
		}
	})
	b.configured(ctx, t, fmt.Sprintf("root = %q", filepath.Join(b.Root, "vmruntime", "root")), fmt.Sprintf("root = %q", root))
	c := b.vmPod(ctx, t).start(idle("c")).ready("ready")
	used := func() (theirs, ours int64) {
		t.Helper()
		resp, err := b.image.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
		if err != nil {
			t.Fatal(err)
		}
		entries := resp.GetImageFilesystems()
		if len(entries) != 2 || entries[1].GetFsId().GetMountpoint() != root {
			t.Fatalf("ImageFsInfo has the file systems %v; want containerd's, then %s", entries, root)
		}
		return int64(entries[0].GetUsedBytes().GetValue()), int64(entries[1].GetUsedBytes().GetValue())
	}
	theirs, ours := used()
	c.sh("dd if=/dev/zero of=/big bs=1M count=40 2>/dev/null")
	c.until("the 40 MiB are told of", func() bool { _, now := used(); return now-ours >= 40<<20 })
	if now, _ := used(); now != theirs {
		t.Errorf("containerd's file system is said to have %d bytes more when a VM has written", now-theirs)
	}
	layer := c.stats().GetWritableLayer()
	if at := layer.GetFsId().GetMountpoint(); at != root || layer.GetUsedBytes().GetValue() < 40<<20 {
		t.Errorf("the writable layer is %v; want more than 40 MiB in %s", layer, root)
	}
	c.pod.remove()
}

// An image that is removed takes its root filesystem along when no container needs it any more.
func TestImageRemoval(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(of("c", images.Server))
	file := c.rootFile()
	if _, err := b.image.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: images.Server}}); err != nil {
		t.Fatalf("RemoveImage: %v", err)
	}
	t.Cleanup(func() {
		if err := b.pull(ctx, images.Server); err != nil {
			t.Error(err)
		}
	})
	if !c.running() || fileSize(file) == 0 {
		t.Error("the container lost its root filesystem with its image")
	}
	p.remove()
	until(ctx, t, "the root filesystem of the removed image is gone", func() bool { return fileSize(file) == 0 })
}

// rootFile is the file on the node that is the container's root filesystem.
func (c *ctr) rootFile() string {
	c.t.Helper()
	resp, err := c.rt.ContainerStatus(c.ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
	if err != nil {
		c.t.Fatal(err)
	}
	var info struct {
		Disk struct {
			Path string `json:"path"`
		} `json:"disk"`
	}
	if err := json.Unmarshal([]byte(resp.GetInfo()["info"]), &info); err != nil || info.Disk.Path == "" {
		c.t.Fatalf("the verbose status %v names no disk: %v", resp.GetInfo(), err)
	}
	return info.Disk.Path
}

// fsUsed is what images and scratch disks take on the node.
func (b *bed) fsUsed(ctx context.Context, t *testing.T) int64 {
	t.Helper()
	resp, err := b.image.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var sum uint64
	for _, fs := range resp.GetImageFilesystems() {
		sum += fs.GetUsedBytes().GetValue()
	}
	if sum == 0 {
		t.Errorf("ImageFsInfo has no bytes: %v", resp)
	}
	return int64(sum)
}
