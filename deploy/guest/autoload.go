package main

import (
	"archive/zip"
	"bytes"
	"compress/flate"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

// autoload is what vmagent reads when the kernel asks for a module.
type autoload struct {
	Modules map[string][]string `json:"modules"` // by module: its files in load order, without those of each boot
	Aliases map[string][]string `json:"aliases"` // modules by alias, which may hold "*"; "-" is written "_"
}

func (a *autoload) list() ([]byte, error) {
	data, err := json.Marshal(a)
	return append(data, '\n'), err
}

// deviceNode is a device file the opening of which makes the kernel ask for its module.
type deviceNode struct {
	Path  string `json:"path"` // below /dev
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
}

// autoload resolves the modules that the kernel may ask for. What is among m's loose files is not packed
// a second time; what each boot loads is left out.
func (r *moduleResolver) autoload(m *modules, dir string, boot map[string]bool, set []string) error {
	names, err := r.expand(dir, set)
	if err != nil {
		return err
	}
	all, err := r.order(maps.Clone(boot), names...)
	if err != nil {
		return err
	}
	slices.Sort(all)
	m.auto = autoload{Modules: map[string][]string{}, Aliases: map[string][]string{}}
	for _, file := range all {
		name := moduleName(file)
		if m.auto.Modules[name], err = r.order(maps.Clone(boot), name); err != nil {
			return err
		}
		info := r.read[name]
		if m.files[file] == nil {
			m.packed[file] = info.data
		}
		m.auto.addAliases(name, info.aliases)
		m.Nodes = append(m.Nodes, nodesOf(info.aliases)...)
	}
	return nil
}

// expand replaces "DIR/*" by the modules of that directory.
func (r *moduleResolver) expand(dir string, set []string) ([]string, error) {
	var names []string
	for _, entry := range set {
		sub, isDir := strings.CutSuffix(entry, "/*")
		if !isDir {
			names = append(names, entry)
			continue
		}
		found := false
		for name, file := range r.names {
			if path.Dir(file) == path.Join(dir, "kernel", sub) {
				names, found = append(names, name), true
			}
		}
		if !found {
			return nil, fmt.Errorf("modules %s: %w", entry, errNoFile)
		}
	}
	return names, nil
}

// addAliases leaves out the names of device files, which are not asked for.
func (a *autoload) addAliases(name string, aliases []string) {
	for _, alias := range aliases {
		alias = strings.ReplaceAll(alias, "-", "_")
		if strings.HasPrefix(alias, "devname:") || alias == name || slices.Contains(a.Aliases[alias], name) {
			continue
		}
		a.Aliases[alias] = append(a.Aliases[alias], name)
	}
}

// nodesOf gives the device file of a module that names one and its number.
func nodesOf(aliases []string) []deviceNode {
	var nodes []deviceNode
	for _, name := range aliases {
		file, ok := strings.CutPrefix(name, "devname:")
		if !ok {
			continue
		}
		for _, alias := range aliases {
			n := deviceNode{Path: file}
			if _, err := fmt.Sscanf(alias, "char-major-%d-%d", &n.Major, &n.Minor); err == nil {
				nodes = append(nodes, n)
			}
		}
	}
	return nodes
}

// packModules makes an archive of which vmagent unpacks the one file that it needs. Its records carry no time.
func packModules(files map[string][]byte) ([]byte, error) {
	var buf bytes.Buffer
	w := zip.NewWriter(&buf)
	w.RegisterCompressor(zip.Deflate, func(out io.Writer) (io.WriteCloser, error) {
		return flate.NewWriter(out, flate.BestCompression)
	})
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f, err := w.Create(name)
		if err != nil {
			return nil, fmt.Errorf("pack %s: %w", name, err)
		}
		if _, err := f.Write(files[name]); err != nil {
			return nil, fmt.Errorf("pack %s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}
