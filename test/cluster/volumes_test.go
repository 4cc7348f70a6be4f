package cluster_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/vmruntime/vmruntime/test/cluster"
)

// What the API changes in volumes that it fills is seen in a running pod, but not where one file is mounted alone.
func TestLiveVolumes(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.apply(t, `
apiVersion: v1
kind: ConfigMap
metadata: {name: config}
data: {key: old}
---
apiVersion: v1
kind: Secret
metadata: {name: secret}
stringData: {key: old}`)
		pod := n.run(t, "p", `
containers:
- name: main
  image: BUSYBOX
  command: [sleep, "1000000"]
  env: [{name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}, {name: KEY, valueFrom: {configMapKeyRef: {name: config, key: key}}}]
  volumeMounts:
  - {name: config, mountPath: /config}
  - {name: secret, mountPath: /secret}
  - {name: down, mountPath: /down}
  - {name: all, mountPath: /all}
  - {name: config, mountPath: /alone, subPath: key}
volumes:
- {name: config, configMap: {name: config}}
- {name: secret, secret: {secretName: secret, defaultMode: 0400}}
- {name: down, downwardAPI: {items: [{path: key, fieldRef: {fieldPath: "metadata.labels['key']"}}]}}
- name: all
  projected:
    sources:
    - configMap: {name: config}
    - serviceAccountToken: {path: token, expirationSeconds: 600, audience: test}`)
		if got := n.exec(t, "p", "stat -Lc %a /secret/key; echo $NAME $KEY; cut -d. -f2 /all/token | wc -w; cat /down/key /config/key"); got != "400\np old\n1\nold" {
			t.Errorf("the volumes are %q", got)
		}
		n.kubectl(t, "patch", "configmap", "config", "-p", `{"data":{"key":"new","more":"added"}}`)
		n.kubectl(t, "patch", "secret", "secret", "-p", `{"stringData":{"key":"new"}}`)
		n.kubectl(t, "label", "pod", "p", "key=new")
		n.awaitUpdate(t, pod, "newaddednewnewnewadded", "config/key", "config/more", "secret/key", "down/key", "all/key", "all/more")
		n.kubectl(t, "patch", "configmap", "config", "-p", `{"data":{"more":null}}`)
		n.awaitUpdate(t, pod, "newnew", "config/key", "config/more", "all/key", "all/more")
		if got := n.exec(t, "p", "cat /alone"); got != "old" {
			t.Errorf("the key that is mounted by subPath is %q, want %q until the container starts again", got, "old")
		}
	})
}

// awaitUpdate waits until those files of a pod's volumes that are there hold together what is wanted, on the node and then in the pod,
// which has each volume mounted by its name and may be a minute later.
func (n *namespace) awaitUpdate(t *testing.T, pod *corev1.Pod, want string, files ...string) {
	t.Helper()
	show := func(dir string) string { return "cat " + dir + strings.Join(files, " "+dir) + " 2>/dev/null || true" }
	n.await(t, fmt.Sprintf("the node's files %v to hold %q", files, want), func() error {
		cmd := exec.CommandContext(n.ctx, "sh", "-c", show("*/")) // below the names of the volumes' types
		cmd.Dir = filepath.Join(n.Node().Root, "kubelet", "pods", string(pod.UID), "volumes")
		out, err := cmd.Output()
		if err == nil && string(out) != want {
			err = fmt.Errorf("they hold %q", out)
		}
		return err
	})
	onNode := time.Now()
	n.awaitOutput(t, pod.Name, show("/"), want)
	if late := time.Since(onNode); late > time.Minute {
		t.Errorf("the pod has %q in %v %s after the node", want, files, late)
	}
}

// tokenRefreshed is how long the kubelet takes to replace a token that is good for ten minutes, the shortest time that there is: four
// fifths of that, and until it looks at the pod again.
const tokenRefreshed = 11 * time.Minute

// A service account's token is replaced in the pod before it is out of date.
func TestTokenRefresh(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.run(t, "p", `
containers:
- name: main
  image: BUSYBOX
  command: [sleep, "1000000"]
  volumeMounts: [{name: token, mountPath: /token}]
volumes:
- {name: token, projected: {sources: [{serviceAccountToken: {path: token, expirationSeconds: 600}}]}}`)
		first := n.exec(t, "p", "cat /token/token")
		if strings.Count(first, ".") != 2 {
			t.Fatalf("the token is %q", first)
		}
		for begun := time.Now(); n.exec(t, "p", "cat /token/token") == first; time.Sleep(10 * time.Second) {
			if time.Since(begun) > tokenRefreshed {
				t.Fatalf("the token is the same after %s", tokenRefreshed)
			}
		}
	})
}

