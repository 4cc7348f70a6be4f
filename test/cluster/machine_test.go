package cluster_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmruntime/vmruntime/test/images"
)

// A machine is a pod like another: logs, commands, files, probes of several types, a port forwarded to its loopback, a Service.
func TestMachine(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, true)
	n.apply(t, strings.ReplaceAll(`
apiVersion: v1
kind: Pod
metadata:
  name: m
  labels: {app: m}
  annotations: {vmruntime.io/user-data: "#!/bin/sh\nnet 46\nserve\n"}
spec:
  CLASS
  terminationGracePeriodSeconds: 30
  containers:
  - name: machine
    image: TINY
    resources: {limits: {memory: 192Mi}}
    startupProbe: {exec: {command: ["true"]}, periodSeconds: 5, timeoutSeconds: 30, failureThreshold: 24}
    readinessProbe: {httpGet: {port: 8080}, timeoutSeconds: 30}
    livenessProbe: {tcpSocket: {port: 8080}, initialDelaySeconds: 60, timeoutSeconds: 30, failureThreshold: 10}
---
apiVersion: v1
kind: Service
metadata: {name: m}
spec: {selector: {app: m}, ports: [{port: 80, targetPort: 8080}]}`, "TINY", images.Tiny))
	n.awaitPod(t, "m", "be ready", ready)
	n.awaitLogs(t, "m", "machine", "tiny: up boot=1 ", "serving 8080 8081")
	if code := exitCode(t, n.command("exec", "m", "--", "sh", "-c", "exit 7")); code != 7 {
		t.Errorf("exec exits with %d, want 7", code)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("copied"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.kubectl(t, "cp", file, "m:/tmp/file")
	if got := n.exec(t, "m", "cat /tmp/file"); got != "copied" {
		t.Errorf("the file that was copied holds %q", got)
	}
	n.run(t, "client", strings.Replace(sleeper, `BUSYBOX, command: [sleep, "1000000"]`, "AGNHOST, args: [pause]", 1))
	host := n.exec(t, "m", "hostname")
	n.awaitOutput(t, "client", "curl -s http://m/", host)
	address := forward(t, n, "m", "8081")["8081"]
	if got, err := get(n.ctx, "http://"+address); err != nil || strings.TrimSpace(got) != host {
		t.Errorf("from the machine's loopback came %q, want %q: %v", got, host, err)
	}
}
