package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// apt runs apt's clients on lists, caches and an empty package state of its own, so that neither root nor
// the host's state is needed, and "install" means the whole dependency closure. Keys, sources, proxies and
// verification are the host's.
type apt struct {
	dir    string // absolute
	goarch string
}

// debPackage is one fetched package.
type debPackage struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	path    string
}

func newApt(dir, goarch, sources string) (*apt, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	a := &apt{dir: dir, goarch: goarch}
	for _, sub := range []string{"lists/partial", "cache/archives/partial", "log"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	conf := []string{
		`Dir::State "` + dir + `";`,
		`Dir::State::lists "` + dir + `/lists";`,
		`Dir::State::status "` + dir + `/status";`,
		`Dir::Cache "` + dir + `/cache";`,
		`Dir::Log "` + dir + `/log";`,
		`Dir::Etc::preferences "` + dir + `/preferences";`,
		`Dir::Etc::preferencesparts "/dev/null";`,
		`APT::Architecture "` + goarch + `";`,
		`APT::Architectures { "` + goarch + `"; };`,
		// The directories belong to the caller, whom apt's own user need not be able to follow.
		`APT::Sandbox::User "root";`,
		`APT::Install-Recommends "false";`,
		`APT::Get::AllowUnauthenticated "false";`,
		`Acquire::AllowInsecureRepositories "false";`,
		`Acquire::Retries "3";`,
	}
	if sources != "" {
		file, err := filepath.Abs(sources)
		if err != nil {
			return nil, err
		}
		conf = append(conf, `Dir::Etc::sourcelist "`+file+`";`, `Dir::Etc::sourceparts "/dev/null";`)
	}
	// A third party's package never takes the place of Debian's.
	preferences := "Package: *\nPin: release o=Debian\nPin-Priority: 900\n"
	return a, errors.Join(
		os.WriteFile(filepath.Join(dir, "apt.conf"), []byte(strings.Join(conf, "\n")+"\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "preferences"), []byte(preferences), 0o644),
		os.WriteFile(filepath.Join(dir, "status"), nil, 0o644),
	)
}

func (a *apt) archives() string { return filepath.Join(a.dir, "cache", "archives") }

// run gives the standard output of one of apt's programs.
func (a *apt) run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = a.archives()
	cmd.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(a.dir, "apt.conf"), "LC_ALL=C.UTF-8")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

func (a *apt) update(ctx context.Context) error {
	_, err := a.run(ctx, "apt-get", "-q", "update")
	return err
}

// fetchKernel fetches the newest kernel of a metapackage, without what a host would need to boot it.
func (a *apt) fetchKernel(ctx context.Context, meta string) (debPackage, error) {
	out, err := a.run(ctx, "apt-cache", "show", "--no-all-versions", meta)
	if err != nil {
		return debPackage{}, fmt.Errorf("%w (is Debian among apt's sources? -sources names others)", err)
	}
	name, err := kernelDependency(out)
	if err != nil {
		return debPackage{}, fmt.Errorf("package %s: %w", meta, err)
	}
	if _, err := a.run(ctx, "apt-get", "-q", "download", name); err != nil {
		return debPackage{}, err
	}
	out, err = a.run(ctx, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return debPackage{}, err
	}
	return a.fetched(name, field(out, "Version"), field(out, "Architecture"))
}

// kernelDependency finds the versioned kernel package that a metapackage depends on.
func kernelDependency(stanza string) (string, error) {
	for dep := range strings.SplitSeq(field(stanza, "Depends"), ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(dep), " ")
		if strings.HasPrefix(name, "linux-image-") {
			return name, nil
		}
	}
	return "", fmt.Errorf("its dependencies %q name no linux-image", field(stanza, "Depends"))
}

// field is the value of one field of a control stanza.
func field(stanza, name string) string {
	for line := range strings.Lines(stanza) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// fetchWithDependencies fetches a package and all that it depends on, sorted by name.
func (a *apt) fetchWithDependencies(ctx context.Context, name string) ([]debPackage, error) {
	plan, err := a.run(ctx, "apt-get", "-q", "--simulate", "install", name)
	if err != nil {
		return nil, err
	}
	if _, err := a.run(ctx, "apt-get", "-q", "-y", "--download-only", "install", name); err != nil {
		return nil, err
	}
	var pkgs []debPackage
	for line := range strings.Lines(plan) {
		n, version, arch, ok := parseInst(line)
		if !ok {
			continue
		}
		p, err := a.fetched(n, version, arch)
		if err != nil {
			return nil, err
		}
		pkgs = append(pkgs, p)
	}
	slices.SortFunc(pkgs, func(x, y debPackage) int { return strings.Compare(x.Name, y.Name) })
	return pkgs, nil
}

// parseInst reads a line of a simulated installation: "Inst NAME (VERSION ORIGIN... [ARCH])".
func parseInst(line string) (name, version, arch string, ok bool) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(line), "Inst ")
	if !ok {
		return "", "", "", false
	}
	name, rest, _ = strings.Cut(rest, " (")
	name, _, _ = strings.Cut(name, ":")
	version, rest, _ = strings.Cut(rest, " ")
	_, rest, _ = strings.Cut(rest, "[")
	arch, _, ok = strings.Cut(rest, "])")
	return name, version, arch, ok
}

// fetched is a package that apt has left, verified, in its archives under the name that it derives.
func (a *apt) fetched(name, version, arch string) (debPackage, error) {
	file := name + "_" + strings.ReplaceAll(version, ":", "%3a") + "_" + arch + ".deb"
	p := debPackage{Name: name, Version: version, path: filepath.Join(a.archives(), file)}
	if _, err := os.Stat(p.path); err != nil {
		return p, fmt.Errorf("package %s %s: apt did not leave it where expected: %w", name, version, err)
	}
	return p, nil
}
