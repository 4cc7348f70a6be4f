package seed

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"
)

// noCloud is the layout that cloud-init's documentation calls NoCloud, with the data on a labelled disk.
func (in Input) noCloud() (*Seed, error) {
	meta, err := marshalYAML(metaData{
		InstanceID: InstanceID(in.PodUID), LocalHostname: in.Hostname, PublicKeys: authorizedKeys(in.SSHKeys),
		PodName: in.PodName, PodNamespace: in.PodNamespace, PodUID: in.PodUID,
	})
	if err != nil {
		return nil, err
	}
	vendor, err := in.vendorData()
	if err != nil {
		return nil, err
	}
	s := &Seed{Label: "cidata", Files: map[string][]byte{"meta-data": meta, "user-data": in.userData(), "vendor-data": vendor}}
	switch {
	case len(in.NetworkConfig) > 0:
		s.Files["network-config"] = in.NetworkConfig
	case len(in.Interfaces) > 0:
		s.Files["network-config"], err = marshalYAML(in.networkV2())
	}
	return s, err
}

type metaData struct {
	InstanceID    string   `yaml:"instance-id"`
	LocalHostname string   `yaml:"local-hostname"`
	PublicKeys    []string `yaml:"public-keys,omitempty"`
	PodName       string   `yaml:"pod-name,omitempty"`
	PodNamespace  string   `yaml:"pod-namespace,omitempty"`
	PodUID        string   `yaml:"pod-uid"`
}

// userData is the user's. cloud-init wants the file in any case, and something in it that it knows.
func (in Input) userData() []byte {
	if len(in.UserData) == 0 {
		return []byte("#cloud-config\n{}\n")
	}
	return in.UserData
}

// configDrive is OpenStack's layout, as cloud-init's documentation describes it for ConfigDrive version 2.
func (in Input) configDrive() (*Seed, error) {
	keys := map[string]string{}
	for i, k := range authorizedKeys(in.SSHKeys) {
		keys[strconv.Itoa(i)] = k
	}
	meta, err := marshalJSON(map[string]any{
		"uuid": InstanceID(in.PodUID), "hostname": in.Hostname, "name": in.PodName, "public_keys": keys, "launch_index": 0,
		"meta": map[string]string{"pod-name": in.PodName, "pod-namespace": in.PodNamespace, "pod-uid": in.PodUID},
	})
	if err != nil {
		return nil, err
	}
	mime, err := in.vendorData()
	if err != nil {
		return nil, err
	}
	vendor, err := marshalJSON(map[string]string{"cloud-init": string(mime)})
	if err != nil {
		return nil, err
	}
	const dir = "openstack/latest/"
	s := &Seed{Label: "config-2", Files: map[string][]byte{
		dir + "meta_data.json": meta, dir + "user_data": in.userData(), dir + "vendor_data.json": vendor,
	}}
	switch {
	case len(in.NetworkConfig) > 0:
		s.Files[dir+"network_data.json"] = in.NetworkConfig
	case len(in.Interfaces) > 0:
		s.Files[dir+"network_data.json"], err = marshalJSON(in.networkData())
	}
	return s, err
}

// vendorData is what is ours, around the user's vendor-data: the boot hook runs before what is theirs, and our cloud-config comes last, to add only what theirs does not have.
func (in Input) vendorData() ([]byte, error) {
	config, err := in.cloudConfig()
	if err != nil {
		return nil, err
	}
	parts := []part{{contentType: "text/cloud-boothook", name: "vmruntime-boothook", body: in.bootHook()}}
	if len(in.VendorData) > 0 {
		p, err := foreignPart(in.VendorData)
		if err != nil {
			return nil, err
		}
		parts = append(parts, p)
	}
	return multipart(append(parts, part{contentType: "text/cloud-config", name: "vmruntime.yaml", body: config, merge: "dict(no_replace,recurse_dict)+list()+str()"})), nil
}

// cloudConfig is the little of ours that a boot hook cannot do: cc_ssh, which runs later, deletes host keys that it does not know. It has
// no lists, see the package comment.
func (in Input) cloudConfig() ([]byte, error) {
	config := map[string]any{}
	if len(authorizedKeys(in.SSHKeys)) > 0 {
		config["disable_root"] = false // else cloud-init would give root's keys a command that says to log in as somebody else
	}
	keys := map[string]string{}
	for _, k := range in.HostKeys {
		name := hostKeyType(k.Public)
		keys[name+"_private"] = strings.TrimSpace(k.Private) + "\n"
		keys[name+"_public"] = strings.TrimSpace(k.Public) + "\n"
	}
	if len(keys) > 0 {
		config["ssh_keys"] = keys
	}
	text, err := marshalYAML(config)
	return append([]byte("#cloud-config\n"), text...), err
}

func marshalYAML(v any) ([]byte, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	err := e.Close()
	return b.Bytes(), err
}

func marshalJSON(v any) ([]byte, error) {
	text, err := json.MarshalIndent(v, "", "  ")
	return append(text, '\n'), err
}
