package vm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// counter writes numbers to its log as fast as they can be read, and keeps the last one in memory and in a file.
func counter(name string) *runtimeapi.ContainerConfig {
	return with(shell(name, "secret=$(head -c 8 /dev/urandom | md5sum | cut -c1-16); echo kept > /written; i=0; while :; do i=$((i+1)); echo $i; [ -e /dev/shm/say ] && { rm /dev/shm/say; echo $secret $i > /said; }; done"),
		func(c *runtimeapi.ContainerConfig) { c.Stdin = true })
}

func (p *pod) tryCheckpoint(dir string, ctrs ...*ctr) error {
	ctx, cancel := context.WithTimeout(p.ctx, 90*time.Second)
	defer cancel()
	req := &runtimeapi.CheckpointPodRequest{PodSandboxId: p.id, OutputPath: dir}
	for _, c := range ctrs {
		req.ContainerIds = append(req.ContainerIds, c.id)
	}
	_, err := p.rt.CheckpointPod(ctx, req)
	return err
}

func (p *pod) checkpoint(ctrs ...*ctr) string {
	p.t.Helper()
	dir := p.t.TempDir()
	begun := time.Now()
	if err := p.tryCheckpoint(dir, ctrs...); err != nil {
		p.t.Fatalf("CheckpointPod: %v", err)
	}
	size := int64(0)
	entries, err := os.ReadDir(dir)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			p.t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			p.t.Errorf("%s has mode %s, want 0600", e.Name(), info.Mode())
		}
		size += info.Size()
	}
	p.t.Logf("checkpointed within %s, %d MiB", time.Since(begun), size>>20)
	return dir
}

func (b *bed) tryRestore(ctx context.Context, dir string, cfg *runtimeapi.PodSandboxConfig, configs ...*runtimeapi.ContainerConfig) (*runtimeapi.RestorePodResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	return b.rt.RestorePod(ctx, &runtimeapi.RestorePodRequest{CheckpointPath: dir, Config: cfg, RuntimeHandler: handlerVM, ContainerConfigs: configs})
}

// restore makes a pod of a checkpoint; its containers come in the order of their configurations.
func (b *bed) restore(ctx context.Context, t *testing.T, dir string, cfg *runtimeapi.PodSandboxConfig, configs ...*runtimeapi.ContainerConfig) (*pod, []*ctr) {
	t.Helper()
	begun := time.Now()
	resp, err := b.tryRestore(ctx, dir, cfg, configs...)
	if err != nil {
		t.Fatalf("RestorePod: %v", err)
	}
	t.Logf("restored within %s", time.Since(begun))
	p := &pod{bed: b, t: t, ctx: ctx, cfg: cfg, id: resp.GetPodSandboxId()}
	t.Cleanup(p.remove)
	var out []*ctr
	for _, c := range configs {
		i := slices.IndexFunc(resp.GetRestoredContainers(), func(r *runtimeapi.RestoredContainer) bool { return r.GetName() == c.GetMetadata().GetName() })
		if i < 0 {
			t.Fatalf("no restored container %s in %v", c.GetMetadata().GetName(), resp)
		}
		out = append(out, &ctr{pod: p, cfg: c, id: resp.GetRestoredContainers()[i].GetContainerId()})
	}
	return p, out
}

// numbers are the lines of a counter's log, which is being written: the last one may not be whole yet.
func (c *ctr) numbers() []int {
	c.t.Helper()
	data, _ := os.ReadFile(c.logFile()) // missing is as good as empty
	var out []int
	for line := range strings.Lines(string(data)) {
		_, number, ok := strings.Cut(line, " stdout F ")
		if !strings.HasSuffix(line, "\n") {
			break
		}
		n, err := strconv.Atoi(strings.TrimSuffix(number, "\n"))
		if err != nil || !ok {
			c.t.Fatalf("%s has the line %q", c.logFile(), line)
		}
		out = append(out, n)
	}
	return out
}

// consecutive fails unless each number is one more than the one before it.
func consecutive(t *testing.T, what string, numbers []int) {
	t.Helper()
	for i, n := range numbers {
		if i > 0 && n != numbers[i-1]+1 {
			t.Fatalf("%s: after %d comes %d", what, numbers[i-1], n)
		}
	}
}

