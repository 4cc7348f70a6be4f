// Package tools builds the programs that the tests run against: containerd,
// runc, the CNI plugins, crictl, critest, ginkgo and the linter.
//
// Each set is its own Go module below this directory, so that its versions are
// pinned by go.mod and go.sum and stay apart from the product's. A set is built
// once into CacheDir()/NAME-VERSION and used from there; a stamp beside the
// programs holds a hash of everything that went into the build.
package tools

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// DigestImage is the digest of the image that critest pulls by digest. The
// original is on a public registry; test/images makes one whose bytes depend on
// nothing outside that package, and its test holds it to this value.
const DigestImage = "sha256:46f41ab0e3cc7b9017d83d241c59e8be7a5f5ed905ad8f03d5ddaaae96c85e4f"

// Set is one module's programs.
type Set struct {
	Name     string   // directory of the tool module, unless Source names it
	Source   string   `json:",omitempty"` // directory of the tool module that the set shares with another; "" for Name
	Module   string   // the module that gives the set its version
	Packages []string // main packages, relative to Module, or "./" for the tool module's own
	Flags    []string // flags of go build; $VERSION is replaced
	Env      []string // additions to the environment, KEY=value
	// Test names a package that is built as a test program (go test -c),
	// relative to Module; "" for none.
	Test string
	// Patch replaces text in one file of Module before the build.
	Patch *Patch
}

// Patch says what to replace in a source file of the module. The file in the
// module cache stays as it is.
type Patch struct{ File, Old, New string }

// kubernetesVersion makes Kubernetes' programs know which version they are: clients compare.
const kubernetesVersion = "-s -w -X k8s.io/component-base/version.gitVersion=$VERSION -X k8s.io/client-go/pkg/version.gitVersion=$VERSION"

// Sets lists every set, in the order in which they are built.
func Sets() []Set {
	return []Set{
		{
			Name: "containerd", Module: "github.com/containerd/containerd/v2",
			Packages: []string{"cmd/containerd", "cmd/containerd-shim-runc-v2", "cmd/ctr"},
			Flags:    []string{"-ldflags", "-s -w -X github.com/containerd/containerd/v2/version.Version=$VERSION"},
			Env:      []string{"CGO_ENABLED=0"},
		},
		{
			Name: "runc", Module: "github.com/opencontainers/runc",
			Packages: []string{"."},
			Flags:    []string{"-tags", "seccomp", "-ldflags", "-s -w"},
			Env:      []string{"CGO_ENABLED=1"},
		},
		{
			Name: "cni", Module: "github.com/containernetworking/plugins",
			Packages: []string{
				"plugins/ipam/host-local", "plugins/main/bridge", "plugins/main/loopback", "plugins/main/ptp",
				"plugins/meta/bandwidth", "plugins/meta/firewall", "plugins/meta/portmap", "plugins/meta/tuning",
			},
			Flags: []string{"-ldflags", "-s -w"},
			Env:   []string{"CGO_ENABLED=0"},
		},
		{
			Name: "cri-tools", Module: "sigs.k8s.io/cri-tools",
			Packages: []string{"cmd/crictl"}, Test: "cmd/critest",
			Flags: []string{"-ldflags", "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$VERSION"},
			Env:   []string{"CGO_ENABLED=0"},
			Patch: &Patch{
				File: "pkg/validate/consts.go",
				Old:  "sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf",
				New:  DigestImage,
			},
		},
		{
			Name: "cri-ginkgo", Module: "github.com/onsi/ginkgo/v2",
			Packages: []string{"ginkgo"},
			Flags:    []string{"-ldflags", "-s -w"},
			Env:      []string{"CGO_ENABLED=0"},
		},
		{
			Name: "etcd", Module: "go.etcd.io/etcd/server/v3",
			Packages: []string{"."},
			Flags:    []string{"-ldflags", "-s -w"},
			Env:      []string{"CGO_ENABLED=0"},
		},
		{
			Name: "kubernetes", Module: "k8s.io/kubernetes",
			Packages: []string{
				"cmd/kubelet", "cmd/kube-apiserver", "cmd/kube-controller-manager", "cmd/kube-scheduler", "cmd/kube-proxy", "cmd/kubectl",
				"test/images/agnhost",
			},
			Flags: []string{"-ldflags", kubernetesVersion},
			Env:   []string{"CGO_ENABLED=0"},
		},
		{
			Name: "coredns", Module: "github.com/coredns/coredns",
			Packages: []string{"./"},
			Flags:    []string{"-ldflags", "-s -w"},
			Env:      []string{"CGO_ENABLED=0"},
		},
		{
			Name: "metrics-server", Module: "sigs.k8s.io/metrics-server",
			Packages: []string{"cmd/metrics-server"},
			Flags:    []string{"-ldflags", "-s -w"},
			Env:      []string{"CGO_ENABLED=0"},
		},
		{
			Name: "kubernetes-e2e", Source: "kubernetes", Module: "k8s.io/kubernetes",
			Test:  "test/e2e",
			Flags: []string{"-ldflags", kubernetesVersion},
			Env:   []string{"CGO_ENABLED=0"},
		},
		{
			Name: "golangci-lint", Module: "github.com/golangci/golangci-lint/v2",
			Packages: []string{"cmd/golangci-lint"},
			Flags:    []string{"-ldflags", "-s -w -X main.version=$VERSION"},
			Env:      []string{"CGO_ENABLED=0"},
		},
	}
}

