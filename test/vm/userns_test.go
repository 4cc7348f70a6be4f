package vm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// The mapping that the tests' pods ask for, as the kubelet does for hostUsers: false.
var usersMapping = []*runtimeapi.IDMapping{{ContainerId: 0, HostId: 1 << 17, Length: 1 << 16}}

func podUsers() *runtimeapi.UserNamespace {
	return &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: usersMapping, Gids: usersMapping}
}

// usersPod is a pod with a user namespace.
func (b *bed) usersPod(t *testing.T, change ...func(*runtimeapi.PodSandboxConfig)) *runtimeapi.PodSandboxConfig {
	t.Helper()
	return b.podConfig(t, append(change, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{
			Pid: runtimeapi.NamespaceMode_CONTAINER, UsernsOptions: podUsers(),
		}
	})...)
}

// inUsers makes a container one of such a pod: the kubelet maps all mounts as it maps the pod.
func inUsers(cfg *runtimeapi.ContainerConfig) *runtimeapi.ContainerConfig {
	security(cfg).NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER, UsernsOptions: podUsers()}
	for _, m := range cfg.GetMounts() {
		m.UidMappings, m.GidMappings = usersMapping, usersMapping
	}
	return cfg
}

func owner(t *testing.T, path string) string {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

func chown(t *testing.T, path string, uid, gid int, mode os.FileMode) {
	t.Helper()
	if err := os.Lchown(path, uid, gid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// All containers of a pod are in one user namespace; in it root is root over the pod's network, its files and nothing else.
func TestUserNamespace(t *testing.T) {
	ctx, b := use(t)
	p := b.runPod(ctx, t, handlerVM, b.usersPod(t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "40000 50000", "kernel.shmmni": "1234"}
	}))
	c := p.start(inUsers(idle("c")))
	c.expect("cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '", " 0 131072 65536\n 0 131072 65536")
	c.expect("id -u; stat -c %u:%g / /etc/passwd /etc/hosts /etc/resolv.conf /dev/shm /proc/$$", "0"+strings.Repeat("\n0:0", 6))
	c.expect("touch /made; chown 7:8 /made; stat -c %u:%g /made; cp /bin/busybox /copy; stat -c %u:%g /copy", "7:8\n0:0")
	c.expect("cat /proc/sys/net/ipv4/ip_local_port_range | tr '\\t' ' '; cat /proc/sys/kernel/shmmni", "40000 50000\n1234")
	c.expect("hostname; ip -4 addr show eth0 | grep -c "+p.ip(), p.cfg.GetHostname()+"\n1")
	c.expect("(echo 1 > /proc/sys/kernel/panic) 2>&1 | grep -o denied; (mount -t tmpfs x /mnt) 2>&1 | grep -o denied", "denied\ndenied")

	other := p.start(inUsers(with(idle("other"), func(c *runtimeapi.ContainerConfig) {
		security(c).RunAsUser = &runtimeapi.Int64Value{Value: 1000}
		security(c).ReadonlyRootfs = true
	})))
	other.expect("id -u; cat /proc/self/uid_map | tr -s ' '; touch /x 2>&1 | grep -o Read-only", "1000\n 0 131072 65536\nRead-only")
	if a, b := c.sh("readlink /proc/self/ns/user"), other.sh("readlink /proc/self/ns/user"); a != b {
		t.Errorf("the containers are in user namespaces %s and %s, want one", a, b)
	}
	c.expect("echo shared > /dev/shm/file; cat /dev/shm/file", "shared")
	other.expect("cat /dev/shm/file; stat -c %u /dev/shm/file", "shared\n0")
	other.expect("echo to a pipe > /dev/stdout", "to a pipe")

	// Root of the pod may listen where only root may.
	p.start(inUsers(of("nginx", images.Nginx)))
	p.until("nginx answers the node", func() bool {
		page, err := b.fetch(ctx, "http://"+hostPort(p.ip(), 80)+"/")
		return err == nil && page == "nginx\n"
	})
	p.forward("18081:80")
	p.until("nginx answers at a forwarded port", func() bool {
		page, err := b.fetch(ctx, "http://127.0.0.1:18081/")
		return err == nil && page == "nginx\n"
	})
	terminal := inUsers(with(shell("terminal", "stat -L -c %u:%g /proc/self/fd/0"), func(c *runtimeapi.ContainerConfig) { c.Tty = true }))
	if got := strings.TrimSpace(p.output(terminal)); got != "0:5" {
		t.Errorf("the terminal is %q's, want 0:5", got)
	}
	c.expect("wget -q -O - http://127.0.0.1/", "nginx")
	if got := p.status().GetLinux().GetNamespaces().GetOptions().GetUsernsOptions(); !proto.Equal(got, podUsers()) {
		t.Errorf("status has user namespace %v, want %v", got, podUsers())
	}
}

// What a volume has on the node is what the containers see, owners too, and the other way round.
func TestUserNamespaceVolumes(t *testing.T) {
	ctx, b := use(t)
	pods := filepath.Join(t.TempDir(), "pods", "uid", "volumes")
	empty, group, config := filepath.Join(pods, "kubernetes.io~empty-dir", "empty"), filepath.Join(pods, "kubernetes.io~empty-dir", "group"),
		filepath.Join(pods, "kubernetes.io~configmap", "config")
	for _, name := range []string{"root", "user", "beyond"} {
		writeFile(t, filepath.Join(empty, name), "node\n")
	}
	chown(t, empty, 0, 0, 0o777)
	chown(t, filepath.Join(empty, "user"), 1000, 2000, 0o600)
	chown(t, filepath.Join(empty, "beyond"), 1<<16, 1<<16, 0o644)
	// As the kubelet does for fsGroup 2000.
	writeFile(t, filepath.Join(config, "key"), "value\n")
	chown(t, filepath.Join(config, "key"), 0, 2000, 0o440)
	chown(t, config, 0, 2000, 0o750|os.ModeSetgid)
	if err := os.MkdirAll(group, 0o777); err != nil {
		t.Fatal(err)
	}
	chown(t, group, 0, 2000, 0o770|os.ModeSetgid)
	mountTmpfs(t, filepath.Join(empty, "below"))
	log := filepath.Join(t.TempDir(), "termination-log")
	writeFile(t, log, "")
	chown(t, log, 0, 0, 0o666)

	p := b.runPod(ctx, t, handlerVM, b.usersPod(t))
	mounts := func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{
			mount("/empty", empty), readOnly(mount("/ro", empty)), mount("/group", group), readOnly(mount("/config", config)),
			{ContainerPath: "/image", Image: &runtimeapi.ImageSpec{Image: images.Layers}, Readonly: true},
			mount("/dev/termination-log", log),
		}
		c.Annotations = map[string]string{"io.kubernetes.container.terminationMessagePath": "/dev/termination-log"}
	}
	root := p.start(inUsers(with(idle("root"), mounts)))
	root.expect("cd /empty; stat -c %u:%g . root user beyond; cat user", "0:0\n0:0\n1000:2000\n65534:65534\nnode")
	root.expect("stat -c %u:%g /image /image/data/keep /config /config/key; cat /config/key", "0:0\n0:0\n0:2000\n0:2000\nvalue")
	root.sh("echo guest > /empty/made; mkdir -p /empty/dir/sub; chown 1234:5678 /empty/dir; echo below > /empty/below/file")
	root.expect("cat /ro/below/file; for f in /ro/file /ro/below/file; do (touch $f) 2>&1 | grep -o Read-only; done", "below\nRead-only\nRead-only")
	for name, want := range map[string]string{"made": "0:0", "dir": "1234:5678", "dir/sub": "0:0", "below/file": "0:0"} {
		if got := owner(t, filepath.Join(empty, name)); got != want {
			t.Errorf("%s is %s's on the node, want %s", name, got, want)
		}
	}

	user := p.start(inUsers(with(idle("user"), func(c *runtimeapi.ContainerConfig) {
		mounts(c)
		security(c).RunAsUser, security(c).SupplementalGroups = &runtimeapi.Int64Value{Value: 1000}, []int64{2000}
	})))
	user.expect("cat /empty/user /config/key; echo mine > /group/file; stat -c %u:%g /group/file", "node\nvalue\n1000:2000")
	user.expect("(cat /empty/dir/sub/x || echo x > /empty/root) 2>&1 | grep -o denied", "denied")
	if got := owner(t, filepath.Join(group, "file")); got != "1000:2000" {
		t.Errorf("the user's file is %s's on the node, want 1000:2000", got)
	}

	// An update is seen, with its owner.
	writeFile(t, filepath.Join(config, "new"), "later\n")
	chown(t, filepath.Join(config, "new"), 0, 2000, 0o440)
	user.until("the new key is in the container", func() bool {
		return user.sh("stat -c %u:%g /config/new 2>/dev/null; cat /config/new 2>/dev/null || true") == "0:2000\nlater\n"
	})
	user.sh("echo last words > /dev/termination-log")
	user.stop(0)
	if got := readFile(log); got != "last words\n" {
		t.Errorf("the termination log has %q, want what the container wrote", got)
	}

	// The mapping is the share's and the guest's: it outlives the daemon, and a new guest gets it again.
	vm := p.verboseInfo().Guest.QEMU.PID
	b.crash(t)
	if err := b.StartVMRuntime(ctx); err != nil {
		t.Fatal(err)
	}
	later := p.start(inUsers(with(idle("later"), mounts)))
	later.expect("touch /empty/later; stat -c %u:%g /empty/later /empty/dir", "0:0\n1234:5678")
	kill(t, vm)
	later.wait()
	again := p.start(inUsers(with(idle("again"), mounts)))
	again.expect("cat /proc/self/uid_map | tr -s ' '; stat -c %u:%g /empty/later /empty/dir /config/new", " 0 131072 65536\n0:0\n1234:5678\n0:2000")

	_, err := p.tryCreate(with(inUsers(idle("unmapped")), mounts))
	refused(t, err, codes.InvalidArgument, "mounts[0]", "uid_mappings")
	_, err = p.tryCreate(idle("other-users"))
	refused(t, err, codes.InvalidArgument, "userns_options")
}

// A PID namespace of the pod belongs to its user namespace.
func TestUserNamespaceSharedProcesses(t *testing.T) {
	ctx, b := use(t)
	cfg := b.usersPod(t)
	cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	p := b.runPod(ctx, t, handlerVM, cfg)
	shared := func(name string) *runtimeapi.ContainerConfig {
		return with(inUsers(idle(name)), func(c *runtimeapi.ContainerConfig) {
			security(c).NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		})
	}
	a, z := p.start(shared("a")), p.start(shared("z"))
	a.sh("sleep 4321 & echo started")
	z.expect("kill $(pgrep -f '^sleep 4321') && echo killed", "killed")
	z.remove()
	a.expect("cat /proc/self/uid_map | tr -s ' '", " 0 131072 65536")
}