// Volumes of a node's directories: by subPath and subPathExpr, in memory, read-only, with what is mounted below them, and
// with their owners.
func TestDirectories(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		dir := t.TempDir()
		// Every user may write, so that only what is read-only refuses.
		if err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o777)); err != nil {
			t.Fatal(err)
		}
		// A mount that propagates has to be shared where it is made.
		if err := errors.Join(unix.Mount(dir, dir, "", unix.MS_BIND, ""), unix.Mount("", dir, "", unix.MS_SHARED, "")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		})
		inner := filepath.Join(dir, "inner")
		mountTmpfs(t, inner)
		defer n.kubectl(t, "delete", "pod", "p") // before the mounts, which it holds
		n.run(t, "p", strings.ReplaceAll(`
securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 2000, supplementalGroups: [3000]}
containers:
- name: main
  image: BUSYBOX
  command: [sleep, "1000000"]
  env: [{name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
  volumeMounts:
  - {name: disk, mountPath: /disk}
  - {name: disk, mountPath: /sub, subPath: a/b}
  - {name: disk, mountPath: /expr, subPathExpr: x-$(NAME)}
  - {name: memory, mountPath: /memory}
  - {name: host, mountPath: /host}
  - {name: host, mountPath: /later, mountPropagation: HostToContainer}
  - {name: host, mountPath: /ro, readOnly: true}
  - {name: host, mountPath: /rro, readOnly: true, recursiveReadOnly: Enabled}
- name: root
  image: BUSYBOX
  command: [sleep, "1000000"]
  securityContext: {runAsUser: 0, readOnlyRootFilesystem: true}
  volumeMounts: [{name: disk, mountPath: /disk}, {name: host, mountPath: /host, mountPropagation: HostToContainer}]
- name: image
  image: BUSYBOX
  command: [sleep, "1000000"]
  volumeMounts: [{name: image, mountPath: /image}]
volumes:
- {name: disk, emptyDir: {}}
- {name: memory, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
- {name: host, hostPath: {path: DIR, type: Directory}}
- {name: image, image: {reference: AGNHOST}}`, "DIR", dir))
		for _, c := range []struct{ container, script, want string }{
			{"main", "id -G", "1000 2000 3000"},
			{"main", "echo f >/disk/f; stat -c %u:%g /disk/f", "1000:2000"},
			{"main", "echo s >/sub/s; cat /disk/a/b/s; echo e >/expr/e; cat /disk/x-p/e", "s\ne"},
			{"main", "echo m >/memory/m; cat /memory/m", "m"},
			{"main", "dd if=/dev/zero of=/memory/big bs=1M count=20 2>/dev/null || echo full; rm /memory/big", "full"},
			{"main", "touch /host/f /ro/inner/f && touch /ro/g 2>&1 | grep -o 'Read-only.*'", "Read-only file system"},
			{"root", "cat /disk/f; touch /f 2>/dev/null || echo refused; echo w >/host/w; echo i >/host/inner/i", "f\nrefused"},
			{"main", "cat /ro/w /rro/w /rro/inner/i", "w\nw\ni"},
			{"main", "touch /rro/inner/f 2>&1 | grep -o 'Read-only.*'", "Read-only file system"},
			{"image", "/image/agnhost --help >/dev/null && touch /image/f 2>&1 | grep -o 'Read-only.*'", "Read-only file system"},
		} {
			if got := n.kubectl(t, "exec", "p", "-c", c.container, "--", "sh", "-c", c.script); got != c.want {
				t.Errorf("%s in %s prints %q, want %q", c.script, c.container, got, c.want)
			}
		}
		if got, err := os.ReadFile(filepath.Join(inner, "i")); err != nil || string(got) != "i\n" {
			t.Errorf("on the node the file in the mount below is %q: %v", got, err)
		}
		propagated(t, n, dir)
	})
}

// mountTmpfs makes a directory with a file system of its own, until the test's end.
func mountTmpfs(t *testing.T, dir string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error(err)
		}
	})
}

