package main

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// moduleSet names modules as modprobe would: without directory, dependencies, or suffix.
type moduleSet struct {
	Boot []string            // loaded by every boot, in this order
	Lazy map[string][]string // loaded on first use of a feature
	Auto []string            // loaded when the kernel asks; "DIR/*" is every module of a directory below kernel/
}

// modules are the files of a moduleSet and the order in which they load, as vmagent reads it.
type modules struct {
	files  map[string][]byte // by base name; those that load at boot or by feature
	packed map[string][]byte // by base name; those that load only when the kernel asks
	auto   autoload

	Boot  []string            `json:"boot"`
	Lazy  map[string][]string `json:"lazy"`
	Nodes []deviceNode        `json:"nodes"`
}

func (m *modules) list() ([]byte, error) {
	data, err := json.MarshalIndent(m, "", "  ")
	return append(data, '\n'), err
}

// moduleResolver finds modules and their dependencies in one kernel's tree.
type moduleResolver struct {
	files   map[string]treeFile // by normalized name
	names   map[string]string   // normalized name to path
	builtin map[string]bool
	read    map[string]*moduleInfo // by normalized name
}

// moduleInfo is a module's file, and what it says about itself.
type moduleInfo struct {
	data    []byte
	depends []string // modules whose symbols it uses
	before  []string // what it asks to be loaded before it; may be no module's name
	aliases []string
}

// resolveModules computes the load order of a set: every module after those it depends on, each once.
func resolveModules(tree fileTree, dir string, set moduleSet) (*modules, error) {
	r, err := newModuleResolver(tree, dir)
	if err != nil {
		return nil, err
	}
	m := &modules{
		files: map[string][]byte{}, packed: map[string][]byte{},
		Boot: []string{}, Lazy: map[string][]string{}, Nodes: []deviceNode{},
	}
	seen := map[string]bool{}
	if m.Boot, err = r.order(seen, set.Boot...); err != nil {
		return nil, err
	}
	r.take(m.files, m.Boot)
	for feature, names := range set.Lazy {
		// Each feature stands on the boot set alone.
		if m.Lazy[feature], err = r.order(maps.Clone(seen), names...); err != nil {
			return nil, err
		}
		r.take(m.files, m.Lazy[feature])
	}
	if err := r.autoload(m, dir, seen, set.Auto); err != nil {
		return nil, err
	}
	return m, nil
}

func newModuleResolver(tree fileTree, dir string) (*moduleResolver, error) {
	r := &moduleResolver{
		files: map[string]treeFile{}, names: map[string]string{}, builtin: map[string]bool{}, read: map[string]*moduleInfo{},
	}
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
			r.files[key], r.names[key] = f, name
		}
	}
	return r, nil
}

// moduleName is how the kernel names the module of a file: hyphens are underscores.
func moduleName(file string) string {
	base, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(base, "-", "_")
}

// order gives the files of modules and of what they need, without those seen before.
func (r *moduleResolver) order(seen map[string]bool, names ...string) ([]string, error) {
	order := []string{}
	for _, name := range names {
		var err error
		if order, err = r.visit(order, seen, name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func (r *moduleResolver) visit(order []string, seen map[string]bool, name string) ([]string, error) {
	name = moduleName(name)
	if seen[name] || r.builtin[name] {
		return order, nil
	}
	seen[name] = true
	info, err := r.info(name)
	if err != nil {
		return nil, err
	}
	for _, dep := range info.depends {
		if order, err = r.visit(order, seen, dep); err != nil {
			return nil, err
		}
	}
	for _, dep := range info.before {
		if _, ok := r.files[moduleName(dep)]; !ok {
			continue // an alias, for which the kernel asks by itself
		}
		if order, err = r.visit(order, seen, dep); err != nil {
			return nil, err
		}
	}
	return append(order, name+".ko"), nil
}

// take copies the content of files that order has listed.
func (r *moduleResolver) take(to map[string][]byte, files []string) {
	for _, file := range files {
		to[file] = r.read[moduleName(file)].data
	}
}

func (r *moduleResolver) info(name string) (*moduleInfo, error) {
	if info, ok := r.read[name]; ok {
		return info, nil
	}
	f, ok := r.files[name]
	if !ok {
		return nil, fmt.Errorf("module %s is neither in the kernel nor beside it: %w", name, errNoFile)
	}
	data, err := uncompressModule(path.Base(r.names[name]), f.data)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", name, err)
	}
	info, err := readModuleInfo(data)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", name, err)
	}
	r.read[name] = info
	return info, nil
}

// readModuleInfo reads a module's section .modinfo: strings KEY=VALUE, each ended by a zero byte.
func readModuleInfo(data []byte) (*moduleInfo, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no section .modinfo")
	}
	text, err := section.Data()
	if err != nil {
		return nil, err
	}
	info := &moduleInfo{data: data}
	for entry := range strings.SplitSeq(string(text), "\x00") {
		key, value, _ := strings.Cut(entry, "=")
		switch {
		case value == "":
		case key == "depends":
			info.depends = append(info.depends, strings.Split(value, ",")...)
		case key == "alias":
			info.aliases = append(info.aliases, value)
		case key == "softdep":
			before, _, _ := strings.Cut(value, "post:")
			info.before = append(info.before, strings.Fields(strings.TrimPrefix(before, "pre:"))...)
		}
	}
	slices.Sort(info.depends)
	return info, nil
}