// again starts the daemon after a crash, and returns when the test's own connection is there again: on a busy machine an attempt
// made meanwhile may have failed, and calls fail until the next one.
func (b *bed) again(ctx context.Context, t *testing.T) {
	t.Helper()
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := b.rt.Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
}

// A pod under load is checkpointed and restored beside itself: both go on where they were, each container of the restored one
// only when it is started; no line is lost or doubled; memory, files and standard input are as they were, and everything
// that belongs to the pod is the new one's.
func TestCheckpointRestore(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	count, still := p.start(counter("count")), p.start(idle("still"))
	still.ready("ready")
	count.ready(" 500\n")
	dir := p.checkpoint(count, still)
	at := len(count.numbers())
	p.until("the checkpointed pod goes on", func() bool { return len(count.numbers()) > at+100 })

	cfg := b.podConfig(t, func(c *runtimeapi.PodSandboxConfig) {
		c.Metadata.Name, c.Hostname = "restored", "restored"
		c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}}
	})
	r, ctrs := b.restore(ctx, t, dir, cfg, proto.CloneOf(count.cfg), proto.CloneOf(still.cfg))
	rcount, rstill := ctrs[0], ctrs[1]
	if r.id == p.id || rcount.id == count.id {
		t.Error("the restored pod has the IDs of the checkpointed one")
	}
	for _, c := range ctrs {
		if s := c.status().GetState(); s != runtimeapi.ContainerState_CONTAINER_CREATED {
			t.Errorf("restored, %s is %s", c.cfg.GetMetadata().GetName(), s)
		}
	}
	rstill.start()
	rstill.expect("cat /etc/hostname; hostname; cat /etc/resolv.conf", "restored\nrestored\nnameserver 192.0.2.53")
	if data, err := os.ReadFile(rcount.logFile()); err == nil && len(data) > 0 {
		t.Errorf("before its start the restored counter has written %d bytes", len(data))
	}
	if r.ip() == p.ip() {
		t.Errorf("both pods have the address %s", p.ip())
	}
	if got := rstill.sh("ip -o -4 addr show eth0"); !strings.Contains(got, " "+r.ip()+"/") || strings.Contains(got, " "+p.ip()+"/") {
		t.Errorf("the restored pod has %q, want %s and not %s", got, r.ip(), p.ip())
	}
	refused(t, r.tryCheckpoint(t.TempDir(), rstill), codes.FailedPrecondition, rcount.id, "has not been started")
	rcount.start()
	r.until("the restored counter goes on", func() bool { return len(rcount.numbers()) > 100 })
	numbers := rcount.numbers()
	consecutive(t, "restored", numbers)
	before := count.numbers()
	consecutive(t, "checkpointed", before)
	if !slices.Contains(before, numbers[0]-1) || numbers[0] < 500 {
		t.Errorf("the restored log begins with %d", numbers[0])
	}
	const say = "touch /dev/shm/say; while [ ! -s /said ]; do sleep 0.1; done; cat /written; cut -d' ' -f1 /said"
	rcount.expect(say, strings.TrimSuffix(count.sh(say), "\n"))
	if now, err := strconv.ParseInt(strings.TrimSpace(rcount.sh("date +%s")), 10, 64); err != nil || time.Since(time.Unix(now, 0)).Abs() > 20*time.Second {
		t.Errorf("the restored pod's clock is %d (%v)", now, err)
	}
	if a, c := still.sh("head -c 16 /dev/urandom | md5sum"), rstill.sh("head -c 16 /dev/urandom | md5sum"); a == c {
		t.Error("both pods draw the same random numbers")
	}
	rstill.stop(20)
	if s := rstill.wait(); s.GetExitCode() != 0 {
		t.Errorf("the restored container ended with %d, want 0", s.GetExitCode())
	}
	r.output(shell("another", "true"))
	b.crash(t)
	b.again(ctx, t)
	seen := len(rcount.numbers())
	r.until("the restored counter is followed by the next daemon", func() bool { return len(rcount.numbers()) > seen+100 })
	consecutive(t, "restored, after the daemon", rcount.numbers())
}

