package cluster_test

import (
	"context"
	"testing"
)

// After the node was switched off and on, what ran runs again, as a container, as a VM and as a machine, each once, and Services work.
func TestReboot(t *testing.T) {
	ctx, c := use(t)
	const ns = "reboot"
	kubectl(ctx, t, c, "create", "namespace", ns)
	t.Cleanup(func() { kubectl(context.WithoutCancel(ctx), t, c, "delete", "namespace", ns, "--wait") })
	n := &namespace{Cluster: c, ctx: ctx, name: ns, vm: true}
	kinds := []string{"container", "vm", "machine"}
	for _, kind := range kinds[:2] {
		apply(ctx, t, c, ns, deployment(kind))
	}
	n.createMachine(t, "machine", machine("serve", "terminationGracePeriodSeconds: 1", ""))
	for _, kind := range kinds {
		kubectl(ctx, t, c, "-n", ns, "wait", "pod", "-l", "app="+kind, "--for=create", "--timeout=1m")
		kubectl(ctx, t, c, "-n", ns, "wait", "pod", "-l", "app="+kind, "--for=condition=Ready", "--timeout=4m")
	}
	before := kubectl(ctx, t, c, "-n", ns, "get", "pods", "-o", "name")
	if err := c.Reboot(ctx); err != nil {
		t.Fatal(err)
	}
	for _, kind := range kinds {
		kubectl(ctx, t, c, "-n", ns, "wait", "pod", "-l", "app="+kind, "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "--timeout=4m")
		kubectl(ctx, t, c, "-n", ns, "wait", "pod", "-l", "app="+kind, "--for=condition=Ready", "--timeout=4m")
	}
	if after := kubectl(ctx, t, c, "-n", ns, "get", "pods", "-o", "name"); after != before {
		t.Errorf("pods are %q, before the reboot %q", after, before)
	}
	n.noneTwice(t, len(kinds))
	awaitPage(ctx, t, c, ns, "vm", "container")
}
