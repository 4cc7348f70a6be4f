package runtime

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/pelletier/go-toml/v2"
)

// DefaultConfigPath is read when no other file is named; it need not be there.
const DefaultConfigPath = "/etc/vmruntime/vmruntime.toml"

// maxStatePath leaves room for "/pods/ID/agent.sock" in the 107 bytes that a socket's path may have (unix(7)).
const maxStatePath = 107 - len("/pods/") - 64 - len("/agent.sock")

// CRINamespace is the namespace that containerd's CRI keeps its images and containers in. It is fixed there.
const CRINamespace = "k8s.io"

// Config is all that can be set. The comment tags are the documentation: `vmruntime config`,
// docs/configuration.md and deploy/vmruntime.toml are made from them.
//
// To change it: add or change the field with its comment tag, its value in defaultConfig and its rule in
// validate, then run `go test ./runtime -run TestConfigFiles -update`. A field is read where it is used as
// cfg.SECTION.FIELD; nothing else keeps a copy. Removing or renaming a key breaks every file that has it, because unknown
// keys are rejected.
type Config struct {
	Server     ServerConfig     `toml:"server" comment:"The daemon itself."`
	Containerd ContainerdConfig `toml:"containerd" comment:"The containerd that everything else is delegated to."`
	VM         VMConfig         `toml:"vm" comment:"Which pods become VMs, and how large."`
	QEMU       QEMUConfig       `toml:"qemu" comment:"The programs on the host that a VM consists of."`
	Guest      GuestConfig      `toml:"guest" comment:"What boots in a VM."`
	Template   TemplateConfig   `toml:"template" comment:"Guests that have booted already, as copies of which container VMs begin."`
	Network    NetworkConfig    `toml:"network" comment:"CNI, as in containerd's own configuration."`
	Cgroup     CgroupConfig     `toml:"cgroup" comment:"Control groups of the host."`
	Metrics    MetricsConfig    `toml:"metrics" comment:"Figures of the daemon for Prometheus."`
	Tracing    TracingConfig    `toml:"tracing" comment:"Spans of OpenTelemetry, which show what a CRI call spends its time on."`
}

// ServerConfig is the section [server].
type ServerConfig struct {
	Socket        string `toml:"socket" comment:"The socket that the kubelet speaks CRI to. Only root may open it."`
	AdminSocket   string `toml:"admin_socket" comment:"The socket that vmruntime vm speaks to. Only root may open it."`
	Root          string `toml:"root" comment:"Durable state: records of pods and containers, root filesystems of images, scratch disks. Should be on the file system\nof containerd's images or of the kubelet's root directory: the kubelet sees no other one fill up."`
	State         string `toml:"state" comment:"Sockets and what need not outlive a reboot. Should be on a tmpfs."`
	LogLevel      string `toml:"log_level" comment:"debug, info, warn or error. debug tells every CRI call and who answered it."`
	StreamAddress string `toml:"stream_address" comment:"Where exec, attach and port-forward of VM pods are served, as address:port; port 0 takes a free one. It has to be a\nloopback address, since whoever has a URL of it may use it."`
}

// ContainerdConfig is the section [containerd].
type ContainerdConfig struct {
	Address string `toml:"address" comment:"containerd's socket; it serves both its CRI and its own API."`
}

// VMConfig is the section [vm].
type VMConfig struct {
	Handlers             []string `toml:"handlers" comment:"Runtime handlers whose pods become VMs. All others are containerd's."`
	DefaultMemory        Size     `toml:"default_memory" comment:"Memory for the containers of a pod that sets no memory limit."`
	DefaultMachineMemory Size     `toml:"default_machine_memory" comment:"Memory for a machine, which boots the operating system of its image, if its pod sets no memory limit."`
	GuestOverhead        Size     `toml:"guest_overhead" comment:"Memory that the guest's kernel and agent use, added to the limit or default."`
	MinMemory            Size     `toml:"min_memory" comment:"The least that a VM gets, overhead included."`
	MaxMemory            Size     `toml:"max_memory" comment:"The most that a VM gets, overhead included. Huge pages come beside it."`
	DefaultVCPUs         int      `toml:"default_vcpus" comment:"Virtual CPUs of a pod that sets no CPU limit. With a limit it is that, rounded up."`
	MaxVCPUs             int      `toml:"max_vcpus" comment:"The most virtual CPUs that a VM gets."`
	ScratchSize          Size     `toml:"scratch_size" comment:"How much the containers of a pod may write to their root filesystems together. The file is\nsparse: it takes what is written."`
}

