package ocispec

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
)

const (
	// maxUserFile bounds what is read of the image's /etc/passwd or /etc/group, in bytes.
	maxUserFile = 4 << 20
	// maxLinks bounds how many symbolic links lead to a file of the image.
	maxLinks = 40
)

// parse reads the entries that the filter lets through from a file of the image. A file that is not there has none.
func parse[E any](root fs.FS, name string, read func(io.Reader, func(E) bool) ([]E, error), filter func(E) bool) ([]E, error) {
	if root == nil {
		return nil, nil
	}
	resolved, err := follow(root, name)
	if err != nil {
		return nil, fmt.Errorf("/%s of the image: %w", name, err)
	}
	f, err := root.Open(resolved)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("/%s of the image: %w", name, err)
	}
	defer f.Close()
	entries, err := read(io.LimitReader(f, maxUserFile), filter)
	if err != nil {
		return nil, fmt.Errorf("/%s of the image: %w", name, err)
	}
	return entries, nil
}

// follow resolves symbolic links within the image, whose root a link cannot leave. The rest of a path behind something
// that is not there is left as it is.
func follow(root fs.FS, name string) (string, error) {
	done, rest := ".", name
	for links := 0; rest != ""; {
		var element string
		element, rest, _ = strings.Cut(rest, "/")
		next := path.Join("/", done, element)[1:]
		if next == "" {
			done = "."
			continue
		}
		info, err := fs.Lstat(root, next)
		if err != nil || info.Mode()&fs.ModeSymlink == 0 {
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("more than %d symbolic links", maxLinks)
		}
		target, err := fs.ReadLink(root, next)
		if err != nil {
			return "", err
		}
		if path.IsAbs(target) {
			done = "."
		}
		rest = strings.TrimPrefix(path.Join(target, rest), "/")
	}
	return done, nil
}
