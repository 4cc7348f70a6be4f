package node

import (
	"errors"
	"os"
	"strings"
	"text/template"
)

// writeConfigs writes the files of CNI, containerd and vmruntime.
func (n *Node) writeConfigs() error {
	accel, level := n.options.Accel, n.options.LogLevel
	if accel == "" {
		accel = "tcg"
	}
	if level == "" {
		level = "info"
	}
	values := map[string]string{
		"Root": n.Root, "Registry": n.registry.addr, "Runc": n.Tool("runc", "runc"), "CNI": n.tools["cni"],
		"Guest": n.options.GuestDir, "Accel": accel, "LogLevel": level,
	}
	return errors.Join(
		writeTemplate(n.path("cni", "conf", "10-test.conflist"), cniConfig, values),
		writeTemplate(n.path("registry", "_default", "hosts.toml"), hostsConfig, values),
		writeTemplate(n.path("containerd", "config.toml"), containerdConfig, values),
		writeTemplate(n.path("vmruntime", "vmruntime.toml"), vmruntimeConfig, values),
	)
}

func writeTemplate(file, text string, values map[string]string) error {
	t, err := template.New(file).Option("missingkey=error").Parse(text)
	if err != nil {
		return err
	}
	var out strings.Builder
	if err := t.Execute(&out, values); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(out.String()), 0o644)
}

const hostsConfig = `[host."http://{{.Registry}}"]
capabilities = ["pull", "resolve"]
`

const cniConfig = `{
  "cniVersion": "1.0.0",
  "name": "test",
  "plugins": [
    {
      "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
      "ipam": {
        "type": "host-local", "dataDir": "{{.Root}}/cni/ipam",
        "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd00:88::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
    {"type": "bandwidth", "capabilities": {"bandwidth": true}},
    {"type": "firewall"}
  ]
}
`

const containerdConfig = `version = 3
root = "{{.Root}}/containerd/root"
state = "{{.Root}}/containerd/state"

[grpc]
address = "{{.Root}}/run/containerd.sock"

[ttrpc]
address = "{{.Root}}/run/containerd.sock.ttrpc"

[plugins."io.containerd.nri.v1.nri"]
disable = true

[plugins."io.containerd.shim.v1.manager"]
socket_dir = "{{.Root}}/run/shim"

[plugins."io.containerd.internal.v1.opt"]
path = "{{.Root}}/containerd/opt"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "vmruntime.test/sandbox:1"

[plugins."io.containerd.cri.v1.images".registry]
config_path = "{{.Root}}/registry"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
cdi_spec_dirs = []

[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{{.Runc}}"
Root = "{{.Root}}/containerd/runc"
SystemdCgroup = false

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{{.CNI}}"]
conf_dir = "{{.Root}}/cni/conf"
`

// TemplateConfig is the node's section about templates: no guests wait for pods, so that whatever is there belongs to a pod. Who wants
// another one puts it in its place.
const TemplateConfig = `[template]
spares = 0
`

const vmruntimeConfig = `[server]
socket = "{{.Root}}/run/vmruntime.sock"
admin_socket = "{{.Root}}/run/admin.sock"
root = "{{.Root}}/vmruntime/root"
state = "{{.Root}}/run/s"
log_level = "{{.LogLevel}}"

[containerd]
address = "{{.Root}}/run/containerd.sock"

[qemu]
accel = "{{.Accel}}"

[guest]
dir = "{{.Guest}}"

[network]
conf_dir = "{{.Root}}/cni/conf"
bin_dirs = ["{{.CNI}}"]

[metrics]
address = "{{.Root}}/run/metrics.sock"

` + TemplateConfig
