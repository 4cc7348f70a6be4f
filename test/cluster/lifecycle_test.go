package cluster_test

import (
	"cmp"
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
	"time"

	"github.com/containerd/cgroups/v3"
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

// A sidecar that fails while the main container runs, and one that its probe finds bad, start again and leave the others alone.
func TestSidecarRestart(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.create(t, "p", `
initContainers:
- name: fails
  image: BUSYBOX
  restartPolicy: Always
  command: [sh, -c, "[ -e /d/again ] && exec sleep 1000000; touch /d/again; until [ -e /d/main ]; do sleep 0.2; done; exit 3"]
  volumeMounts: &d [{name: d, mountPath: /d}]
- name: probed
  image: BUSYBOX
  restartPolicy: Always
  command: [sleep, "1000000"]
  livenessProbe: {exec: {command: [sh, -c, "[ -e /d/probed ] || { touch /d/probed; exit 1; }"]}, periodSeconds: 1, timeoutSeconds: 60, failureThreshold: 1}
  volumeMounts: *d
containers:
- {name: main, image: BUSYBOX, command: [sh, -c, touch /d/main; exec sleep 1000000], volumeMounts: *d}
volumes: [{name: d, emptyDir: {}}]`)
		pod := n.awaitPod(t, "p", "have both sidecars run again", func(p *corev1.Pod) bool {
			return ready(p) && !slices.ContainsFunc(p.Status.InitContainerStatuses, func(s corev1.ContainerStatus) bool {
				return s.RestartCount != 1 || s.State.Running == nil
			})
		})
		if last := pod.Status.InitContainerStatuses[0].LastTerminationState.Terminated; last == nil || last.ExitCode != 3 {
			t.Errorf("the sidecar that fails with 3 ended with %v", last)
		}
		if status(t, pod, "main").RestartCount != 0 {
			t.Errorf("the main container is restarted with its sidecars: %s", describe(pod))
		}
	})
}

// Hooks of each type tell a server that they run, or take their time; what preStop does comes before the container's SIGTERM.
func TestHooks(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		server := n.run(t, "server", `
containers:
- {name: main, image: AGNHOST, args: [netexec], readinessProbe: {httpGet: {port: 8080}}}`)
		tell := "wget -q -O /dev/null http://" + server.Status.PodIP + ":8080/echo?msg="
		pod := n.run(t, "p", strings.NewReplacer("TELL", tell, "HOST", server.Status.PodIP).Replace(`
terminationGracePeriodSeconds: 100
containers:
- name: sleep
  image: BUSYBOX
  command: [sh, -c, "trap 'TELLterm-sleep; exit' TERM; while :; do sleep 0.2; done"]
  lifecycle:
    postStart: {sleep: {seconds: 6}}
    preStop: {sleep: {seconds: 6}}
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
    preStop: {httpGet: {host: HOST, port: 8080, path: "/echo?msg=stop-http"}}`))
		n.awaitLogs(t, "server", "main", "start-exec", "start-http")
		// The kubelet starts a container when the hook of that before it has ended.
		if began := startedAt(t, pod, "sleep"); startedAt(t, pod, "exec").Sub(began) < 6*time.Second {
			t.Errorf("the container after that whose postStart sleeps 6 s from %v on started at %v", began, startedAt(t, pod, "exec"))
		}
		deleted := time.Now()
		n.kubectl(t, "delete", "pod", "p")
		n.awaitLogs(t, "server", "main", "stop-exec", "stop-http", "term-exec", "term-http", "term-sleep")
		log := n.kubectl(t, "logs", "server")
		for _, kind := range []string{"exec", "http"} {
			if strings.Index(log, "stop-"+kind) > strings.Index(log, "term-"+kind) {
				t.Errorf("preStop by %s ran after SIGTERM:\n%s", kind, log)
			}
		}
		if at := loggedAt(t, n, "server", "term-sleep"); at.Sub(deleted) < 6*time.Second {
			t.Errorf("the container whose preStop sleeps 6 s had SIGTERM %v after the pod was deleted", at.Sub(deleted))
		}
	})
}

