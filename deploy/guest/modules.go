package main

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// moduleSet names modules as modprobe would: without directory, dependencies, or suffix.
type moduleSet struct {
	Boot []string            // loaded by every boot, in this order
	Lazy map[string][]string // loaded on first use of a feature
}

// containerModules are what container VMs need. What a kernel has built in is left out by itself.
func containerModules() moduleSet {
	return moduleSet{
		Boot: []string{
			"virtio_pci", "virtio_console", "virtio_scsi", "sd_mod", "virtio_net", "erofs", "overlay", "ext4", "virtio_rng",
		},
		Lazy: map[string][]string{"virtiofs": {"virtiofs"}},
	}
}

// modules are the files of a moduleSet and the order in which they load, as vmagent reads it.
type modules struct {
	files map[string][]byte   // by base name
	Boot  []string            `json:"boot"`
	Lazy  map[string][]string `json:"lazy"`
}

func (m *modules) list() ([]byte, error) {
	data, err := json.MarshalIndent(m, "", "  ")
	return append(data, '\n'), err
}

// moduleResolver finds modules and their dependencies in one kernel's tree.
type moduleResolver struct {
	files   map[string]treeFile // by normalized name
	names   map[string]string   // normalized name to file name
	builtin map[string]bool
}

// resolveModules computes the load order of a set: every module after those it depends on, each once.
func resolveModules(tree fileTree, dir string, set moduleSet) (*modules, error) {
	r, err := newModuleResolver(tree, dir)
	if err != nil {
		return nil, err
	}
	m := &modules{files: map[string][]byte{}, Boot: []string{}, Lazy: map[string][]string{}}
	seen := map[string]bool{}
	for _, name := range set.Boot {
		if m.Boot, err = r.visit(m, m.Boot, seen, name); err != nil {
			return nil, err
		}
	}
	for feature, names := range set.Lazy {
		// Each feature stands on the boot set alone.
		mine, order := map[string]bool{}, []string{}
		for name := range seen {
			mine[name] = true
		}
		for _, name := range names {
			if order, err = r.visit(m, order, mine, name); err != nil {
				return nil, err
			}
		}
		m.Lazy[feature] = order
	}
	return m, nil
}

func newModuleResolver(tree fileTree, dir string) (*moduleResolver, error) {
	r := &moduleResolver{files: map[string]treeFile{}, names: map[string]string{}, builtin: map[string]bool{}}
	list, ok := tree[path.Join(dir, "modules.builtin")]
	if !ok {
		return nil, fmt.Errorf("%s/modules.builtin: %w", dir, errNoFile)
	}
	for line := range strings.Lines(string(list.data)) {
		r.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	for name, f := range tree {
		if strings.HasPrefix(name, dir+"/kernel/") && strings.Contains(path.Base(name), ".ko") {
			key := moduleName(name)
			r.files[key], r.names[key] = f, path.Base(name)
		}
	}
	return r, nil
}

// moduleName is how the kernel names the module of a file: hyphens are underscores.
func moduleName(file string) string {
	base, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(base, "-", "_")
}

func (r *moduleResolver) visit(m *modules, order []string, seen map[string]bool, name string) ([]string, error) {
	name = moduleName(name)
	if seen[name] || r.builtin[name] {
		return order, nil
	}
	seen[name] = true
	f, ok := r.files[name]
	if !ok {
		return nil, fmt.Errorf("module %s is neither in the kernel nor beside it: %w", name, errNoFile)
	}
	data, err := uncompressModule(r.names[name], f.data)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", name, err)
	}
	deps, err := moduleDepends(data)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", name, err)
	}
	for _, dep := range deps {
		if order, err = r.visit(m, order, seen, dep); err != nil {
			return nil, err
		}
	}
	file := name + ".ko"
	m.files[file] = data
	return append(order, file), nil
}

// moduleDepends reads what a module says about itself: the modules whose symbols it uses, and those that
// it asks to be loaded before it, which may have been built in.
func moduleDepends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var deps []string
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			deps = append(deps, strings.Split(list, ",")...)
		}
	}
	slices.Sort(deps)
	return deps, nil
}
