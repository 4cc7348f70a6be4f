package qcow2

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestDetectFormat(t *testing.T) {
	zeros := make([]byte, 1024)
	begin := func(s string, at int) []byte {
		b := make([]byte, 1024)
		copy(b[at:], s)
		return b
	}
	for _, c := range []struct {
		name string
		data []byte
		want string // a format, or part of the refusal
	}{
		{"disk.img", begin(magic, 0), "qcow2"},
		{"/snapshots/1:2/disk/disk.qcow2", begin(magic, 0), "qcow2"},
		{"disk", zeros, "raw"},
		{"disk.img", zeros, "raw"},
		{"disk.raw", begin("\x55\xaa", 510), "raw"},
		{"image.iso", zeros, "raw"},
		{"disk.raw", begin(magic, 0), "is named .raw and begins like a qcow2 image"},
		{"disk.qcow2", zeros, "is named .qcow2 and begins with"},
		{"DISK.QCOW2", zeros, "is named .qcow2 and begins with"},
		{"disk.qcow2", nil, "is named .qcow2"},
		{"disk.vmdk", zeros, "is named .vmdk"},
		{"disk.img", nil, "has 0 bytes"},
		{"disk.img", zeros[:1000], "has 1000 bytes, want a multiple of 512"},
		{"disk.img", zeros[:1], "has 1 bytes"},
		{"json:{}", zeros, "has a colon"},
		{"nbd:host:10809", zeros, "has a colon"},
		{"a\nb", zeros, "cannot be printed, at 1"},
		{"disk.img", begin("KDMV", 0), "like a vmdk file"},
		{"disk.img", begin("# Disk DescriptorFile", 0), "like a vmdk descriptor file"},
		{"disk.img", begin("\x7f\x10\xda\xbe", 64), "like a vdi file"},
		{"disk.img", begin("LUKS\xba\xbe", 0), "like a luks file"},
		{"disk.img", begin("\x1f\x8b\x08", 0), "like a gzip file"},
		{"disk.img", begin("ustar", 257), "like a tar file"},
	} {
		got, err := DetectFormat(bytes.NewReader(c.data), int64(len(c.data)), c.name)
		if c.want == "qcow2" || c.want == "raw" {
			if got != c.want || err != nil {
				t.Errorf("%s: %q, %v, want %s", c.name, got, err, c.want)
			}
			continue
		}
		if got != "" || !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q, %v, want a refusal with %q", c.name, got, err, c.want)
		}
	}
	if _, err := DetectFormat(failing{}, 1024, "disk"); !errors.Is(err, errDisk) || errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("of a broken disk: %v", err)
	}
}

// What qemu-img makes in other formats is not taken for raw.
func TestDetectFormatOfQEMUs(t *testing.T) {
	needTools(t, "qemu-img")
	for _, c := range []struct{ format, options string }{
		{"vmdk", ""},
		{"vmdk", "subformat=streamOptimized"},
		{"vmdk", "subformat=monolithicFlat"},
		{"vdi", ""},
		{"vhdx", ""},
		{"vpc", ""},
		{"qed", ""},
		{"parallels", ""},
		{"qcow", ""},
		{"qcow2", ""},
		{"luks", "key-secret=s,iter-time=10"},
	} {
		path := filepath.Join(t.TempDir(), "disk.img")
		args := []string{"--object", "secret,id=s,data=x", "-f", c.format}
		if c.options != "" {
			args = append(args, "-o", c.options)
		}
		if !createOther(t, append(args, path, "1M")...) {
			continue
		}
		f, size := openImage(t, path)
		format, err := DetectFormat(f, size, path)
		switch c.format {
		case "qcow2":
			if format != "qcow2" || err != nil {
				t.Errorf("qcow2 is %q, %v", format, err)
			}
		case "qcow": // version 1 has the same magic
			if _, err := Check(f, size, Limits{}); format != "qcow2" || err == nil || !strings.Contains(err.Error(), "version is 1") {
				t.Errorf("qcow is %q, %v", format, err)
			}
		default:
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "begins like a") {
				t.Errorf("%s %s is %q, %v", c.format, c.options, format, err)
			}
		}
	}
}
