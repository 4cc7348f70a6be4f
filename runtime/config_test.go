package runtime

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write golden files anew")

// TestConfigFiles holds the generated documentation and example to the struct.
func TestConfigFiles(t *testing.T) {
	cfg := defaultConfig("amd64")
	text, err := cfg.Text()
	if err != nil {
		t.Fatal(err)
	}
	example := "# The defaults. Every key may be left out; unknown keys are errors. See docs/configuration.md.\n\n" + string(text)
	golden(t, "../deploy/vmruntime.toml", example)
	golden(t, "../docs/configuration.md", configDoc(cfg))
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s is not what the code makes (go test -update writes it anew):\n%s", path, diff)
	}
}

// configDoc renders every key with its default and its comment.
func configDoc(cfg Config) string {
	var b strings.Builder
	b.WriteString("# Configuration\n\nMade from the comments in `runtime/config.go`; change it there.\n\n" +
		"One TOML file, `" + DefaultConfigPath + "` or what `--config` names. Every key may be left out; unknown keys are errors, and all errors\n" +
		"are told at once. `vmruntime config` prints what is in force, `vmruntime config --default` the defaults.\n" +
		"Sizes have a unit, like `256MiB`.\n")
	v := reflect.ValueOf(cfg)
	for i := range v.NumField() {
		section := v.Type().Field(i)
		name := section.Tag.Get("toml")
		fmt.Fprintf(&b, "\n## [%s]\n\n%s\n\n| key | default | |\n|---|---|---|\n", name, section.Tag.Get("comment"))
		for j := range section.Type.NumField() {
			f := section.Type.Field(j)
			fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", f.Tag.Get("toml"), tomlValue(v.Field(i).Field(j).Interface()),
				strings.ReplaceAll(f.Tag.Get("comment"), "\n", " "))
		}
	}
	return b.String()
}

func tomlValue(v any) string {
	switch v := v.(type) {
	case string:
		return fmt.Sprintf("%q", v)
	case Size:
		return fmt.Sprintf("%q", v.String())
	case []string:
		return fmt.Sprintf("%q", v)
	default:
		return fmt.Sprint(v)
	}
}

// Every key needs its documentation.
func TestConfigComments(t *testing.T) {
	for section := range fields(reflect.TypeFor[Config]()) {
		for f := range fields(section.Type) {
			if f.Tag.Get("comment") == "" || f.Tag.Get("toml") == "" {
				t.Errorf("%s.%s lacks a toml or comment tag", section.Name, f.Name)
			}
		}
	}
}

func fields(typ reflect.Type) func(func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for field := range typ.Fields() {
			if !yield(field) {
				return
			}
		}
	}
}

func TestDefaultConfigIsValid(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		if err := defaultConfig(arch).Validate(); err != nil {
			t.Errorf("%s: %v", arch, err)
		}
	}
}

