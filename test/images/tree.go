package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"iter"
	"log"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// tree is a file system by path, without a leading slash.
type tree map[string]*node

// node is a file, or with link a symlink, with hard a hard link.
type node struct {
	isDir      bool
	mode       int64
	uid, gid   int
	data       []byte
	link, hard string
}

func (t tree) names() iter.Seq[string] { return maps.Keys(t) }

// dir adds a directory and its parents.
func (t tree) dir(name string, mode int64) {
	if parent := path.Dir(name); parent != "." {
		if _, ok := t[parent]; !ok {
			t.dir(parent, 0o755)
		}
	}
	t[name] = &node{isDir: true, mode: mode}
}

func (t tree) put(name string, n *node) {
	if parent := path.Dir(name); parent != "." && t[parent] == nil {
		t.dir(parent, 0o755)
	}
	t[name] = n
}

func (t tree) file(name string, mode int64, data string) {
	t.put(name, &node{mode: mode, data: []byte(data)})
}
func (t tree) link(name, target string)     { t.put(name, &node{mode: 0o777, link: target}) }
func (t tree) hardlink(name, target string) { t.put(name, &node{mode: 0o755, hard: target}) }

// layer packs the tree. Order, times and owners do not depend on the machine.
// Hard links follow all files, so that their targets are there.
func (t tree) layer() (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	names := slices.Sorted(t.names())
	slices.SortStableFunc(names, func(a, b string) int { return btoi(t[a].hard != "") - btoi(t[b].hard != "") })
	for _, name := range names {
		if err := t[name].write(w, name); err != nil {
			return nil, fmt.Errorf("pack %q: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	opener := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil }
	return tarball.LayerFromOpener(opener, tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithCompressedCaching)
}

func (n *node) write(w *tar.Writer, name string) error {
	h := &tar.Header{Name: name, Mode: n.mode, Uid: n.uid, Gid: n.gid, Format: tar.FormatPAX}
	switch {
	case n.isDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case n.link != "":
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.link
	case n.hard != "":
		h.Typeflag, h.Linkname = tar.TypeLink, n.hard
	default:
		h.Typeflag, h.Size = tar.TypeReg, int64(len(n.data))
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(n.data)
	return err
}

// goImage is an image of one static Go program, which it runs.
func goImage(prog, file string, mode int64, config v1.Config) (v1.Image, error) {
	layer, err := goLayer(prog, file, mode)
	if err != nil {
		return nil, err
	}
	config.Entrypoint = []string{file}
	return image(config, layer)
}

// goLayer is one static Go program as a file.
func goLayer(prog, file string, mode int64) (v1.Layer, error) {
	tmp, err := os.MkdirTemp("", "vmruntime-images-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, prog)
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", out,
		"github.com/vmruntime/vmruntime/test/images/prog/"+prog)
	cmd.Dir = sourceDir()
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", cmd, err, output)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	fs := tree{}
	fs.file(file[1:], mode, string(data))
	return fs.layer()
}

func sourceDir() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(file)
}

func arch() string { return runtime.GOARCH }

// multiarch is Debian's name of the machine's kind.
func multiarch() string {
	return map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[runtime.GOARCH]
}

func discardLogger() *log.Logger { return log.New(io.Discard, "", 0) }

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
