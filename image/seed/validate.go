package seed

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"
	"gopkg.in/yaml.v3"
)

var (
	podUID        = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	hostname      = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	interfaceName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$`)
	diskSerial    = regexp.MustCompile(`^[a-z0-9-]{1,20}$`)
	shareName     = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	fsType        = regexp.MustCompile(`^[a-z0-9]{0,16}$`)
)

// checker collects what is wrong.
type checker struct{ errs []error }

func (c *checker) rule(ok bool, field string, value any, want string) {
	if !ok {
		c.errs = append(c.errs, fmt.Errorf("%s is %.80q; it has to be %s: %w", field, fmt.Sprint(value), want, errdefs.ErrInvalidArgument))
	}
}

func (c *checker) path(field, value string) {
	ok := path.IsAbs(value) && path.Clean(value) == value && value != "/" && !strings.ContainsFunc(value, unicode.IsControl)
	c.rule(ok, field, value, "an absolute path without // or . or .. in it")
}

func (in Input) validate() []error {
	var c checker
	c.rule(slices.Contains([]Datasource{NoCloud, ConfigDrive, Ignition}, in.Datasource), "datasource", in.Datasource, "nocloud, configdrive or ignition")
	c.rule(podUID.MatchString(in.PodUID), "the pod's UID", in.PodUID, "at most 128 letters, digits, dots, dashes and underscores")
	c.rule(len(in.Hostname) <= 64 && hostname.MatchString(in.Hostname), "hostname", in.Hostname, "a DNS name of at most 64 bytes")
	in.validateNetwork(&c)
	in.validateKeys(&c)
	in.validateMounts(&c)
	in.validateData(&c)
	return c.errs
}

func (in Input) validateNetwork(c *checker) {
	names := map[string]bool{}
	for i, f := range in.Interfaces {
		field := fmt.Sprintf("interface %d's ", i)
		c.rule(interfaceName.MatchString(f.Name) && !names[f.Name], field+"name", f.Name, "a name of at most 15 bytes that no other interface has")
		names[f.Name] = true
		mac, err := net.ParseMAC(f.MAC)
		c.rule(err == nil && len(mac) == 6, field+"MAC", f.MAC, "like 02:00:00:00:00:01")
		c.rule(f.MTU == 0 || f.MTU >= 68 && f.MTU <= 65535, field+"MTU", f.MTU, "68 to 65535")
		for _, a := range f.Addresses {
			c.rule(a.IsValid() && a.Addr().Zone() == "", field+"address", a, "an address with its prefix length, like 10.0.0.2/24")
		}
		for _, r := range f.Routes {
			c.rule(r.To.IsValid(), field+"route", r.To, "a network, like 0.0.0.0/0")
			c.rule(!r.Via.IsValid() || r.Via.Is4() == r.To.Addr().Is4(), field+"gateway", r.Via, "of the same family as "+r.To.String())
		}
	}
	for _, s := range in.DNS.Search {
		c.rule(len(s) <= 255 && !strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }), "DNS search domain", s, "a domain name")
	}
}

func (in Input) validateKeys(c *checker) {
	for n, line := range authorizedKeys(in.SSHKeys) {
		_, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
		c.rule(err == nil, fmt.Sprintf("SSH key %d", n+1), size([]byte(line)), `a public key, like "ssh-ed25519 AAAA... name"`)
	}
	if in.ExecKey != "" {
		_, _, options, _, err := ssh.ParseAuthorizedKey([]byte(in.ExecKey))
		c.rule(err == nil && len(options) == 0 && !strings.Contains(strings.TrimSpace(in.ExecKey), "\n"), "the pod's SSH key", in.ExecKey, "one public key without options")
	}
	for n, k := range in.HostKeys {
		_, err := ssh.ParseRawPrivateKey([]byte(k.Private))
		c.rule(err == nil, fmt.Sprintf("SSH host key %d", n), "secret", "a private key without passphrase, as PEM")
		c.rule(hostKeyType(k.Public) != "", fmt.Sprintf("SSH host key %d's public part", n), k.Public, "of type ed25519, ecdsa or rsa")
	}
}

// authorizedKeys are the lines that are keys.
func authorizedKeys(text string) []string {
	var keys []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			keys = append(keys, line)
		}
	}
	return keys
}

// hostKeyType is what cloud-init and sshd call a key's type.
func hostKeyType(public string) string {
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(public))
	if err != nil {
		return ""
	}
	switch key.Type() {
	case ssh.KeyAlgoED25519:
		return "ed25519"
	case ssh.KeyAlgoRSA:
		return "rsa"
	case ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		return "ecdsa"
	}
	return ""
}

func (in Input) validateMounts(c *checker) {
	targets := map[string]bool{ShareRoot: true}
	once := func(field, value string) {
		c.path(field, value)
		c.rule(!targets[value], field, value, "a path that nothing else is mounted at")
		targets[value] = true
	}
	for _, d := range in.Disks {
		c.rule(diskSerial.MatchString(d.Serial), "disk serial", d.Serial, "at most 20 lower case letters, digits and dashes")
		c.rule(slices.Contains([]string{"virtio", "scsi", "sata"}, d.Bus), "bus of disk "+d.Serial, d.Bus, "virtio, scsi or sata")
		c.rule(fsType.MatchString(d.FSType), "file system type of disk "+d.Serial, d.FSType, "like ext4, or empty")
		if d.Link != "" {
			once("device path of disk "+d.Serial, d.Link)
		}
		if d.Mount != "" {
			once("mount path of disk "+d.Serial, d.Mount)
		}
	}
	for _, s := range in.Shares {
		c.rule(shareName.MatchString(s.Name) && s.Name != path.Base(path.Dir(AgentPath)), "share", s.Name, "another file name than agent, of at most 128 letters, digits, dots, dashes and underscores")
		once("mount path of share "+s.Name, s.Path)
	}
}

func (in Input) validateData(c *checker) {
	cloudInit := in.Datasource != Ignition
	for _, d := range []struct {
		field string
		data  []byte
		fits  bool
	}{
		{"user-data", in.UserData, cloudInit},
		{"vendor-data", in.VendorData, cloudInit},
		{"network-config", in.NetworkConfig, cloudInit},
		{"ignition", in.Ignition, !cloudInit},
	} {
		c.rule(len(d.data) <= MaxData, d.field, size(d.data), "at most 1 MiB")
		c.rule(d.fits || len(d.data) == 0, d.field, size(d.data), fmt.Sprintf("empty with the datasource %s", in.Datasource))
	}
	c.rule(cloudInit || !in.Agent, "agent", in.Agent, "left out with the datasource ignition")
	c.cloudConfig("user-data", in.UserData)
	c.cloudConfig("vendor-data", in.VendorData)
	if len(in.NetworkConfig) == 0 {
		return
	}
	if in.Datasource == ConfigDrive {
		var object map[string]any
		err := json.Unmarshal(in.NetworkConfig, &object)
		c.rule(err == nil, "network-config", size(in.NetworkConfig), fmt.Sprintf("OpenStack's network_data.json for a ConfigDrive: %v", err))
		return
	}
	err := mapping(in.NetworkConfig, false)
	c.rule(err == nil, "network-config", size(in.NetworkConfig), fmt.Sprintf("a mapping in YAML: %v", err))
}

// size stands for data in errors: there may be secrets in it.
func size(data []byte) string { return fmt.Sprintf("%d bytes", len(data)) }

// cloudConfig checks what its first line says to be one; the guest would ignore a broken one with no more than a line in its log.
func (c *checker) cloudConfig(field string, data []byte) {
	if bytes.HasPrefix(data, []byte("#cloud-config\n")) || bytes.HasPrefix(data, []byte("#cloud-config\r\n")) {
		err := mapping(data, true)
		c.rule(err == nil, field, size(data), fmt.Sprintf("YAML as its first line says: %v", err))
	}
}

// mapping reports what keeps a text from being a mapping in YAML. Nothing at all is one where empty says so.
func mapping(text []byte, empty bool) error {
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return err
	}
	if empty && (doc.Kind == 0 || doc.Content[0].Tag == "!!null") {
		return nil
	}
	if doc.Kind != yaml.DocumentNode || doc.Content[0].Kind != yaml.MappingNode {
		return fmt.Errorf("no mapping at its top")
	}
	return nil
}
