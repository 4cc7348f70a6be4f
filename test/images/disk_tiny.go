package images

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"
)

// The packages that have the kernel, by a dependency; both kernels are signed, for Secure Boot. Debian leaves the
// drivers of SATA controllers, graphics and watchdogs out of the one for clouds. The other takes much longer to
// unpack itself.
const (
	tinyKernelPackage = "linux-image-cloud-amd64"
	fullKernelPackage = "linux-image-amd64"
)

// tinyPackages are where the tiny system's files come from.
func tinyPackages() []string {
	return []string{
		tinyKernelPackage, fullKernelPackage, "busybox", "dash", "libc6", "qemu-guest-agent", "dhcpcd-base",
		"libglib2.0-0", "libnuma1", "libudev1", "liburing2", "libpcre2-8-0",
	}
}

// tinyModules are the kernel's modules that the tiny system has, with all that they depend on.
func tinyModules() []string {
	return []string{
		"virtio_pci", "virtio_blk", "virtio_net", "virtio_scsi", "sd_mod", "sr_mod", "isofs", "vfat", "nls_cp437", "nls_ascii", "nls_utf8", "virtiofs", "virtio_console",
		"virtio_balloon", "virtio_rng", "pvpanic_pci", "button", "evdev", "efivarfs", "qemu_fw_cfg",
	}
}

// fullModules are those that only the full kernel has as modules.
func fullModules() []string {
	return []string{"ext4", "crc32c_generic", "ahci", "i6300esb", "virtio-gpu", "bochs"}
}

// tinyCmdline leaves a panicked kernel standing, as distributions do.
const tinyCmdline = "console=tty0 console=ttyS0,115200 " + noTimerCheck

const (
	tinyRootMiB = 96
	tinyEFIMiB  = 40
)

// tinySystem is the content of the initramfs, and of the root with more programs.
type tinySystem struct {
	kernel []byte
	base   tree
	debs   *debs
}

// tinySystem collects the system for the kernel of a package.
func (b *diskBuild) tinySystem(kernel string) (*tinySystem, error) {
	name, err := kernelPackage(kernel)
	if err != nil {
		return nil, err
	}
	d, err := openDebs(append(tinyPackages(), name)...)
	if err != nil {
		return nil, err
	}
	s := &tinySystem{base: tree{}, debs: d}
	if err := s.busybox(); err != nil {
		return nil, err
	}
	if err := s.scripts(); err != nil {
		return nil, err
	}
	release := strings.TrimPrefix(name, "linux-image-")
	image, ok := d.files["boot/vmlinuz-"+release]
	if !ok {
		return nil, fmt.Errorf("package %s has no kernel of release %q", name, release)
	}
	s.kernel = image.data
	modules := tinyModules()
	if kernel == fullKernelPackage {
		modules = append(modules, fullModules()...)
	}
	return s, s.modules(b, release, modules)
}

// kernelPackage is the kernel that a metapackage depends on.
func kernelPackage(meta string) (string, error) {
	out, err := exec.Command("apt-cache", "depends", "--important", meta).Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache depends %s: %w", meta, err)
	}
	for line := range strings.Lines(string(out)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			return "linux-image-" + name, nil
		}
	}
	return "", fmt.Errorf("package %s depends on no kernel: %q", meta, out)
}

func (s *tinySystem) busybox() error {
	// The console's shell is one that does not edit lines: what is typed early is kept, and nothing is asked of a
	// terminal that is a test.
	for _, name := range []string{"bin/busybox", "bin/dash"} {
		if err := s.debs.copyTo(s.base, name); err != nil {
			return err
		}
	}
	applets, err := appletNames(s.base["bin/busybox"].data)
	if err != nil {
		return err
	}
	for _, applet := range applets {
		if applet != "bin/busybox" {
			s.base.link(applet, "/bin/busybox")
		}
	}
	return nil
}

