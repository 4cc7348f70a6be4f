package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/image/qcow2"
)

const convertEnv = "VMRUNTIME_IMAGE_TEST_CONVERT" // makes the test program a converter

func converter() []string { return []string{"/usr/bin/env", convertEnv + "=1", os.Args[0]} }

func needsRoot(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root: run by make test")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: for loop devices, and to confine qemu-img")
	}
}

// guestSees reads a disk as a guest would.
func guestSees(t *testing.T, d *Disk) []byte {
	t.Helper()
	src, err := openSource(d)
	if err != nil {
		t.Fatal(err)
	}
	defer src.close()
	data := make([]byte, d.VirtualSize)
	if _, err := src.ReadAt(data, 0); err != nil {
		t.Fatal(err)
	}
	return data
}

// evenDisk is makeDisk's with a size that every format can have.
func evenDisk(t *testing.T) (raw, qcow string) {
	t.Helper()
	raw, qcow = makeDisk(t)
	if err := errors.Join(os.Truncate(raw, 41<<20), os.Remove(qcow)); err != nil {
		t.Fatal(err)
	}
	toFormat(t, raw, qcow, "qcow2")
	return raw, qcow
}

func toFormat(t *testing.T, raw, path, format string, options ...string) {
	t.Helper()
	args := append([]string{"convert", "-f", "raw", "-O", format}, options...)
	if out, err := exec.Command("qemu-img", append(args, raw, path)...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v %s", err, out)
	}
}

func TestImport(t *testing.T) {
	n := startContainerd(t)
	raw, qcow := evenDisk(t)
	stages := map[string]bool{}
	o := PackOptions{Disk: qcow, Name: "team/debian", Progress: func(stage string, done, total int64) {
		stages[stage] = true
		if done > total {
			t.Errorf("%s: %d of %d", stage, done, total)
		}
	}}
	p, err := Import(t.Context(), n.client, "", o)
	if err != nil {
		t.Fatal(err)
	}
	if p.Name != "docker.io/team/debian:latest" || p.File != "disk/debian.qcow2" || p.VirtualSize != 41<<20 {
		t.Errorf("packed: %+v", p)
	}
	if !stages["packing"] || !stages["unpacking"] {
		t.Errorf("progress of %v", stages)
	}
	await(t, "the CRI knows the image", func() bool {
		_, err := n.client.ImageService().Get(n.ctx(), p.Config.String())
		return err == nil
	})
	n.collectGarbage()
	s := n.store()
	t.Cleanup(func() { s.Release(n.cleanup(), "c1") })
	d := findDisk(t, s, "team/debian", "c1")
	if d.Digest != p.Config.String() || d.Name != p.File || !bytes.Equal(guestSees(t, d), readFile(t, raw)) {
		t.Errorf("disk %+v is not what was packed", d)
	}
	info, err := os.Stat(d.Path)
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != 107 || info.Sys().(*syscall.Stat_t).Gid != 107 {
		t.Errorf("owner of the disk: %+v, %v", info.Sys(), err)
	}
	c, err := s.Inspect(t.Context(), "team/debian")
	if err != nil || c.Verdict != nil || c.Chosen != p.File || len(c.Disks) != 1 || c.Disks[0].Allocated == 0 || c.Digest != p.Config || c.LayerSize < p.LayerSize {
		t.Errorf("inspected: %+v, %v", c, err)
	}
	again, err := Import(t.Context(), n.client, "", o)
	if err != nil || *again != *p {
		t.Errorf("the same disk again: %+v, %v, want %+v", again, err, p)
	}
	// Another disk takes the name; the old one stays for who uses it.
	o.Disk = filepath.Join(t.TempDir(), "other")
	if err := qcow2.CreateOverlay(o.Disk, 1<<20); err != nil {
		t.Fatal(err)
	}
	if other, err := Import(t.Context(), n.client, "", o); err != nil || other.Config == p.Config {
		t.Errorf("another disk: %+v, %v", other, err)
	}
	if d := findDisk(t, s, "team/debian", "c2"); d.VirtualSize != 1<<20 {
		t.Errorf("the other disk: %+v", d)
	}
	if err := s.Release(t.Context(), "c2"); err != nil {
		t.Fatal(err)
	}
	if got := n.leases(); len(got) != 2 {
		t.Errorf("%d leases, want those of c1 and its view", len(got))
	}
}

