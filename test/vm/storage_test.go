package vm_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// backing makes a sparse file.
func backing(t *testing.T, size int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "backing")
	writeFile(t, file, "")
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	return file
}

// loop makes a block device of a file, and gives it by a symbolic link, as the kubelet names block volumes.
func loop(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Skipf("needs loop devices: losetup: %v, %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v, %s: somebody holds it", device, err, out)
		}
	})
	link := filepath.Join(t.TempDir(), "pvc")
	if err := os.Symlink(device, link); err != nil {
		t.Fatal(err)
	}
	return link
}

// volumes gives a machine block volumes: device, devicePath, device, devicePath...
func volumes(attempt uint32, pairs ...string) *runtimeapi.ContainerConfig {
	return with(of("machine", images.Tiny), func(c *runtimeapi.ContainerConfig) {
		c.Metadata.Attempt, c.LogPath = attempt, fmt.Sprintf("machine-%d.log", attempt)
		for i := 0; i < len(pairs); i += 2 {
			c.Devices = append(c.Devices, &runtimeapi.Device{HostPath: pairs[i], ContainerPath: pairs[i+1], Permissions: "mrw"})
		}
	})
}

// exported shows a disk of QEMU's as a file of the node, by FUSE; the first arguments describe the node "disk".
func exported(ctx context.Context, t *testing.T, command func(context.Context, string, ...string) *exec.Cmd, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("qemu-storage-daemon"); err != nil {
		t.Skip("needs qemu-storage-daemon, of Debian's qemu-system-common")
	}
	point := filepath.Join(t.TempDir(), "exported")
	writeFile(t, point, "")
	cmd := command(ctx, "qemu-storage-daemon", append(args, "--export", "type=fuse,id=fuse,node-name=disk,writable=on,mountpoint="+point)...)
	started(t, cmd)
	until(ctx, t, "the disk is exported", func() bool {
		mounted, err := mountinfo.Mounted(point)
		return err == nil && mounted
	})
	return point
}

// started runs a program until the test ends.
func started(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)                                  // by its ID
		late := time.AfterFunc(3*time.Second, func() { _ = cmd.Process.Kill() }) // a target with a session does not obey
		defer late.Stop()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s wrote:\n%s", cmd.Path, out.String())
		}
	})
}

// slow is a block device that takes 20 MB of writes in a second.
func slow(ctx context.Context, t *testing.T, size int64) string {
	t.Helper()
	return loop(t, exported(ctx, t, exec.CommandContext,
		"--object", "throttle-group,id=slow,x-bps-write=20000000",
		"--blockdev", "driver=file,node-name=file,discard=unmap,filename="+backing(t, size),
		"--blockdev", "driver=throttle,throttle-group=slow,node-name=disk,file=file"))
}

const gib = 1 << 30