// propagated mounts something on the node while the pod `p` runs: it is seen where that is asked for, and only there, until
// it is unmounted. The other way a mount comes from a container only: a VM pod that asks for it is refused.
func propagated(t *testing.T, n *namespace, dir string) {
	t.Helper()
	mounted := filepath.Join(dir, "mounted")
	mountTmpfs(t, mounted)
	if err := os.WriteFile(filepath.Join(mounted, "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.awaitOutput(t, "p", "ls /later/mounted", "f")
	if got := n.exec(t, "p", "ls /host/mounted"); got != "" {
		t.Errorf("a mount made later is seen in a volume without propagation: %q", got)
	}
	if err := unix.Unmount(mounted, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	n.awaitOutput(t, "p", "ls /later/mounted", "")
	n.create(t, "both", strings.ReplaceAll(`
containers:
- name: main
  image: BUSYBOX
  command: [sh, -ec, "mkdir -p /host/up; mount -t tmpfs up /host/up; touch /host/up/f; exec sleep 1000000"]
  securityContext: {privileged: true}
  volumeMounts: [{name: host, mountPath: /host, mountPropagation: Bidirectional}]
volumes: [{name: host, hostPath: {path: DIR, type: Directory}}]`, "DIR", dir))
	defer n.kubectl(t, "delete", "pod", "both")
	if n.vm {
		n.awaitEvents(t, "both", "propagation Bidirectional: a mount made inside a VM cannot appear on the node; use None or HostToContainer")
		return
	}
	up := filepath.Join(dir, "up")
	t.Cleanup(func() { _ = unix.Unmount(up, unix.MNT_DETACH) })
	n.awaitPod(t, "both", "be ready", ready)
	n.await(t, "the container's mount to appear on the node", func() error {
		_, err := os.Stat(filepath.Join(up, "f"))
		return err
	})
}

// The group of a volume's files is changed by policy: always, or only when its root has another.
func TestFSGroupChangePolicy(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		dir := t.TempDir()
		n.apply(t, persistentVolume(n, "volume", "Filesystem", dir))
		t.Cleanup(func() { kubectl(n.ctx, t, n.Cluster, "delete", "pv", n.name+"-volume", "--wait=false") })
		file := filepath.Join(dir, "f")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		for i, c := range []struct {
			policy string
			group  int // that the pod sees
		}{{"OnRootMismatch", 2000}, {"OnRootMismatch", 0}, {"Always", 2000}} {
			if err := os.Chown(file, 0, 0); err != nil {
				t.Fatal(err)
			}
			name := fmt.Sprintf("p-%d", i)
			n.create(t, name, "securityContext: {runAsUser: 1000, fsGroup: 2000, fsGroupChangePolicy: "+c.policy+"}"+
				volumePod("stat -c %g /v/f", "volumeMounts: [{name: v, mountPath: /v}]", "volume"))
			n.awaitPod(t, name, "succeed", inPhase(corev1.PodSucceeded))
			if got := n.kubectl(t, "logs", name); got != strconv.Itoa(c.group) {
				t.Errorf("pod %d, with the policy %s, sees a file of group %s, want %d", i, c.policy, got, c.group)
			}
			n.kubectl(t, "delete", "pod", name)
		}
	})
}

// A pod with `hostUsers: false` has users of its own: its root is none of the machine that it runs on, and owns what it makes in volumes.
func TestUserNamespace(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		pod := n.run(t, "p", `
hostUsers: false
securityContext: {fsGroup: 2000}
containers:
- {name: main, image: BUSYBOX, command: [sleep, "1000000"], volumeMounts: [{name: d, mountPath: /d}]}
volumes: [{name: d, emptyDir: {}}]`)
		for script, want := range map[string]string{
			"id -u": "0",
			"awk '{print $1, ($2 >= 65536), $3}' /proc/self/uid_map":                                 "0 1 65536",
			"touch /d/f /f; stat -c %u:%g /d/f /f":                                                   "0:2000\n0:0",
			"chown 1000:1000 /f; stat -c %u:%g /f":                                                   "1000:1000",
			"stat -c %g -L /var/run/secrets/kubernetes.io/serviceaccount/token":                      "2000",
			"[ $(wc -c </var/run/secrets/kubernetes.io/serviceaccount/token) -gt 100 ] && echo long": "long",
		} {
			if got := n.exec(t, "p", script); got != want {
				t.Errorf("%s prints %q, want %q", script, got, want)
			}
		}
		info, err := os.Stat(filepath.Join(n.Node().Root, "kubelet", "pods", string(pod.UID), "volumes/kubernetes.io~empty-dir/d/f"))
		if err != nil {
			t.Fatal(err)
		}
		if owner, ok := info.Sys().(*syscall.Stat_t); !ok || owner.Uid != 0 || owner.Gid != 2000 {
			t.Errorf("on the node the file belongs to %+v, want 0:2000", info.Sys())
		}
	})
}

