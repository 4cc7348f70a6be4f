package cluster_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// webServer is the spec of a pod that tells its host name on port 8080, by UDP on 8081, and on a port of the node by both.
const webServer = `
containers:
- name: web
  image: AGNHOST
  args: [netexec]
  ports: [{containerPort: 8080, hostPort: HOSTPORT}, {containerPort: 8081, hostPort: HOSTPORT, protocol: UDP}]
  readinessProbe: {httpGet: {port: 8080}}`

// agnhostSleeper is a pod with curl that does nothing.
const agnhostSleeper = `
containers:
- {name: main, image: AGNHOST, args: [pause]}`

// A pod is reached by its own addresses of both families, by those of Services, by names and by a port of the node,
// from a pod of each kind; what the node filters at a pod's link does not pass.
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
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}], type: NodePort}
---
apiVersion: v1
kind: Service
metadata: {name: balanced}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}], type: LoadBalancer}
---
apiVersion: v1
kind: Service
metadata: {name: other}
spec: {type: ExternalName, externalName: web.NAMESPACE.svc.cluster.local}`)
		// As a cloud's controller does, whose balancer sends the node what is for this address.
		balanced := "10.97.0." + port[len(port)-1:]
		n.kubectl(t, "patch", "service", "balanced", "--subresource=status", "-p", `{"status":{"loadBalancer":{"ingress":[{"ip":"`+balanced+`"}]}}}`)
		if len(web.Status.PodIPs) != 2 || len(web.Status.HostIPs) != 2 {
			t.Fatalf("the addresses of pod and node are %v and %v, want one of each family", web.Status.PodIPs, web.Status.HostIPs)
		}
		services := strings.Fields(n.kubectl(t, "get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[0]} {.spec.clusterIPs[1]}"))
		nodePort := n.kubectl(t, "get", "service", "node", "-o", "jsonpath={.spec.ports[0].nodePort}")
		node := web.Status.HostIP
		targets := []string{
			"web", "web." + n.name + ".svc.cluster.local", "headless:8080",
			services[0], "[" + services[1] + "]", web.Status.PodIPs[0].IP + ":8080", "[" + web.Status.PodIPs[1].IP + "]:8080",
			node + ":" + nodePort, node + ":" + port, "[" + web.Status.HostIPs[1].IP + "]:" + port, balanced, "other",
		}
		clients := map[bool]*corev1.Pod{}
		for _, vm := range []bool{false, true} {
			client := &namespace{Cluster: n.Cluster, ctx: n.ctx, name: n.name, vm: vm}
			pod := fmt.Sprintf("client-%t", vm)
			clients[vm] = client.run(t, pod, agnhostSleeper)
			for _, target := range targets {
				n.awaitOutput(t, pod, "curl -s -g -m 20 http://"+target+"/hostname", "web")
			}
			n.awaitOutput(t, pod, fmt.Sprintf("bash -c 'exec 3<>/dev/udp/%s/%s; echo hostname >&3; timeout 20 dd bs=100 count=1 <&3'", node, port), "web")
			n.awaitOutput(t, pod, "curl -s -m 20 -o /dev/null -w '%{http_code}' -k https://kubernetes.default.svc/version", "200")
		}
		filtered(t, n, web, clients)
	})
}

// filtered refuses on the node what goes to a pod by its link, and then what another pod of the kind sends by its own: network policies
// do the same.
func filtered(t *testing.T, n *namespace, web *corev1.Pod, clients map[bool]*corev1.Pod) {
	t.Helper()
	client, other := clients[n.vm], clients[!n.vm]
	for family, program := range map[string]string{"-4": "iptables", "-6": "ip6tables"} {
		visits := func(ofClient, ofOther string) {
			t.Helper()
			visit := "curl " + family + " -s -m 20 -o /dev/null http://web/ && echo reached || echo refused"
			n.awaitOutput(t, client.Name, visit, ofClient)
			n.awaitOutput(t, other.Name, visit, ofOther)
		}
		lift := n.reject(t, program, "--physdev-out", linkOf(t, n, web))
		visits("refused", "refused")
		lift()
		visits("reached", "reached")
		lift = n.reject(t, program, "--physdev-in", linkOf(t, n, client))
		visits("refused", "reached")
		lift()
		visits("reached", "reached")
	}
}

// reject has the node refuse the TCP that goes over a pod's link in one direction, until that is lifted.
func (n *namespace) reject(t *testing.T, program, direction, link string) (lift func()) {
	t.Helper()
	rule := func(ctx context.Context, action string) {
		out, err := n.Node().Command(ctx, program, "-w", action, "FORWARD", "-m", "physdev", "--physdev-is-bridged", direction, link, "-p", "tcp", "-j", "REJECT").CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v, %s", program, err, out)
		}
	}
	lift = sync.OnceFunc(func() { rule(context.WithoutCancel(n.ctx), "-D") })
	t.Cleanup(lift)
	rule(n.ctx, "-I")
	return lift
}

// linkOf is the node's end of a pod's link: the port at which the bridge has met the pod's address.
func linkOf(t *testing.T, n *namespace, pod *corev1.Pod) (name string) {
	t.Helper()
	err := n.Node().Do(func() error {
		arp, arpErr := netlink.NeighList(0, netlink.FAMILY_V4)
		ports, portErr := netlink.NeighList(0, unix.AF_BRIDGE)
		for _, a := range arp {
			if a.IP.String() != pod.Status.PodIP {
				continue
			}
			for _, p := range ports {
				if p.MasterIndex == a.LinkIndex && p.HardwareAddr.String() == a.HardwareAddr.String() {
					link, err := netlink.LinkByIndex(p.LinkIndex)
					if err != nil {
						return err
					}
					name = link.Attrs().Name
					return nil
				}
			}
		}
		return errors.Join(arpErr, portErr, fmt.Errorf("no port of the bridge has met %s", pod.Status.PodIP))
	})
	if err != nil {
		t.Fatal(err)
	}
	return name
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

// The pods of a StatefulSet have names that are found, and keep name and volume when they are replaced, by hand or for a new template.
func TestStatefulSet(t *testing.T) {
	eachRuntime(t, func(t *testing.T, n *namespace) {
		n.apply(t, persistentVolume(n, "data-set-0", "Filesystem", t.TempDir())+"---"+persistentVolume(n, "data-set-1", "Filesystem", t.TempDir())+`
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
  replicas: 2
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
        env: [{name: VERSION, value: one}]
        command: [sh, -c, "echo $(hostname) $VERSION >>/data/index.html; exec httpd -f -p 8080 -h /data"]
        readinessProbe: {httpGet: {port: 8080}}
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      storageClassName: ""
      accessModes: [ReadWriteOnce]
      resources: {requests: {storage: 8Mi}}`)
		t.Cleanup(func() {
			kubectl(n.ctx, t, n.Cluster, "delete", "pv", n.name+"-data-set-0", n.name+"-data-set-1", "--wait=false")
		})
		rolled := func() { n.kubectl(t, "rollout", "status", "statefulset/set", "--timeout=5m") }
		rolled()
		n.run(t, "client", agnhostSleeper)
		n.awaitOutput(t, "client", "curl -s http://set-0.set:8080/", "set-0 one")
		n.awaitOutput(t, "client", "curl -s http://set-1.set:8080/", "set-1 one")
		n.kubectl(t, "delete", "pod", "set-0")
		n.awaitOutput(t, "client", "curl -s http://set-0.set:8080/", "set-0 one\nset-0 one")
		rolled()
		n.kubectl(t, "set", "env", "statefulset/set", "VERSION=two")
		rolled()
		n.awaitOutput(t, "client", "curl -s http://set-0.set:8080/", "set-0 one\nset-0 one\nset-0 two")
		n.awaitOutput(t, "client", "curl -s http://set-1.set:8080/", "set-1 one\nset-1 two")
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
        readinessProbe: {httpGet: {port: 8080}, periodSeconds: 2, timeoutSeconds: 20}
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
		unready(t, n)
		n.await(t, "a job of the CronJob to succeed", func() error {
			out, err := n.Kubectl(n.ctx, "-n", n.name, "get", "cronjob", "cron", "-o", "jsonpath={.status.lastSuccessfulTime}")
			if err == nil && out == "" {
				err = errors.New("none has")
			}
			return err
		})
	})
}

// unready has one of the two pods behind the Service `web` fail its readiness probe: the Service does without it until it passes
// again.
func unready(t *testing.T, n *namespace) {
	t.Helper()
	var pods []string
	serve := func(what string, want func() bool) {
		t.Helper()
		n.await(t, what, func() (err error) {
			if pods, err = readyEndpoints(n, "web"); err == nil && !want() {
				err = fmt.Errorf("the Service has %v", pods)
			}
			return err
		})
	}
	serve("two pods to serve", func() bool { return len(pods) == 2 })
	fails, other := pods[0], pods[1]
	n.exec(t, fails, "mv /w/index.html /w/aside")
	serve("the other pod alone to serve", func() bool { return slices.Equal(pods, []string{other}) })
	n.awaitOutput(t, "daemonset/each", "for i in 1 2 3 4 5; do wget -q -O - http://web; done", "two\ntwo\ntwo\ntwo\ntwo")
	n.exec(t, fails, "mv /w/aside /w/index.html")
	serve("the pod to serve again", func() bool { return slices.Contains(pods, fails) })
}

// readyEndpoints are the pods that a Service has visits go to.
func readyEndpoints(n *namespace, service string) (pods []string, err error) {
	list, err := n.Client().DiscoveryV1().EndpointSlices(n.name).List(n.ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + service})
	if err != nil {
		return nil, err
	}
	for _, slice := range list.Items {
		for _, e := range slice.Endpoints {
			if e.Conditions.Ready != nil && *e.Conditions.Ready && e.TargetRef != nil {
				pods = append(pods, e.TargetRef.Name)
			}
		}
	}
	return pods, nil
}
