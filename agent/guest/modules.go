package guest

import (
	"archive/zip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	modulesDir   = "/lib/modules"
	modulesFile  = "/etc/vmagent/modules.json"
	autoloadFile = "/etc/vmagent/autoload.json"
	// autoloadArchive holds, compressed, those modules that are not files of their own.
	autoloadArchive = modulesDir + "/autoload.zip"
	// modprobe is the program that the kernel starts, in the first namespaces, when it lacks something that a
	// module may have: as "modprobe -q -- ALIAS".
	modprobe = "/sbin/modprobe"
)

// moduleList is /etc/vmagent/modules.json: what each boot loads, in this order, what is loaded when it is
// first needed, and the device files of modules that the kernel asks for.
type moduleList struct {
	Boot  []string            `json:"boot"`
	Lazy  map[string][]string `json:"lazy"`
	Nodes []deviceNode        `json:"nodes"`
}

type deviceNode struct {
	Path  string `json:"path"`
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
}

// autoload is /etc/vmagent/autoload.json: the files of each module in load order, and modules by alias.
type autoload struct {
	Modules map[string][]string `json:"modules"`
	Aliases map[string][]string `json:"aliases"`
}

// resolve gives the files to load for a module's name or alias, in order; none if nothing here has it.
// As in any modprobe, "-" and "_" are one.
func (a *autoload) resolve(name string) []string {
	name = strings.ReplaceAll(name, "-", "_")
	if files, ok := a.Modules[name]; ok {
		return files
	}
	modules := a.Aliases[name]
	if len(modules) == 0 {
		for pattern, of := range a.Aliases {
			if ok, err := filepath.Match(pattern, name); ok && err == nil {
				modules = append(modules, of...)
			}
		}
		slices.Sort(modules)
	}
	var files []string
	for _, module := range modules {
		for _, file := range a.Modules[module] {
			if !slices.Contains(files, file) {
				files = append(files, file)
			}
		}
	}
	return files
}

// answerKernel makes this program the kernel's modprobe.
func answerKernel() error {
	if err := os.MkdirAll(filepath.Dir(modprobe), 0o755); err != nil {
		return err
	}
	if err := os.Symlink("/init", modprobe); err != nil {
		return fmt.Errorf("the kernel's modprobe: %w", err)
	}
	return nil
}

// Modprobe loads a module by name or alias, with what it needs. It is ErrNotFound if the guest has no such
// module, be it that the kernel has it built in.
func Modprobe(name string) error {
	data, err := os.ReadFile(autoloadFile)
	if err != nil {
		return err
	}
	var a autoload
	if err := json.Unmarshal(data, &a); err != nil {
		return fmt.Errorf("%s: %w", autoloadFile, err)
	}
	files := a.resolve(name)
	if len(files) == 0 {
		return fmt.Errorf("module %q: %w", name, errdefs.ErrNotFound)
	}
	archive, err := zip.OpenReader(autoloadArchive)
	if err != nil {
		return err
	}
	defer archive.Close()
	for _, file := range files {
		if err := loadAuto(&archive.Reader, file); err != nil {
			return fmt.Errorf("load module %s for %q: %w", file, name, err)
		}
	}
	return nil
}

// loadTables makes iptables of the older kind work for a process that may use it: the kernel has neither
// answer nor question for a program that asks for tables before the module is there, and the program's own
// modprobe finds none in its container.
func (s *Server) loadTables(p *specs.Process) {
	if p.Capabilities == nil || !slices.Contains(p.Capabilities.Bounding, "CAP_NET_ADMIN") {
		return
	}
	for _, module := range []string{"ip_tables", "ip6_tables"} {
		// Kernels that have them built in, or no longer have them, need nothing.
		if err := Modprobe(module); err != nil && !errdefs.IsNotFound(err) {
			s.log.Warn("iptables", "error", err)
		}
	}
}

// loadAuto loads one file unless it is loaded. While another process loads it, the kernel makes this one wait.
func loadAuto(archive *zip.Reader, file string) error {
	state, err := os.ReadFile(filepath.Join("/sys/module", strings.TrimSuffix(file, ".ko"), "initstate"))
	if err == nil && string(state) == "live\n" {
		return nil
	}
	f, err := archive.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return loadModule(filepath.Join(modulesDir, file), "")
	}
	if err != nil {
		return err
	}
	defer f.Close()
	image, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	err = unix.InitModule(image, "")
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func readModules() (*moduleList, error) {
	data, err := os.ReadFile(modulesFile)
	if err != nil {
		return nil, err
	}
	list := &moduleList{}
	if err := json.Unmarshal(data, list); err != nil {
		return nil, fmt.Errorf("%s: %w", modulesFile, err)
	}
	return list, nil
}

func loadBoot() error {
	list, err := readModules()
	if err != nil {
		return err
	}
	if err := loadModules(list.Boot, bootParameters); err != nil {
		return err
	}
	return makeNodes(list.Nodes)
}

// makeNodes makes the device files the opening of which has the kernel ask for their modules.
func makeNodes(nodes []deviceNode) error {
	for _, n := range nodes {
		file := filepath.Join("/dev", n.Path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		err := unix.Mknod(file, unix.S_IFCHR|0o600, int(unix.Mkdev(n.Major, n.Minor)))
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("make device file %s: %w", file, err)
		}
	}
	return nil
}

// bootParameters let a driver's search for its devices go on beside the loading of the next one: whoever
// needs a device waits for it.
func bootParameters(file string) string {
	if file == "scsi_mod.ko" {
		return "async_probe=1 scan=async"
	}
	return "async_probe=1"
}

// loadLazy loads the modules of one feature. A kernel that has it built in lists none.
func loadLazy(feature string) error {
	list, err := readModules()
	if err != nil {
		return err
	}
	return loadModules(list.Lazy[feature], func(string) string { return "" })
}

func loadModules(files []string, parameters func(file string) string) error {
	for _, name := range files {
		if err := loadModule(filepath.Join(modulesDir, name), parameters(name)); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return nil
}

func loadModule(path, parameters string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), parameters, 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
