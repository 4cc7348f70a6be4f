// Package images makes the OCI images of the tests without a registry: from
// Debian packages, which apt fetches and verifies, and from the Go programs
// below prog. The same packages give the same digests.
//
// Handler serves them; containerd is pointed at it for every registry name.
package images

import (
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// The images that our own tests use. The names resolve to the test's registry,
// as every name does on a test node.
const (
	Sandbox = "vmruntime.test/sandbox:1" // the pause image of normal pods
	Busybox = "vmruntime.test/busybox:1" // dynamic busybox, pgrep, ipcs
	Nginx   = "vmruntime.test/nginx:1"   // Debian's nginx on port 80
	Server  = "vmruntime.test/server:1"  // one static Go program, port 8080
	Users   = "vmruntime.test/users:1"   // USER alice:crew, more users and groups
	Layers  = "vmruntime.test/layers:1"  // two layers, the second with whiteouts
	Pages   = "vmruntime.test/pages:1"   // busybox, and /pages, which maps huge pages
)

const (
	e2ePrefix     = "registry.k8s.io/e2e-test-images/"
	critestPrefix = "gcr.io/k8s-staging-cri-tools/"
	// digestRepo is the image that critest pulls by digest, see tools.DigestImage.
	digestRepo = critestPrefix + "test-image-digest"
)

// Build makes every image, by reference.
func Build() (map[string]v1.Image, error) {
	d, err := openDebs(packages()...)
	if err != nil {
		return nil, err
	}
	all := map[string]v1.Image{}
	for _, group := range []func(*debs, map[string]v1.Image) error{addOwn, addCritest} {
		if err := group(d, all); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Handler builds the images and returns a registry that serves them and the images of
// disks, whatever registry name stands before the repository.
func Handler() (http.Handler, error) {
	all, err := Build()
	if err != nil {
		return nil, err
	}
	return handlerOf(all)
}

func handlerOf(all map[string]v1.Image) (http.Handler, error) {
	h := newDiskRegistry()
	for _, ref := range slices.Sorted(maps.Keys(all)) {
		tag, err := name.NewTag(ref)
		if err != nil {
			return nil, err
		}
		if err := remote.Write(tag, all[ref], remote.WithTransport(handlerTransport{h})); err != nil {
			return nil, fmt.Errorf("store image %s: %w", ref, err)
		}
	}
	return h, nil
}

// handlerTransport hands requests to a handler in this process.
type handlerTransport struct{ http.Handler }

func (t handlerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body == nil {
		r.Body = http.NoBody // what a server gives its handlers
	}
	w := httptest.NewRecorder()
	t.ServeHTTP(w, r)
	response := w.Result()
	response.Request = r
	return response, nil
}

// image makes an image of layers and a config.
func image(config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	return platformImage(arch(), config, layers...)
}

func platformImage(arch string, config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	return imageOn(empty.Image, arch, config, layers...)
}

func imageOn(base v1.Image, arch string, config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	img, err := mutate.AppendLayers(base, layers...)
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Config = "linux", arch, config
	return mutate.ConfigFile(img, file)
}

func addOwn(d *debs, all map[string]v1.Image) error {
	base, err := d.base()
	if err != nil {
		return err
	}
	builders := map[string]func() (v1.Image, error){
		Sandbox: func() (v1.Image, error) { return goImage("pause", "/pause", 0o755, v1.Config{}) },
		Busybox: func() (v1.Image, error) { return image(v1.Config{Cmd: []string{"sh"}}, base) },
		Nginx:   func() (v1.Image, error) { return d.nginx(base, 80) },
		Server: func() (v1.Image, error) {
			return goImage("server", "/server", 0o755, v1.Config{ExposedPorts: map[string]struct{}{"8080/tcp": {}}})
		},
		Pages: func() (v1.Image, error) {
			layer, err := goLayer("pages", "/pages", 0o755)
			if err != nil {
				return nil, err
			}
			return image(v1.Config{Cmd: []string{"sh"}}, base, layer)
		},
		Users:  func() (v1.Image, error) { return usersImage(base) },
		Layers: func() (v1.Image, error) { return layersImage(base) },
	}
	return buildAll(builders, all)
}

func buildAll(builders map[string]func() (v1.Image, error), all map[string]v1.Image) error {
	for ref, build := range builders {
		img, err := build()
		if err != nil {
			return fmt.Errorf("build image %s: %w", ref, err)
		}
		all[ref] = img
	}
	return nil
}

// usersImage runs as a user and group given by name, and knows more of them.
func usersImage(base v1.Layer) (v1.Image, error) {
	fs := tree{}
	fs.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n"+
		"alice:x:1001:1001:Alice:/home/alice:/bin/sh\n"+
		"bob:x:1002:1002:Bob:/home/bob:/bin/sh\n")
	fs.file("etc/group", 0o644, "root:x:0:\nalice:x:1001:\nbob:x:1002:\ncrew:x:2000:alice\ndeck:x:2001:alice,bob\n")
	fs.dir("home/alice", 0o755)
	fs["home/alice"].uid, fs["home/alice"].gid = 1001, 1001
	layer, err := fs.layer()
	if err != nil {
		return nil, err
	}
	return image(v1.Config{User: "alice:crew", WorkingDir: "/home/alice", Env: []string{"WHO=alice"}, Cmd: []string{"id"}}, base, layer)
}

// layersImage has a file that the second layer removes, a directory that it
// makes opaque, and a file that it replaces.
func layersImage(base v1.Layer) (v1.Image, error) {
	lower, upper := tree{}, tree{}
	lower.file("data/keep", 0o644, "keep\n")
	lower.file("data/gone", 0o644, "gone\n")
	lower.file("data/replaced", 0o644, "old\n")
	lower.file("opaque/a", 0o644, "a\n")
	lower.file("opaque/b", 0o644, "b\n")
	upper.file("data/.wh.gone", 0o644, "")
	upper.file("data/replaced", 0o600, "new\n")
	upper.file("opaque/.wh..wh..opq", 0o644, "")
	upper.file("opaque/c", 0o644, "c\n")
	first, err := lower.layer()
	if err != nil {
		return nil, err
	}
	second, err := upper.layer()
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Cmd: []string{"find", "/data", "/opaque"}}, base, first, second)
}
