package cluster_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/vmruntime/vmruntime/test/cluster"
)

// Init containers run one after the other, a sidecar among them serves those after it and outlives the main container.
func TestInitContainersAndSidecars(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.create(t, "p", `
restartPolicy: Never
initContainers:
- {name: one, image: BUSYBOX, command: [sh, -c, echo one >>/d/f], volumeMounts: &d [{name: d, mountPath: /d}]}
- name: side
  image: BUSYBOX
  restartPolicy: Always
  command: [sh, -c, "trap 'echo ended; exit' TERM; mkdir /w; cp /d/f /w; httpd -p 8080 -h /w; echo side >>/d/f; while :; do sleep 0.2; done"]
  startupProbe: {httpGet: {path: /f, port: 8080}, periodSeconds: 1, failureThreshold: 100}
  volumeMounts: *d
- {name: two, image: BUSYBOX, command: [sh, -c, "wget -q -O- localhost:8080/f && echo two >>/d/f"], volumeMounts: *d}
containers:
- {name: main, image: BUSYBOX, command: [sh, -c, cat /d/f], volumeMounts: *d}
volumes: [{name: d, emptyDir: {}}]`)
		n.awaitPod(t, "p", "succeed", inPhase(corev1.PodSucceeded))
		for container, want := range map[string]string{"two": "one", "main": "one\nside\ntwo", "side": "ended"} {
			if got := n.kubectl(t, "logs", "p", "-c", container); got != want {
				t.Errorf("the log of %s is %q, want %q", container, got, want)
			}
		}
	})
}

// Hooks of each type tell a server that they run; what preStop does comes before the container's SIGTERM.
func TestHooks(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		server := n.run(t, "server", `
containers:
- {name: main, image: AGNHOST, args: [netexec], readinessProbe: {httpGet: {port: 8080}}}`)
		tell := "wget -q -O /dev/null http://" + server.Status.PodIP + ":8080/echo?msg="
		n.run(t, "p", strings.NewReplacer("TELL", tell, "HOST", server.Status.PodIP).Replace(`
terminationGracePeriodSeconds: 100
containers:
- name: exec
  image: BUSYBOX
  command: [sh, -c, "trap 'TELLterm-exec; exit' TERM; while :; do sleep 0.2; done"]
  lifecycle:
    postStart: {exec: {command: [sh, -c, "TELLstart-exec"]}}
    preStop: {exec: {command: [sh, -c, "TELLstop-exec"]}}
- name: http
  image: BUSYBOX
  command: [sh, -c, "trap 'TELLterm-http; exit' TERM; while :; do sleep 0.2; done"]
  lifecycle:
    postStart: {httpGet: {host: HOST, port: 8080, path: "/echo?msg=start-http"}}
    preStop: {httpGet: {host: HOST, port: 8080, path: "/echo?msg=stop-http"}}
- name: sleep
  image: BUSYBOX
  command: [sh, -c, "trap 'TELLterm-sleep; exit' TERM; while :; do sleep 0.2; done"]
  lifecycle:
    postStart: {sleep: {seconds: 1}}
    preStop: {sleep: {seconds: 1}}`))
		n.awaitLogs(t, "server", "main", "start-exec", "start-http")
		n.kubectl(t, "delete", "pod", "p")
		n.awaitLogs(t, "server", "main", "stop-exec", "stop-http", "term-exec", "term-http", "term-sleep")
		log := n.kubectl(t, "logs", "server")
		for _, kind := range []string{"exec", "http"} {
			if strings.Index(log, "stop-"+kind) > strings.Index(log, "term-"+kind) {
				t.Errorf("preStop by %s ran after SIGTERM:\n%s", kind, log)
			}
		}
	})
}

