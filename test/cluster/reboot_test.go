package cluster_test

import (
	"context"
	"testing"
)

// After the node was switched off and on, what ran runs again, as a container and as a VM, and Services work.
func TestReboot(t *testing.T) {
	ctx, c := use(t)
	const ns = "reboot"
	kubectl(ctx, t, c, "create", "namespace", ns)
	t.Cleanup(func() { kubectl(context.WithoutCancel(ctx), t, c, "delete", "namespace", ns, "--wait") })
	kinds := []string{"container", "vm"}
	for _, kind := range kinds {
		apply(ctx, t, c, ns, deployment(kind))
	}
	for _, kind := range kinds {
		kubectl(ctx, t, c, "-n", ns, "rollout", "status", "deployment/"+kind, "--timeout=4m")
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
	awaitPage(ctx, t, c, ns, "vm", "container")
}
