package image

import (
	"fmt"
	"strconv"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// BenchmarkEnsure builds the root file system of an image that is unpacked, from
// nothing to a file on stable storage; and finds one that is built.
func BenchmarkEnsure(b *testing.B) {
	for name, make := range map[string]func(testing.TB) v1.Layer{"busybox": busyboxLayer, "debian": debianLayer} {
		b.Run(name, func(b *testing.B) {
			n := startContainerd(b)
			n.load(testRef, imageOf(b, "", make(b)), "overlayfs")
			s := n.store()
			var img *Image
			b.Run("build", func(b *testing.B) {
				for b.Loop() {
					img = ensure(b, s, testRef, "c1")
					b.StopTimer()
					b.ReportMetric(float64(img.Size)/(1<<20), "MiB")
					if err := removeIfThere(img.RootFS); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
			ensure(b, s, testRef, "c1")
			b.Run("cached", func(b *testing.B) {
				for b.Loop() {
					ensure(b, s, testRef, "c1")
				}
			})
		})
	}
}

// busyboxLayer is one program of 800 kB under 300 names.
func busyboxLayer(t testing.TB) v1.Layer {
	l := newLayer(t)
	l.file("bin/busybox", noise(800_000))
	for i := range 300 {
		l.link(fmt.Sprintf("bin/applet%03d", i), "bin/busybox")
	}
	return l.done()
}

// debianLayer has as many files and as many bytes as a Debian root with some
// programs: 19,000 files, 484 MB, most of them small.
func debianLayer(t testing.TB) v1.Layer {
	l := newLayer(t)
	data := noise(20 << 20)
	for i := range 19_000 {
		size := 200 + i*7919%9000
		if i%100 == 0 {
			size = 2_100_000
		}
		l.file(fmt.Sprintf("usr/%02d/%02d/file-%05d", i%40, i/40%40, i), data[i:i+size])
	}
	return l.done()
}

// BenchmarkFindDisk is what CreateContainer adds: for a machine whose image another one uses, for one whose image nobody
// uses, and for an ordinary container.
func BenchmarkFindDisk(b *testing.B) {
	n := startContainerd(b)
	n.load(diskRef, diskImage(b, files(b, "disk/a.qcow2", emptyDisk(b, 1<<40))), "overlayfs")
	n.load(testRef, imageOf(b, "", baseLayer(b)), "overlayfs")
	s := n.store()
	b.Run("shared", func(b *testing.B) {
		findDisk(b, s, diskRef, "first")
		for i := 0; b.Loop(); i++ {
			findDisk(b, s, diskRef, "c"+strconv.Itoa(i))
		}
		b.StopTimer()
		if err := s.Prune(b.Context(), nil); err != nil {
			b.Fatal(err)
		}
	})
	b.Run("alone", func(b *testing.B) {
		for b.Loop() {
			findDisk(b, s, diskRef, "c")
			if err := s.Release(b.Context(), "c"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("ordinary", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.FindDisk(b.Context(), testRef, "c"); !errdefs.IsNotFound(err) {
				b.Fatal(err)
			}
		}
	})
}