// Block volumes are disks with a serial that stays, in the pod's order; what is read-only is so on the node.
func TestMachineBlockVolumes(t *testing.T) {
	ctx, b := use(t)
	file, sealed := backing(t, 64<<20), backing(t, 32<<20)
	if err := os.WriteFile(sealed, bytes.Repeat([]byte("sealed\n\n"), 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	data, ro := loop(t, file), loop(t, sealed)
	p := b.machinePod(ctx, t, images.Tiny)
	config := func(attempt uint32) *runtimeapi.ContainerConfig {
		return with(volumes(attempt, data, "/dev/data", ro, "/dev/sealed"), func(c *runtimeapi.ContainerConfig) { c.Devices[1].Permissions = "r" })
	}
	c := p.start(config(0)).up(1)
	serial := func(path string) string {
		sum := sha256.Sum256([]byte(path))
		return fmt.Sprintf("vol-%x", sum[:8])
	}
	disks := []string{"disk=vdb sectors=131072 mode=rw serial=" + serial("/dev/data"), "disk=vdc sectors=65536 mode=ro serial=" + serial("/dev/sealed")}
	c.says("blocks | cut -d ' ' -f 1-4", disks...)
	c.sh("echo 0123456789abcdef | dd of=/dev/vdb seek=100 2>/dev/null && sync")
	resp, err := c.execSync(30, "sh", "-c", "blockdev --setrw /dev/vdc; echo overwritten | dd of=/dev/vdc bs=512 conv=fsync,sync")
	if err != nil || resp.GetExitCode() == 0 {
		t.Errorf("a read-only volume takes writes: %v, %v", resp, err)
	}
	c.stop(30)
	again := p.start(config(1)).up(1)
	again.says("blocks | cut -d ' ' -f 1-4", disks...)
	again.expect("dd if=/dev/vdb skip=100 count=1 2>/dev/null | head -c 16", "0123456789abcdef")
	if content := readFile(sealed); !strings.HasPrefix(content, "sealed\n\n") || strings.Contains(content, "overwritten") {
		t.Error("the read-only volume was written to on the node")
	}
	again.remove()
	_, err = p.tryCreate(volumes(2, data, "/dev/x", ro, "/dev/x"))
	refused(t, err, codes.InvalidArgument, "/dev/x", "twice")
}

// Block volumes are devices of containers: shared by those of a pod that name them and by no other, read-only if the pod says so, and as they
// were in the next guest.
func TestBlockVolumes(t *testing.T) {
	ctx, b := use(t)
	file, sealed := backing(t, 64<<20), backing(t, 32<<20)
	if err := os.WriteFile(sealed, bytes.Repeat([]byte("sealed\n\n"), 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	data, ro := loop(t, file), loop(t, sealed)
	if err := os.Chmod(data, 0o640); err != nil { // of the device that the link leads to
		t.Fatal(err)
	}
	config := func(name string) *runtimeapi.ContainerConfig {
		return with(idle(name), func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: data, ContainerPath: "/dev/data", Permissions: "mrw"}, {HostPath: ro, ContainerPath: "/dev/sealed", Permissions: "r"}}
		})
	}
	p := b.vmPod(ctx, t)
	c := p.start(config("c"))
	c.expect("stat -c '%F %a' /dev/data", "block special file 640")
	const numbers = "$((0x$(stat -c %t /dev/data))) $((0x$(stat -c %T /dev/data)))"
	c.expect("set -- "+numbers+"; cat /sys/dev/block/$1:$2/size", "131072")
	c.sh("echo 0123456789abcdef | dd of=/dev/data bs=512 seek=100 conv=sync,fsync 2>/dev/null")
	c.expect("dd if=/dev/sealed bs=7 count=1 2>/dev/null", "sealed")
	resp, err := c.execSync(30, "sh", "-c", "blockdev --setrw /dev/sealed; echo overwritten | dd of=/dev/sealed bs=512 conv=fsync,sync")
	if err != nil || resp.GetExitCode() == 0 {
		t.Errorf("a read-only volume takes writes: %v, %v", resp, err)
	}
	const read = "dd if=/dev/data bs=512 skip=100 count=1 2>/dev/null | head -c 16"
	beside := p.start(config("beside"))
	beside.expect(read, "0123456789abcdef")
	made := strings.TrimSpace(c.sh("echo " + numbers))
	other := p.start(idle("other"))
	other.expect("mknod /tmp/data b "+made+" && dd if=/tmp/data of=/dev/null bs=512 count=1 2>&1 | grep -o 'Operation not permitted'", "Operation not permitted")
	other.remove()
	refused(t, p.tryCheckpoint(t.TempDir(), c, beside), codes.FailedPrecondition, "block volumes")

	kill(t, p.verboseInfo().Guest.QEMU.PID)
	c.wait()
	p.start(with(config("c"), func(c *runtimeapi.ContainerConfig) { c.Metadata.Attempt = 1 })).expect(read, "0123456789abcdef")
	if content := readFile(sealed); !strings.HasPrefix(content, "sealed\n\n") || strings.Contains(content, "overwritten") {
		t.Error("the read-only volume was written to on the node")
	}
	_, err = p.tryCreate(with(config("users"), func(c *runtimeapi.ContainerConfig) { c.Devices[1].ContainerPath = "/dev/data" }))
	refused(t, err, codes.InvalidArgument, "/dev/data", "twice")
}

// A block volume at / is a root disk that stays: over containers, pods, and images without a disk; what is there is not overwritten.
func TestMachinePersistentRoot(t *testing.T) {
	ctx, b := use(t)
	file := backing(t, gib)
	root := loop(t, file)
	p := b.machinePod(ctx, t, images.Tiny)
	c := p.start(volumes(0, root, "/")).up(1)
	c.says("blocks | cut -d ' ' -f 1-3", "disk=vda sectors=2097152 mode=rw")
	c.sh("echo kept >/var/marker && sync")
	c.stop(30)
	p.start(volumes(1, root, "/")).up(2).expect("cat /var/marker", "kept")
	p.remove()
	q := b.machinePod(ctx, t, images.Tiny, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-next" })
	d := q.start(with(volumes(0, root, "/"), func(c *runtimeapi.ContainerConfig) { c.Image.Image = images.Busybox })).up(3)
	d.expect("cat /var/marker", "kept")
	d.sh("echo synced >/var/marker && sync")

	// The node is rebooted: no processes, an empty run directory. The pod gives way to the next, which boots the disk.
	info := q.verboseInfo()
	b.crash(t)
	kill(t, info.Guest.QEMU.PID)
	emptyState(t, filepath.Join(b.Root, "run", "s"))
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	if s := q.status(); s.GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("the sandbox is %s after a reboot, want NOTREADY", s.GetState())
	}
	if s := d.wait(); s.GetExitCode() != 137 || s.GetReason() != "VMLost" {
		t.Errorf("the machine is %v after a reboot, want exited with 137 and VMLost", s)
	}
	q.remove()
	r := b.machinePod(ctx, t, images.Tiny, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-after" })
	r.start(volumes(0, root, "/")).up(4).expect("cat /var/marker", "synced")
}

// What a device has that we did not write is not overwritten, and one that is too small is refused in words.
func TestMachineRootRefused(t *testing.T) {
	ctx, b := use(t)
	foreign := backing(t, gib)
	writeFile(t, foreign, "somebody's data")
	if err := os.Truncate(foreign, gib); err != nil {
		t.Fatal(err)
	}
	p := b.machinePod(ctx, t, images.Tiny)
	c := p.start(volumes(0, loop(t, foreign), "/")) // it runs, and finds nothing to boot
	c.stop(0)
	data := make([]byte, 4096)
	f, err := os.Open(foreign)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(data, 0); err != nil || !strings.HasPrefix(string(data), "somebody's data\x00") {
		t.Errorf("a device of somebody's was written to: %q, %v", data[:32], err)
	}
	small := p.create(volumes(1, loop(t, backing(t, 16<<20)), "/"))
	if err := small.tryStart(); err == nil || !strings.Contains(err.Error(), "16777216 bytes") || !strings.Contains(err.Error(), "at least") {
		t.Errorf("a device that is too small: %v, want its size and what is needed", err)
	}
}

// Writing the image to the device goes on after the request that began it, and is done again when the daemon is killed under it.
func TestMachinePopulate(t *testing.T) {
	ctx, b := use(t)
	root := slow(ctx, t, gib)
	p := b.machinePod(ctx, t, images.Tiny)
	start := func(c *ctr) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := b.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.id})
		return err
	}
	first := p.create(volumes(0, root, "/"))
	if err := start(first); err == nil {
		t.Fatal("the slow device is populated within a second: the test shows nothing")
	}
	if s := first.wait(); !strings.Contains(s.GetMessage(), "it goes on at") {
		t.Errorf("the container that waited in vain says %q, want that the work goes on", s.GetMessage())
	}
	b.crash(t)
	if head := readHead(t, root); !strings.HasPrefix(head, "vmruntime: ") {
		t.Fatalf("the device begins with %q, want the marker of one that is not whole", head)
	}
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	second := p.create(volumes(1, root, "/"))
	if err := start(second); err == nil {
		t.Error("the device was not populated anew")
	}
	second.wait()
	second.remove() // takes nothing from the work that goes on
	from := fileSize(b.LogFile("vmruntime"))
	p.start(volumes(2, root, "/")).up(1)
	if n := strings.Count(logFrom(b.LogFile("vmruntime"), from), "populating device"); n > 0 {
		t.Errorf("the third container began anew, it was to wait for what went on")
	}

	// A pod that is stopped does not leave its work behind.
	other := slow(ctx, t, gib)
	q := b.machinePod(ctx, t, images.Tiny, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Metadata.Name += "-other" })
	if err := start(q.create(volumes(0, other, "/"))); err == nil {
		t.Error("the other device is populated within a second")
	}
	q.remove()
	if head := readHead(t, other); !strings.HasPrefix(head, "vmruntime: ") {
		t.Errorf("the device of the stopped pod begins with %q, want the marker", head)
	}
}

