package main

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"path"
	"strings"
)

// libraryDirs are where Debian's packages hold shared libraries, below which TRIPLET may follow.
var libraryDirs = []string{"lib", "usr/lib"}

// elfClosure collects a program, its interpreter and all libraries that they need, each under the path by
// which the loader asks for it. owners are the packages that they come from.
func elfClosure(tree fileTree, program string) (files map[string][]byte, owners map[string]bool, err error) {
	files, owners = map[string][]byte{}, map[string]bool{}
	todo := []string{program}
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		if files[name] != nil {
			continue
		}
		_, f, err := tree.resolve(name)
		if err != nil {
			return nil, nil, fmt.Errorf("closure of %s: %w", program, err)
		}
		files[name], owners[f.pkg] = f.data, true
		needed, err := elfNeeds(f.data, tree)
		if err != nil {
			return nil, nil, fmt.Errorf("closure of %s: %s: %w", program, name, err)
		}
		todo = append(todo, needed...)
	}
	return files, owners, nil
}

func elfNeeds(data []byte, tree fileTree) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		interp, err := io.ReadAll(p.Open())
		if err != nil {
			return nil, err
		}
		paths = append(paths, strings.Trim(string(interp), "/\x00"))
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, lib := range libs {
		if strings.HasPrefix(lib, "ld-linux-") {
			continue // the loader itself, there already as the program's interpreter
		}
		p, err := findLibrary(tree, lib, f.Machine)
		if err != nil {
			return nil, err
		}
		paths = append(paths, p)
	}
	return paths, nil
}

// findLibrary gives the path of a library below one of the directories that Debian's loader searches.
func findLibrary(tree fileTree, lib string, machine elf.Machine) (string, error) {
	triplet := map[elf.Machine]string{elf.EM_X86_64: "x86_64-linux-gnu", elf.EM_AARCH64: "aarch64-linux-gnu"}[machine]
	for _, dir := range libraryDirs {
		for _, sub := range []string{triplet, ""} {
			if p := path.Join(dir, sub, lib); tree[p].data != nil || tree[p].link != "" {
				return p, nil
			}
		}
	}
	return "", fmt.Errorf("library %s: %w", lib, errNoFile)
}
