package cluster_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/vmruntime/vmruntime/test/images"
	"github.com/vmruntime/vmruntime/test/tools"
)

// What the tiny machine does when it has booted, by lines of a script; see test/images/tiny.
const (
	// online gives it the pod's addresses.
	online = "modprobe virtio_net\nuntil net 46 | grep -q ^route=default; do sleep 1; done\n"
	// mounted shows the pod's volumes below /mnt.
	mounted = "modprobe virtiofs\nmount -t virtiofs shares /mnt\n"
	// agent runs the runtime's own agent, which is one of them.
	agent = mounted + "/mnt/agent/vmagent machine </dev/null >/dev/null 2>&1 &\n"
	// named has the machine called what its pod is.
	named = "hostname $(sed -n 's/^local-hostname: *//p' /run/seed/meta-data)\n"
)

// machine is a template of a pod with a tiny machine. In its fields of the pod and of the container TINY is the image; the script runs at each boot.
func machine(script, pod, container string) string {
	return strings.NewReplacer("SCRIPT", fmt.Sprintf("%q", "#!/bin/sh\n"+script), "POD", indented(pod, 2), "CONTAINER", indented(container, 4)).Replace(`
metadata:
  labels: {app: APP}
  annotations: {vmruntime.io/user-data: SCRIPT, vmruntime.io/guest-agent-install: "AGENT"}
spec:
  CLASS
  automountServiceAccountToken: false
  POD
  containers:
  - name: main
    image: TINY
    resources: {limits: {memory: 192Mi}}
    CONTAINER`)
}

// indented moves all lines but the first to the right.
func indented(text string, by int) string {
	return strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n"+strings.Repeat(" ", by))
}

// expandMachine puts a name into a template, and into manifests with it.
func expandMachine(name, manifest string) string {
	return strings.NewReplacer("APP", name, "TINY", images.Tiny, "AGENT", fmt.Sprint(strings.Contains(manifest, "vmagent"))).Replace(manifest)
}

// createMachine makes a pod of a template.
func (n *namespace) createMachine(t *testing.T, name, template string) {
	t.Helper()
	n.apply(t, expandMachine(name, "apiVersion: v1\nkind: Pod\n"+strings.Replace(strings.TrimSpace(template), "metadata:", "metadata:\n  name: APP", 1)))
}

// client is a pod, of containers, that has curl.
func (n *namespace) client(t *testing.T) {
	t.Helper()
	ordinary := &namespace{Cluster: n.Cluster, ctx: n.ctx, name: n.name}
	ordinary.run(t, "client", strings.Replace(sleeper, `BUSYBOX, command: [sleep, "1000000"]`, "AGNHOST, args: [pause]", 1))
}

// A machine is a pod like another to all that kubectl does, and to a Service.
func TestMachine(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, true)
	n.createMachine(t, "p", machine(online+agent+"serve", "", `
stdin: true
startupProbe: {exec: {command: [test, -e, /run/late]}, periodSeconds: 5, timeoutSeconds: 30, failureThreshold: 60}
readinessProbe: {httpGet: {port: 8080}, timeoutSeconds: 30}`))
	n.awaitPod(t, "p", "be ready", ready)
	n.awaitLogs(t, "p", "main", "tiny: up boot=1 ", "serving 8080 8081")
	n.await(t, "our agent to run what has input", func() error {
		cmd := n.command("exec", "-i", "p", "--", "cat")
		cmd.Stdin = strings.NewReader("input")
		out, err := cmd.CombinedOutput()
		if err == nil && string(out) != "input" {
			err = fmt.Errorf("it prints %q", out)
		}
		return err
	})
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 137} {
		if code := exitCode(t, n.command("exec", "p", "--", "sh", "-c", script)); code != want {
			t.Errorf("exec of %q exits with %d, want %d", script, code, want)
		}
	}
	execBothWays(t, n, 1<<20)
	execResized(t, n)
	copyBothWays(t, n, 1<<20)
	isDescribed(t, n)
	consoleAttached(t, n)
	local := forward(t, n, "p", "8080", "8081")
	for _, port := range []string{"8080", "8081"} { // the second is on the guest's loopback only
		if got, err := get(n.ctx, "http://"+local[port]); err != nil || got != "tiny\n" {
			t.Errorf("from port %s came %q: %v", port, got, err)
		}
	}
	n.apply(t, "apiVersion: v1\nkind: Service\nmetadata: {name: m}\nspec: {selector: {app: p}, ports: [{port: 80, targetPort: 8080}]}")
	n.client(t)
	n.awaitOutput(t, "client", "curl -s http://m/", "tiny")
	// Nothing runs beside a machine, and asking for it does it no harm.
	n.kubectl(t, "debug", "p", "--image="+images.Busybox, "--container=debugger", "--profile=general", "--", "true")
	n.awaitEvents(t, "p", "Failed", "debugger", "machine")
	if pod := n.awaitPod(t, "p", "be ready", ready); status(t, pod, "main").RestartCount != 0 {
		t.Errorf("after all that the machine is %s", describe(pod))
	}
}

