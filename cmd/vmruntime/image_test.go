package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/image"
	"github.com/vmruntime/vmruntime/image/qcow2"
)

func TestImportAndInspectArchive(t *testing.T) {
	dir := t.TempDir()
	disk, archive := filepath.Join(dir, "small.qcow2"), filepath.Join(dir, "small.tar")
	if err := qcow2.CreateOverlay(disk, 1<<30); err != nil {
		t.Fatal(err)
	}
	out, errout := runCommand(t, "image", "import", disk, "team/small:1", "--output", archive, "--arch", "arm64")
	if !strings.Contains(out, "docker.io/team/small:1\n") || !strings.Contains(out, "/disk/small.qcow2, 1.0 GiB (1073741824 bytes)") {
		t.Errorf("import says\n%s", out)
	}
	if errout != "checking\npacking\n" {
		t.Errorf("progress %q", errout)
	}
	out, _ = runCommand(t, "image", "inspect", archive)
	for _, line := range []string{
		"is           a machine that boots /disk/small.qcow2\n", "platform     linux/arm64\n",
		"disk         /disk/small.qcow2\n", "  format     qcow2\n", "  check      ok\n",
	} {
		if !strings.Contains(out, line) {
			t.Errorf("inspect lacks %q:\n%s", line, out)
		}
	}
	if got, err := exec.Command("tar", "-tf", archive).Output(); err != nil || !strings.HasPrefix(string(got), "blobs/sha256/") {
		t.Errorf("archive: %v\n%s", err, got)
	}
}

func runCommand(t *testing.T, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, errout strings.Builder
	cmd := command()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&errout)
	if err := cmd.ExecuteContext(t.Context()); err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out.String(), errout.String()
}

func TestPrintContents(t *testing.T) {
	for verdict, c := range map[string]*image.Contents{
		"an ordinary image: no disk: not found":    {Verdict: fmt.Errorf("no disk: %w", errdefs.ErrNotFound)},
		"refused: 2 disks: invalid argument":       {Verdict: fmt.Errorf("2 disks: %w", errdefs.ErrInvalidArgument)},
		"a machine that boots /disk/a.raw":         {Chosen: "disk/a.raw"},
		"check      refused: a backing file":       {Disks: []image.FoundDisk{{Name: "disk/a.qcow2", Refused: "a backing file"}}},
		"1.5 KiB (1536 bytes), allocated 12 bytes": {Disks: []image.FoundDisk{{Name: "a.raw", Format: "raw", VirtualSize: 1536, Allocated: 12}}},
		"kernel or initrd  /boot/vmlinuz":          {Kernels: []string{"boot/vmlinuz"}},
	} {
		var b strings.Builder
		if err := printContents(&b, c); err != nil || !strings.Contains(b.String(), verdict) {
			t.Errorf("%v, lacks %q:\n%s", err, verdict, b.String())
		}
	}
}