func readHead(t *testing.T, device string) string {
	t.Helper()
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head := make([]byte, 64)
	if _, err := f.ReadAt(head, 0); err != nil {
		t.Fatal(err)
	}
	return string(head)
}

// Directories of the node in a machine: one share, each volume a directory in it, changes seen at once.
func TestMachineShares(t *testing.T) {
	ctx, b := use(t)
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "ro", "file"), "node\n")
	writeFile(t, filepath.Join(dir, "rw", "file"), "node\n")
	volume := filepath.Join(dir, "volumes", "kubernetes.io~configmap", "config")
	project := func(version, text string) {
		t.Helper()
		writeFile(t, filepath.Join(volume, version, "key"), text)
		if err := os.Symlink(version, filepath.Join(volume, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(volume, "..data_tmp"), filepath.Join(volume, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	project("..v1", "one\n")
	if err := os.Symlink("..data/key", filepath.Join(volume, "key")); err != nil {
		t.Fatal(err)
	}
	p := b.machinePod(ctx, t, images.Tiny)
	c := p.start(with(of("machine", images.Tiny), func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{mount("/data", filepath.Join(dir, "rw")), readOnly(mount("/sealed", filepath.Join(dir, "ro"))), readOnly(mount("/etc/config", volume))}
	})).up(1)
	c.sh("modprobe virtiofs; mount -t virtiofs shares /mnt")
	c.sh("cd /mnt; for d in *; do [ -e $d/key ] && ln -s /mnt/$d /run/config && continue; touch $d/guest 2>/dev/null && ln -s /mnt/$d /run/data || ln -s /mnt/$d /run/sealed; done")
	c.expect("cat /run/data/file /run/sealed/file /run/config/key", "node\nnode\none")
	c.sh("mount -o remount,rw /mnt; ! echo x >/run/sealed/new; ! rm /run/sealed/file; ! echo x >/run/config/key")
	info, err := os.Stat(filepath.Join(dir, "rw", "guest"))
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != 0 || st.Gid != 0 {
		t.Errorf("a file of the guest's root belongs to %d:%d on the node, want 0:0", st.Uid, st.Gid)
	}
	writeFile(t, filepath.Join(dir, "rw", "later"), "later\n")
	project("..v2", "two\n")
	c.until("the guest sees what changed", func() bool { return c.sh("cat /run/data/later /run/config/key; true") == "later\ntwo\n" })
	pid := p.verboseInfo().Guest.Share.PID
	if cgroups := readFile(fmt.Sprintf("/proc/%d/cgroup", pid)); !strings.Contains(cgroups, p.id) {
		t.Errorf("virtiofsd is in\n%swant the pod's cgroup", cgroups)
	}
	ours, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	if its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", pid)); err != nil || its == ours {
		t.Errorf("virtiofsd has the node's user namespace %s, %v", its, err)
	}
}

// A machine's memory consists of huge pages where its container has them.
func TestMachineHugePages(t *testing.T) {
	ctx, b := use(t)
	const want = 112
	had := reserveHugePages(t, hugePool, want)
	p := b.machinePod(ctx, t, images.Tiny)
	huge := func(attempt uint32, limits ...*runtimeapi.HugepageLimit) *runtimeapi.ContainerConfig {
		return with(volumes(attempt), func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{HugepageLimits: limits}
		})
	}
	two := &runtimeapi.HugepageLimit{PageSize: "2MB", Limit: want << 21}
	_, err := p.tryCreate(huge(0, &runtimeapi.HugepageLimit{PageSize: "2 bananas", Limit: 2 << 20}))
	refused(t, err, codes.InvalidArgument, "2 bananas", "2MB")
	_, err = p.tryCreate(huge(1, two, &runtimeapi.HugepageLimit{PageSize: "1GB", Limit: gib}))
	refused(t, err, codes.InvalidArgument, "one size")
	_, err = p.tryCreate(huge(2, &runtimeapi.HugepageLimit{PageSize: "2MB", Limit: 3 << 20}))
	refused(t, err, codes.InvalidArgument, "3145728", "multiple")
	c := p.start(huge(3, two)).up(1)
	if got := had - freeHugePages(t, hugePool); got != want {
		t.Errorf("the machine has %d huge pages, want %d", got, want)
	}
	c.stop(30)
	c.until("the pages are given back", func() bool { return freeHugePages(t, hugePool) == had })
}

