package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"path"
	"strings"
)

var errNoFile = errors.New("no such file in the packages")

// fileTree is the content of packages by path, without a leading slash.
type fileTree map[string]treeFile

type treeFile struct {
	data []byte
	link string // target of a symbolic link; data is then empty
	pkg  string // the package that it came with
}

func (t fileTree) add(other fileTree) {
	maps.Copy(t, other)
}

// unpack reads a package's files and symbolic links into memory.
func unpack(ctx context.Context, p debPackage) (fileTree, error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", p.path)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("dpkg-deb: %w", err)
	}
	files, err := readTar(out, p.Name)
	if err != nil {
		// The writer of the pipe must not wait for a reader that has given up.
		_, _ = io.Copy(io.Discard, out)
	}
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return nil, fmt.Errorf("package %s: %w: %s", p.path, err, strings.TrimSpace(stderr.String()))
	}
	return files, nil
}

func readTar(r io.Reader, pkg string) (fileTree, error) {
	files := fileTree{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			_, err := io.Copy(io.Discard, r)
			return files, err
		}
		if err != nil {
			return nil, err
		}
		f := treeFile{pkg: pkg}
		switch h.Typeflag {
		case tar.TypeReg:
			if f.data, err = io.ReadAll(tr); err != nil {
				return nil, err
			}
		case tar.TypeSymlink:
			f.link = h.Linkname
		default:
			continue
		}
		files[path.Clean(strings.TrimPrefix(h.Name, "/"))] = f
	}
}

// resolve follows symbolic links to a regular file.
func (t fileTree) resolve(name string) (string, treeFile, error) {
	for range 16 {
		f, ok := t[name]
		switch {
		case !ok:
			return "", treeFile{}, fmt.Errorf("%s: %w", name, errNoFile)
		case f.link == "":
			return name, f, nil
		case path.IsAbs(f.link):
			name = strings.TrimPrefix(path.Clean(f.link), "/")
		default:
			name = path.Join(path.Dir(name), f.link)
		}
	}
	return "", treeFile{}, fmt.Errorf("%s: more than 16 symbolic links", name)
}
