package cluster_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/vmruntime/vmruntime/test/cluster"
	"github.com/vmruntime/vmruntime/test/images"
)

func TestLogs(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.create(t, "p", `
containers:
- name: main
  image: BUSYBOX
  command: [sh, -c, "if [ ! -e /d/again ]; then touch /d/again; echo first; exit 3; fi; seq 1 10; sleep 1; echo err >&2; sleep 1000000"]
  volumeMounts: [{name: d, mountPath: /d}]
volumes: [{name: d, emptyDir: {}}]`)
		n.awaitPod(t, "p", "run again", func(p *corev1.Pod) bool {
			return len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].RestartCount == 1 && ready(p)
		})
		n.awaitLogs(t, "p", "main", "err", "10")
		for _, c := range []struct{ flags, want string }{
			{"--previous", "first"},
			{"--tail=11", "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\nerr"},
			{"--since=1h", "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\nerr"},
			{"--since-time=2100-01-01T00:00:00Z", ""},
			{"--limit-bytes=4", "1\n2"},
		} {
			// What is written to two pipes comes in any order: the last line may come before others.
			if got := n.kubectl(t, "logs", "p", c.flags); !slices.Equal(linesInOrder(got), linesInOrder(c.want)) {
				t.Errorf("logs %s is %q, want %q", c.flags, got, c.want)
			}
		}
		if got := n.kubectl(t, "logs", "p", "--tail=1"); got != "err" && got != "10" {
			t.Errorf("logs --tail=1 is %q, want the last line of one stream", got)
		}
		since(t, n)
		follow(t, n)
	})
}

// since asks for what came into a log after a time between its lines, which a slow kubectl does not miss.
func since(t *testing.T, n *namespace) {
	t.Helper()
	const apart = 20 * time.Second
	time.Sleep(time.Until(loggedAt(t, n, "p", "err").Add(apart)))
	n.exec(t, "p", "echo recent >/proc/1/fd/1")
	n.awaitLogs(t, "p", "main", "recent")
	between := loggedAt(t, n, "p", "recent").Add(-apart / 2)
	for _, flag := range []string{
		fmt.Sprintf("--since=%ds", int(time.Since(between).Seconds())), "--since-time=" + between.Format(time.RFC3339),
	} {
		if got := n.kubectl(t, "logs", "p", flag); got != "recent" {
			t.Errorf("logs %s is %q, want %q", flag, got, "recent")
		}
	}
}

// follow reads a log that grows until its pod is gone.
func follow(t *testing.T, n *namespace) {
	t.Helper()
	cmd := n.command("logs", "-f", "--tail=1", "p")
	out := start(t, cmd)
	lines := bufio.NewScanner(out)
	lines.Scan()
	n.exec(t, "p", "echo late >/proc/1/fd/1")
	if lines.Scan(); lines.Text() != "late" {
		t.Errorf("logs -f printed %q, want %q", lines.Text(), "late")
	}
	n.kubectl(t, "delete", "pod", "p")
	if _, err := io.Copy(io.Discard, out); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("logs -f of a pod that went: %v", err)
	}
}

// start starts a command and returns its output; what is left of it at the test's end is killed.
func start(t *testing.T, cmd *exec.Cmd) io.Reader {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return out
}

func TestExec(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.run(t, "p", sleeper)
		for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 137, "kill -TERM $$": 143} {
			if code := exitCode(t, n.command("exec", "p", "--", "sh", "-c", script)); code != want {
				t.Errorf("exec of %q exits with %d, want %d", script, code, want)
			}
		}
		if code := exitCode(t, n.command("exec", "p", "--", "/no/such/program")); code == 0 {
			t.Error("exec of a program that is not there succeeds")
		}
		var stdout, stderr bytes.Buffer
		cmd := n.command("exec", "p", "--", "sh", "-c", "echo out; echo err >&2")
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil || stdout.String() != "out\n" || stderr.String() != "err\n" {
			t.Errorf("exec prints %q and %q: %v", &stdout, &stderr, err)
		}
		execBothWays(t, n, 100<<20)
		execResized(t, n)
	})
}

