package vm_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

func mount(to, from string) *runtimeapi.Mount {
	return &runtimeapi.Mount{ContainerPath: to, HostPath: from}
}

func readOnly(m *runtimeapi.Mount) *runtimeapi.Mount {
	m.Readonly = true
	return m
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// readFile is what a file on the node has; a missing one has nothing.
func readFile(path string) string {
	data, _ := os.ReadFile(path)
	return string(data)
}

// mountTmpfs mounts a small file system on the node for the time of the test.
func mountTmpfs(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// Directories and files of the node, seen and written from both sides, read-only where asked.
func TestHostMounts(t *testing.T) {
	ctx, b := use(t)
	host := t.TempDir()
	for _, name := range []string{"rw/from-node", "ro/from-node", "file-rw", "file-ro"} {
		writeFile(t, filepath.Join(host, name), "node\n")
	}
	mountTmpfs(t, filepath.Join(host, "tree", "below"))
	p := b.vmPod(ctx, t)
	at := func(name string) string { return filepath.Join(host, name) }
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) {
		rro := readOnly(mount("/rro", at("tree")))
		rro.RecursiveReadOnly = true
		noexec := mount("/noexec", at("rw"))
		noexec.MountOptions = []string{"noexec", "nosuid"}
		c.Mounts = []*runtimeapi.Mount{
			mount("/rw", at("rw")), readOnly(mount("/ro", at("ro"))), mount("/file-rw", at("file-rw")), readOnly(mount("/file-ro", at("file-ro"))),
			readOnly(mount("/tree-ro", at("tree"))), rro, mount("/made", at("missing/dir")), noexec,
		}
	}))
	c.expect("cat /rw/from-node /ro/from-node /file-rw /file-ro", "node\nnode\nnode\nnode")
	c.sh("echo guest > /rw/from-guest; echo guest > /file-rw; echo guest > /made/file; mkdir -p /rw/a/b; ln -s from-node /rw/link; chown 1234:5678 /rw/from-guest; chmod 640 /rw/from-guest")
	for _, name := range []string{"rw/from-guest", "file-rw", "missing/dir/file"} {
		if got := readFile(at(name)); got != "guest\n" {
			t.Errorf("%s on the node has %q, want what the container wrote", name, got)
		}
	}
	info, err := os.Stat(at("rw/from-guest"))
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != 1234 || st.Gid != 5678 || info.Mode().Perm() != 0o640 {
		t.Errorf("owner %d:%d, mode %v on the node, want 1234:5678 and 0640", st.Uid, st.Gid, info.Mode())
	}
	writeFile(t, at("rw/later"), "later\n")
	c.until("the container sees what the node writes", func() bool { return c.sh("cat /rw/later 2>/dev/null || true") == "later\n" })
	for _, path := range []string{"/ro/file", "/file-ro", "/tree-ro/file", "/rro/file", "/rro/below/file"} {
		c.expect("(echo x > "+path+") 2>&1 | grep -o 'Read-only file system'", "Read-only file system")
	}
	c.expect("awk '$2 == \"/noexec\" && $4 ~ /noexec/ && $4 ~ /nosuid/' /proc/mounts | wc -l; cat /noexec/from-node", "1\nnode")
	c.sh("echo x > /tree-ro/below/file") // read-only is not recursive unless asked

	// What is mounted below a shared directory does not keep the node from taking the mount and its directory away.
	below := at("tree/gone")
	mountTmpfs(t, below)
	other := p.start(with(idle("other"), func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{mount("/tree", at("tree"))} }))
	other.expect("ls /tree", "below\ngone")
	if err := errors.Join(unix.Unmount(below, 0), os.Remove(below)); err != nil {
		t.Error(err)
	}
	other.until("the directory is gone from the container", func() bool { return other.sh("ls /tree") == "below\n" })

	// A container that comes later sees the same directory through the same share.
	later := p.start(with(idle("later"), func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{mount("/same", at("rw"))} }))
	later.expect("cat /same/from-guest", "guest")
	if info := p.verboseInfo(); info.Guest.Share == nil {
		t.Error("the pod has no record of its share")
	}
	c.remove()
	later.expect("cat /same/from-guest", "guest")
}

// What is mounted on the node later appears with HostToContainer, and does not without.
func TestMountPropagation(t *testing.T) {
	ctx, b := use(t)
	host := t.TempDir()
	if err := unix.Mount(host, host, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", host, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(host, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	p := b.vmPod(ctx, t)
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) {
		slave := mount("/slave", host)
		slave.Propagation = runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		c.Mounts = []*runtimeapi.Mount{slave, mount("/private", host)}
	}))
	mountTmpfs(t, filepath.Join(host, "new"))
	writeFile(t, filepath.Join(host, "new", "file"), "mounted later\n")
	c.until("the mount appears in the container", func() bool { return c.sh("cat /slave/new/file 2>/dev/null || true") == "mounted later\n" })
	c.expect("ls /private/new", "")
}