// QEMUConfig is the section [qemu].
type QEMUConfig struct {
	Binary    string `toml:"binary" comment:"QEMU's system emulator, 7.2 or newer."`
	Accel     string `toml:"accel" comment:"kvm, tcg (emulation, slow, works everywhere) or auto: kvm where a guest was seen to boot with it, else tcg."`
	Virtiofsd string `toml:"virtiofsd" comment:"Serves directories of the host to a VM. Empty: the first of /usr/libexec/virtiofsd, /usr/lib/virtiofsd,\n/usr/lib/qemu/virtiofsd and /usr/bin/virtiofsd that is there."`
	Swtpm     string `toml:"swtpm" comment:"The program that emulates a TPM for machines that ask for one."`
	UIDBase   uint32 `toml:"uid_base" comment:"Every VM runs as a user and group ID of its own, from this one on. They should belong to nobody else on the node."`
	UIDCount  uint32 `toml:"uid_count" comment:"How many such IDs there are, so how many VM pods. The one after them is that of VMs that are no pod's."`
}

// GuestConfig is the section [guest].
type GuestConfig struct {
	Dir string `toml:"dir" comment:"What make guest built: kernel, initramfs and manifest.json."`
}

// maxSpares bounds how many VMs may wait for a pod.
const maxSpares = 64

// TemplateConfig is the section [template].
type TemplateConfig struct {
	Enabled bool   `toml:"enabled" comment:"Whether container VMs begin as copies of templates. Without one, and while one is made, they boot."`
	Share   string `toml:"share" comment:"Which pods share the pages of a template's memory that they have not written to: none (off), those of one namespace\n(namespace), or all (node). Shared pages save memory. Their timing tells a pod what others have read, and a VM with shared\npages can get no shared directory once one of its containers has started; see docs/templates.md."`
	MaxSize Size   `toml:"max_size" comment:"How much all templates may take, in memory and on disk each. The least recently used go first."`
	Spares  int    `toml:"spares" comment:"How many VMs wait for a pod, each a copy of a template of one of the sizes that were asked for last; of two, one is\nof the default size. They are made while no pod starts. A pod that finds one of its size, or one of the default size that can grow to it,\nstarts several times as fast; each takes the memory of an idle VM. Not with share namespace."`
}

// NetworkConfig is the section [network].
type NetworkConfig struct {
	ConfDir string   `toml:"conf_dir" comment:"CNI configurations; the first by name is used."`
	BinDirs []string `toml:"bin_dirs" comment:"Where CNI plugins are looked for, in this order."`
}

// CgroupConfig is the section [cgroup].
type CgroupConfig struct {
	Driver string `toml:"driver" comment:"cgroupfs, systemd or auto: what containerd says. Has to be set only for containerd 1.7, which cannot say it, and then to\nwhat containerd and kubelet use."`
}

// MetricsConfig is the section [metrics].
type MetricsConfig struct {
	Address string `toml:"address" comment:"Where /metrics is served: the path of a socket, which only root may open, or a loopback address and a port, like\n127.0.0.1:9090. Empty: nowhere."`
}

// TracingConfig is the section [tracing]. Its keys mean what they do in the kubelet's configuration.
type TracingConfig struct {
	Endpoint               string `toml:"endpoint" comment:"Where spans are sent, by OTLP over gRPC without TLS, as the kubelet does: a host and a port, like 127.0.0.1:4317, or the\npath of a socket. Empty: nowhere, and nothing is traced."`
	SamplingRatePerMillion int    `toml:"sampling_rate_per_million" comment:"How many of a million traces are recorded that begin here. Those that begin in the kubelet are recorded if it does."`
}

// Target is the endpoint as gRPC has it.
func (c TracingConfig) Target() string {
	if filepath.IsAbs(c.Endpoint) {
		return "unix:" + c.Endpoint
	}
	return c.Endpoint
}

