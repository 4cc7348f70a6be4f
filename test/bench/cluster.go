package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/cluster"
	"github.com/vmruntime/vmruntime/test/images"
)

const (
	// manyTimeout bounds the start, and the removal, of as many pods as are measured at once.
	manyTimeout = 15 * time.Minute
	// manySettle is how long the node is left alone before it counts as idle.
	manySettle = 30 * time.Second
	// manyWatched is how long it is looked at then, which is as many relists as seconds.
	manyWatched = 60 * time.Second
	// manyOverhead is what the pods are scheduled by: that of the RuntimeClass vm, which is a limit too, lets a hundred fit only where
	// they have 24 GiB.
	manyOverhead = "150Mi"
)

// kinds are the pods that are compared, by their RuntimeClass.
func kinds() []string { return []string{vmHandler, ""} }

// inCluster measures with a node that is a cluster's.
func (b *bench) inCluster(do func(*bench, context.Context, *cluster.Cluster) error) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		c, err := cluster.Start(ctx, cluster.Options{VMRuntime: b.vmruntime, GuestDir: b.guest, Accel: b.accel})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.Stop()) }()
		inner := &bench{options: b.options, node: c.Node()}
		if inner.vm, err = dial(c.Node().Socket()); err != nil {
			return err
		}
		defer inner.vm.close()
		err = do(inner, ctx, c)
		b.report.figures = append(b.report.figures, inner.report.figures...)
		return err
	}
}

// clusterStarts measures, in turns, pods from their creation until the API has them as running: VM pods, for each of which a guest
// waits, and pods of containers, while one waits too. The image has been pulled.
func (b *bench) clusterStarts(ctx context.Context, c *cluster.Cluster) error {
	return b.withTemplateConfig(ctx, "[template]\nspares = 1\n", func() error {
		took := map[string]durations{}
		for i := range 1 + b.pods {
			classes := kinds()
			if i%2 == 1 {
				slices.Reverse(classes)
			}
			for _, class := range classes {
				if i > 0 { // the first shows which guests are wanted; one that is being made is in the way of both kinds
					if err := b.awaitSpares(ctx, 1); err != nil {
						return err
					}
				}
				d, err := untilRunning(ctx, c, class, fmt.Sprintf("start-%s-%d", clusterKind(class), i))
				if err != nil {
					return err
				}
				if i > 0 {
					took[class] = append(took[class], d)
				}
			}
		}
		const name = "VM pod in a cluster, from its creation until it runs, over containers', "
		b.report.medians(name+"p50", took[vmHandler], took[""])
		b.report.compare(name+"p99", took[vmHandler].at(0.99), took[""].at(0.99), "ms")
		return nil
	})
}

func clusterKind(class string) string {
	if class == "" {
		return "container"
	}
	return class
}

// untilRunning takes the time of a pod's start, and removes it.
func untilRunning(ctx context.Context, c *cluster.Cluster, class, name string) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	pods := c.Client().CoreV1().Pods(metav1.NamespaceDefault)
	events, err := pods.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		return 0, err
	}
	defer events.Stop()
	begun := time.Now()
	if _, err := pods.Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: podSpec(class)}, metav1.CreateOptions{}); err != nil {
		return 0, err
	}
	for event := range events.ResultChan() {
		pod, ok := event.Object.(*corev1.Pod)
		switch {
		case !ok:
			return 0, fmt.Errorf("watching pod %s: %v", name, event.Object)
		case event.Type == "DELETED":
			return took, nil
		case took == 0 && pod.Status.Phase == corev1.PodRunning:
			took = time.Since(begun)
			if err := pods.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
				return 0, err
			}
		}
	}
	return 0, fmt.Errorf("pod %s has not started and ended within %s", name, podTimeout)
}

// podSpec is a pod that waits, of containers or with a RuntimeClass.
func podSpec(class string) corev1.PodSpec {
	grace := int64(1)
	spec := corev1.PodSpec{
		TerminationGracePeriodSeconds: &grace,
		Containers:                    []corev1.Container{{Name: "main", Image: images.Busybox, Command: []string{"sleep", "1000000"}}},
	}
	if class != "" {
		spec.RuntimeClassName = &class
	}
	return spec
}

// idle is what a node with many pods does while nothing is asked of it.
type idle struct {
	relist cluster.Histogram
	cpu    map[string]float64 // of programs, of all pods and of the whole machine, in percent of a core
}

const wholeMachine = "the whole machine"

