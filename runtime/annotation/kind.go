package annotation

import (
	"fmt"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"
	"k8s.io/apimachinery/pkg/api/resource"
)

const (
	maxPath = 1023    // bytes of a path inside an image or a container
	maxSize = 1 << 44 // bytes of a disk: 16 TiB, as for the image's disk
	minSize = 1 << 20
	sector  = 4096 // disks are whole multiples of it, for guests with large sectors
)

// cpuHelp is no model: QEMU lists them all and ends.
const cpuHelp = "help"

// cpuModel is what QEMU's CPU models are made of; a comma would begin a property.
var cpuModel = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

func tagged(f reflect.StructField) key {
	k := key{
		name: f.Tag.Get("key"), kind: f.Tag.Get("kind"), group: f.Tag.Get("group"), doc: f.Tag.Get("doc"), def: f.Tag.Get("default"),
		values: strings.Fields(f.Tag.Get("values")), max: maxPath,
	}
	if n, err := strconv.Atoi(f.Tag.Get("max")); err == nil {
		k.max = n
	}
	return k
}

// wrong is the one form that errors have.
func wrong(name, value, want string) error {
	const most = 64
	if len(value) > most {
		value = value[:most] + "..."
	}
	return fmt.Errorf("annotation %s is %q; it has to be %s: %w", Prefix+name, value, want, errdefs.ErrInvalidArgument)
}

// set checks a value by its kind and stores it.
func (k key) set(value string) error {
	if want := k.store(value); want != "" {
		return wrong(k.name, value, want)
	}
	return nil
}

// store returns what would have been right, or nothing.
func (k key) store(value string) string {
	switch k.kind {
	case "size":
		return k.storeSize(value)
	case "bool":
		k.target.SetBool(value == "true")
		return unless(value == "true" || value == "false", "true or false")
	case "word":
		k.target.SetString(value)
		return unless(slices.Contains(k.values, value), "one of "+strings.Join(k.values, ", "))
	}
	k.target.SetString(value)
	switch {
	case len(value) == 0:
		return "not empty, or left out"
	case len(value) > k.max:
		return fmt.Sprintf("at most %d bytes, not %d", k.max, len(value))
	case !utf8.ValidString(value) || strings.ContainsRune(value, 0):
		return "text in UTF-8 without zero bytes"
	case k.kind == "name":
		return unless(cpuModel.MatchString(value) && value != cpuHelp, "a name of letters, digits, dots, dashes and underscores")
	case k.kind == "line":
		return unless(!strings.ContainsFunc(value, unicode.IsControl), "one line without control characters")
	case k.kind == "path":
		clean := path.IsAbs(value) && path.Clean(value) == value && value != "/"
		return unless(clean && !strings.ContainsFunc(value, unicode.IsControl), "an absolute path of a file, without // or . or .. in it")
	case k.name == "ssh-keys":
		return wrongKeys(value)
	}
	return ""
}

func unless(ok bool, want string) string {
	if ok {
		return ""
	}
	return want
}

func (k key) storeSize(value string) string {
	const want = "a whole number of bytes as a quantity like 20Gi, from 1Mi to 16Ti"
	q, err := resource.ParseQuantity(value)
	if err != nil {
		return want
	}
	bytes, whole := q.AsInt64()
	if !whole || bytes < minSize || bytes > maxSize {
		return want
	}
	k.target.SetInt((bytes + sector - 1) / sector * sector)
	return ""
}

// wrongKeys checks lines of authorized_keys.
func wrongKeys(text string) string {
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if _, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line)); err != nil {
			return fmt.Sprintf("one public key per line, like \"ssh-ed25519 AAAA... name\"; line %d is none", n+1)
		}
	}
	return ""
}

// validate holds the rules between annotations. What is wrong by itself was told already.
func (m *Machine) validate(given map[string]string) (errs []error) {
	rule := func(ok bool, name, want string) {
		if value, is := given[Prefix+name]; is && !ok {
			errs = append(errs, wrong(name, value, want))
		}
	}
	for _, name := range []string{"user-data", "vendor-data", "network-config", "ignition", "ssh-keys"} {
		_, both := given[Prefix+name]
		rule(!both, name+"-from", "left out where "+Prefix+name+" is set")
	}
	cloudInit := m.Datasource == "nocloud" || m.Datasource == "configdrive"
	for _, name := range []string{"user-data", "vendor-data", "network-config"} {
		rule(cloudInit, name, "used with the datasource nocloud or configdrive")
		rule(cloudInit, name+"-from", "used with the datasource nocloud or configdrive")
	}
	for _, name := range []string{"ignition", "ignition-from"} {
		rule(m.Datasource == "ignition", name, "used with "+Prefix+"datasource=ignition")
	}
	rule(m.Datasource != "ignition" || !m.Ignition.IsZero(), "datasource", "used with "+Prefix+"ignition or "+Prefix+"ignition-from")
	for _, name := range []string{"ssh-keys", "ssh-keys-from"} {
		rule(m.Datasource != "none", name, "used with another datasource than none")
	}
	rule(!m.GuestAgentInstall || cloudInit, "guest-agent-install", "used with the datasource nocloud or configdrive")
	for _, name := range []string{"initrd", "kernel-args"} {
		rule(m.Kernel != "", name, "used with "+Prefix+"kernel")
	}
	rule(m.Firmware != "efi-secure-boot", "kernel", "left out with the firmware efi-secure-boot, which would not check it")
	return errs
}