// Probes of each type pass in one pod, and fail in another: its containers are restarted, and a probe that takes
// longer than it may is killed.
func TestProbes(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.run(t, "good", `
containers:
- name: web
  image: AGNHOST
  args: [netexec]
  startupProbe: {exec: {command: [sh, -c, "touch /tmp/probed"]}, timeoutSeconds: 30, failureThreshold: 100}
  readinessProbe: {httpGet: {path: /, port: 8080}, timeoutSeconds: 30}
  livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 100} # the startup probe does not wait for the server
- name: grpc
  image: AGNHOST
  args: [grpc-health-checking, --http-port=8082]
  startupProbe: {grpc: {port: 5000}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 100}
  readinessProbe: {grpc: {port: 5000}, periodSeconds: 1, timeoutSeconds: 30}`)
		n.exec(t, "good", "test -e /tmp/probed")
		n.create(t, "bad", `
containers:
- &c
  name: exec
  image: BUSYBOX
  command: [sh, -c, "trap exit TERM; while :; do sleep 0.2; done"]
  livenessProbe: {exec: {command: [sleep, "1000"]}, periodSeconds: 1, timeoutSeconds: 1, failureThreshold: 2}
- {<<: *c, name: http, livenessProbe: {httpGet: {port: 7001}, periodSeconds: 1, failureThreshold: 1}}
- {<<: *c, name: tcp, livenessProbe: {tcpSocket: {port: 7001}, periodSeconds: 1, failureThreshold: 1}}
- {<<: *c, name: grpc, startupProbe: {grpc: {port: 7001}, periodSeconds: 1, failureThreshold: 1}}
- {<<: *c, name: slow, livenessProbe: null, readinessProbe: {exec: {command: [sh, -c, "echo probe >>/tmp/probes; exec sleep 2000"]}, periodSeconds: 1, timeoutSeconds: 1}}`)
		n.awaitPod(t, "bad", "be restarted", func(p *corev1.Pod) bool {
			return len(p.Status.ContainerStatuses) == 5 && !slices.ContainsFunc(p.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool {
				return (s.RestartCount == 0) != (s.Name == "slow")
			})
		})
		n.await(t, "some probes", func() error {
			_, err := n.Kubectl(n.ctx, "-n", n.name, "exec", "bad", "-c", "slow", "--", "sh", "-c", "[ $(wc -l </tmp/probes) -ge 3 ]")
			return err
		})
		if left, _ := strconv.Atoi(n.kubectl(t, "exec", "bad", "-c", "slow", "--", "sh", "-c", "grep -l '^sleep.2000' /proc/[0-9]*/cmdline | wc -l")); left > 1 {
			t.Errorf("%d probes that timed out still run", left)
		}
		if good := n.awaitPod(t, "good", "be ready", ready); status(t, good, "web").RestartCount+status(t, good, "grpc").RestartCount > 0 {
			t.Errorf("a pod whose probes pass: %s", describe(good))
		}
	})
}

// How containers end, what is told about it, and when they are started again.
func TestTermination(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.create(t, "never", `
restartPolicy: Never
containers:
- {name: file, image: BUSYBOX, command: [sh, -c, "echo -n told >/dev/termination-log"]}
- {name: elsewhere, image: BUSYBOX, terminationMessagePath: /tmp/m, command: [sh, -c, "echo -n told >/tmp/m; exit 4"]}
- {name: log, image: BUSYBOX, terminationMessagePolicy: FallbackToLogsOnError, command: [sh, -c, "echo logged; exit 3"]}
- {name: missing, image: BUSYBOX, command: [/no/such/program]}`)
		pod := n.awaitPod(t, "never", "fail", ended)
		for container, want := range map[string]corev1.ContainerStateTerminated{
			"file":      {Reason: "Completed", Message: "told"},
			"elsewhere": {Reason: "Error", Message: "told", ExitCode: 4},
			"log":       {Reason: "Error", Message: "logged\n", ExitCode: 3},
		} {
			got := status(t, pod, container).State.Terminated
			if got == nil || got.Reason != want.Reason || got.Message != want.Message || got.ExitCode != want.ExitCode {
				t.Errorf("container %s ended with %v, want %v", container, got, want)
			}
		}
		if got := status(t, pod, "missing").State.Terminated; got == nil || got.ExitCode == 0 || !strings.Contains(got.Message, "/no/such/program") {
			t.Errorf("a container whose program is missing ended with %v", got)
		}
		n.create(t, "on-failure", `
restartPolicy: OnFailure
containers:
- {name: main, image: BUSYBOX, command: [sh, -c, "[ -e /d/f ] || { touch /d/f; exit 1; }"], volumeMounts: [{name: d, mountPath: /d}]}
volumes: [{name: d, emptyDir: {}}]`)
		if pod := n.awaitPod(t, "on-failure", "succeed", inPhase(corev1.PodSucceeded)); status(t, pod, "main").RestartCount != 1 {
			t.Errorf("the pod that failed once: %s", describe(pod))
		}
		n.create(t, "deadline", "activeDeadlineSeconds: 1"+sleeper)
		if pod := n.awaitPod(t, "deadline", "fail", inPhase(corev1.PodFailed)); pod.Status.Reason != "DeadlineExceeded" {
			t.Errorf("the pod that took too long: %s", describe(pod))
		}
	})
}

