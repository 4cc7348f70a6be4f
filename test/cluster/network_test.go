package cluster_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// webServer is the spec of a pod that tells its host name on port 8080, and on a port of the node.
const webServer = `
containers:
- name: web
  image: AGNHOST
  args: [netexec]
  ports: [{containerPort: 8080, hostPort: HOSTPORT}]
  readinessProbe: {httpGet: {port: 8080}}`

// agnhostSleeper is a pod with curl that does nothing.
const agnhostSleeper = `
containers:
- {name: main, image: AGNHOST, args: [pause]}`

// A pod is reached by its own addresses of both families, by those of Services, by names and by a port of the node,
// from a pod of each kind; what the node filters at the pod's link does not arrive.
func TestServices(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		port := "18080"
		if n.vm {
			port = "18081"
		}
		web := n.run(t, "web", strings.ReplaceAll(webServer, "HOSTPORT", port))
		n.apply(t, `
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}], ipFamilyPolicy: RequireDualStack}
---
apiVersion: v1
kind: Service
metadata: {name: headless}
spec: {selector: {app: web}, ports: [{port: 8080}], clusterIP: None}
---
apiVersion: v1
kind: Service
metadata: {name: node}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}], type: NodePort}`)
		if len(web.Status.PodIPs) != 2 {
			t.Fatalf("the pod's addresses are %v, want one of each family", web.Status.PodIPs)
		}
		services := strings.Fields(n.kubectl(t, "get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[0]} {.spec.clusterIPs[1]}"))
		nodePort := n.kubectl(t, "get", "service", "node", "-o", "jsonpath={.spec.ports[0].nodePort}")
		node := web.Status.HostIP
		targets := []string{
			"web", "web." + n.name + ".svc.cluster.local", "headless:8080",
			services[0], "[" + services[1] + "]", web.Status.PodIPs[0].IP + ":8080", "[" + web.Status.PodIPs[1].IP + "]:8080",
			node + ":" + nodePort, node + ":" + port,
		}
		for _, vm := range []bool{false, true} {
			client := &namespace{Cluster: n.Cluster, ctx: n.ctx, name: n.name, vm: vm}
			pod := fmt.Sprintf("client-%t", vm)
			client.run(t, pod, agnhostSleeper)
			for _, target := range targets {
				n.awaitOutput(t, pod, "curl -s -g -m 20 http://"+target+"/hostname", "web")
			}
			n.awaitOutput(t, pod, "curl -s -m 20 -o /dev/null -w '%{http_code}' -k https://kubernetes.default.svc/version", "200")
		}
		filtered(t, n, web)
	})
}

// filtered drops on the node what goes to a pod by the link of its own, which is what network policies do.
func filtered(t *testing.T, n *namespace, web *corev1.Pod) {
	t.Helper()
	rule := func(ctx context.Context, action string) {
		out, err := n.Node().Command(ctx, "iptables", "-w", action, "FORWARD", "-d", web.Status.PodIP, "-p", "tcp", "--dport", "8080", "-j", "REJECT").CombinedOutput()
		if err != nil {
			t.Fatalf("iptables: %v, %s", err, out)
		}
	}
	const visit = "curl -4 -s -m 20 -o /dev/null http://web/ && echo reached || echo refused"
	rule(n.ctx, "-I")
	n.awaitOutput(t, "client-false", visit, "refused")
	n.awaitOutput(t, "client-true", visit, "refused")
	rule(n.ctx, "-D")
	n.awaitOutput(t, "client-true", visit, "reached")
}