// The output of a restored log and the checkpointed one's until then are one stream: the pod is stopped while it is still.
func TestCheckpointLogs(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	count := p.start(counter("count")).ready(" 200\n")
	var dirs []string
	for range 3 {
		dirs = append(dirs, p.checkpoint(count))
	}
	old := count.numbers()
	for i, dir := range dirs {
		r, ctrs := b.restore(ctx, t, dir, b.podConfig(t, func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name += fmt.Sprint("-", i) }), proto.CloneOf(count.cfg))
		ctrs[0].start()
		r.until("it goes on", func() bool { return len(ctrs[0].numbers()) > 50 })
		consecutive(t, "restored", append(slices.DeleteFunc(slices.Clone(old), func(n int) bool { return n >= ctrs[0].numbers()[0] }), ctrs[0].numbers()...))
		// What was restored can be checkpointed and restored again.
		if i == 0 {
			again := r.checkpoint(ctrs[0])
			r.remove()
			old := ctrs[0].numbers()
			r2, ctrs2 := b.restore(ctx, t, again, b.podConfig(t), proto.CloneOf(count.cfg))
			ctrs2[0].start()
			r2.until("it goes on a second time", func() bool { return len(ctrs2[0].numbers()) > 50 })
			consecutive(t, "restored twice", append(slices.DeleteFunc(old, func(n int) bool { return n >= ctrs2[0].numbers()[0] }), ctrs2[0].numbers()...))
			r = r2
		}
		r.remove()
	}
}

// What the CRI asks to refuse is refused, leaves no file, and leaves the pod running.
func TestCheckpointRefused(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	one, two := p.start(idle("one")).ready("ready"), p.start(idle("two")).ready("ready")
	created := p.create(idle("created"))
	dir := t.TempDir()
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		dir  string
		ctrs []*ctr
		code codes.Code
		word string
	}{
		{"none", dir, nil, codes.InvalidArgument, "container_ids is empty"},
		{"twice", dir, []*ctr{one, one, two}, codes.InvalidArgument, "twice"},
		{"not all", dir, []*ctr{one}, codes.FailedPrecondition, two.id},
		{"not running", dir, []*ctr{one, two, created}, codes.FailedPrecondition, "created"},
		{"unknown", dir, []*ctr{one, two, {id: "nobody"}}, codes.NotFound, "nobody"},
		{"relative", "checkpoint", []*ctr{one, two}, codes.InvalidArgument, "absolute"},
		{"missing", filepath.Join(dir, "missing"), []*ctr{one, two}, codes.InvalidArgument, "existing directory"},
		{"link", link, []*ctr{one, two}, codes.InvalidArgument, "symbolic link"},
		{"not empty", full, []*ctr{one, two}, codes.FailedPrecondition, "must be empty"},
	} {
		t.Run(tc.name, func(t *testing.T) { refused(t, p.tryCheckpoint(tc.dir, tc.ctrs...), tc.code, tc.word) })
	}
	_, err := b.rt.CheckpointPod(ctx, &runtimeapi.CheckpointPodRequest{PodSandboxId: p.id, OutputPath: dir, ContainerIds: []string{one.id, two.id}, Options: map[string]string{"fast": "1"}})
	refused(t, err, codes.InvalidArgument, "fast")
	_, err = b.rt.CheckpointPod(context.Background(), &runtimeapi.CheckpointPodRequest{PodSandboxId: p.id, OutputPath: dir, ContainerIds: []string{one.id, two.id}})
	refused(t, err, codes.InvalidArgument, "deadline")
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	_, err = b.rt.CheckpointPod(short, &runtimeapi.CheckpointPodRequest{PodSandboxId: p.id, OutputPath: dir, ContainerIds: []string{one.id, two.id}})
	refused(t, err, codes.DeadlineExceeded)
	one.expect("echo on", "on") // after what the call left has been undone
	p.until("nothing is left of a checkpoint whose deadline came", func() bool {
		entries, err := os.ReadDir(dir)
		return err == nil && len(entries) == 0
	})
	shared := p.start(with(idle("shared"), func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/shared"}}
	}))
	refused(t, p.tryCheckpoint(dir, one, two, shared), codes.FailedPrecondition, "virtiofs")
}