// Memory that a container, or a pod as a whole, may not use ends the container that wants it, and tells why.
func TestOOM(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		// A kernel refuses at once what is more than all of its memory, and kills no one.
		const grow = `BEGIN { s = sprintf("%1000000s", ""); while (1) a[n++] = s n }`
		n.create(t, "container", strings.ReplaceAll(`
restartPolicy: Never
containers:
- {name: main, image: BUSYBOX, command: [awk, 'GROW'], resources: {limits: {memory: 64Mi}}}
- {name: other, image: BUSYBOX, command: [sleep, "1000000"], resources: {limits: {memory: 64Mi}}}`, "GROW", grow))
		n.create(t, "pod", strings.ReplaceAll(`
restartPolicy: Never
resources: {limits: {memory: 128Mi}}
containers:
- {name: main, image: BUSYBOX, command: [awk, 'GROW']}`, "GROW", grow))
		for _, name := range []string{"container", "pod"} {
			pod := n.awaitPod(t, name, "have a container that ended", func(p *corev1.Pod) bool {
				return len(p.Status.ContainerStatuses) > 0 && status(t, p, "main").State.Terminated != nil
			})
			if got := status(t, pod, "main").State.Terminated; got.Reason != "OOMKilled" || got.ExitCode != 137 {
				t.Errorf("the container that used too much memory of its %s ended with %v", name, got)
			}
		}
		if out := n.kubectl(t, "exec", "container", "-c", "other", "--", "echo", "lives"); out != "lives" {
			t.Errorf("its neighbour prints %q", out)
		}
	})
}

// A container is stopped with the signal that it asks for, and its status tells which one that is.
func TestStopSignals(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		dir := t.TempDir()
		pod := n.run(t, "p", strings.ReplaceAll(`
os: {name: linux}
terminationGracePeriodSeconds: 300
containers:
- &c
  name: own
  image: BUSYBOX
  command: [sh, -c, "for s in TERM USR1; do trap \"echo $s >/d/$NAME; exit\" $s; done; echo ready; while :; do sleep 0.2; done"]
  env: [{name: NAME, value: own}]
  lifecycle: {stopSignal: SIGUSR1}
  volumeMounts: [{name: d, mountPath: /d}]
- {<<: *c, name: usual, env: [{name: NAME, value: usual}], lifecycle: null}
volumes: [{name: d, hostPath: {path: DIR, type: Directory}}]`, "DIR", dir))
		n.awaitLogs(t, "p", "own", "ready")
		n.awaitLogs(t, "p", "usual", "ready")
		n.kubectl(t, "delete", "pod", "p")
		for container, want := range map[string]corev1.Signal{"own": "SIGUSR1", "usual": "SIGTERM"} {
			if got := status(t, pod, container).StopSignal; got == nil || *got != want {
				t.Errorf("the status of %s says that its stop signal is %v, want %s", container, got, want)
			}
			got, err := os.ReadFile(filepath.Join(dir, container))
			if "SIG"+strings.TrimSpace(string(got)) != string(want) {
				t.Errorf("container %s was stopped with %q (%v), want %s", container, got, err, want)
			}
		}
	})
}