// linesInOrder sorts the lines of a text.
func linesInOrder(text string) []string {
	lines := strings.Split(text, "\n")
	slices.Sort(lines)
	return lines
}

func exitCode(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return cmd.ProcessState.ExitCode()
}

// execBothWays sends so many bytes to a command's standard input, to its end, and reads them back. They go by SPDY: over a
// WebSocket kubectl gives up when an answer to its ping, which has to wait for what was sent before it, takes a minute,
// and that is how long the many buffers on the way take to run dry when a busy machine emulates the guest.
func execBothWays(t *testing.T, n *namespace, size int64) {
	t.Helper()
	sent, got := sha256.New(), sha256.New()
	cmd := n.command("exec", "-i", "p", "--", "cat")
	cmd.Env = append(os.Environ(), "KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false")
	cmd.Stdin = io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{}), size), sent)
	cmd.Stdout, cmd.Stderr = got, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("exec -i cat: %v", err)
	}
	if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Error("what came back through exec -i is not what was sent")
	}
}

// sizes are the sizes that a terminal has, one after the other.
type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

// twoSizes waits for a line, which comes when there is someone to see the rest, and then for its terminal to have two sizes.
const twoSizes = `read line; until [ "$(stty size)" = '40 100' ]; do sleep 0.1; done; echo one; until [ "$(stty size)" = '25 81' ]; do sleep 0.1; done; tty; echo two`

// execResized changes the size of a command's terminal while it runs.
func execResized(t *testing.T, n *namespace) {
	t.Helper()
	resized(t, n, "p", "exec", &corev1.PodExecOptions{Command: []string{"sh", "-c", twoSizes}, Stdin: true, Stdout: true, TTY: true})
}

// resized changes the size of the terminal of twoSizes, which is reached by a pod's subresource.
func resized(t *testing.T, n *namespace, pod, subresource string, options runtime.Object) {
	t.Helper()
	request := n.Client().CoreV1().RESTClient().Post().Resource("pods").Namespace(n.name).Name(pod).SubResource(subresource).
		VersionedParams(options, scheme.ParameterCodec)
	executor, err := remotecommand.NewWebSocketExecutor(n.RestConfig(), http.MethodGet, request.URL().String())
	if err != nil {
		t.Fatal(err)
	}
	queue := make(sizes, 2)
	defer close(queue)
	queue <- remotecommand.TerminalSize{Width: 100, Height: 40}
	output := &resizer{queue: queue}
	end, hold := io.Pipe()
	defer hold.Close()
	stdin := io.MultiReader(strings.NewReader("\n"), end)
	err = executor.StreamWithContext(n.ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: output, Tty: true, TerminalSizeQueue: queue})
	if err != nil || !strings.Contains(output.String(), "one\r\n/dev/") || !strings.HasSuffix(output.String(), "two\r\n") {
		t.Errorf("%s with a terminal whose size changes printed %q: %v", subresource, output.String(), err)
	}
}

// resizer keeps what is written and, with the first line, changes the size.
type resizer struct {
	out   bytes.Buffer // not embedded: io.Copy would find its ReadFrom
	queue sizes
	once  sync.Once
}

func (r *resizer) String() string { return r.out.String() }

func (r *resizer) Write(p []byte) (int, error) {
	n, err := r.out.Write(p)
	if strings.Contains(r.String(), "one") {
		r.once.Do(func() { r.queue <- remotecommand.TerminalSize{Width: 81, Height: 25} })
	}
	return n, err
}