// consoleAttached types on the machine's console, and reads the answer there and in the log, which is followed.
func consoleAttached(t *testing.T, n *namespace) {
	t.Helper()
	log := start(t, n.command("logs", "-f", "--tail=1", "p"))
	cmd := n.command("attach", "-i", "--quiet", "p")
	keys, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	console := start(t, cmd)
	if _, err := io.WriteString(keys, "echo typed $((40+2))\n"); err != nil {
		t.Fatal(err)
	}
	for what, from := range map[string]io.Reader{"kubectl attach": console, "kubectl logs -f": log} {
		lines := bufio.NewScanner(from)
		for lines.Scan() && !strings.Contains(lines.Text(), "typed 42") {
		}
		if !strings.Contains(lines.Text(), "typed 42") {
			t.Errorf("%s ended without the answer of the console: %v", what, lines.Err())
		}
	}
}

// Probes of each type find a machine good that is; one that is not any more is shut down in order, and boots again.
func TestMachineProbes(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, true)
	programs, err := tools.Dir("kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]struct{ probe, begin, end string }{
		"exec": {"exec: {command: [test, -e, /run/good]}", "touch /run/good", "rm /run/good"},
		"http": {"httpGet: {port: 8080}", "serve", "rm /run/www/index.html"},
		"tcp":  {"tcpSocket: {port: 8080}", "serve", "killall httpd"},
		"grpc": {
			"grpc: {port: 5000}", mounted + "/mnt/*/agnhost grpc-health-checking --http-port=8082 </dev/null >/dev/null 2>&1 &",
			"wget -q -O - http://127.0.0.1:8082/make-not-serving",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			container := strings.ReplaceAll(`
startupProbe: {PROBE, periodSeconds: 10, timeoutSeconds: 30, failureThreshold: 60} # few: a pod may have only so many events
readinessProbe: {PROBE, periodSeconds: 2, timeoutSeconds: 30}
livenessProbe: {PROBE, periodSeconds: 2, timeoutSeconds: 30, failureThreshold: 3}`, "PROBE", p.probe)
			pod := "terminationGracePeriodSeconds: 240"
			if name == "grpc" {
				container += "\nvolumeMounts: [{name: programs, mountPath: /programs, readOnly: true}]"
				pod += "\nvolumes: [{name: programs, hostPath: {path: " + programs + ", type: Directory}}]"
			}
			n.createMachine(t, name, machine(online+p.begin, pod, container))
			if pod := n.awaitPod(t, name, "be ready", ready); status(t, pod, "main").RestartCount != 0 {
				t.Fatalf("the probes find a good machine bad: %s", describe(pod))
			}
			n.exec(t, name, p.end)
			again := n.awaitPod(t, name, "boot again and be ready", func(p *corev1.Pod) bool { return status(t, p, "main").RestartCount == 1 && ready(p) })
			if end := status(t, again, "main").LastTerminationState.Terminated; end == nil || end.ExitCode != 0 || end.Reason != "Completed" {
				t.Errorf("the machine was not shut down in order: %s", describe(again))
			}
			n.awaitEvents(t, name, "Liveness probe failed", "failed liveness probe, will be restarted")
		})
	}
}

// How machines end, what is told about it, and when they are booted again.
func TestMachineEnds(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, true)
	const kept = "volumeMounts: [{name: d, mountPath: /d}]"
	const volume = "\nvolumes: [{name: d, emptyDir: {}}]"
	for name, m := range map[string]string{
		"quits": machine("poweroff", "restartPolicy: Never", ""),
		"panic": machine("crash", "restartPolicy: Never", ""),
		// Panics once, then powers off.
		"fails":  machine(mounted+"cd /mnt/*\nif [ -e f ]; then poweroff; else touch f; sync; crash; fi", "restartPolicy: OnFailure"+volume, kept),
		"always": machine(mounted+"cd /mnt/*\n[ -e f ] || { touch f; sync; poweroff; }", "restartPolicy: Always"+volume, kept),
		// Is told to shut down when there is nothing in it yet that would.
		"deaf": machine("", "terminationGracePeriodSeconds: 1", "livenessProbe: {tcpSocket: {port: 1}, periodSeconds: 1, failureThreshold: 1}"),
		// Has no agent, so that the power button is all there is.
		"button": machine("killall qemu-ga\necho no agent", "terminationGracePeriodSeconds: 300", ""),
	} {
		n.createMachine(t, name, m)
	}
	ends := func(name string, phase corev1.PodPhase, restarts int32, code int32, reason string) {
		t.Helper()
		pod := n.awaitPod(t, name, "end", ended)
		s := status(t, pod, "main")
		if pod.Status.Phase != phase || s.RestartCount != restarts || s.State.Terminated.ExitCode != code || s.State.Terminated.Reason != reason {
			t.Errorf("want %s, %d restarts, exit code %d, %s; it is %s", phase, restarts, code, reason, describe(pod))
		}
	}
	ends("quits", corev1.PodSucceeded, 0, 0, "Completed")
	ends("panic", corev1.PodFailed, 0, 1, "GuestFailed")
	ends("fails", corev1.PodSucceeded, 1, 0, "Completed")
	for name, want := range map[string]corev1.ContainerStateTerminated{
		"always": {ExitCode: 0, Reason: "Completed"}, "deaf": {ExitCode: 137, Reason: "Error"},
	} {
		pod := n.awaitPod(t, name, "be booted again", func(p *corev1.Pod) bool {
			return len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].RestartCount > 0 && p.Status.ContainerStatuses[0].State.Running != nil
		})
		if end := status(t, pod, "main").LastTerminationState.Terminated; end == nil || end.ExitCode != want.ExitCode || end.Reason != want.Reason {
			t.Errorf("want that it ended with %d, %s; it is %s", want.ExitCode, want.Reason, describe(pod))
		}
	}
	buttonPressed(t, n)
}

