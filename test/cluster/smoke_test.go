package cluster_test

import (
	"context"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/test/cluster"
	"github.com/vmruntime/vmruntime/test/images"
)

// A Deployment behind a Service runs, answers by its DNS name to a pod of the other kind, has logs and takes
// commands: as a container and as a VM.
func TestSmoke(t *testing.T) {
	ctx, c := use(t)
	const ns = "smoke"
	kubectl(ctx, t, c, "create", "namespace", ns)
	t.Cleanup(func() { kubectl(context.WithoutCancel(ctx), t, c, "delete", "namespace", ns, "--wait") })
	for _, kind := range []string{"container", "vm"} {
		apply(ctx, t, c, ns, deployment(kind))
	}
	for _, kind := range []string{"container", "vm"} {
		kubectl(ctx, t, c, "-n", ns, "rollout", "status", "deployment/"+kind, "--timeout=4m")
	}
	var utsname unix.Utsname
	if err := unix.Uname(&utsname); err != nil {
		t.Fatal(err)
	}
	node := unix.ByteSliceToString(utsname.Release[:])
	for kind, other := range map[string]string{"container": "vm", "vm": "container"} {
		t.Run(kind, func(t *testing.T) {
			if kernel := kubectl(ctx, t, c, "-n", ns, "exec", "deployment/"+kind, "--", "uname", "-r"); (kernel == node) != (kind == "container") {
				t.Errorf("uname -r prints %q, on the node %q", kernel, node)
			}
			if logs := kubectl(ctx, t, c, "-n", ns, "logs", "deployment/"+kind); logs != kind+" starts" {
				t.Errorf("logs are %q, want %q", logs, kind+" starts")
			}
			awaitPage(ctx, t, c, ns, kind, other)
		})
	}
}

// deployment is a web server in a pod of a kind, "container" or "vm", and its Service.
func deployment(kind string) string {
	class := ""
	if kind == "vm" {
		class = "runtimeClassName: vm"
	}
	return strings.NewReplacer("KIND", kind, "CLASS", class, "IMAGE", images.Busybox).Replace(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: KIND}
spec:
  selector: {matchLabels: {app: KIND}}
  template:
    metadata: {labels: {app: KIND}}
    spec:
      CLASS
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: IMAGE
        command: [sh, -c, "echo KIND starts; mkdir -p /www; echo KIND serves >/www/index.html; exec httpd -f -p 8080 -h /www"]
        readinessProbe: {httpGet: {port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: KIND}
spec:
  selector: {app: KIND}
  ports: [{port: 80, targetPort: 8080}]
`)
}

// awaitPage waits until a pod of one Deployment reaches the Service of another: kube-proxy knows of a pod some time after it is ready.
func awaitPage(ctx context.Context, t *testing.T, c *cluster.Cluster, ns, from, to string) {
	t.Helper()
	n := &namespace{Cluster: c, ctx: ctx, name: ns}
	n.awaitOutput(t, "deployment/"+from, "wget -q -O - http://"+to+"."+ns, to+" serves")
}

// apply makes what a manifest describes.
func apply(ctx context.Context, t *testing.T, c *cluster.Cluster, namespace, manifest string) {
	t.Helper()
	cmd := c.KubectlCommand(ctx, "-n", namespace, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifest)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("kubectl apply: %v\n%s\n%s", err, out, manifest)
	}
}

// kubectl returns what a command printed, without white space around it.
func kubectl(ctx context.Context, t *testing.T, c *cluster.Cluster, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}