// A pod that ends behind a Service finishes what it has begun, while new visits go to another.
func TestDraining(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.apply(t, `
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {serves: "yes"}, ports: [{port: 80, targetPort: 8080}]}`)
		for _, name := range []string{"old", "new"} {
			n.create(t, name, `
terminationGracePeriodSeconds: 1200
containers:
- name: web
  image: AGNHOST
  args: [netexec]
  readinessProbe: {httpGet: {port: 8080}}
  lifecycle: {preStop: {exec: {command: [sh, -c, "until [ -e /tmp/drained ]; do sleep 0.2; done"]}}}`)
		}
		n.create(t, "client", agnhostSleeper)
		for _, name := range []string{"old", "new", "client"} {
			n.awaitPod(t, name, "be ready", ready)
		}
		n.kubectl(t, "label", "pod", "old", "serves=yes")
		n.awaitOutput(t, "client", "curl -s -m 20 http://web/hostname", "old")
		visit := n.command("exec", "client", "--", "curl", "-s", "-G", "-m", "1200", "http://web/shell",
			"--data-urlencode", "cmd=until [ -e /tmp/go ]; do sleep 0.2; done; hostname")
		var page bytes.Buffer
		visit.Stdout, visit.Stderr = &page, &page
		if err := visit.Start(); err != nil {
			t.Fatal(err)
		}
		visited := make(chan error, 1)
		go func() { visited <- visit.Wait() }()
		n.awaitLogs(t, "old", "web", "/shell?cmd=")
		n.kubectl(t, "delete", "pod", "old", "--wait=false")
		n.kubectl(t, "label", "pod", "new", "serves=yes")
		n.awaitOutput(t, "client", "for i in 1 2 3 4 5; do curl -s -m 20 http://web/hostname; done", strings.Repeat("new", 5))
		n.exec(t, "old", "touch /tmp/go")
		if err := <-visited; err != nil || !strings.Contains(page.String(), `"output":"old\n"`) {
			t.Errorf("the visit that began before the end of its pod: %v, %q", err, &page)
		}
		n.exec(t, "new", "touch /tmp/drained") // ends with the namespace
		n.exec(t, "old", "touch /tmp/drained")
		n.kubectl(t, "wait", "pod/old", "--for=delete", "--timeout=8m")
	})
}

// The pods of a StatefulSet have names that are found, and keep name and volume when they are replaced.
func TestStatefulSet(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.apply(t, persistentVolume(n, "data-set-0", "Filesystem", t.TempDir())+`
---
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
  template:
    metadata: {labels: {app: set}}
    spec:
      CLASS
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: BUSYBOX
        command: [sh, -c, "echo start >>/data/index.html; exec httpd -f -p 8080 -h /data"]
        readinessProbe: {httpGet: {port: 8080}}
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      storageClassName: ""
      accessModes: [ReadWriteOnce]
      resources: {requests: {storage: 8Mi}}`)
		t.Cleanup(func() { kubectl(n.ctx, t, n.Cluster, "delete", "pv", n.name+"-data-set-0", "--wait=false") })
		n.kubectl(t, "rollout", "status", "statefulset/set", "--timeout=5m")
		n.run(t, "client", agnhostSleeper)
		n.awaitOutput(t, "client", "curl -s http://set-0.set:8080/", "start")
		n.kubectl(t, "delete", "pod", "set-0")
		n.awaitOutput(t, "client", "curl -s http://set-0.set:8080/", "start\nstart")
	})
}

// Workloads of each kind run to their end or roll to what is new.
func TestWorkloads(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.apply(t, `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      CLASS
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: BUSYBOX
        env: [{name: VERSION, value: one}]
        command: [sh, -c, "mkdir /w; echo $VERSION >/w/index.html; exec httpd -f -p 8080 -h /w"]
        readinessProbe: {httpGet: {port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: each}
spec:
  selector: {matchLabels: {app: each}}
  template:
    metadata: {labels: {app: each}}
    spec:
      CLASS
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: BUSYBOX, command: [sleep, "1000000"]}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: job}
spec:
  completions: 2
  completionMode: Indexed
  template:
    spec:
      CLASS
      restartPolicy: Never
      containers: [{name: main, image: BUSYBOX, command: [sh, -c, "echo index $JOB_COMPLETION_INDEX"]}]
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: cron}
spec:
  schedule: "* * * * *"
  concurrencyPolicy: Forbid
  jobTemplate:
    spec:
      template:
        spec:
          CLASS
          restartPolicy: Never
          containers: [{name: main, image: BUSYBOX, command: ["true"]}]`)
		n.kubectl(t, "rollout", "status", "deployment/web", "--timeout=5m")
		n.kubectl(t, "set", "env", "deployment/web", "VERSION=two")
		n.kubectl(t, "rollout", "status", "deployment/web", "--timeout=5m")
		n.kubectl(t, "rollout", "status", "daemonset/each", "--timeout=5m")
		n.kubectl(t, "wait", "job/job", "--for=condition=Complete", "--timeout=5m")
		n.awaitOutput(t, "daemonset/each", "wget -q -O - http://web", "two")
		n.await(t, "a job of the CronJob to succeed", func() error {
			out, err := n.Kubectl(n.ctx, "-n", n.name, "get", "cronjob", "cron", "-o", "jsonpath={.status.lastSuccessfulTime}")
			if err == nil && out == "" {
				err = errors.New("none has")
			}
			return err
		})
	})
}