func TestImportThatFailsLeavesNothing(t *testing.T) {
	n := startContainerd(t)
	_, qcow := evenDisk(t)
	ctx, cancel := context.WithCancel(t.Context())
	o := PackOptions{Disk: qcow, Name: "x", Progress: func(stage string, done, _ int64) {
		if stage == "packing" && done > 0 {
			cancel()
		}
	}}
	if _, err := Import(ctx, n.client, "", o); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	n.collectGarbage()
	blobs := 0
	err := n.client.ContentStore().Walk(n.ctx(), func(content.Info) error { blobs++; return nil })
	if err != nil || blobs != 0 || len(n.leases()) != 0 {
		t.Errorf("left: %d blobs, leases %v, %v", blobs, n.leases(), err)
	}
	if running, err := n.client.ContentStore().ListStatuses(n.ctx()); err != nil || len(running) != 0 {
		t.Errorf("left: %v, %v", running, err)
	}
}

func TestArchive(t *testing.T) {
	n := startContainerd(t)
	raw, qcow := evenDisk(t)
	path := filepath.Join(t.TempDir(), "image.tar")
	o := PackOptions{Disk: qcow, Name: "registry.test/disks/small:2"}
	p, err := WriteArchive(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	c, err := InspectArchive(t.Context(), path, "")
	if err != nil || c.Verdict != nil || c.Name != o.Name || c.Chosen != "disk/small.qcow2" || c.Digest != p.Config || c.LayerSize != p.LayerSize {
		t.Errorf("inspected: %+v, %v", c, err)
	}
	if _, err := WriteArchive(t.Context(), path, o); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the file is there: %v, want already exists", err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	imported, err := n.client.Import(n.ctx(), f)
	if err != nil || len(imported) != 1 || imported[0].Name != o.Name {
		t.Fatalf("containerd takes %v, %v", imported, err)
	}
	s := n.store()
	t.Cleanup(func() { s.Release(n.cleanup(), "c1") })
	d := findDisk(t, s, o.Name, "c1")
	if d.Digest != p.Config.String() || !bytes.Equal(guestSees(t, d), readFile(t, raw)) {
		t.Errorf("disk %+v is not what was packed", d)
	}
	if out, err := exec.Command("tar", "-tf", path).CombinedOutput(); err != nil || !strings.Contains(string(out), "index.json") {
		t.Errorf("tar: %v %s", err, out)
	}
}

func TestFormatsThatAreConverted(t *testing.T) {
	needsRoot(t)
	raw, _ := evenDisk(t)
	want := readFile(t, raw)
	dir := t.TempDir()
	toFormat(t, raw, filepath.Join(dir, "a.vmdk"), "vmdk")
	toFormat(t, raw, filepath.Join(dir, "b.vmdk"), "vmdk", "-o", "subformat=streamOptimized")
	toFormat(t, raw, filepath.Join(dir, "c.vdi"), "vdi")
	toFormat(t, raw, filepath.Join(dir, "d.raw"), "raw")
	toFormat(t, raw, filepath.Join(dir, "e.img"), "raw")
	if err := os.Chmod(filepath.Join(dir, "c.vdi"), 0o600); err != nil { // not readable by nobody
		t.Fatal(err)
	}
	disks, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, disk := range disks {
		temp := t.TempDir()
		percent := int64(0)
		o := PackOptions{Disk: filepath.Join(dir, disk.Name()), TempDir: temp, Launcher: converter(), Progress: func(stage string, done, total int64) {
			if stage == "converting" {
				percent = done * 100 / total
			}
		}}
		f, info, err := openPackable(t.Context(), &o)
		if err != nil {
			t.Errorf("%s: %v", disk.Name(), err)
			continue
		}
		defer f.Close()
		if percent != 100 {
			t.Errorf("%s: progress ended at %d %%", disk.Name(), percent)
		}
		got := guestSees(t, &Disk{Path: fmt.Sprintf("/proc/self/fd/%d", f.Fd()), Format: "qcow2", VirtualSize: info.VirtualSize, FileSize: fileSize(t, f)})
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the converted disk is another", disk.Name())
		}
		mustBeEmpty(t, temp)
	}
}