// Listen says where metrics are served, as for net.Listen.
func (c MetricsConfig) Listen() (network, address string) {
	if filepath.IsAbs(c.Address) {
		return "unix", c.Address
	}
	return "tcp", c.Address
}

// Size is a number of bytes, written like 256MiB.
type Size int64

// MarshalText writes the size in the largest unit that divides it.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String writes the size in the largest unit that divides it.
func (s Size) String() string {
	n := int64(s)
	for _, unit := range []struct {
		bytes int64
		name  string
	}{{1 << 40, "TiB"}, {1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n != 0 && n%unit.bytes == 0 {
			return fmt.Sprintf("%d%s", n/unit.bytes, unit.name)
		}
	}
	return fmt.Sprintf("%dB", n)
}

// UnmarshalText reads a size with a unit: B, KiB, MiB, GiB, TiB, or powers of ten with kB, MB, GB, TB.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := humanize.ParseBytes(string(text))
	if err != nil || n > math.MaxInt64 {
		return fmt.Errorf("size %q is not a number with a unit, like 256MiB", text)
	}
	*s = Size(n)
	return nil
}

// Default is the configuration without a file.
func Default() Config { return defaultConfig(goruntime.GOARCH) }

func defaultConfig(goarch string) Config {
	binary := "/usr/bin/qemu-system-x86_64"
	if goarch == "arm64" {
		binary = "/usr/bin/qemu-system-aarch64"
	}
	return Config{
		Server: ServerConfig{
			Socket:        "/run/vmruntime/vmruntime.sock",
			AdminSocket:   "/run/vmruntime/admin.sock",
			Root:          "/var/lib/vmruntime",
			State:         "/run/vmruntime",
			LogLevel:      "info",
			StreamAddress: "127.0.0.1:0",
		},
		Containerd: ContainerdConfig{Address: "/run/containerd/containerd.sock"},
		VM: VMConfig{
			Handlers:             []string{"vm"},
			DefaultMemory:        256 << 20,
			DefaultMachineMemory: 1 << 30,
			GuestOverhead:        64 << 20,
			MinMemory:            128 << 20,
			MaxMemory:            64 << 30,
			DefaultVCPUs:         1,
			MaxVCPUs:             32,
			ScratchSize:          10 << 30,
		},
		QEMU: QEMUConfig{
			Binary:   binary,
			Accel:    "auto",
			Swtpm:    "swtpm",
			UIDBase:  200000,
			UIDCount: 65536,
		},
		Template: TemplateConfig{Enabled: true, Share: shareOff, MaxSize: 2 << 30, Spares: 2},
		Guest:    GuestConfig{Dir: "/usr/lib/vmruntime/guest"},
		Network:  NetworkConfig{ConfDir: "/etc/cni/net.d", BinDirs: []string{"/opt/cni/bin"}},
		Cgroup:   CgroupConfig{Driver: "auto"},
		Tracing:  TracingConfig{SamplingRatePerMillion: perMillion},
	}
}

// Load reads a file over the defaults and validates the whole. All that is wrong is reported at once. An empty path means
// DefaultConfigPath, which may be missing; any other file has to be there.
func Load(path string) (Config, error) {
	cfg := Default()
	optional := path == ""
	if optional {
		path = DefaultConfigPath
	}
	text, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return cfg, nil
	}
	if err != nil {
		return cfg, fmt.Errorf("read the configuration: %w", err)
	}
	if err := cfg.parse(text); err != nil {
		return cfg, fmt.Errorf("configuration %s:\n%w", path, err)
	}
	return cfg, nil
}

// parse reads TOML over what is set, and validates the result.
func (c *Config) parse(text []byte) error {
	err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(c)
	var unknown *toml.StrictMissingError
	var broken *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		var errs []error
		for _, e := range unknown.Errors {
			line, _ := e.Position()
			errs = append(errs, fmt.Errorf("line %d: unknown key %s", line, strings.Join(e.Key(), ".")))
		}
		return errors.Join(append(errs, c.Validate())...)
	case errors.As(err, &broken):
		line, _ := broken.Position()
		if key := strings.Join(broken.Key(), "."); key != "" {
			return fmt.Errorf("line %d: %s: %w", line, key, broken)
		}
		return fmt.Errorf("line %d: %w", line, broken)
	case err != nil:
		return err
	}
	return c.Validate()
}