// startedAt is when a pod's container that runs has started.
func startedAt(t *testing.T, pod *corev1.Pod, container string) time.Time {
	t.Helper()
	running := status(t, pod, container).State.Running
	if running == nil {
		t.Fatalf("container %s does not run: %s", container, describe(pod))
	}
	return running.StartedAt.Time
}

// loggedAt is when the first line that holds a text came into the log of a pod's only container.
func loggedAt(t *testing.T, n *namespace, pod, text string) time.Time {
	t.Helper()
	for line := range strings.Lines(n.kubectl(t, "logs", pod, "--timestamps")) {
		if stamp, rest, _ := strings.Cut(line, " "); strings.Contains(rest, text) {
			at, err := time.Parse(time.RFC3339Nano, stamp)
			if err != nil {
				t.Fatal(err)
			}
			return at
		}
	}
	t.Fatalf("the log of %s has no line with %q", pod, text)
	return time.Time{}
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
		n.create(t, "crash", `
containers:
- {name: main, image: BUSYBOX, command: [sh, -c, exit 5]}`)
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
		n.create(t, "deadline", `
terminationGracePeriodSeconds: 6
containers:
- {name: main, image: BUSYBOX, command: [sh, -c, "trap 'echo asked' TERM; echo runs; while :; do sleep 0.2; done"]}`)
		n.awaitLogs(t, "deadline", "main", "runs")
		n.kubectl(t, "patch", "pod", "deadline", "-p", `{"spec":{"activeDeadlineSeconds":1}}`)
		pod = n.awaitPod(t, "deadline", "fail", ended)
		if pod.Status.Reason != "DeadlineExceeded" {
			t.Errorf("the pod that took too long: %s", describe(pod))
		}
		asked := loggedAt(t, n, "deadline", "asked")
		// The status tells whole seconds.
		if got := status(t, pod, "main").State.Terminated; got.ExitCode != 137 || got.FinishedAt.Sub(asked) < 5*time.Second {
			t.Errorf("the container that ignored SIGTERM at %v, with 6 s of grace, ended with %v", asked, got)
		}
		backsOff(t, n, "crash")
	})
}

// backsOff waits for a pod whose container fails again and again to be started again, and to wait before it.
func backsOff(t *testing.T, n *namespace, name string) {
	t.Helper()
	var restarts int32
	for range 2 {
		pod := n.awaitPod(t, name, fmt.Sprintf("wait after more than %d restarts", restarts), func(p *corev1.Pod) bool {
			if len(p.Status.ContainerStatuses) == 0 {
				return false
			}
			s := status(t, p, "main")
			return s.RestartCount > restarts && s.State.Waiting != nil && s.State.Waiting.Reason == "CrashLoopBackOff"
		})
		s := status(t, pod, "main")
		if last := s.LastTerminationState.Terminated; last == nil || last.ExitCode != 5 {
			t.Errorf("the container that fails with 5 again and again: %s, last %v", describe(pod), last)
		}
		restarts = s.RestartCount
	}
}

