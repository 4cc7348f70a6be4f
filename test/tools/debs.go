package tools

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Debs gives a directory with the files of Debian packages, unpacked and not installed: nothing of them is started or
// configured. apt chooses the versions and verifies what it downloads; what the cache has is not fetched again.
func Debs(packages ...string) (string, error) {
	out, err := exec.Command("apt-get", append([]string{"download", "--print-uris"}, packages...)...).Output()
	if err != nil {
		return "", fmt.Errorf("apt knows not all of the packages %s, run `apt-get update`: %w", strings.Join(packages, " "), err)
	}
	sum := sha256.Sum256(out)
	dir := filepath.Join(CacheDir(), "debs-"+hex.EncodeToString(sum[:8]))
	if err := os.MkdirAll(CacheDir(), 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(dir + ".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	tmp, err := os.MkdirTemp(CacheDir(), "debs-unpack-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	download := exec.Command("apt-get", append([]string{"-q", "-o", "APT::Sandbox::User=root", "download"}, packages...)...)
	download.Dir = tmp
	if out, err := download.CombinedOutput(); err != nil {
		return "", fmt.Errorf("download packages %s: %w\n%s", strings.Join(packages, " "), err, out)
	}
	files, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return "", err
	}
	for _, deb := range files {
		if out, err := exec.Command("dpkg-deb", "-x", deb, filepath.Join(tmp, "root")).CombinedOutput(); err != nil {
			return "", fmt.Errorf("unpack %s: %w\n%s", deb, err, out)
		}
	}
	if err := os.Chmod(filepath.Join(tmp, "root"), 0o755); err != nil {
		return "", err
	}
	return dir, os.Rename(filepath.Join(tmp, "root"), dir)
}