// A projected volume changes as the kubelet changes it: the link ..data is replaced by a new one.
func TestProjectedVolume(t *testing.T) {
	ctx, b := use(t)
	volume := filepath.Join(t.TempDir(), "volumes", "kubernetes.io~configmap", "config")
	project := func(version string, keys map[string]string) {
		for k, v := range keys {
			writeFile(t, filepath.Join(volume, version, k), v)
		}
		tmp := filepath.Join(volume, "..data_tmp")
		if err := os.Symlink(version, tmp); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, filepath.Join(volume, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	project("..v1", map[string]string{"key": "one", "gone": "x"})
	for _, k := range []string{"key", "gone"} {
		if err := os.Symlink("..data/"+k, filepath.Join(volume, k)); err != nil {
			t.Fatal(err)
		}
	}
	p := b.vmPod(ctx, t)
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{readOnly(mount("/etc/config", volume))}
	}))
	c.expect("cat /etc/config/key /etc/config/gone; (echo x > /etc/config/new) 2>&1 | grep -o Read-only", "onexRead-only")
	if info := p.verboseInfo(); info.Guest.Share != nil {
		t.Error("a projected volume started virtiofsd; it is to be pushed")
	}

	// Whoever reads sees the old version or the new one, never none.
	c.sh("(while [ ! -e /tmp/stop ]; do cat /etc/config/key >> /tmp/seen || echo missing >> /tmp/missing; done) >/dev/null 2>&1 &")
	project("..v2", map[string]string{"key": "two", "more": "y"})
	if err := os.Remove(filepath.Join(volume, "gone")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("..data/more", filepath.Join(volume, "more")); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(volume, "..v1")); err != nil {
		t.Fatal(err)
	}
	c.until("the new version is in the container", func() bool {
		return c.sh("cat /etc/config/key /etc/config/more 2>/dev/null; ls /etc/config") == "twoykey\nmore\n"
	})
	c.expect("touch /tmp/stop; cat /tmp/missing 2>/dev/null; echo none", "none")
	if seen := c.sh("cat /tmp/seen"); strings.Trim(strings.ReplaceAll(strings.ReplaceAll(seen, "one", ""), "two", ""), "\n") != "" || seen == "" {
		t.Errorf("a reader saw other than one and two")
	}
}

// The kubelet's emptyDirs are directories of the node; in memory they are a tmpfs there.
func TestEmptyDirs(t *testing.T) {
	ctx, b := use(t)
	pods := filepath.Join(t.TempDir(), "pods", "uid", "volumes", "kubernetes.io~empty-dir")
	disk, memory := filepath.Join(pods, "disk"), filepath.Join(pods, "memory")
	if err := os.MkdirAll(disk, 0o777); err != nil {
		t.Fatal(err)
	}
	mountTmpfs(t, memory)
	p := b.vmPod(ctx, t)
	volumes := func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{mount("/disk", disk), mount("/memory", memory)}
	}
	one, two := p.start(with(idle("one"), volumes)), p.start(with(idle("two"), volumes))
	one.sh("echo shared > /disk/file; echo memory > /memory/file; echo shm > /dev/shm/file")
	two.expect("cat /disk/file /memory/file /dev/shm/file", "shared\nmemory\nshm")
	two.expect("df -k /dev/shm | tail -1 | awk '{print $2}'", "65536")
	if got := readFile(filepath.Join(memory, "file")); got != "memory\n" {
		t.Errorf("the node's tmpfs has %q, want what the container wrote: the kubelet measures it there", got)
	}
	// The limit of the memory volume is kept.
	one.expect("dd if=/dev/zero of=/memory/big bs=1k count=2000 2>&1 | grep -o 'No space'", "No space")
	one.remove()
	two.expect("cat /disk/file", "shared")
}

// An image as a volume: read-only, the whole of it or a directory in it.
func TestImageVolumes(t *testing.T) {
	ctx, b := use(t)
	resp, err := b.image.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: images.Layers}})
	if err != nil {
		t.Fatal(err)
	}
	volume := func(to, sub string) *runtimeapi.Mount {
		return &runtimeapi.Mount{ContainerPath: to, Image: &runtimeapi.ImageSpec{Image: resp.GetImage().GetId()}, ImageSubPath: sub, Readonly: true}
	}
	p := b.vmPod(ctx, t)
	c := p.start(with(idle("c"), func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{volume("/whole", ""), volume("/part", "data")}
	}))
	c.expect("cat /whole/data/keep /part/keep; ls /part; (touch /part/x) 2>&1 | grep -o Read-only", "keep\nkeep\nkeep\nreplaced\nRead-only")
	_, err = p.tryCreate(with(idle("bad"), func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{volume("/x", "../etc")} }))
	refused(t, err, codes.InvalidArgument, "../etc")
	if c, err := p.tryCreate(with(idle("no-sub"), func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{volume("/x", "no/such/dir")} })); err == nil {
		if err = c.tryStart(); err == nil || !strings.Contains(err.Error(), "no/such/dir") {
			t.Errorf("an image volume with a sub path that is not there: %v, want an error that names it", err)
		}
	}
}