func fileSize(t *testing.T, f *os.File) int64 {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func TestPackRefuses(t *testing.T) {
	needsRoot(t)
	raw, qcow := evenDisk(t)
	dir := t.TempDir()
	write := func(name, data string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	backed := filepath.Join(dir, "backed.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", backed).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v %s", err, out)
	}
	for _, c := range []struct {
		disk, name, arch string
		is               func(error) bool
		says             string
	}{
		{qcow, "Not A Name", "", errdefs.IsInvalidArgument, "Not A Name"},
		{qcow, "a@sha256:" + strings.Repeat("0", 64), "", errdefs.IsInvalidArgument, "digest"},
		{qcow, "a", "mips", errdefs.IsInvalidArgument, "mips"},
		{backed, "a", "", errdefs.IsInvalidArgument, "backing"},
		{write("odd.raw", "odd"), "a", "", errdefs.IsInvalidArgument, "3 bytes"},
		{write("empty.img", ""), "a", "", errdefs.IsInvalidArgument, "0 bytes"},
		{write("cut.vmdk", "KDMV"+strings.Repeat("\x00", 1020)), "a", "", errdefs.IsInvalidArgument, "qemu-img"},
		{write("a.vmdk", "# Disk DescriptorFile\n"+strings.Repeat(" ", 490)), "a", "", errdefs.IsInvalidArgument, "vmdk descriptor"},
		{write("a.qcow2.gz", "\x1f\x8b\x08"+strings.Repeat("\x00", 509)), "a", "", errdefs.IsInvalidArgument, "gzip"},
		{dir, "a", "", errdefs.IsInvalidArgument, "regular"},
		{filepath.Join(dir, "none"), "a", "", func(err error) bool { return errors.Is(err, fs.ErrNotExist) }, "none"},
	} {
		out := filepath.Join(t.TempDir(), "out.tar")
		_, err := WriteArchive(t.Context(), out, PackOptions{Disk: c.disk, Name: c.name, Architecture: c.arch, TempDir: t.TempDir(), Launcher: converter()})
		if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("disk %s, name %s: %v, want one that says %q", c.disk, c.name, err, c.says)
		}
		if there(out) {
			t.Errorf("disk %s: an archive was left", c.disk)
		}
	}
}

// TestDiskCannotNameFiles: a VMDK may name a parent and, in its descriptor, other files of the host.
func TestDiskCannotNameFiles(t *testing.T) {
	needsRoot(t)
	raw, _ := evenDisk(t)
	dir := t.TempDir()
	parent, child := filepath.Join(dir, "parent.vmdk"), filepath.Join(dir, "child.vmdk")
	toFormat(t, raw, parent, "vmdk")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", child).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v %s", err, out)
	}
	f, info, err := openPackable(t.Context(), &PackOptions{Disk: child, TempDir: dir, Launcher: converter(), Progress: func(string, int64, int64) {}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if info.Allocated != 0 {
		t.Errorf("%d bytes came from a file that the disk names", info.Allocated)
	}
}

// TestConverterIsConfined runs a shell where qemu-img would run.
func TestConverterIsConfined(t *testing.T) {
	needsRoot(t)
	const script = `id -u; id -G; ls / | tr '\n' ' '; echo
ls /etc; cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' \n'; echo
ls /proc | grep -c '^[0-9]'; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status | tr -s '\t\n' ' '; echo
ulimit -c; ulimit -n; ulimit -f
cat /usr/bin/env > /usr/bin/x || echo read-only
cat /usr/bin/env /usr/bin/env /usr/bin/env >&4 || echo too large`
	out, err := unnamed(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	job, err := json.Marshal(convertJob{Root: t.TempDir(), MaxBytes: 64 << 10, Argv: []string{"/bin/sh", "-c", script}})
	if err != nil {
		t.Fatal(err)
	}
	cmd := confined(t.Context(), converter(), job)
	cmd.ExtraFiles = []*os.File{out, out}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	got, err := cmd.Output()
	want := strings.Join([]string{
		"65534", "65534", "bin etc lib lib64 proc usr ", "ld.so.cache", "lo", "N",
		"CapEff: 0000000000000000 CapBnd: 0000000000000000 NoNewPrivs: 1 ", "0", "64", "128", "read-only", "too large", "",
	}, "\n")
	lines := strings.Split(string(got), "\n")
	if len(lines) > 6 && len(lines[5]) == 1 {
		lines[5] = "N" // the shell's own processes only
	}
	if got := strings.Join(lines, "\n"); err != nil || got != want {
		t.Errorf("confined: %v\n%s\n%s\nwant\n%s", err, got, stderr.String(), want)
	}
	if size := fileSize(t, out); size > 64<<10 {
		t.Errorf("wrote %d bytes, more than allowed", size)
	}
}

func TestInspectArchiveRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, data := range []string{"no archive", strings.Repeat("\x00", 1024)} {
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if c, err := InspectArchive(t.Context(), path, ""); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %+v, %v, want invalid argument", data[:4], c, err)
		}
	}
}