// A process that dies on the node, a container's first or a VM's QEMU, is told as it was, and the pod goes on by its policy.
func TestKilledOnNode(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		for _, policy := range []string{"Always", "Never"} {
			name := strings.ToLower(policy)
			pod := n.run(t, name, "restartPolicy: "+policy+sleeper)
			if err := syscall.Kill(n.nodePID(t, pod), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			ended := func(p *corev1.Pod) *corev1.ContainerStateTerminated {
				if policy == "Never" {
					return status(t, p, "main").State.Terminated
				}
				return status(t, p, "main").LastTerminationState.Terminated
			}
			after := n.awaitPod(t, name, "have ended, and go on if it is to", func(p *corev1.Pod) bool {
				return ended(p) != nil && ready(p) == (policy == "Always")
			})
			want := corev1.ContainerStateTerminated{ExitCode: 137, Reason: "Error"}
			if n.vm {
				want.Reason = "VMFailed"
			}
			if got := ended(after); got.ExitCode != want.ExitCode || got.Reason != want.Reason || n.vm && got.Message == "" {
				t.Errorf("with restartPolicy %s the container ended with %v, want %v", policy, got, want)
			}
			if policy == "Always" && after.Status.PodIP != pod.Status.PodIP {
				t.Errorf("the pod had the address %s and has %s", pod.Status.PodIP, after.Status.PodIP)
			}
		}
	})
}

// nodePID is the process on the node by which a pod lives: QEMU, or the first of the container `main`.
func (n *namespace) nodePID(t *testing.T, pod *corev1.Pod) int {
	t.Helper()
	_, id, _ := strings.Cut(status(t, pod, "main").ContainerID, "://")
	args := []string{"inspect", id}
	if n.vm {
		sandboxes, err := n.Node().Crictl(n.ctx, "pods", "-q", "--no-trunc", "--namespace", n.name, "--name", "^"+pod.Name+"$")
		if err != nil {
			t.Fatal(err)
		}
		args = []string{"inspectp", strings.TrimSpace(sandboxes)}
	}
	out, err := n.Node().Crictl(n.ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	var told struct {
		Info struct {
			PID   int
			Guest struct{ QEMU struct{ PID int } }
		}
	}
	if err := json.Unmarshal([]byte(out), &told); err != nil {
		t.Fatalf("crictl inspect: %v, %s", err, out)
	}
	pid := max(told.Info.PID, told.Info.Guest.QEMU.PID)
	if pid <= 1 {
		t.Fatalf("crictl inspect names no process: %s", out)
	}
	return pid
}

// A VM that takes more memory than its pod has, because the RuntimeClass tells too little overhead, is killed by the node's
// kernel: its containers say so and start again, and nothing else on the node is touched.
func TestVMOutOfMemory(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, true)
	n.apply(t, `
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: NAMESPACE}
handler: vm
overhead: {podFixed: {memory: 64Mi}}`)
	t.Cleanup(func() { kubectl(n.ctx, t, n.Cluster, "delete", "runtimeclass", n.name) })
	n.vm = false
	n.run(t, "neighbor", sleeper)
	n.create(t, "p", strings.ReplaceAll(`
runtimeClassName: NAMESPACE
restartPolicy: OnFailure
containers:
- name: main
  image: BUSYBOX
  command: [sh, -c, "[ -e /d/again ] || { touch /d/again; dd if=/dev/zero of=/dev/null bs=220M count=1; }; sleep 1000000"]
  resources: {limits: {memory: 256Mi}}
  volumeMounts: [{name: d, mountPath: /d}]
volumes: [{name: d, emptyDir: {}}]`, "NAMESPACE", n.name))
	pod := n.awaitPod(t, "p", "run again", func(p *corev1.Pod) bool { return ready(p) && status(t, p, "main").RestartCount > 0 })
	got := status(t, pod, "main")
	if end := got.LastTerminationState.Terminated; got.RestartCount != 1 || end == nil || end.Reason != "OOMKilled" || end.ExitCode != 137 ||
		!strings.Contains(end.Message, "RuntimeClass") {
		t.Errorf("the pod whose VM had no memory: %s, last %v", describe(pod), end)
	}
	if neighbor := n.awaitPod(t, "neighbor", "be ready", ready); status(t, neighbor, "main").RestartCount != 0 || n.exec(t, "neighbor", "echo lives") != "lives" {
		t.Errorf("its neighbor: %s", describe(neighbor))
	}
	if node := n.kubectl(t, "get", "node", cluster.NodeName, "-o", `jsonpath={range .status.conditions[*]}{.type}={.status} {end}`); !strings.Contains(node, "MemoryPressure=False") || !strings.Contains(node, "Ready=True") {
		t.Errorf("the node is %s", node)
	}
}