// scripts adds what is in the directory tiny, and empty directories.
func (s *tinySystem) scripts() error {
	places := map[string]string{
		"init": "init", "rc": "etc/rc", "rc.late": "usr/sbin/rc.late", "inittab": "etc/inittab",
		"profile": "etc/profile", "udhcpc.script": "etc/udhcpc.script", "dhcpcd.conf": "etc/dhcpcd.conf", "PWRF": "etc/acpi/PWRF/00000080",
	}
	err := fs.WalkDir(sources, "tiny", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := sources.ReadFile(name)
		if err != nil {
			return err
		}
		place, ok := places[path.Base(name)]
		if path.Dir(name) == "tiny/bin" {
			place, ok = "usr/sbin/"+path.Base(name), true
		}
		if !ok {
			return fmt.Errorf("%s has no place in the tiny system", name)
		}
		s.base.file(place, 0o755, string(data))
		return nil
	})
	for _, dir := range []string{"dev", "proc", "sys", "run", "root", "mnt", "var/lib/dhcpcd", "usr/lib/dhcpcd"} {
		s.base.dir(dir, 0o755)
	}
	s.base.dir("tmp", 0o1777)
	s.base.link("sbin/shutdown", "/usr/sbin/shutdown") // where the guest agent looks for it
	s.base.file("etc/passwd", 0o644, "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
	s.base.file("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n")
	return err
}

// modules adds the modules and depmod's index of them.
func (s *tinySystem) modules(b *diskBuild, release string, names []string) error {
	dir := path.Join("lib/modules", release)
	all, some := b.path("modules"), b.path("modules-used")
	for name, n := range s.debs.files {
		if strings.HasPrefix(name, dir+"/") {
			if err := writeBelow(all, name, n.data); err != nil {
				return err
			}
		}
	}
	if err := b.run("", "depmod", "-b", all, release); err != nil {
		return err
	}
	depends, err := os.ReadFile(filepath.Join(all, dir, "modules.dep"))
	if err != nil {
		return err
	}
	used, err := moduleClosure(string(depends), names)
	if err != nil {
		return err
	}
	for _, file := range append(used, "modules.builtin", "modules.order", "modules.builtin.modinfo") {
		n, ok := s.debs.files[path.Join(dir, file)]
		if !ok {
			return fmt.Errorf("the kernel's package has no file %s/%s", dir, file)
		}
		if err := writeBelow(some, path.Join(dir, file), n.data); err != nil {
			return err
		}
	}
	if err := b.run("", "depmod", "-b", some, release); err != nil {
		return err
	}
	for _, file := range append(used, "modules.dep", "modules.alias", "modules.softdep", "modules.builtin") {
		data, err := os.ReadFile(filepath.Join(some, dir, file))
		if err != nil {
			return err
		}
		s.base.file(path.Join(dir, file), 0o644, string(data))
	}
	return errors.Join(os.RemoveAll(all), os.RemoveAll(some))
}

// moduleClosure lists the files of modules and of those that they need, from modules.dep: FILE: FILE... in a line.
func moduleClosure(depends string, names []string) ([]string, error) {
	lines := map[string][]string{} // by module name
	for line := range strings.Lines(depends) {
		file, rest, _ := strings.Cut(line, ":")
		name, _, _ := strings.Cut(path.Base(file), ".ko")
		lines[strings.ReplaceAll(name, "-", "_")] = append(strings.Fields(rest), file)
	}
	files := map[string]bool{}
	for _, name := range names {
		line, ok := lines[strings.ReplaceAll(name, "-", "_")]
		if !ok {
			return nil, fmt.Errorf("the kernel has no module %q", name)
		}
		for _, file := range line {
			files[file] = true
		}
	}
	return slices.Sorted(maps.Keys(files)), nil
}