// As those of 2 MiB, where the node has pages of 1 GiB.
func TestMachineGigabytePages(t *testing.T) {
	ctx, b := use(t)
	if _, err := os.Stat(gibPool); err != nil {
		t.Skipf("the kernel has no huge pages of 1 GiB: %v", err)
	}
	had := reserveHugePages(t, gibPool, 1)
	p := b.machinePod(ctx, t, images.Tiny)
	huge := func(attempt uint32, bytes uint64) *runtimeapi.ContainerConfig {
		return with(volumes(attempt), func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "1GB", Limit: bytes}, {PageSize: "2MB"}}}
		})
	}
	_, err := p.tryCreate(huge(0, 3<<29))
	refused(t, err, codes.InvalidArgument, "hugepage_limits 1GB is 1610612736", "multiple")
	refused(t, p.create(huge(1, 1<<50)).tryStart(), codes.ResourceExhausted, "1048576 KiB", "nr_hugepages")
	c := p.start(huge(2, gib)).up(1)
	if got := had - freeHugePages(t, gibPool); got != 1 {
		t.Errorf("the machine has %d pages of 1 GiB, want 1", got)
	}
	if kib, _ := strconv.Atoi(strings.TrimSpace(c.sh("sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo"))); kib < 900<<10 || kib > 1<<20 {
		t.Errorf("the machine has %d KiB, want those of the page", kib)
	}
	c.stop(30)
	c.until("the page is given back", func() bool { return freeHugePages(t, gibPool) == had })
}

