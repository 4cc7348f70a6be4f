package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// stopTimeout bounds Stop's removal of pods, whose context is its own.
const stopTimeout = 3 * time.Minute

// removePods has the kubelet end every pod and take down its volumes, while nothing makes new ones, and then removes
// the sandboxes, which the kubelet does at its leisure.
func (c *Cluster) removePods(ctx context.Context) error {
	errs := []error{c.daemons["kube-controller-manager"].Stop(), c.daemons["kube-scheduler"].Stop(), c.removeManifests()}
	namespaces, err := c.client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	soon := int64(1)
	for _, ns := range namespaces.Items {
		errs = append(errs, c.client.CoreV1().Pods(ns.Name).DeleteCollection(ctx,
			metav1.DeleteOptions{GracePeriodSeconds: &soon}, metav1.ListOptions{}))
	}
	errs = append(errs, Await(ctx, 2*time.Minute, "all pods to go", c.noPods), c.daemons["kubelet"].Stop())
	_, err = c.node.Crictl(ctx, "rmp", "--all", "--force")
	return errors.Join(append(errs, err)...)
}

func (c *Cluster) removeManifests() error {
	files, err := filepath.Glob(filepath.Join(c.ManifestDir(), "*"))
	for _, f := range files {
		err = errors.Join(err, os.Remove(f))
	}
	return err
}

func (c *Cluster) noPods(ctx context.Context) error {
	pods, err := c.client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var left []string
	for _, p := range pods.Items {
		left = append(left, p.Namespace+"/"+p.Name)
		// What the kubelet never had goes at once.
		if p.Spec.NodeName == "" {
			now := int64(0)
			err := c.client.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now})
			if err != nil && !apierrors.IsNotFound(err) {
				return err
			}
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("pods are left: %s", strings.Join(left, ", "))
	}
	return nil
}

// Leaks lists what pods that are gone left on the node. The kubelet may take a minute to remove the sandboxes of
// deleted pods, which are listed until then.
func (c *Cluster) Leaks(ctx context.Context) ([]string, error) {
	lines, err := c.node.Leaks(ctx)
	// The kubelet's own cgroups are there with its first pod, on some hierarchies.
	return slices.DeleteFunc(lines, func(line string) bool {
		return strings.HasPrefix(line, "cgroup ") && slices.Contains([]string{"kubepods", "besteffort", "burstable"}, filepath.Base(line))
	}), err
}