func TestConfigRoundTrip(t *testing.T) {
	want := Default()
	want.VM.Handlers = []string{"vm", "vm-large"}
	want.VM.DefaultMemory = 1000
	want.VM.DefaultMemory = 48<<20 + 512
	want.QEMU.UIDBase = 70000
	text, err := want.Text()
	if err != nil {
		t.Fatal(err)
	}
	got := Default()
	if err := got.parse(text); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.toml")
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a named file that is missing: error %v, want one that names it", err)
	}
	text := "[vm]\nhandlers = ['kvm']\nmax_memory = '2GiB'\n[network]\nbin_dirs = ['/usr/lib/cni']\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.VM.Handlers, want.VM.MaxMemory, want.Network.BinDirs = []string{"kvm"}, 2<<30, []string{"/usr/lib/cni"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestConfigErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		want []string
	}{
		"unknown keys and wrong values, all at once": {
			text: "[server]\nsockte = '/x'\nroot = 'relative'\n[cloud]\nx = 1\n[qemu]\naccel = 'fast'\nuid_base = 0\n",
			want: []string{
				"line 2: unknown key server.sockte",
				"unknown key cloud",
				`server.root is "relative"; it has to be an absolute, clean path`,
				`qemu.accel is "fast"; it has to be one of auto, kvm, tcg`,
				"qemu.uid_base is 0; it has to be at least 1000",
			},
		},
		"not TOML":   {text: "[server\n", want: []string{"line 1"}},
		"wrong type": {text: "[vm]\nmax_vcpus = 'many'\n", want: []string{"line 2: vm.max_vcpus"}},
		"no unit":    {text: "[vm]\nmax_memory = 'much'\n", want: []string{"vm.max_memory", `size "much" is not a number with a unit, like 256MiB`}},
		"bounds": {
			text: "[vm]\nhandlers = ['vm', 'VM', 'vm']\nmin_memory = '1GiB'\nmax_memory = '512MiB'\ndefault_vcpus = 0\nscratch_size = '1B'\n",
			want: []string{
				`vm.handlers[1] is "VM"`,
				`vm.handlers[2] is "vm"; it has to be named once`,
				"vm.max_memory is 512MiB; it has to be at least vm.min_memory, 1GiB",
				"vm.default_vcpus is 0; it has to be 1 to vm.max_vcpus, 32",
				"vm.scratch_size is 1B",
			},
		},
		"stream address": {text: "[server]\nstream_address = '0.0.0.0:10010'\n", want: []string{`server.stream_address is "0.0.0.0:10010"; it has to be a loopback address`}},
		"metrics address": {
			text: "[metrics]\naddress = '10.0.0.1:9090'\n",
			want: []string{`metrics.address is "10.0.0.1:9090"; it has to be empty, the absolute path of a socket, or a loopback address and a port`},
		},
		"metrics socket": {text: "[metrics]\naddress = '/run/../x'\n", want: []string{"metrics.address is \"/run/../x\"; it has to be an absolute, clean path"}},
		"tracing endpoint with a scheme": {
			text: "[tracing]\nendpoint = 'http://127.0.0.1:4317'\n",
			want: []string{`tracing.endpoint is "http://127.0.0.1:4317"; it has to be empty, a host and a port without a scheme, like 127.0.0.1:4317`},
		},
		"tracing without a port": {text: "[tracing]\nendpoint = 'collector:0'\n", want: []string{`tracing.endpoint is "collector:0"`}},
		"tracing socket":         {text: "[tracing]\nendpoint = '/run/../x'\n", want: []string{`tracing.endpoint is "/run/../x"; it has to be an absolute, clean path`}},
		"sampling": {
			text: "[tracing]\nsampling_rate_per_million = 1000001\n",
			want: []string{"tracing.sampling_rate_per_million is 1000001; it has to be 0 to 1000000"},
		},
		"itself":      {text: "[containerd]\naddress = '/run/vmruntime/vmruntime.sock'\n", want: []string{"another socket than server.socket"}},
		"user IDs":    {text: "[qemu]\nuid_base = 4294960000\nuid_count = 65536\n", want: []string{"qemu.uid_count is 65536"}},
		"empty lists": {text: "[vm]\nhandlers = []\n[network]\nbin_dirs = []\n", want: []string{"vm.handlers is []", "network.bin_dirs is []"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Default()
			err := cfg.parse([]byte(tc.text))
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error lacks %q:\n%v", want, err)
				}
			}
		})
	}
}

func TestMetricsAddress(t *testing.T) {
	for address, want := range map[string]string{"": "tcp ", "127.0.0.1:9090": "tcp 127.0.0.1:9090", "[::1]:0": "tcp [::1]:0", "/run/m.sock": "unix /run/m.sock"} {
		cfg := Default()
		cfg.Metrics.Address = address
		if err := cfg.Validate(); err != nil {
			t.Errorf("%q: %v", address, err)
		}
		network, listen := cfg.Metrics.Listen()
		if got := network + " " + listen; got != want {
			t.Errorf("%q: listens at %q, want %q", address, got, want)
		}
	}
}

func TestTracingTarget(t *testing.T) {
	for endpoint, want := range map[string]string{
		"": "", "127.0.0.1:4317": "127.0.0.1:4317", "[::1]:4317": "[::1]:4317", "otel-collector.monitoring:4317": "otel-collector.monitoring:4317",
		"/run/otlp.sock": "unix:/run/otlp.sock",
	} {
		cfg := Default()
		cfg.Tracing.Endpoint = endpoint
		if err := cfg.Validate(); err != nil {
			t.Errorf("%q: %v", endpoint, err)
		}
		if got := cfg.Tracing.Target(); got != want {
			t.Errorf("%q: the target is %q, want %q", endpoint, got, want)
		}
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{"256MiB": 256 << 20, "1GiB": 1 << 30, "1kB": 1000, "0B": 0, "1536KiB": 1536 << 10} {
		var got Size
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", text, got, err, want)
		}
	}
	for size, want := range map[Size]string{0: "0B", 1000: "1000B", 1536 << 10: "1536KiB", 10 << 30: "10GiB"} {
		if got := size.String(); got != want {
			t.Errorf("%d: %s, want %s", size, got, want)
		}
	}
}