// buttonPressed deletes a pod whose machine has no agent, and reads on its console that it shut down.
func buttonPressed(t *testing.T, n *namespace) {
	t.Helper()
	n.awaitLogs(t, "button", "main", "no agent")
	log := start(t, n.command("logs", "-f", "button"))
	n.kubectl(t, "delete", "pod", "button")
	all, err := io.ReadAll(log)
	for _, want := range []string{"tiny: power button", "Power down"} {
		if !strings.Contains(string(all), want) {
			t.Errorf("the console of a machine that was deleted does not tell %q: %v\n%s", want, err, all)
		}
	}
}

// A StatefulSet of machines: each has a disk of its own, that was filled once and is booted by whichever pod takes the name next.
func TestMachineStatefulSet(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, true)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 256<<20); err != nil {
		t.Fatal(err)
	}
	template := machine(online+named+"mkdir -p /run/www\necho $(hostname) has booted $(cat /var/boots) times >/run/www/index.html\nhttpd -p 8080 -h /run/www",
		"terminationGracePeriodSeconds: 240", `
readinessProbe: {httpGet: {port: 8080}, timeoutSeconds: 30}
volumeDevices: [{name: root, devicePath: /}]`)
	n.apply(t, persistentVolume(n, "root-set-0", "Block", loopDevice(t, disk))+"---"+expandMachine("set", `
apiVersion: v1
kind: Service
metadata: {name: set}
spec: {selector: {app: set}, clusterIP: None, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: set}
spec:
  serviceName: set
  selector: {matchLabels: {app: set}}
  volumeClaimTemplates:
  - metadata: {name: root}
    spec: {storageClassName: "", volumeMode: Block, accessModes: [ReadWriteOnce], resources: {requests: {storage: 8Mi}}}
  template:
    `+indented(template, 4)))
	t.Cleanup(func() { kubectl(n.ctx, t, n.Cluster, "delete", "pv", n.name+"-root-set-0", "--wait=false") })
	defer func() { // before the loop device goes
		n.kubectl(t, "delete", "statefulset", "set")
		n.kubectl(t, "wait", "pod", "-l", "app=set", "--for=delete", "--timeout=5m")
	}()
	n.client(t)
	const ask = "curl -s -m 20 http://set-0.set:8080/"
	n.awaitOutput(t, "client", ask, "set-0 has booted 1 times")
	n.kubectl(t, "delete", "pod", "set-0")
	n.awaitOutput(t, "client", ask, "set-0 has booted 2 times")
	n.kubectl(t, "scale", "statefulset/set", "--replicas=0")
	n.kubectl(t, "wait", "pod", "-l", "app=set", "--for=delete", "--timeout=5m")
	n.kubectl(t, "scale", "statefulset/set", "--replicas=1")
	n.awaitOutput(t, "client", ask, "set-0 has booted 3 times")
}

// A Deployment of machines is rolled from one image's disk to another's.
func TestMachineDeployment(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, true)
	template := machine(online+"mkdir -p /run/www\n{ command -v fio || echo no fio; } >/run/www/index.html\nhttpd -p 8080 -h /run/www",
		"terminationGracePeriodSeconds: 240", "readinessProbe: {httpGet: {port: 8080}, timeoutSeconds: 30}")
	n.apply(t, expandMachine("web", `
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  selector: {matchLabels: {app: web}}
  template:
    `+indented(template, 4)))
	n.kubectl(t, "rollout", "status", "deployment/web", "--timeout=8m")
	n.client(t)
	n.awaitOutput(t, "client", "curl -s http://web/", "no fio")
	n.kubectl(t, "set", "image", "deployment/web", "main="+images.Fio)
	n.kubectl(t, "rollout", "status", "deployment/web", "--timeout=8m")
	n.awaitOutput(t, "client", "curl -s http://web/", "/usr/bin/fio")
}