// Memory that a container, or a pod as a whole, may not use ends the container that wants it, tells why, and leaves its neighbour alone.
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
- {name: main, image: BUSYBOX, command: [awk, 'GROW']}
- {name: other, image: BUSYBOX, command: [sleep, "1000000"]}`, "GROW", grow))
		for _, name := range []string{"container", "pod"} {
			pod := n.awaitPod(t, name, "have a container that ended and another that has started", func(p *corev1.Pod) bool {
				return len(p.Status.ContainerStatuses) > 0 && status(t, p, "main").State.Terminated != nil && status(t, p, "other").State.Waiting == nil
			})
			if got := status(t, pod, "main").State.Terminated; got.Reason != "OOMKilled" || got.ExitCode != 137 {
				t.Errorf("the container that used too much memory of its %s ended with %v", name, got)
			}
			if out := n.kubectl(t, "exec", name, "-c", "other", "--", "echo", "lives"); out != "lives" {
				t.Errorf("the neighbour in its %s prints %q", name, out)
			}
			if name == "pod" {
				podLimitRaised(t, n, pod)
			}
		}
	})
}

// podLimitRaised raises a pod's limit: the memory of a VM, which was that of the limit, and the pod's cgroup on the node follow.
func podLimitRaised(t *testing.T, n *namespace, pod *corev1.Pod) {
	t.Helper()
	const before, after, guest = 128 << 20, 256 << 20, 64 << 20 // the last is vm.guest_overhead
	inVM := func() int64 {
		total, err := strconv.ParseInt(n.kubectl(t, "exec", pod.Name, "-c", "other", "--", "awk", "/^MemTotal/ { print $2 }", "/proc/meminfo"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return total << 10
	}
	if got := inVM(); n.vm && got > before+guest {
		t.Errorf("the VM of a pod that may have %d bytes has %d", before, got)
	}
	n.kubectl(t, "patch", "pod", pod.Name, "--subresource=resize", "--patch", `{"spec":{"resources":{"limits":{"memory":"256Mi"}}}}`)
	file := filepath.Join("/sys/fs/cgroup/memory", podCgroup(n, pod), "memory.limit_in_bytes")
	if cgroups.Mode() == cgroups.Unified {
		file = filepath.Join("/sys/fs/cgroup", podCgroup(n, pod), "memory.max")
	}
	n.await(t, "the pod's cgroup to have the new limit", func() error {
		limit, err := os.ReadFile(file)
		if want := strconv.FormatInt(after+pod.Spec.Overhead.Memory().Value(), 10); err == nil && strings.TrimSpace(string(limit)) != want {
			err = fmt.Errorf("it has %s, want %s", limit, want)
		}
		return err
	})
	if !n.vm {
		return
	}
	n.await(t, "the VM to have the new limit's memory", func() error {
		if got := inVM(); got <= before+guest || got > after+guest {
			return fmt.Errorf("it has %d bytes", got)
		}
		return nil
	})
}

// podCgroup is a pod's cgroup on the node, below that of its class of service.
func podCgroup(n *namespace, pod *corev1.Pod) string {
	class := map[corev1.PodQOSClass]string{corev1.PodQOSBurstable: "burstable", corev1.PodQOSBestEffort: "besteffort"}[pod.Status.QOSClass]
	return filepath.Join(n.Node().CgroupParent(), "kubepods", class, "pod"+string(pod.UID))
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

// A running container gets more and less CPU and memory, a VM also more than it began with. What it cannot have is refused with
// a sentence. A pod's class of service is told, and its cgroup is that class's.
func TestResizeAndQoS(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		const spec = `
containers:
- name: main
  image: BUSYBOX
  command: [sleep, "1000000"]
  resources: {requests: {cpu: 100m, memory: 64Mi}, limits: {cpu: 500m, memory: 64Mi}}`
		pod := n.run(t, "p", spec)
		n.ofClass(t, pod, corev1.PodQOSBurstable)
		for _, limits := range []struct{ cpu, memory, guest string }{
			{cpu: "600m", memory: "64Mi"}, {cpu: "600m", memory: "96Mi"}, {"1500m", "256Mi", "2\nmore"}, {"400m", "80Mi", "1\nless"},
		} {
			n.resize(t, limits.cpu, limits.memory, "64Mi")
			var refused string
			var r corev1.ResourceList
			n.awaitPod(t, "p", "be resized or refuse it", func(p *corev1.Pod) bool {
				refused = resizeError(p)
				if now := status(t, p, "main").Resources; now != nil {
					r = now.Limits
				}
				return refused != "" || r.Cpu().String() == limits.cpu && r.Memory().String() == limits.memory
			})
			if refused != "" {
				t.Fatalf("resize to %v is refused: %s", limits, refused)
			}
			n.awaitOutput(t, "p", cgroupLimits, fmt.Sprintf("%d %d", r.Cpu().MilliValue()*100, r.Memory().Value()))
			if n.vm && limits.guest != "" {
				n.awaitOutput(t, "p", guestSize, limits.guest)
			}
		}
		notResized(t, n)
		if restarts := status(t, n.awaitPod(t, "p", "be ready", ready), "main").RestartCount; restarts != 0 {
			t.Errorf("a resize restarted the container %d times", restarts)
		}
		n.ofClass(t, n.run(t, "guaranteed", strings.Replace(spec, "requests: {cpu: 100m, memory: 64Mi}, ", "", 1)), corev1.PodQOSGuaranteed)
		n.ofClass(t, n.run(t, "besteffort", sleeper), corev1.PodQOSBestEffort)
	})
}

// ofClass says that a pod is of a class of service, and that what it lives by on the node is in a cgroup of that class.
func (n *namespace) ofClass(t *testing.T, pod *corev1.Pod, want corev1.PodQOSClass) {
	t.Helper()
	if pod.Status.QOSClass != want {
		t.Errorf("the class of service of %s is %s, want %s", pod.Name, pod.Status.QOSClass, want)
	}
	groups, unified, err := cgroups.ParseCgroupFileUnified(fmt.Sprintf("/proc/%d/cgroup", n.nodePID(t, pod)))
	if err != nil {
		t.Fatal(err)
	}
	for _, controller := range []string{"cpu", "memory"} {
		if got := cmp.Or(groups[controller], unified); !strings.Contains(got, podCgroup(n, pod)+"/") {
			t.Errorf("the %s of %s is that of %s, want one below %s", controller, pod.Name, got, podCgroup(n, pod))
		}
	}
}

// resize asks for other limits of the pod `p`, and for so much memory to be set aside.
func (n *namespace) resize(t *testing.T, cpu, memory, requested string) {
	t.Helper()
	n.kubectl(t, "patch", "pod", "p", "--subresource=resize", "--patch", fmt.Sprintf(
		`{"spec":{"containers":[{"name":"main","resources":{"limits":{"cpu":%q,"memory":%q},"requests":{"memory":%q}}}]}}`, cpu, memory, requested))
}

// notResized asks for less memory than a container uses, and for a VM that is larger than any may be: the pod tells why it is
// refused, and forgets it when what it has is asked for again.
func notResized(t *testing.T, n *namespace) {
	t.Helper()
	n.exec(t, "p", "dd if=/dev/zero of=/dev/shm/f bs=1M count=40")
	for _, c := range []struct {
		memory, requested, want string
		refused                 bool
	}{
		{"20Mi", "16Mi", `container "main" memory limit (20971520) below current usage`, true},
		{"100Gi", "64Mi", "memory of the VM would be 107", n.vm},
	} {
		if !c.refused {
			continue
		}
		n.resize(t, "400m", c.memory, c.requested)
		n.awaitPod(t, "p", "refuse "+c.memory, func(p *corev1.Pod) bool { return strings.Contains(resizeError(p), c.want) })
		n.resize(t, "400m", "80Mi", "64Mi")
		n.awaitPod(t, "p", "forget it", func(p *corev1.Pod) bool {
			return resizeError(p) == "" && status(t, p, "main").Resources.Limits.Memory().String() == "80Mi"
		})
	}
	n.awaitOutput(t, "p", cgroupLimits, fmt.Sprintf("%d %d", 400*100, 80<<20))
}

// cgroupLimits tells a container's CPU time out of 100 ms, and its memory, as the kernel has them: that of the node, or the guest's.
const cgroupLimits = `cd /sys/fs/cgroup; if [ -e memory ]; then echo $(cat cpu/cpu.cfs_quota_us memory/memory.limit_in_bytes)
else echo $(cut -d' ' -f1 cpu.max) $(cat memory.max); fi`

// guestSize tells the processors of a VM, and whether it has the memory of a container's limit of 256Mi: it began with half of that.
const guestSize = `grep -c ^processor /proc/cpuinfo; [ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -ge $((256*1024)) ] && echo more || echo less`

// resizeError is why a pod is not resized: "" when it is or may yet be.
func resizeError(p *corev1.Pod) string {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodResizePending || c.Type == corev1.PodResizeInProgress && c.Reason == corev1.PodReasonError {
			return c.Message
		}
	}
	return ""
}
