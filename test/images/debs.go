package images

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/vmruntime/vmruntime/test/tools"
)

// packages are all Debian packages from which images take files.
func packages() []string {
	return []string{
		"busybox", "procps", "util-linux", "nginx", "netbase",
		"libc6", "libproc2-0", "libsystemd0", "libcap2", "libgcrypt20", "libgpg-error0",
		"liblzma5", "libzstd1", "liblz4-1", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g",
	}
}

// debs is the content of the packages, as one file system.
type debs struct {
	files tree
	box   v1.Layer // see base
}

// openDebs fetches those packages that the cache lacks and reads them all. apt
// chooses the versions and verifies what it downloads.
func openDebs(packages ...string) (*debs, error) {
	dir := filepath.Join(tools.CacheDir(), "debs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	args := append([]string{"download", "--print-uris"}, packages...)
	out, err := exec.Command("apt-get", args...).Output()
	if err != nil {
		return nil, fmt.Errorf("apt knows not all of the packages %s, run `apt-get update`: %w", strings.Join(packages, " "), err)
	}
	d := &debs{files: tree{}}
	for line := range strings.Lines(string(out)) {
		// 'URI' FILE SIZE HASH
		fields := strings.Fields(line)
		if len(fields) < 2 {
			return nil, fmt.Errorf("apt-get download --print-uris printed %q, want a URI and a file name", line)
		}
		deb := filepath.Join(dir, fields[1])
		if err := fetch(deb); err != nil {
			return nil, err
		}
		if err := d.read(deb); err != nil {
			return nil, fmt.Errorf("read package %s: %w", deb, err)
		}
	}
	return d, nil
}

// fetch downloads a package's file unless it is there.
func fetch(deb string) error {
	if _, err := os.Stat(deb); err == nil {
		return nil
	}
	tmp, err := os.MkdirTemp(filepath.Dir(deb), "fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	pkg, _, _ := strings.Cut(filepath.Base(deb), "_")
	cmd := exec.Command("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", pkg)
	cmd.Dir = tmp
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("download package %s: %w\n%s", pkg, err, out)
	}
	return os.Rename(filepath.Join(tmp, filepath.Base(deb)), deb)
}

// read adds the files of a package.
func (d *debs) read(deb string) error {
	out, err := exec.Command("dpkg-deb", "--fsys-tarfile", deb).Output()
	if err != nil {
		return err
	}
	return d.readTar(bytes.NewReader(out))
}

// readTar adds the files and links of an archive.
func (d *debs) readTar(archive io.Reader) error {
	for r := tar.NewReader(archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path.Clean(h.Name), "/")
		switch h.Typeflag {
		case tar.TypeReg:
			data, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			d.files[name] = &node{mode: h.Mode, data: data}
		case tar.TypeSymlink:
			d.files[name] = &node{mode: 0o777, link: h.Linkname}
		}
	}
}

// copyTo copies a program or library with all libraries that it needs.
func (d *debs) copyTo(fs tree, name string) error {
	if _, done := fs[name]; done {
		return nil
	}
	n, ok := d.files[name]
	if !ok {
		return fmt.Errorf("no package has the file %q", name)
	}
	if n.link != "" {
		fs.link(name, n.link)
		target := path.Join(path.Dir(name), n.link)
		if path.IsAbs(n.link) {
			target = n.link[1:]
		}
		return d.copyTo(fs, target)
	}
	fs.file(name, n.mode, string(n.data))
	needed, err := libraries(n.data)
	if err != nil {
		return fmt.Errorf("read ELF file %q: %w", name, err)
	}
	for _, lib := range needed {
		file, err := d.library(lib)
		if err != nil {
			return fmt.Errorf("%q needs %w", name, err)
		}
		if err := d.copyTo(fs, file); err != nil {
			return err
		}
	}
	return nil
}

// library finds a shared library by its file name or full path.
func (d *debs) library(name string) (string, error) {
	if path.IsAbs(name) {
		return name[1:], nil
	}
	for _, file := range slices.Sorted(d.files.names()) {
		if path.Base(file) == name {
			return file, nil
		}
	}
	return "", fmt.Errorf("library %q, which no package has", name)
}

// libraries lists what a program needs: its interpreter and its libraries.
func libraries(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		interp, err := io.ReadAll(p.Open())
		if err != nil {
			return nil, err
		}
		needed = append(needed, strings.TrimRight(string(interp), "\x00"))
	}
	return needed, nil
}

// base is the layer of busybox's system, made once.
func (d *debs) base() (v1.Layer, error) {
	if d.box != nil {
		return d.box, nil
	}
	fs, err := d.busybox()
	if err != nil {
		return nil, err
	}
	d.box, err = fs.layer()
	return d.box, err
}

// busybox is a small system: busybox under all its names, pgrep and ipcs. It is
// the dynamic busybox (the static one runs its applets without exec, so that a
// masked path does not show), and its names are hard links.
func (d *debs) busybox() (tree, error) {
	fs := tree{}
	for _, name := range []string{"bin/busybox", "usr/bin/pgrep", "usr/bin/ipcs", "lib/" + multiarch() + "/libnss_files.so.2"} {
		if err := d.copyTo(fs, name); err != nil {
			return nil, err
		}
	}
	applets, err := appletNames(fs["bin/busybox"].data)
	if err != nil {
		return nil, err
	}
	for _, applet := range applets {
		if _, exists := fs[applet]; !exists && applet != "bin/busybox" {
			fs.hardlink(applet, "bin/busybox")
		}
	}
	for _, dir := range []string{"dev", "proc", "sys", "root", "home", "var/run", "var/log", "var/tmp", "run", "mnt", "usr/sbin"} {
		fs.dir(dir, 0o755)
	}
	fs.dir("tmp", 0o1777)
	fs.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n")
	fs.file("etc/group", 0o644, "root:x:0:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n")
	fs.file("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n")
	if services, ok := d.files["etc/services"]; ok {
		fs.file("etc/services", 0o644, string(services.data))
	}
	return fs, nil
}

// appletNames asks busybox itself which names it answers to.
func appletNames(program []byte) ([]string, error) {
	tmp, err := os.MkdirTemp("", "vmruntime-images-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	file := filepath.Join(tmp, "busybox")
	if err := os.WriteFile(file, program, 0o755); err != nil {
		return nil, err
	}
	out, err := exec.Command(file, "--list-full").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list-full: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// nginx is Debian's nginx in the foreground on a port.
func (d *debs) nginx(base v1.Layer, port int) (v1.Image, error) {
	fs := tree{}
	if err := d.copyTo(fs, "usr/sbin/nginx"); err != nil {
		return nil, err
	}
	fs.dir("var/lib/nginx", 0o755)
	fs.dir("var/log/nginx", 0o755)
	fs.file("www/index.html", 0o644, "nginx\n")
	fs.file("etc/nginx/nginx.conf", 0o644, fmt.Sprintf(`user www-data;
worker_processes 1;
pid /var/run/nginx.pid;
error_log stderr notice;
events { worker_connections 64; }
http {
	access_log off;
	server {
		listen %[1]d;
		listen [::]:%[1]d;
		root /www;
	}
}
`, port))
	layer, err := fs.layer()
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Cmd: []string{"nginx", "-g", "daemon off;"}, StopSignal: "SIGQUIT"}, base, layer)
}