func TestRunAndAttach(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		args := []string{"run", "p", "-i", "--quiet", "--restart=Never", "--image=" + images.Busybox, "--pod-running-timeout=4m"}
		if n.vm {
			args = append(args, `--overrides={"spec":{"runtimeClassName":"vm"}}`)
		}
		cmd := n.command(append(args, "--", "sh", "-c", "cat; exit 5")...)
		cmd.Stdin = strings.NewReader("to run\n")
		out, err := cmd.Output()
		if cmd.ProcessState.ExitCode() != 5 || string(out) != "to run\n" {
			t.Errorf("kubectl run -i printed %q, %v", out, err)
		}
		n.run(t, "q", `
restartPolicy: Never
containers:
- {name: main, image: BUSYBOX, stdin: true, stdinOnce: true, command: [sh, -c, "read x; echo got $x; cat >/dev/null"]}`)
		cmd = n.command("attach", "-i", "--quiet", "q")
		cmd.Stdin = strings.NewReader("to attach\n")
		if out, err = cmd.Output(); err != nil || string(out) != "got to attach\n" {
			t.Errorf("kubectl attach -i printed %q, %v", out, err)
		}
		n.awaitPod(t, "q", "succeed when its input ends", inPhase(corev1.PodSucceeded))
		n.run(t, "terminal", fmt.Sprintf(`
restartPolicy: Never
containers:
- {name: main, image: BUSYBOX, stdin: true, tty: true, command: [sh, -c, %q]}`, twoSizes))
		resized(t, n, "terminal", "attach", &corev1.PodAttachOptions{Stdin: true, Stdout: true, TTY: true})
		n.awaitPod(t, "terminal", "succeed at its program's end", inPhase(corev1.PodSucceeded))
	})
}

func TestCopy(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.run(t, "p", sleeper)
		copyBothWays(t, n, 5<<20)
	})
}

// copyBothWays copies files, of which one has so many bytes, to a pod and back.
func copyBothWays(t *testing.T, n *namespace, size int) {
	t.Helper()
	there, back := t.TempDir(), filepath.Join(t.TempDir(), "back")
	data := make([]byte, size)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(data); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"data": data, "dir/empty": nil, "dir/a file": []byte("text")}
	for name, content := range files {
		path := filepath.Join(there, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, content, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	n.kubectl(t, "cp", there, "p:/tmp/there")
	n.kubectl(t, "cp", "p:/tmp/there", back)
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(back, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s came back with %d bytes that are not the %d that were sent: %v", name, len(got), len(want), err)
		}
	}
}

func TestPortForward(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.run(t, "p", `
containers:
- name: main
  image: AGNHOST
  command: [sh, -c, "echo loopback >/tmp/index.html; busybox httpd -p 127.0.0.1:8081 -h /tmp; exec /agnhost netexec"]
  readinessProbe: {httpGet: {port: 8080}}`)
		local := forward(t, n, "p", "8080", "8081")
		var group sync.WaitGroup
		for i := range 10 {
			group.Go(func() {
				want := fmt.Sprintf("number %d", i)
				if got, err := get(n.ctx, "http://"+local["8080"]+"/echo?msg="+strings.ReplaceAll(want, " ", "+")); err != nil || got != want {
					t.Errorf("through port-forward came %q, want %q: %v", got, want, err)
				}
				if got, err := get(n.ctx, "http://"+local["8081"]); err != nil || got != "loopback\n" {
					t.Errorf("from the pod's loopback came %q: %v", got, err)
				}
			})
		}
		group.Wait()
	})
}

// forward has kubectl forward ports of a pod until the test's end, and returns the local address of each.
func forward(t *testing.T, n *namespace, pod string, ports ...string) map[string]string {
	t.Helper()
	args := []string{"port-forward", pod, "--address=127.0.0.1"}
	for _, p := range ports {
		args = append(args, ":"+p)
	}
	out := bufio.NewScanner(start(t, n.command(args...)))
	local := map[string]string{}
	forwarding := regexp.MustCompile(`^Forwarding from (127\.0\.0\.1:\d+) -> (\d+)$`)
	for len(local) < len(ports) && out.Scan() {
		if m := forwarding.FindStringSubmatch(out.Text()); m != nil {
			local[m[2]] = m[1]
		}
	}
	return local
}