// CacheDir is where the sets are kept: $VMRUNTIME_CACHE, or a directory that
// outlives a checkout.
func CacheDir() string {
	if dir := os.Getenv("VMRUNTIME_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/vmruntime-build"
}

// Dir is the directory of a set's programs. The error says how to build the
// set when it is not there.
func Dir(name string) (string, error) {
	set, err := find(name)
	if err != nil {
		return "", err
	}
	version, err := set.version()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(CacheDir(), name+"-"+version)
	if _, err := os.Stat(filepath.Join(dir, stamp)); err != nil {
		return "", fmt.Errorf("tool %q is not built in %s, build it with `go run ./test/tools/build %s`: %w", name, dir, name, err)
	}
	return dir, nil
}

// Build builds the named set unless the cache has it, and returns its
// directory and whether something was built. Builds of one set exclude each
// other, also between processes.
func Build(name string) (dir string, built bool, err error) {
	set, err := find(name)
	if err != nil {
		return "", false, err
	}
	version, err := set.version()
	if err != nil {
		return "", false, err
	}
	key, err := set.key()
	if err != nil {
		return "", false, err
	}
	dir = filepath.Join(CacheDir(), name+"-"+version)
	if err := os.MkdirAll(CacheDir(), 0o755); err != nil {
		return "", false, err
	}
	unlock, err := lock(dir + ".lock")
	if err != nil {
		return "", false, err
	}
	defer unlock()
	if have, err := os.ReadFile(filepath.Join(dir, stamp)); err == nil && string(have) == key {
		return dir, false, nil
	}
	tmp, err := os.MkdirTemp(CacheDir(), name+"-build-")
	if err != nil {
		return "", false, err
	}
	defer os.RemoveAll(tmp)
	if err := set.compile(tmp, version); err != nil {
		return "", false, fmt.Errorf("build tool %q: %w", name, err)
	}
	if err := os.WriteFile(filepath.Join(tmp, stamp), []byte(key), 0o644); err != nil {
		return "", false, err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", false, err
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", false, err
	}
	return dir, true, os.Rename(tmp, dir)
}

const stamp = ".built"

func find(name string) (Set, error) {
	var names []string
	for _, s := range Sets() {
		if s.Name == name {
			return s, nil
		}
		names = append(names, s.Name)
	}
	return Set{}, fmt.Errorf("tool %q is unknown, want one of %s", name, strings.Join(names, ", "))
}

// source is the directory of the tool module.
func (s Set) source() (string, error) {
	_, file, _, ok := runtime.Caller(0)
	if !ok || !filepath.IsAbs(file) {
		return "", errors.New("test/tools must be built without -trimpath: it finds its modules beside its source")
	}
	return filepath.Join(filepath.Dir(file), cmp.Or(s.Source, s.Name)), nil
}

// version reads the version of s.Module from the tool module's go.mod.
func (s Set) version() (string, error) {
	dir, err := s.source()
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "require "))
		if len(fields) >= 2 && fields[0] == s.Module {
			return fields[1], nil
		}
	}
	return "", fmt.Errorf("%s/go.mod does not require %s", dir, s.Module)
}