// What a VM cannot have is refused with a sentence, and leaves nothing.
func TestRefused(t *testing.T) {
	ctx, b := use(t)
	sandboxes := map[string]struct {
		change func(*runtimeapi.NamespaceOption)
		words  string
	}{
		"network": {func(o *runtimeapi.NamespaceOption) { o.Network = runtimeapi.NamespaceMode_NODE }, "hostNetwork"},
		"pid":     {func(o *runtimeapi.NamespaceOption) { o.Pid = runtimeapi.NamespaceMode_NODE }, "hostPID"},
		"ipc":     {func(o *runtimeapi.NamespaceOption) { o.Ipc = runtimeapi.NamespaceMode_NODE }, "hostIPC"},
		"users": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD}
		}, "uids has 0 mappings"},
	}
	for name, tt := range sandboxes {
		cfg := b.podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{}
			tt.change(cfg.Linux.SecurityContext.NamespaceOptions)
		})
		_, err := b.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handlerVM})
		refused(t, err, codes.InvalidArgument, tt.words)
		if t.Failed() {
			t.Fatalf("sandbox with the node's %s namespace", name)
		}
	}

	p := b.vmPod(ctx, t)
	dir := t.TempDir()
	socket, fifo := filepath.Join(dir, "socket"), filepath.Join(dir, "fifo")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	bidirectional := mount("/m", dir)
	bidirectional.Propagation = runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	containers := map[string]struct {
		change func(*runtimeapi.ContainerConfig)
		words  string
	}{
		"socket":        {func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{mount("/m", socket)} }, "socket"},
		"FIFO":          {func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{mount("/m", fifo)} }, "FIFO"},
		"device mount":  {func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{mount("/m", "/dev/null")} }, "device"},
		"bidirectional": {func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{bidirectional} }, "propagation"},
		"device": {func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/fuse", ContainerPath: "/dev/fuse", Permissions: "rw"}}
		}, "/dev/fuse"},
		"privileged in an ordinary pod": {func(c *runtimeapi.ContainerConfig) { security(c).Privileged = true }, "privileged"},
		"AppArmor": {func(c *runtimeapi.ContainerConfig) {
			security(c).Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "x"}
		}, "apparmor"},
		"capability": {func(c *runtimeapi.ContainerConfig) {
			security(c).Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"FLY"}}
		}, "FLY"},
	}
	for name, tt := range containers {
		_, err := p.tryCreate(with(idle("refused"), tt.change))
		t.Run(name, func(t *testing.T) { refused(t, err, codes.InvalidArgument, tt.words) })
	}
	_, err = p.tryCreate(with(idle("no-image"), func(c *runtimeapi.ContainerConfig) { c.Image.Image = "vmruntime.test/no-such-image:1" }))
	refused(t, err, codes.NotFound, "no-such-image")
}

// A user who is no root writes where a supplemental group may, as in volumes that the kubelet has given to the pod's fsGroup.
func TestSupplementalGroups(t *testing.T) {
	ctx, b := use(t)
	dir := filepath.Join(t.TempDir(), "volume")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	chown(t, dir, 0, 2000, 0o770|os.ModeSetgid)
	user := func(name string, groups ...int64) *runtimeapi.ContainerConfig {
		return with(idle(name), func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{mount("/volume", dir)}
			security(c).RunAsUser, security(c).SupplementalGroups = &runtimeapi.Int64Value{Value: 1000}, groups
		})
	}
	p := b.vmPod(ctx, t)
	member := p.start(user("member", 2000))
	member.expect("cd /volume; echo mine > file; mkdir sub; mkfifo fifo; ln -s file link; mv file moved; stat -c %u:%g:%a moved sub", "1000:2000:644\n1000:2000:2755")
	if got := owner(t, filepath.Join(dir, "moved")); got != "1000:2000" {
		t.Errorf("the file is %s's on the node, want 1000:2000", got)
	}
	p.start(user("stranger")).expect("(touch /volume/file; cat /volume/moved) 2>&1 | grep -c denied", "2")

	// One who is not of the group gets no set-group-ID program of it.
	chown(t, dir, 0, 2000, 0o777|os.ModeSetgid)
	p.start(user("other")).expect("cd /volume; cp /bin/busybox b; chmod 2755 b; stat -c %u:%g:%a b", "1000:2000:755")
}
