package seed

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// ignition puts the user's configuration of specification 3 below one of ours (ignition.config.merge), so that the user's wins and nothing of it is
// lost. One of specification 2 has no such merging and is passed on alone. Ignition runs once in the life of a disk.
func (in Input) ignition() (*Seed, error) {
	var user struct {
		Ignition struct {
			Version string `json:"version"`
		} `json:"ignition"`
	}
	if err := json.Unmarshal(in.Ignition, &user); err != nil {
		return nil, fmt.Errorf("ignition is %q; it has to be JSON: %w: %w", size(in.Ignition), err, errdefs.ErrInvalidArgument)
	}
	version := user.Ignition.Version
	switch {
	case strings.HasPrefix(version, "2."):
		return &Seed{Ignition: in.Ignition}, nil
	case !strings.HasPrefix(version, "3."):
		return nil, fmt.Errorf("ignition.version is %q; it has to be that of a specification, like 3.4.0: %w", version, errdefs.ErrInvalidArgument)
	}
	text, err := json.Marshal(ignitionConfig{
		Ignition: ignitionHead{Version: version, Config: ignitionMerge{Merge: []ignitionSource{{dataURL(in.Ignition)}}}},
		Passwd:   ignitionPasswd{Users: in.ignitionUsers()},
		Storage:  ignitionStorage{Files: in.ignitionFiles()},
	})
	return &Seed{Ignition: text}, err
}

// What follows is the part of Ignition's configuration specification 3 that is used.
type (
	ignitionConfig struct {
		Ignition ignitionHead    `json:"ignition"`
		Passwd   ignitionPasswd  `json:"passwd"`
		Storage  ignitionStorage `json:"storage"`
	}
	ignitionHead struct {
		Version string        `json:"version"`
		Config  ignitionMerge `json:"config"`
	}
	ignitionMerge struct {
		Merge []ignitionSource `json:"merge"`
	}
	ignitionSource struct {
		Source string `json:"source"`
	}
	ignitionPasswd struct {
		Users []ignitionUser `json:"users,omitempty"`
	}
	ignitionUser struct {
		Name string   `json:"name"`
		Keys []string `json:"sshAuthorizedKeys"`
	}
	ignitionStorage struct {
		Files []ignitionFile `json:"files"`
	}
	ignitionFile struct {
		Path      string           `json:"path"`
		Mode      int              `json:"mode"`
		Overwrite bool             `json:"overwrite,omitempty"`
		Contents  *ignitionSource  `json:"contents,omitempty"`
		Append    []ignitionSource `json:"append,omitempty"`
	}
)

func dataURL(data []byte) string { return "data:;base64," + base64.StdEncoding.EncodeToString(data) }

// ignitionUsers are root, and core, the default user of the images that have Ignition, if there are keys for it.
func (in Input) ignitionUsers() []ignitionUser {
	keys := authorizedKeys(in.SSHKeys)
	var users []ignitionUser
	if len(keys) > 0 {
		users = append(users, ignitionUser{"core", keys})
	}
	if line := in.execKeyLine(); line != "" {
		keys = append(slices.Clip(keys), line)
	}
	if len(keys) > 0 {
		users = append(users, ignitionUser{"root", keys})
	}
	return users
}

func (in Input) ignitionFiles() []ignitionFile {
	file := func(path string, mode int, text string) ignitionFile {
		return ignitionFile{Path: path, Mode: mode, Overwrite: true, Contents: &ignitionSource{dataURL([]byte(text))}}
	}
	files := []ignitionFile{
		file("/etc/hostname", 0o644, in.Hostname+"\n"),
		file(EnvFile, 0o640, environment(in.Env, everywhere)),
	}
	for _, k := range in.HostKeys {
		name := "/etc/ssh/ssh_host_" + hostKeyType(k.Public) + "_key"
		files = append(files, file(name, 0o600, strings.TrimSpace(k.Private)+"\n"), file(name+".pub", 0o644, strings.TrimSpace(k.Public)+"\n"))
	}
	if fstab := in.fstab(); fstab != "" {
		files = append(files, ignitionFile{Path: "/etc/fstab", Mode: 0o644, Append: []ignitionSource{{dataURL([]byte(fstab))}}})
	}
	return files
}