// A file in the kubelet's directory is a pod; the pod goes with the file.
func TestStaticPod(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		manifest := strings.Replace(n.expand(podManifest("static", sleeper)), "metadata: {", "metadata: {namespace: "+n.name+", ", 1)
		file := filepath.Join(n.ManifestDir(), n.name+".yaml")
		t.Cleanup(func() {
			if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
		})
		if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
			t.Fatal(err)
		}
		const name = "static-" + cluster.NodeName
		n.awaitPod(t, name, "be ready", ready)
		if out := n.exec(t, name, "hostname"); out != name {
			t.Errorf("hostname prints %q, want %q", out, name)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		n.await(t, "the static pod to go", func() error {
			_, err := n.Client().CoreV1().Pods(n.name).Get(n.ctx, name, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return nil
			}
			return errors.Join(err, errors.New("it is there"))
		})
	})
}

// A running container gets more and less CPU and memory, or the pod says why not. Its class of service is told.
func TestResizeAndQoS(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		const spec = `
containers:
- name: main
  image: BUSYBOX
  command: [sleep, "1000000"]
  resources: {requests: {cpu: 100m, memory: 64Mi}, limits: {cpu: 500m, memory: 64Mi}}`
		pod := n.run(t, "p", spec)
		if pod.Status.QOSClass != corev1.PodQOSBurstable {
			t.Errorf("the class of service is %s, want Burstable", pod.Status.QOSClass)
		}
		for _, limits := range []struct{ cpu, memory string }{{"600m", "64Mi"}, {"600m", "96Mi"}, {"400m", "80Mi"}} {
			patch := fmt.Sprintf(`{"spec":{"containers":[{"name":"main","resources":{"limits":{"cpu":%q,"memory":%q}}}]}}`, limits.cpu, limits.memory)
			n.kubectl(t, "patch", "pod", "p", "--subresource=resize", "--patch", patch)
			var refused string
			n.awaitPod(t, "p", "be resized or refuse it", func(p *corev1.Pod) bool {
				refused = resizeError(p)
				r := status(t, p, "main").Resources
				return refused != "" || r != nil && r.Limits.Cpu().String() == limits.cpu && r.Limits.Memory().String() == limits.memory
			})
			if refused != "" {
				t.Errorf("resize to %v is refused: %s", limits, refused)
			}
		}
		if restarts := status(t, n.awaitPod(t, "p", "be ready", ready), "main").RestartCount; restarts != 0 {
			t.Errorf("a resize restarted the container %d times", restarts)
		}
	})
}

// resizeError is why a pod is not resized: "" when it is or may yet be.
func resizeError(p *corev1.Pod) string {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodResizePending || c.Type == corev1.PodResizeInProgress && c.Reason == corev1.PodReasonError {
			return c.Message
		}
	}
	return ""
}