// Text is the configuration as a commented TOML file that Load would read to the same.
func (c Config) Text() ([]byte, error) {
	return toml.Marshal(c)
}

// Level is the log level; Validate holds that there is one.
func (c ServerConfig) Level() slog.Level {
	var l slog.Level
	_ = l.UnmarshalText([]byte(c.LogLevel))
	return l
}

// FindVirtiofsd is the path of virtiofsd, or fs.ErrNotExist.
func (c QEMUConfig) FindVirtiofsd() (string, error) {
	candidates := []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/bin/virtiofsd"}
	if c.Virtiofsd != "" {
		candidates = []string{c.Virtiofsd}
	}
	for _, path := range candidates {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("no virtiofsd at %s: %w", strings.Join(candidates, ", "), fs.ErrNotExist)
}

// Validate reports all that is wrong, each with key, value and what would be right.
func (c Config) Validate() error {
	var v validator
	v.path("server.socket", c.Server.Socket)
	v.path("server.admin_socket", c.Server.AdminSocket)
	v.path("server.root", c.Server.Root)
	v.path("server.state", c.Server.State)
	v.rule(c.Server.Root != c.Server.State, "server.state", c.Server.State, "another directory than server.root")
	v.rule(len(c.Server.State) <= maxStatePath, "server.state", c.Server.State, fmt.Sprintf("a path of at most %d bytes: sockets lie below it, whose paths the kernel bounds", maxStatePath))
	v.oneOf("server.log_level", c.Server.LogLevel, "debug", "info", "warn", "error")
	addr, err := netip.ParseAddrPort(c.Server.StreamAddress)
	v.rule(err == nil && addr.Addr().IsLoopback(), "server.stream_address", c.Server.StreamAddress, "a loopback address and a port, like 127.0.0.1:0")
	// A socket's address holds 107 bytes; a longer path fails only at bind, with no clear error.
	v.rule(len(c.Server.Socket) <= 107, "server.socket", c.Server.Socket, "at most 107 bytes long")
	v.rule(len(c.Server.AdminSocket) <= 107, "server.admin_socket", c.Server.AdminSocket, "at most 107 bytes long")
	v.rule(c.Server.AdminSocket != c.Server.Socket, "server.admin_socket", c.Server.AdminSocket, "another socket than server.socket")
	v.path("containerd.address", c.Containerd.Address)
	v.rule(c.Containerd.Address != c.Server.Socket, "containerd.address", c.Containerd.Address, "another socket than server.socket")
	c.VM.validate(&v)
	c.QEMU.validate(&v)
	v.path("guest.dir", c.Guest.Dir)
	v.oneOf("template.share", c.Template.Share, shareOff, shareNamespace, shareNode)
	v.rule(c.Template.MaxSize >= 0, "template.max_size", c.Template.MaxSize, "not negative")
	v.rule(c.Template.Spares >= 0 && c.Template.Spares <= maxSpares, "template.spares", c.Template.Spares, fmt.Sprintf("0 to %d", maxSpares))
	v.path("network.conf_dir", c.Network.ConfDir)
	v.rule(len(c.Network.BinDirs) > 0, "network.bin_dirs", c.Network.BinDirs, "at least one directory")
	for i, dir := range c.Network.BinDirs {
		v.path(fmt.Sprintf("network.bin_dirs[%d]", i), dir)
	}
	v.oneOf("cgroup.driver", c.Cgroup.Driver, "auto", "cgroupfs", "systemd")
	c.Metrics.validate(&v)
	c.Tracing.validate(&v)
	return errors.Join(v.errs...)
}

func (c MetricsConfig) validate(v *validator) {
	switch network, address := c.Listen(); {
	case address == "":
	case network == "unix":
		v.path("metrics.address", address)
		v.rule(len(address) <= 107, "metrics.address", address, "at most 107 bytes long")
	default:
		addr, err := netip.ParseAddrPort(address)
		v.rule(err == nil && addr.Addr().IsLoopback(), "metrics.address", address, "empty, the absolute path of a socket, or a loopback address and a port, like 127.0.0.1:9090")
	}
}

// perMillion is the whole of what is sampled.
const perMillion = 1_000_000

func (c TracingConfig) validate(v *validator) {
	if filepath.IsAbs(c.Endpoint) {
		v.path("tracing.endpoint", c.Endpoint)
	} else if c.Endpoint != "" {
		host, port, err := net.SplitHostPort(c.Endpoint)
		number, portErr := strconv.ParseUint(port, 10, 16)
		ok := err == nil && portErr == nil && number > 0 && host != "" && !strings.Contains(host, "/")
		v.rule(ok, "tracing.endpoint", c.Endpoint, "empty, a host and a port without a scheme, like 127.0.0.1:4317, or the absolute path of a socket")
	}
	v.rule(c.SamplingRatePerMillion >= 0 && c.SamplingRatePerMillion <= perMillion, "tracing.sampling_rate_per_million", c.SamplingRatePerMillion, "0 to 1000000")
}

// handlerName is what Kubernetes allows for the handler of a RuntimeClass: a DNS label.
var handlerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (c VMConfig) validate(v *validator) {
	v.rule(len(c.Handlers) > 0, "vm.handlers", c.Handlers, "at least one name")
	for i, h := range c.Handlers {
		key := fmt.Sprintf("vm.handlers[%d]", i)
		v.rule(handlerName.MatchString(h), key, h, "lower case letters, digits and dashes, at most 63, as in a RuntimeClass")
		v.rule(!slices.Contains(c.Handlers[:i], h), key, h, "named once")
	}
	v.rule(c.DefaultMemory >= 16<<20, "vm.default_memory", c.DefaultMemory, "at least 16MiB")
	v.rule(c.GuestOverhead >= 0, "vm.guest_overhead", c.GuestOverhead, "not negative")
	v.rule(c.MinMemory >= 64<<20, "vm.min_memory", c.MinMemory, "at least 64MiB: less does not boot")
	v.rule(c.MaxMemory >= c.MinMemory, "vm.max_memory", c.MaxMemory, "at least vm.min_memory, "+c.MinMemory.String())
	v.rule(c.MaxVCPUs >= 1 && c.MaxVCPUs <= 255, "vm.max_vcpus", c.MaxVCPUs, "1 to 255")
	v.rule(c.DefaultVCPUs >= 1 && c.DefaultVCPUs <= c.MaxVCPUs, "vm.default_vcpus", c.DefaultVCPUs, fmt.Sprintf("1 to vm.max_vcpus, %d", c.MaxVCPUs))
	v.rule(c.ScratchSize >= 16<<20, "vm.scratch_size", c.ScratchSize, "at least 16MiB")
}

func (c QEMUConfig) validate(v *validator) {
	v.path("qemu.binary", c.Binary)
	v.oneOf("qemu.accel", c.Accel, "auto", "kvm", "tcg")
	if c.Virtiofsd != "" {
		v.path("qemu.virtiofsd", c.Virtiofsd)
	}
	v.rule(c.UIDBase >= 1000, "qemu.uid_base", c.UIDBase, "at least 1000: lower ones belong to the system")
	v.rule(c.UIDCount >= 1, "qemu.uid_count", c.UIDCount, "at least 1")
	v.rule(uint64(c.UIDBase)+uint64(c.UIDCount) < math.MaxUint32, "qemu.uid_count", c.UIDCount, "such that uid_base + uid_count stays below 4294967295")
}

// validator collects what is wrong.
type validator struct{ errs []error }

func (v *validator) rule(ok bool, key string, value any, want string) {
	if ok {
		return
	}
	if s, isString := value.(string); isString {
		value = fmt.Sprintf("%q", s)
	}
	v.errs = append(v.errs, fmt.Errorf("%s is %v; it has to be %s", key, value, want))
}

func (v *validator) path(key, value string) {
	v.rule(filepath.IsAbs(value) && filepath.Clean(value) == value, key, value, "an absolute, clean path")
}

func (v *validator) oneOf(key, value string, allowed ...string) {
	v.rule(slices.Contains(allowed, value), key, value, "one of "+strings.Join(allowed, ", "))
}
