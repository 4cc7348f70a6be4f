package network

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
)

// load reads the node's CNI configuration as it is now. The loopback plugin is not needed: the package sets lo up.
func (m *Manager) load() (gocni.CNI, error) {
	c, err := gocni.New(
		gocni.WithPluginDir(m.opts.BinDirs),
		gocni.WithPluginConfDir(m.opts.ConfDir),
		gocni.WithMinNetworkCount(1),
	)
	if err != nil {
		return nil, err
	}
	if err := c.Load(gocni.WithDefaultConf); err != nil {
		return nil, fmt.Errorf("the CNI configuration in %s is not usable; install a network plugin for the cluster or correct it: %w: %w",
			m.opts.ConfDir, err, errdefs.ErrUnavailable)
	}
	return c, nil
}

// lib is libcni below go-cni, for its cache of attachments and for calls that go-cni makes without a deadline.
func (m *Manager) lib() *libcni.CNIConfig {
	return libcni.NewCNIConfig(m.opts.BinDirs, nil)
}

// Ready says whether pods can get a network now: a CNI configuration is there and loadable, the programs of its
// plugins are there, and plugins that can tell (CNI 1.1 STATUS) say so. The error names what is missing; its class is ErrUnavailable.
func (m *Manager) Ready(ctx context.Context) error {
	c, err := m.load()
	if err != nil {
		return err
	}
	lists, err := m.usable(c)
	if err != nil {
		return err
	}
	for _, list := range lists {
		if err := m.lib().GetStatusNetworkList(ctx, list); err != nil {
			return fmt.Errorf("CNI network %q says that it is not ready: %w: %w", list.Name, err, errdefs.ErrUnavailable)
		}
	}
	return nil
}

// usable gives the networks of a configuration, all of whose plugins are there.
func (m *Manager) usable(c gocni.CNI) ([]*libcni.NetworkConfigList, error) {
	var lists []*libcni.NetworkConfigList
	for _, n := range c.GetConfig().Networks {
		list, err := libcni.ConfListFromBytes([]byte(n.Config.Source))
		if err != nil {
			return nil, fmt.Errorf("read CNI network %q again: %w: %w", n.Config.Name, err, errdefs.ErrUnavailable)
		}
		if err := m.findPlugins(list); err != nil {
			return nil, err
		}
		lists = append(lists, list)
	}
	return lists, nil
}

func (m *Manager) findPlugins(list *libcni.NetworkConfigList) error {
	programs := map[string]bool{}
	for _, p := range list.Plugins {
		programs[p.Network.Type] = true
		if p.Network.IPAM.Type != "" {
			programs[p.Network.IPAM.Type] = true
		}
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(programs)) {
		if _, err := invoke.FindInPath(name, m.opts.BinDirs); err != nil {
			errs = append(errs, fmt.Errorf("CNI plugin %q, which network %q uses, is not in %s; install it there: %w",
				name, list.Name, strings.Join(m.opts.BinDirs, " or "), errdefs.ErrUnavailable))
		}
	}
	return errors.Join(errs...)
}

// addToCNI runs ADD and returns the interfaces that results name, the primary one first.
func addToCNI(ctx context.Context, c gocni.CNI, req Request, path string) ([]string, error) {
	opts, err := req.cniOptions()
	if err != nil {
		return nil, err
	}
	res, err := c.Setup(ctx, req.ID, path, opts...)
	if err != nil {
		return nil, fmt.Errorf("CNI ADD for pod %s/%s: %w", req.Namespace, req.Name, classify(err))
	}
	var order []string
	for _, r := range res.Raw() {
		for _, i := range r.Interfaces {
			if i.Sandbox != "" {
				order = append(order, i.Name)
			}
		}
	}
	return order, nil
}

// classify gives a plugin's error a class. The plugins say only in words that addresses are used up.
func classify(err error) error {
	if strings.Contains(err.Error(), "no IP addresses available") {
		return fmt.Errorf("the network has no free address; give it a larger range or remove pods: %w: %w",
			err, errdefs.ErrResourceExhausted)
	}
	return err
}

func (m *Manager) cachedAttachments(id string) ([]*libcni.NetworkAttachment, error) {
	list, err := m.lib().GetCachedAttachments(id)
	if err != nil {
		return nil, fmt.Errorf("read the attachments that CNI recorded: %w", err)
	}
	return list, nil
}

// removeFromCNI runs DEL for every attachment on record, with the configuration it was made with. An ADD that failed
// has left none, so DEL runs also by the node's configuration, except when that is on record in full.
func (m *Manager) removeFromCNI(ctx context.Context, req Request, path string) error {
	there := isNetNS(path)
	if !there {
		path = "" // how CNI is told that the namespace is gone
	}
	cached, err := m.cachedAttachments(req.ID)
	if err != nil {
		return err
	}
	var errs []error
	recorded := map[string]bool{}
	for _, a := range cached {
		recorded[a.Network+"/"+a.IfName] = true
		errs = append(errs, m.removeCached(ctx, a, path))
	}
	// Setup makes no namespace while there is no usable configuration, so without one there is nothing more to give back.
	c, err := m.load()
	if err != nil || allRecorded(c, recorded) {
		return errors.Join(errs...)
	}
	if _, err := m.usable(c); err != nil && !there {
		return errors.Join(errs...) // nor while a plugin is missing
	}
	return errors.Join(append(errs, removeByConfig(ctx, c, req, path))...)
}

func (m *Manager) removeCached(ctx context.Context, a *libcni.NetworkAttachment, path string) error {
	list, err := libcni.ConfListFromBytes(a.Config)
	if err != nil {
		return fmt.Errorf("read the recorded configuration of CNI network %q: %w", a.Network, err)
	}
	err = m.lib().DelNetworkList(ctx, list, &libcni.RuntimeConf{
		ContainerID: a.ContainerID, NetNS: path, IfName: a.IfName, Args: a.CniArgs, CapabilityArgs: a.CapabilityArgs,
	})
	if err != nil {
		return fmt.Errorf("CNI DEL of %s in network %q: %w", a.IfName, a.Network, err)
	}
	return nil
}

func allRecorded(c gocni.CNI, recorded map[string]bool) bool {
	for _, n := range c.GetConfig().Networks {
		if !recorded[n.Config.Name+"/"+n.IFName] {
			return false
		}
	}
	return true
}

func removeByConfig(ctx context.Context, c gocni.CNI, req Request, path string) error {
	opts, err := req.cniOptions()
	if err != nil {
		return err
	}
	if err := c.Remove(ctx, req.ID, path, opts...); err != nil {
		return fmt.Errorf("CNI DEL: %w", err)
	}
	return nil
}

// isNetNS tells whether a path is a namespace, and not the empty file that is left of one.
func isNetNS(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return isNSFile(f)
}