// key hashes what decides the bytes of a build.
func (s Set) key() (string, error) {
	dir, err := s.source()
	if err != nil {
		return "", err
	}
	programs, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return "", err
	}
	h := sha256.New()
	for _, name := range append([]string{filepath.Join(dir, "go.mod"), filepath.Join(dir, "go.sum")}, programs...) {
		data, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		h.Write(data)
	}
	if err := json.NewEncoder(h).Encode(s); err != nil {
		return "", err
	}
	fmt.Fprint(h, runtime.GOARCH)
	return hex.EncodeToString(h.Sum(nil)), nil
}

// compile puts the set's programs into out.
func (s Set) compile(out, version string) error {
	var flags []string
	for _, f := range s.Flags {
		flags = append(flags, strings.ReplaceAll(f, "$VERSION", version))
	}
	if s.Patch != nil {
		modfile, clean, err := s.patched()
		if err != nil {
			return err
		}
		defer clean()
		flags = append(flags, "-modfile="+modfile)
	}
	if len(s.Packages) > 0 {
		args := append([]string{"build", "-trimpath", "-o", out + "/"}, flags...)
		for _, p := range s.Packages {
			if p != "./" {
				p = path.Join(s.Module, p)
			}
			args = append(args, p)
		}
		if err := s.goCommand(args...); err != nil {
			return err
		}
	}
	if s.Test == "" {
		return nil
	}
	args := append([]string{"test", "-c", "-vet=off", "-trimpath", "-o", filepath.Join(out, path.Base(s.Test))}, flags...)
	return s.goCommand(append(args, path.Join(s.Module, s.Test))...)
}

// patched copies the module, replaces the text, and returns a go.mod that takes
// the module from there. (The compiler's -overlay refuses files in the module
// cache.)
func (s Set) patched() (modfile string, clean func(), err error) {
	tmp, err := os.MkdirTemp("", "vmruntime-tool-")
	if err != nil {
		return "", nil, err
	}
	clean = func() { _ = os.RemoveAll(tmp) }
	if err := s.patchInto(tmp); err != nil {
		clean()
		return "", nil, err
	}
	return filepath.Join(tmp, "go.mod"), clean, nil
}

func (s Set) patchInto(tmp string) error {
	module, err := s.moduleDir()
	if err != nil {
		return err
	}
	source := filepath.Join(tmp, "src")
	if err := os.CopyFS(source, os.DirFS(module)); err != nil {
		return err
	}
	name := filepath.Join(source, s.Patch.File)
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if n := strings.Count(string(data), s.Patch.Old); n != 1 {
		return fmt.Errorf("%s of %s has %q %d times, want once", s.Patch.File, s.Module, s.Patch.Old, n)
	}
	if err := os.WriteFile(name, []byte(strings.Replace(string(data), s.Patch.Old, s.Patch.New, 1)), 0o644); err != nil {
		return err
	}
	dir, err := s.source()
	if err != nil {
		return err
	}
	for _, name := range []string{"go.mod", "go.sum"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(tmp, name), data, 0o644); err != nil {
			return err
		}
	}
	return s.goCommand("mod", "edit", "-replace", s.Module+"="+source, filepath.Join(tmp, "go.mod"))
}

func (s Set) moduleDir() (string, error) {
	if err := s.goCommand("mod", "download", s.Module); err != nil {
		return "", err
	}
	cmd, err := s.command("list", "-m", "-f", "{{.Dir}}", s.Module)
	if err != nil {
		return "", err
	}
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go list -m %s: %w", s.Module, err)
	}
	return strings.TrimSpace(string(out)), nil
}

func (s Set) goCommand(args ...string) error {
	cmd, err := s.command(args...)
	if err != nil {
		return err
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return nil
}

func (s Set) command(args ...string) (*exec.Cmd, error) {
	dir, err := s.source()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), "GOFLAGS=-buildvcs=false", "GOWORK=off"), s.Env...)
	return cmd, nil
}

// lock takes an exclusive lock on a file and returns how to let it go. The
// file stays: removing it would let two holders in.
func lock(name string) (func(), error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, fs.FileMode(0o644))
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}