// A guest cannot write more than its root disk has; what it wrote is counted.
func TestMachineRootIsBounded(t *testing.T) {
	ctx, b := use(t)
	c := b.machine(ctx, t, images.Tiny)
	used := func() uint64 {
		t.Helper()
		resp, err := b.image.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var n uint64
		for _, fs := range append(resp.GetContainerFilesystems(), resp.GetImageFilesystems()...) {
			n = max(n, fs.GetUsedBytes().GetValue())
		}
		return n
	}
	before := used()
	c.says("dd if=/dev/urandom of=/big bs=1M 2>&1 | grep -o 'No space left on device'; sync", "No space left on device")
	var size uint64
	if _, err := fmt.Sscan(c.sh("cat /sys/block/vda/size"), &size); err != nil {
		t.Fatal(err)
	}
	resp, err := b.rt.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: c.id})
	if err != nil {
		t.Fatal(err)
	}
	layer := resp.GetStats().GetWritableLayer().GetUsedBytes().GetValue()
	if layer < 32<<20 || layer > size*512+size*512/1000+(4<<20) {
		t.Errorf("the writable layer has %d bytes after all of the disk's room was written; the disk has %d", layer, size*512)
	}
	c.until("the node's image file system counts it", func() bool { return used() >= before+layer/2 })
}
