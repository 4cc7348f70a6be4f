package seed

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func writeISO(t *testing.T, in Input) (s *Seed, path string) {
	t.Helper()
	s, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "seed.iso")
	if err := s.WriteISO(path); err != nil {
		t.Fatal(err)
	}
	return s, path
}

func TestISO(t *testing.T) {
	for d, label := range map[Datasource]string{NoCloud: "cidata", ConfigDrive: "config-2"} {
		t.Run(string(d), func(t *testing.T) {
			s, path := writeISO(t, full(d))
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if info.Mode() != 0o600 || info.Size()%sector != 0 {
				t.Errorf("mode %v, size %d, want 0600 and whole sectors", info.Mode(), info.Size())
			}
			image, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.TrimRight(string(image[16*sector+40:16*sector+72]), " "); got != label {
				t.Errorf("label %q, want %q", got, label)
			}
			if diff := cmp.Diff(s.Files, readJoliet(t, image)); diff != "" {
				t.Error(diff)
			}
			left, err := os.ReadDir(filepath.Dir(path))
			if err != nil || len(left) != 1 {
				t.Errorf("beside the disk lie %v, %v", left, err)
			}
		})
	}
}

// readJoliet reads as Linux does: from the root in the supplementary volume descriptor by directory records alone. It is written from ECMA-119, since the library does not
// read what lies below a second directory.
func readJoliet(t *testing.T, image []byte) map[string][]byte {
	t.Helper()
	descriptor := image[17*sector:]
	if descriptor[0] != 2 || string(descriptor[88:91]) != "%/E" {
		t.Fatalf("sector 17 is no Joliet descriptor: %q", descriptor[:100])
	}
	for _, d := range [][]byte{image[16*sector:], descriptor} {
		if made := string(d[813:829]); made != "2000010100000000" {
			t.Errorf("made at %q, want a time that is always the same", made)
		}
	}
	files := map[string][]byte{}
	var walk func(dir string, record []byte)
	walk = func(dir string, record []byte) {
		extent := func(r []byte) []byte {
			at := int(binary.LittleEndian.Uint32(r[2:])) * sector
			return image[at : at+int(binary.LittleEndian.Uint32(r[10:]))]
		}
		for list := extent(record); len(list) > 0 && list[0] != 0; list = list[list[0]:] {
			if list[18] != 100 {
				t.Errorf("a record of the year %d, want 2000", 1900+int(list[18]))
			}
			name := list[33 : 33+list[32]]
			if len(name) == 1 {
				continue // the directory itself and its parent
			}
			var text []uint16
			for ; len(name) > 0; name = name[2:] {
				text = append(text, binary.BigEndian.Uint16(name))
			}
			path := dir + string(utf16.Decode(text))
			if list[25]&2 != 0 {
				walk(path+"/", list)
			} else {
				files[path] = bytes.Clone(extent(list))
			}
		}
	}
	walk("", descriptor[156:])
	return files
}

// The kernel reads what was written.
func TestISOMount(t *testing.T) {
	if testing.Short() || os.Getuid() != 0 {
		t.Skip("needs root, to mount: run by make test")
	}
	if known, err := os.ReadFile("/proc/filesystems"); err != nil || !strings.Contains(string(known), "iso9660") {
		t.Skip("needs a kernel with iso9660 (modprobe isofs)")
	}
	for _, d := range []Datasource{NoCloud, ConfigDrive} {
		s, path := writeISO(t, full(d))
		dir := t.TempDir()
		if out, err := exec.Command("mount", "-o", "loop,ro", path, dir).CombinedOutput(); err != nil {
			t.Fatalf("mount: %v: %s", err, out)
		}
		defer exec.Command("umount", dir).Run()
		for name, want := range s.Files {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
			}
		}
	}
}

// The same input gives the same bytes, also over a file that is there.
func TestISODeterministic(t *testing.T) {
	s, first := writeISO(t, full(NoCloud))
	_, second := writeISO(t, full(NoCloud))
	if err := s.WriteISO(second); err != nil {
		t.Fatal(err)
	}
	a, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(second)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Errorf("%d and %d bytes, which differ", len(a), len(b))
	}
}

// What a guest does with the disk before it mounts it: blkid tells type and label.
func TestISOLabel(t *testing.T) {
	blkid, err := exec.LookPath("blkid")
	if err != nil {
		t.Skip("needs blkid (package util-linux)")
	}
	for d, label := range map[Datasource]string{NoCloud: "cidata", ConfigDrive: "config-2"} {
		_, path := writeISO(t, minimal(d))
		out, err := exec.Command(blkid, "-p", "-o", "export", path).CombinedOutput()
		if err != nil {
			t.Fatalf("blkid: %v: %s", err, out)
		}
		for _, want := range []string{"TYPE=iso9660\n", "LABEL=" + label + "\n"} {
			if !strings.Contains(string(out), want) {
				t.Errorf("%s: blkid lacks %q:\n%s", d, want, out)
			}
		}
	}
}

// Another reader of Joliet than the library that wrote it.
func TestISOOthers(t *testing.T) {
	isoinfo, err := exec.LookPath("isoinfo")
	if err != nil {
		t.Skip("needs isoinfo (package genisoimage)")
	}
	s, path := writeISO(t, full(ConfigDrive))
	for name, want := range s.Files {
		got, err := exec.Command(isoinfo, "-J", "-i", path, "-x", "/"+name).Output()
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: isoinfo reads %d bytes, %v; want %d", name, len(got), err, len(want))
		}
	}
}

func TestISOErrors(t *testing.T) {
	ignition, err := Build(minimal(Ignition))
	if err != nil {
		t.Fatal(err)
	}
	if err := ignition.WriteISO(filepath.Join(t.TempDir(), "x")); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("an ISO for Ignition: %v", err)
	}
	cloud, err := Build(minimal(NoCloud))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "missing", "x")
	if err := cloud.WriteISO(path); err == nil {
		t.Error("an ISO in a directory that is not there: no error")
	}
}
