package cluster

import (
	"context"
	"fmt"
	"strings"
)

// VMPolicy turns pods into VM pods, but those that ask for a RuntimeClass or for a namespace of the node: a VM cannot
// have the latter, and tests use such pods to look at the node. The API server then runs its own plugins again, so the
// RuntimeClass's overhead and node selector are added as if the pod had asked.
const VMPolicy = `apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: vm}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}
  matchConditions:
  - {name: no-class, expression: "!has(object.spec.runtimeClassName)"}
  - {name: no-network, expression: "!has(object.spec.hostNetwork) || !object.spec.hostNetwork"}
  - {name: no-pid, expression: "!has(object.spec.hostPID) || !object.spec.hostPID"}
  - {name: no-ipc, expression: "!has(object.spec.hostIPC) || !object.spec.hostIPC"}
  failurePolicy: Fail
  reinvocationPolicy: Never
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration:
      expression: 'Object{spec: Object.spec{runtimeClassName: "vm"}}'
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {name: vm}
spec: {policyName: vm}
`

// MakeAllVMs applies VMPolicy and returns when it holds.
func (c *Cluster) MakeAllVMs(ctx context.Context) error {
	cmd := c.KubectlCommand(ctx, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(VMPolicy)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apply the policy for VMs: %w\n%s", err, out)
	}
	return Await(ctx, readyTimeout, "the policy for VMs", func(ctx context.Context) error {
		class, err := c.Kubectl(ctx, "run", "probe", "--image=probe", "--dry-run=server", "-o", "jsonpath={.spec.runtimeClassName} {.spec.overhead.memory}")
		if err == nil && !strings.HasPrefix(class, "vm ") {
			err = fmt.Errorf("a pod's RuntimeClass and overhead are %q", class)
		}
		return err
	})
}