// clusterMany measures an idle node with many VM pods, and then with as many of containers: the kubelet's relists and processor time.
func (b *bench) clusterMany(ctx context.Context, c *cluster.Cluster) error {
	const class = "many"
	if _, err := c.Client().NodeV1().RuntimeClasses().Create(ctx, &nodev1.RuntimeClass{
		ObjectMeta: metav1.ObjectMeta{Name: class}, Handler: vmHandler,
		Overhead: &nodev1.Overhead{PodFixed: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(manyOverhead)}},
	}, metav1.CreateOptions{}); err != nil {
		return err
	}
	vms, err := b.idleWith(ctx, c, class)
	if err != nil {
		return err
	}
	containers, err := b.idleWith(ctx, c, "")
	if err != nil {
		return err
	}
	with := fmt.Sprintf("with %d idle VM pods, over as many of containers", b.many)
	b.report.compare("kubelet's relist "+with+", mean", vms.relist.Mean()*1000, containers.relist.Mean()*1000, "ms")
	b.report.compare("kubelet's relist "+with+", p99 within", vms.relist.Quantile(0.99)*1000, containers.relist.Quantile(0.99)*1000, "ms")
	for _, name := range []string{"kubelet", "vmruntime", "containerd", "pods", wholeMachine} {
		b.report.compare("processor time of "+name+" "+with, vms.cpu[name], containers.cpu[name], "% of a core")
	}
	b.report.add(fmt.Sprintf("processor time of vmruntime with %d idle VM pods and a kubelet", b.many), vms.cpu["vmruntime"], "% of a core").within(daemonCPUBar)
	return nil
}

// idleWith looks at the node while it has pods of a class, which it then removes.
func (b *bench) idleWith(ctx context.Context, c *cluster.Cluster, class string) (found idle, err error) {
	name := "many-" + clusterKind(class)
	progress(fmt.Sprintf("starting %d pods of %s", b.many, name))
	replicas := int32(b.many)
	labels := map[string]string{"app": name}
	deployments := c.Client().AppsV1().Deployments(metav1.NamespaceDefault)
	if _, err := deployments.Create(ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: podSpec(class)},
		},
	}, metav1.CreateOptions{}); err != nil {
		return found, err
	}
	defer func() { err = errors.Join(err, removeMany(ctx, c, name)) }()
	begun := time.Now()
	if err := cluster.Await(ctx, manyTimeout, "all pods to run", func(ctx context.Context) error {
		d, err := deployments.Get(ctx, name, metav1.GetOptions{})
		if err == nil && d.Status.AvailableReplicas != replicas {
			err = fmt.Errorf("%d of %d do", d.Status.AvailableReplicas, replicas)
		}
		return err
	}); err != nil {
		return found, err
	}
	b.report.add(fmt.Sprintf("%d pods of a Deployment run, %s, after", b.many, clusterKind(class)), time.Since(begun).Seconds(), "s")
	if err := sleep(ctx, manySettle); err != nil {
		return found, err
	}
	return b.watchIdle(ctx, c)
}

func removeMany(ctx context.Context, c *cluster.Cluster, name string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), manyTimeout)
	defer cancel()
	if err := c.Client().AppsV1().Deployments(metav1.NamespaceDefault).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return err
	}
	return cluster.Await(ctx, manyTimeout, "all pods to go", func(ctx context.Context) error {
		pods, err := c.Client().CoreV1().Pods(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{LabelSelector: "app=" + name})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("%d are left", len(pods.Items))
		}
		return err
	})
}

// watchIdle looks at the node for a while.
func (b *bench) watchIdle(ctx context.Context, c *cluster.Cluster) (found idle, err error) {
	before, relists, err := b.nodeState(ctx, c)
	if err != nil {
		return found, err
	}
	begun := time.Now()
	if err := sleep(ctx, manyWatched); err != nil {
		return found, err
	}
	after, relistsAfter, err := b.nodeState(ctx, c)
	if err != nil {
		return found, err
	}
	took := time.Since(begun)
	found = idle{relist: relistsAfter.Since(relists), cpu: map[string]float64{}}
	for name, used := range after {
		found.cpu[name] = float64(used-before[name]) / float64(took) * 100
	}
	if found.relist.Count == 0 {
		return found, fmt.Errorf("the kubelet counts no relist in %s", took)
	}
	return found, nil
}

// nodeState is the processor time that the node's programs, all pods and the machine have used, and how long relists took.
func (b *bench) nodeState(ctx context.Context, c *cluster.Cluster) (map[string]time.Duration, cluster.Histogram, error) {
	used := map[string]time.Duration{}
	var errs []error
	for name, pid := range map[string]int{"kubelet": c.KubeletPID(), "vmruntime": b.node.VMRuntimePID(), "containerd": b.node.ContainerdPID()} {
		d, err := processCPU(pid)
		used[name] = d
		errs = append(errs, err)
	}
	machine, err := machineCPU()
	used[wholeMachine] = machine
	errs = append(errs, err)
	sandboxes, err := b.vm.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	errs = append(errs, err)
	var pods []*pod
	for _, s := range sandboxes.GetItems() {
		pods = append(pods, &pod{id: s.GetMetadata().GetUid()}) // in the name of the kubelet's cgroup for the pod
	}
	used["pods"], err = podsCPU(pods)
	errs = append(errs, err)
	metrics, err := c.KubeletMetrics(ctx)
	return used, cluster.NewHistogram(metrics["kubelet_pleg_relist_duration_seconds"], "", ""), errors.Join(append(errs, err)...)
}