// A checkpoint that is damaged or does not fit is refused, and nothing of the attempt is left.
func TestRestoreRefused(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(idle("one")).ready("ready")
	dir := p.checkpoint(c)
	change := func(f func(*runtimeapi.ContainerConfig)) []*runtimeapi.ContainerConfig {
		return []*runtimeapi.ContainerConfig{with(proto.CloneOf(c.cfg), f)}
	}
	same := change(func(*runtimeapi.ContainerConfig) {})
	for _, tc := range []struct {
		name    string
		configs []*runtimeapi.ContainerConfig
		code    codes.Code
		word    string
	}{
		{"no containers", nil, codes.InvalidArgument, "container_configs is empty"},
		{"another name", change(func(c *runtimeapi.ContainerConfig) { c.Metadata.Name = "other" }), codes.InvalidArgument, "exactly those"},
		{"one more", append(slices.Clone(same), idle("more")), codes.InvalidArgument, "exactly those"},
		{"twice", append(slices.Clone(same), same...), codes.InvalidArgument, "exactly those"},
		{"command", change(func(c *runtimeapi.ContainerConfig) { c.Command = []string{"true"} }), codes.InvalidArgument, "command"},
		{"environment", change(func(c *runtimeapi.ContainerConfig) { c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b")}} }), codes.InvalidArgument, "envs"},
		{"directory", change(func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/tmp" }), codes.InvalidArgument, "working_dir"},
		{"user", change(func(c *runtimeapi.ContainerConfig) { security(c).RunAsUser = int64Value(5) }), codes.InvalidArgument, "user"},
		{"root", change(func(c *runtimeapi.ContainerConfig) { security(c).ReadonlyRootfs = true }), codes.InvalidArgument, "root"},
		{"image", change(func(c *runtimeapi.ContainerConfig) { c.Image.Image = "localhost/none:1" }), codes.NotFound, "localhost/none:1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := b.tryRestore(ctx, dir, b.podConfig(t), tc.configs...)
			refused(t, err, tc.code, tc.word)
		})
	}
	t.Run("block volume", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "volume")
		if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 1<<20)); err != nil {
			t.Fatal(err)
		}
		device := loop(t, file)
		_, err := b.tryRestore(ctx, dir, b.podConfig(t), change(func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: device, ContainerPath: "/dev/volume", Permissions: "rwm"}}
		})...)
		refused(t, err, codes.InvalidArgument, "/dev/volume")
	})
	for _, name := range []string{"manifest.json", "memory.zst", "scratch.zst"} {
		path := filepath.Join(dir, name)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		damage := slices.Clone(data)
		damage[len(damage)/2] ^= 1
		for _, bad := range [][]byte{damage, data[:len(data)-1]} {
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := b.tryRestore(ctx, dir, b.podConfig(t), same...)
			refused(t, err, codes.InvalidArgument, name, "damaged")
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, ctrs := b.restore(ctx, t, dir, b.podConfig(t), same...)
	ctrs[0].start()
	ctrs[0].expect("echo on", "on")
}

// The daemon is killed while a pod stands still for a checkpoint: the next one lets it go on, and the cut-off checkpoint is none.
func TestCheckpointDaemonKilled(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	count := p.start(counter("count")).ready(" 100\n")
	dir := t.TempDir()
	broken := make(chan error, 1)
	go func() { broken <- p.tryCheckpoint(dir, count) }()
	p.until("the pod's memory is being written", func() bool { return fileSize(filepath.Join(dir, "memory.zst")) > 0 })
	b.crash(t)
	if err := <-broken; err == nil {
		t.Fatal("the checkpoint was over before the daemon was killed")
	}
	b.again(ctx, t)
	at := len(count.numbers())
	p.until("the pod goes on", func() bool { return len(count.numbers()) > at+100 })
	consecutive(t, "after the daemon", count.numbers())
	_, err := b.tryRestore(ctx, dir, b.podConfig(t), proto.CloneOf(count.cfg))
	refused(t, err, codes.InvalidArgument, "damaged")
	p.checkpoint(count)
}

// The only container of a pod is checkpointed into one file, of which its pod can be made again.
func TestCheckpointContainer(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(counter("count")).ready(" 100\n")
	file := filepath.Join(t.TempDir(), "count.tar")
	call := func(location string, timeout int64) error {
		_, err := b.rt.CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: c.id, Location: location, Timeout: timeout})
		return err
	}
	refused(t, call("count.tar", 0), codes.InvalidArgument, "location", "absolute")
	refused(t, call(filepath.Join(file, "count.tar"), 0), codes.InvalidArgument, "location", "existing directory")
	refused(t, call(file, -1), codes.InvalidArgument, "timeout is -1")
	if err := call(file, 90); err != nil {
		t.Fatal(err)
	}
	refused(t, call(file, 0), codes.FailedPrecondition, "exists")
	at := len(c.numbers())
	p.until("the container goes on", func() bool { return len(c.numbers()) > at+100 })
	another := p.start(idle("another"))
	refused(t, call(file+".2", 0), codes.FailedPrecondition, another.id, "CheckpointPod")
	another.stop(0)
	dir := t.TempDir()
	if out, err := exec.Command("tar", "-xf", file, "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	r, ctrs := b.restore(ctx, t, dir, b.podConfig(t, func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name += "-restored" }), proto.CloneOf(c.cfg))
	ctrs[0].start()
	r.until("the restored container goes on", func() bool { return len(ctrs[0].numbers()) > 100 })
	consecutive(t, "restored", ctrs[0].numbers())
	c.stop(0)
	refused(t, call(file+".2", 0), codes.FailedPrecondition, "not running")
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(file), "*")); err != nil || !slices.Equal(left, []string{file}) {
		t.Errorf("left are %q (%v), want the one file", left, err)
	}
}

