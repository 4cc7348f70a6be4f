package test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/vmruntime/vmruntime/"

// rule says which of our packages a package may import.
type rule struct {
	pkg    string   // and what lies below it, unless another rule names that
	may    []string // our packages, without the module's name
	reason string
}

func rules() []rule {
	return []rule{
		{
			"cmd/vmruntime",
			[]string{"runtime", "runtime/delegate", "runtime/vmpb", "qemu", "image"},
			"main wires; qemu only because it is re-executed as QEMU's launcher, image because it packs disks",
		},
		{"cmd/vmagent", []string{"agent/guest", "agent", "agent/agentpb"}, "the guest's program has no part of the host's side"},
		{
			"runtime",
			[]string{
				"qemu", "image", "network", "agent", "agent/agentpb", "trace",
				"runtime/state", "runtime/ocispec", "runtime/crilog", "runtime/archive", "runtime/cgroup", "runtime/delegate", "runtime/annotation", "runtime/vmpb", "image/seed", "agent/qga", "agent/sshexec",
			},
			"only runtime composes the leaves; delegate's interface is what it implements",
		},
		{"runtime/state", nil, "records know nothing of what they record"},
		{"runtime/ocispec", nil, "a pure function of CRI messages"},
		{"runtime/crilog", nil, "a file format"},
		{"runtime/archive", nil, "a file format"},
		{"runtime/cgroup", nil, "a leaf"},
		{"runtime/vmpb", nil, "generated"},
		{"runtime/annotation", nil, "a pure function of a pod's annotations"},
		{"runtime/delegate", nil, "it puts any CRI server in front of another; it must not know ours"},
		{"qemu", []string{"trace"}, "a leaf"},
		{"trace", nil, "marks; it knows nothing of what it marks, and what is sent where is the daemon's"},
		{"image", []string{"image/qcow2"}, "knows nothing of VMs; what it takes from an image it checks"},
		{"image/qcow2", nil, "a parser of hostile files; it knows nothing of where they come from"},
		{"image/seed", nil, "a pure function of plain values"},
		{"network", nil, "a leaf"},
		{"agent", []string{"agent/agentpb"}, "the protocol's two ends share nothing else"},
		{"agent/agentpb", nil, "generated"},
		{"agent/posixsh", nil, "scripts"},
		{"agent/qga", []string{"agent/posixsh"}, "a protocol's client"},
		{"agent/sshexec", []string{"agent/posixsh"}, "a protocol's client"},
		{"agent/guest", []string{"agent", "agent/agentpb"}, "runs in the guest"},
		{"deploy", nil, "builds the guest from files, not from packages"},
	}
}

// forbidden says which imports of others' packages a package must not have,
// also not through others.
func forbidden() []struct{ pkg, prefix, reason string } {
	return []struct{ pkg, prefix, reason string }{
		{"qemu", "k8s.io/cri-", "qemu does not know the CRI"},
		{"qemu", "github.com/containerd/containerd/v2", "qemu does not know containerd"},
		{"network", "k8s.io/cri-", "network does not know the CRI"},
		{"image", "k8s.io/cri-api", "image knows containerd, not the CRI"},
		{"agent", "k8s.io/", "the agent speaks its own protocol"},
		{"agent/guest", "github.com/containerd/containerd/v2", "the guest has no containerd, and its program must stay small"},
		{"cmd/vmagent", "google.golang.org/grpc/internal/transport", "the guest's protocol is ttrpc; grpc would double its program"},
		{"runtime/crilog", "k8s.io/", "a file format"},
		{"runtime/state", "k8s.io/", "records know nothing of what they record"},
	}
}

type goPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", "./...")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", cmd, err)
	}
	var list []goPackage
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		p.ImportPath = strings.TrimPrefix(p.ImportPath, module)
		list = append(list, p)
	}
}

// ruleOf is the rule of the longest matching name.
func ruleOf(pkg string) (rule, bool) {
	var best rule
	for _, r := range rules() {
		if (pkg == r.pkg || strings.HasPrefix(pkg, r.pkg+"/")) && len(r.pkg) > len(best.pkg) {
			best = r
		}
	}
	return best, best.pkg != ""
}

func isTest(pkg string) bool { return pkg == "test" || strings.HasPrefix(pkg, "test/") }

// Our packages form the DAG of docs/ARCHITECTURE.md.
func TestImportDAG(t *testing.T) {
	for _, p := range packages(t) {
		if isTest(p.ImportPath) {
			continue
		}
		r, ok := ruleOf(p.ImportPath)
		if !ok {
			t.Errorf("package %s has no rule: decide what it may import", p.ImportPath)
			continue
		}
		for _, imported := range p.Imports {
			name, ours := strings.CutPrefix(imported, module)
			below := strings.HasPrefix(name, r.pkg+"/") && !hasOwnRule(name)
			if ours && !below && !slices.Contains(r.may, name) {
				t.Errorf("%s imports %s: %s", p.ImportPath, name, r.reason)
			}
		}
	}
}

func hasOwnRule(pkg string) bool {
	r, ok := ruleOf(pkg)
	return ok && r.pkg == pkg
}

// What a package must not depend on, directly or not.
func TestForbiddenImports(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range packages(t) {
		seen[p.ImportPath] = true
		for _, f := range forbidden() {
			if p.ImportPath != f.pkg {
				continue
			}
			for _, dep := range p.Deps {
				if strings.HasPrefix(dep, f.prefix) {
					t.Errorf("%s depends on %s: %s", p.ImportPath, dep, f.reason)
				}
			}
		}
		if !isTest(p.ImportPath) && slices.Contains(p.Imports, "testing") {
			t.Errorf("%s imports testing: nothing outside tests does, it adds flags and weight", p.ImportPath)
		}
	}
	for _, f := range forbidden() {
		if !seen[f.pkg] {
			t.Errorf("a rule is about package %s, which there is not", f.pkg)
		}
	}
}