// initramfs packs the system for the kernel.
func (s *tinySystem) initramfs() ([]byte, error) {
	records := []cpio.Record{
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.CharDev("dev/null", 0o666, 1, 3),
	}
	names := slices.Sorted(s.base.names())
	if i := slices.Index(names, "dev"); i >= 0 {
		names = slices.Insert(slices.Delete(names, i, i+1), 0, "dev")
	}
	var all []cpio.Record
	for _, name := range names {
		n := s.base[name]
		switch {
		case n.isDir:
			all = append(all, cpio.Directory(name, uint64(n.mode)))
		case n.link != "":
			all = append(all, cpio.Symlink(name, n.link))
		default:
			all = append(all, cpio.StaticFile(name, string(n.data), uint64(n.mode)))
		}
		if name == "dev" {
			all = append(all, records...)
		}
	}
	var archive, packed bytes.Buffer
	w := cpio.Newc.Writer(&archive)
	for i, r := range all {
		r.Ino, r.NLink = uint64(i+1), 1
		if err := w.WriteRecord(r); err != nil {
			return nil, fmt.Errorf("initramfs: %s: %w", r.Name, err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, err
	}
	z := lz4.NewWriter(&packed)
	if err := z.Apply(lz4.LegacyOption(true), lz4.CompressionLevelOption(lz4.Level9)); err != nil {
		return nil, err
	}
	if _, err := io.Copy(z, &archive); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return packed.Bytes(), nil
}

// root writes the root's files: the system, and programs that a kernel booted by itself does without.
func (s *tinySystem) root(dir string, programs []string) error {
	root := maps.Clone(s.base)
	for _, program := range programs {
		if err := s.debs.copyTo(root, program); err != nil {
			return err
		}
	}
	for name, n := range s.debs.files {
		if strings.HasPrefix(name, "usr/lib/dhcpcd/") {
			root.put(name, n)
		}
	}
	return root.writeTo(dir)
}

// writeTo writes the tree below a directory.
func (t tree) writeTo(dir string) error {
	for _, name := range slices.Sorted(t.names()) {
		n, file := t[name], filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(file), 0o755)
		switch {
		case err != nil:
		case n.isDir:
			err = os.MkdirAll(file, 0o755)
		case n.link != "":
			err = os.Symlink(n.link, file)
		case n.hard != "":
			err = fmt.Errorf("%s: hard links are for layers", name)
		default:
			err = os.WriteFile(file, n.data, 0o600)
		}
		if err != nil {
			return err
		}
		if n.link == "" {
			// Unlike os.Chmod, the system call takes the bits as they are in a layer.
			if err := errors.Join(os.Lchown(file, n.uid, n.gid), chmod(file, n.mode)); err != nil {
				return err
			}
		}
	}
	return nil
}

func makeTinyKernel(b *diskBuild, out string) error {
	s, err := b.tinySystem(tinyKernelPackage)
	if err != nil {
		return err
	}
	initrd, err := s.initramfs()
	if err != nil {
		return err
	}
	return errors.Join(writeBelow(out, "vmlinuz", s.kernel), writeBelow(out, "initrd", initrd))
}

func makeTinyDisk(b *diskBuild, out string) error {
	raw := b.path("disk.raw")
	if err := b.tinyDisk(tinyKernelPackage, raw); err != nil {
		return err
	}
	return b.toQCOW2(raw, out)
}

func makeTinyRaw(b *diskBuild, out string) error { return b.tinyDisk(fullKernelPackage, out) }

// tinyDisk writes the raw disk of the tiny system with the kernel of a package.
func (b *diskBuild) tinyDisk(kernel, out string) error {
	s, err := b.tinySystem(kernel)
	if err != nil {
		return err
	}
	initrd, err := s.initramfs()
	if err != nil {
		return err
	}
	return b.tinyBoot(s, initrd, tinyRootMiB, out, "usr/sbin/qemu-ga", "usr/sbin/dhcpcd")
}

// tinyBoot writes a raw disk that boots the system, with more programs in its root.
func (b *diskBuild) tinyBoot(s *tinySystem, initrd []byte, rootMiB int64, out string, programs ...string) error {
	root := b.path("root")
	if err := s.root(root, programs); err != nil {
		return err
	}
	return b.assemble(bootDisk{
		root: root, label: "tiny", rootMiB: rootMiB,
		efi: map[string][]byte{"vmlinuz": s.kernel, "initrd": initrd}, efiMiB: tinyEFIMiB,
		grub: "linux /vmlinuz " + tinyCmdline + "\ninitrd /initrd\nboot\n",
	}, out)
}

// makeBackingDisk makes what a pod must never boot: a disk that says that most of it is in another file.
func makeBackingDisk(b *diskBuild, out string) error {
	base := b.path("base.raw")
	if err := createSparse(base, mib); err != nil {
		return err
	}
	return b.run("", "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, out)
}
