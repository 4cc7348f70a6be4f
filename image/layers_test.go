package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// layer is a tar archive in the making.
type layer struct {
	t   testing.TB
	buf *bytes.Buffer
	w   *tar.Writer
}

func newLayer(t testing.TB) *layer {
	buf := &bytes.Buffer{}
	return &layer{t: t, buf: buf, w: tar.NewWriter(buf)}
}

func (l *layer) add(h tar.Header, data string) {
	l.t.Helper()
	if h.ModTime.IsZero() {
		h.ModTime = time.Unix(1_700_000_000+int64(len(h.Name)), 123_456_789)
	}
	h.Format = tar.FormatPAX
	h.Size = int64(len(data))
	if err := l.w.WriteHeader(&h); err != nil {
		l.t.Fatal(err)
	}
	if _, err := io.WriteString(l.w, data); err != nil {
		l.t.Fatal(err)
	}
}

func (l *layer) dir(name string) {
	l.add(tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, "")
}

func (l *layer) file(name, data string) {
	l.add(tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, data)
}

func (l *layer) link(name, target string) {
	l.add(tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target, Mode: 0o4755}, "") // of the inode
}

func (l *layer) symlink(name, target string) {
	l.add(tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, "")
}

func (l *layer) done() v1.Layer {
	l.t.Helper()
	if err := l.w.Close(); err != nil {
		l.t.Fatal(err)
	}
	data := l.buf.Bytes()
	out, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
	if err != nil {
		l.t.Fatal(err)
	}
	return out
}

// imageOf makes an image for this machine; user tells configurations apart.
func imageOf(t testing.TB, user string, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", goarch
	config.Config.User = user
	config.Config.Cmd = []string{"/bin/sh"}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return img
}

// noise returns data that does not compress and is the same in each run.
func noise(n int) string {
	r := rand.NewChaCha8([32]byte{1})
	b := make([]byte, n)
	r.Read(b)
	return string(b)
}

const (
	capNetBindService = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	// user::rwx user:1000:r-x group::r-x mask::r-x other::---
	accessACL = "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x05\x00\xe8\x03\x00\x00" +
		"\x04\x00\x05\x00\xff\xff\xff\xff" + "\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
)

// baseLayer has one of everything.
func baseLayer(t testing.TB) v1.Layer {
	l := newLayer(t)
	for _, d := range []string{"bin/", "etc/", "opaque/", "opaque/sub/", "removed/", "many/", "dev/", "becomes-file/"} {
		l.dir(d)
	}
	l.add(tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, "")
	l.file("etc/passwd", "root:x:0:0::/:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n")
	l.file("etc/group", "root:x:0:\nweb:x:1000:\n")
	l.file("etc/gone", "covered by a whiteout")
	l.file("opaque/old", "hidden by an opaque directory")
	l.file("opaque/sub/old", "hidden by an opaque directory")
	l.file("removed/file", "gone with its directory")
	l.file("becomes-file/inner", "gone")
	l.file("becomes-dir", "gone")
	l.add(tar.Header{Name: "bin/su", Typeflag: tar.TypeReg, Mode: 0o4755}, "set-uid")
	l.add(tar.Header{Name: "bin/wall", Typeflag: tar.TypeReg, Mode: 0o2755, Gid: 5}, "set-gid")
	l.add(tar.Header{Name: "bin/ping", Typeflag: tar.TypeReg, Mode: 0o755, PAXRecords: map[string]string{
		"SCHILY.xattr.security.capability": capNetBindService, "SCHILY.xattr.user.note": "hello",
	}}, "capabilities")
	l.add(tar.Header{Name: "etc/acl", Typeflag: tar.TypeReg, Mode: 0o750, PAXRecords: map[string]string{
		"SCHILY.xattr.system.posix_acl_access": accessACL,
	}}, "access list")
	l.add(tar.Header{Name: "etc/large-ids", Typeflag: tar.TypeReg, Mode: 0o600, Uid: 3_000_000_000, Gid: 70_000}, "x")
	l.add(tar.Header{Name: "etc/epoch", Typeflag: tar.TypeReg, Mode: 0o600, ModTime: time.Unix(0, 0)}, "x")
	l.file("bin/busybox", noise(300_000))
	for i := range 50 {
		l.link(fmt.Sprintf("bin/applet%02d", i), "bin/busybox")
	}
	l.file("bin/cut", "a link of this goes away in the next layer")
	l.link("bin/cut-removed", "bin/cut")
	l.link("bin/cut-kept", "bin/cut")
	l.symlink("bin/sh", "busybox")
	l.symlink("etc/absolute", "/etc/passwd")
	l.symlink("etc/escape", "../../../../../../etc/shadow")
	l.symlink("etc/loop", "loop")
	l.symlink("etc/long", "/"+strings.Repeat("x", 4000))
	l.symlink("escape-dir", "/etc")
	for _, n := range []int{0, 1, 4095, 4096, 4097, 8192, 1<<20 + 1} {
		l.file(fmt.Sprintf("etc/size-%d", n), noise(n))
	}
	l.file("etc/zeros", strings.Repeat("\x00", 1<<20))
	l.file("etc/new\nline \xff", "odd name")
	for i := range 2000 {
		l.file(fmt.Sprintf("many/a-name-of-some-length-%04d", i), fmt.Sprint(i))
	}
	l.add(tar.Header{Name: "dev/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}, "")
	l.add(tar.Header{Name: "dev/large", Typeflag: tar.TypeBlock, Mode: 0o660, Devmajor: 259, Devminor: 70_000}, "")
	l.add(tar.Header{Name: "dev/fifo", Typeflag: tar.TypeFifo, Mode: 0o640}, "")
	l.file(strings.Repeat("deep/", 200)+"file", "deep")
	return l.done()
}

// upperLayer changes what baseLayer has.
func upperLayer(t testing.TB) v1.Layer {
	l := newLayer(t)
	l.dir("etc/")
	l.file("etc/.wh.gone", "")
	l.file(".wh.removed", "")
	l.dir("opaque/")
	l.file("opaque/.wh..wh..opq", "")
	l.file("opaque/new", "only this is seen")
	l.file(".wh.becomes-file", "")
	l.file("becomes-file", "now a file")
	l.file(".wh.becomes-dir", "")
	l.dir("becomes-dir/")
	l.file("becomes-dir/inner", "now a directory")
	l.file("bin/.wh.cut-removed", "")
	l.add(tar.Header{Name: "bin/su", Typeflag: tar.TypeReg, Mode: 0o4755}, "set-uid, changed")
	l.link("bin/late-link", "bin/su")
	l.file("etc/group", "root:x:0:\nweb:x:1000:\nlate:x:2000:\n")
	return l.done()
}

// longNameLayer has the longest name there can be; mkfs.erofs 1.5, which
// containerd's erofs snapshotter runs, fails on it.
func longNameLayer(t testing.TB) v1.Layer {
	l := newLayer(t)
	l.file("etc/"+strings.Repeat("n", 255), "long name")
	return l.done()
}