// A pod that writes more to an emptyDir, or to a container's own root, than its limit is evicted.
func TestEviction(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.create(t, "p", `
containers:
- name: main
  image: BUSYBOX
  command: [sh, -c, "dd if=/dev/zero of=/d/big bs=1M count=20; sleep 1000000"]
  volumeMounts: [{name: d, mountPath: /d}]
volumes: [{name: d, emptyDir: {sizeLimit: 8Mi}}]`)
		n.create(t, "root", `
containers:
- name: main
  image: BUSYBOX
  command: [sh, -c, "dd if=/dev/zero of=/big bs=1M count=20; sleep 1000000"]
  resources: {limits: {ephemeral-storage: 8Mi}}`)
		for name, reason := range map[string]string{
			"p":    `Usage of EmptyDir volume "d" exceeds the limit "8Mi"`,
			"root": `Pod ephemeral local storage usage exceeds the total limit of containers 8Mi`,
		} {
			pod := n.awaitPod(t, name, "fail", inPhase(corev1.PodFailed))
			if pod.Status.Reason != "Evicted" || !strings.Contains(pod.Status.Message, reason) {
				t.Errorf("the pod failed with %s, want %s", describe(pod), reason)
			}
		}
	})
}

// Persistent volumes of the node keep what pods wrote: a file system, and a block device.
func TestPersistentVolumes(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		image := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(image, bytes.Repeat([]byte{1}, 8<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		device := loopDevice(t, image)
		for mode, path := range map[string]string{"Filesystem": t.TempDir(), "Block": device} {
			name := strings.ToLower(mode)
			n.apply(t, persistentVolume(n, name, mode, path))
			t.Cleanup(func() { kubectl(n.ctx, t, n.Cluster, "delete", "pv", n.name+"-"+name, "--wait=false") })
		}
		onVolume(t, n, "fs", "volumeMounts: [{name: v, mountPath: /v}]", "filesystem",
			"echo kept >/v/f", "grep -x kept /v/f")
		const devices = "volumeDevices: [{name: v, devicePath: /dev/block}]"
		onVolume(t, n, "block", devices, "block", "test -b /dev/block; echo kept | dd of=/dev/block bs=512 seek=3 conv=sync,fsync",
			"[ $(dd if=/dev/block bs=512 skip=3 count=1 | head -n 1) = kept ]")
		if got, err := os.ReadFile(image); err != nil || string(got[3*512:3*512+5]) != "kept\n" {
			t.Errorf("the device does not hold on the node what the pod wrote: %v", err)
		}
	})
}

// loopDevice makes a block device of a file.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Skipf("needs loop devices: losetup: %v, %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v, %s", device, err, out)
		}
	})
	return device
}

// onVolume runs scripts on a claim's volume, each in a pod of its own.
func onVolume(t *testing.T, n *namespace, prefix, mounts, claim string, scripts ...string) {
	t.Helper()
	for i, script := range scripts {
		name := fmt.Sprintf("%s-%d", prefix, i)
		n.create(t, name, volumePod(script, mounts, claim))
		if pod := n.awaitPod(t, name, "end", ended); pod.Status.Phase != corev1.PodSucceeded {
			t.Errorf("pod %s ended with %s\n%s", name, describe(pod), n.kubectl(t, "logs", name))
		}
		n.kubectl(t, "delete", "pod", name)
	}
}

func volumePod(script, mounts, claim string) string {
	return fmt.Sprintf(`
restartPolicy: Never
containers:
- name: main
  image: BUSYBOX
  command: [sh, -ec, %q]
  %s
volumes: [{name: v, persistentVolumeClaim: {claimName: %s}}]`, script, mounts, claim)
}

// persistentVolume is a volume of the node and the claim that gets it.
func persistentVolume(n *namespace, name, mode, path string) string {
	return strings.NewReplacer("PV", n.name+"-"+name, "CLAIM", name, "MODE", mode, "PATH", path, "NODE", cluster.NodeName).Replace(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: PV}
spec:
  storageClassName: ""
  volumeMode: MODE
  capacity: {storage: 8Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: PATH}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [NODE]}]}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: CLAIM}
spec:
  storageClassName: ""
  volumeName: PV
  volumeMode: MODE
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 8Mi}}
`)
}