// get is a page, over a connection of its own.
func get(ctx context.Context, url string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	response, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(request)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(response.Body)
	return string(body), errors.Join(err, response.Body.Close())
}

func TestDescribeEventsAndStats(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.run(t, "p", sleeper)
		isDescribed(t, n)
	})
}

// isDescribed says what is told about a running pod.
func isDescribed(t *testing.T, n *namespace) {
	t.Helper()
	described := n.kubectl(t, "describe", "pod", "p")
	if !strings.Contains(described, "State:          Running") || n.vm && !strings.Contains(described, "Runtime Class Name:  vm") {
		t.Errorf("kubectl describe prints\n%s", described)
	}
	n.awaitEvents(t, "p", "Scheduled", "Pulled", "Created", "Started")
	n.await(t, "statistics of the pod", func() error { return hasStatistics(n, "p", "main") })
	n.await(t, "the metrics from which kubectl top has its figures", func() error {
		return hasMetrics(n, "resource", "p", "container_cpu_usage_seconds_total", "container_memory_working_set_bytes",
			"container_start_time_seconds", "pod_cpu_usage_seconds_total", "pod_memory_working_set_bytes")
	})
}

// hasMetrics asks one of the kubelet's pages of metrics for a pod and its container `main`; none may be zero.
func hasMetrics(n *namespace, page, pod string, names ...string) error {
	out, err := n.Kubectl(n.ctx, "get", "--raw", "/api/v1/nodes/"+cluster.NodeName+"/proxy/metrics/"+page)
	if err != nil {
		return err
	}
	for _, name := range names {
		of := fmt.Sprintf("namespace=%q.*pod=%q", n.name, pod)
		if strings.HasPrefix(name, "container_") {
			of = `container="main".*` + of
		}
		if !regexp.MustCompile(`(?m)^` + name + `\{[^}]*` + of + `[^}]*\} [0-9.e+]*[1-9]`).MatchString(out) {
			return fmt.Errorf("/metrics/%s has no %s of pod %s", page, name, pod)
		}
	}
	return nil
}

// hasStatistics asks the kubelet's summary for a container.
func hasStatistics(n *namespace, pod, container string) error {
	type usage struct {
		CPU    struct{ UsageCoreNanoSeconds uint64 }
		Memory struct{ WorkingSetBytes uint64 }
	}
	var summary struct {
		Pods []struct {
			PodRef struct{ Name, Namespace string }
			usage
			Containers []struct {
				Name string
				usage
			}
		}
	}
	out, err := n.Kubectl(n.ctx, "get", "--raw", "/api/v1/nodes/"+cluster.NodeName+"/proxy/stats/summary")
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), &summary); err != nil {
		return err
	}
	for _, p := range summary.Pods {
		if p.PodRef.Name != pod || p.PodRef.Namespace != n.name {
			continue
		}
		for _, c := range p.Containers {
			if c.Name == container && p.CPU.UsageCoreNanoSeconds > 0 && p.Memory.WorkingSetBytes > 0 &&
				c.CPU.UsageCoreNanoSeconds > 0 && c.Memory.WorkingSetBytes > 0 {
				return nil
			}
		}
		return fmt.Errorf("the summary says of the pod %+v", p)
	}
	return errors.New("the summary has no such pod")
}

func TestDebug(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.run(t, "p", sleeper)
		kernel := n.exec(t, "p", "uname -r; cat /proc/sys/kernel/random/boot_id")
		n.kubectl(t, "debug", "p", "--image="+images.Busybox, "--target=main", "--container=debugger", "--profile=general",
			"--", "sh", "-c", "uname -r; cat /proc/sys/kernel/random/boot_id; cat /proc/1/cmdline | tr '\\0' ' '; echo; cat /proc/1/root/etc/hostname; sleep 1000000")
		n.awaitLogs(t, "p", "debugger", kernel+"\nsleep 1000000 \np\n")
	})
}