// A checkpoint is restored by another node that has the images, and by its own after a reboot.
func TestRestoreElsewhere(t *testing.T) {
	ctx, b := use(t)
	p := b.vmPod(ctx, t)
	c := p.start(counter("count")).ready(" 100\n")
	const say = "touch /dev/shm/say; while [ ! -s /said ]; do sleep 0.1; done; cat /written; cut -d' ' -f1 /said; rm /said"
	dir := p.checkpoint(c)
	m := b.busyMachine(ctx, t)
	machineDir, secret := m.pod.checkpoint(m), strings.TrimSuffix(m.sh("cat /run/m/secret"), "\n")
	since := len(m.ticks())
	m.until("the checkpointed machine goes on", func() bool { return len(m.ticks()) > since })
	since = m.ticks()[since] + 1
	want := strings.TrimSuffix(c.sh(say), "\n")
	qemus := []int{p.verboseInfo().Guest.QEMU.PID, m.pod.verboseInfo().Guest.QEMU.PID}
	b.crash(t)
	for _, pid := range qemus {
		kill(t, pid)
	}
	emptyState(t, filepath.Join(b.Root, "run", "s"))
	b.again(ctx, t)
	before := c.numbers()
	p.remove()
	m.pod.remove()
	_, other := another(t)
	if err := other.pull(ctx, images.Tiny); err != nil {
		t.Fatal(err)
	}
	for what, b := range map[string]*bed{"after the reboot": b, "on another node": other} {
		r, ctrs := b.restore(ctx, t, dir, b.podConfig(t), proto.CloneOf(c.cfg))
		ctrs[0].start()
		r.until("the restored container goes on "+what, func() bool { return len(ctrs[0].numbers()) > 100 })
		numbers := ctrs[0].numbers()
		consecutive(t, what, numbers)
		if !slices.Contains(before, numbers[0]-1) {
			t.Errorf("%s the log begins with %d", what, numbers[0])
		}
		ctrs[0].expect(say, want)
		_, machines := b.restore(ctx, t, machineDir, b.podConfig(t, sized(192<<20), func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "machine" }), proto.CloneOf(m.cfg))
		machines[0].start()
		machines[0].goesOn(what, secret, since)
	}
}
