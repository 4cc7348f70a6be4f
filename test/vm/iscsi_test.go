package vm_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vmruntime/vmruntime/test/images"
	"github.com/vmruntime/vmruntime/test/tools"
)

const (
	iscsiPortal = "127.0.0.1:13260"
	iscsiName   = "iqn.2024-01.test.vmruntime:disk"
)

// iscsiTarget serves a file as LUN 1 by Debian's tgt, on the loopback of the node's network, with a control socket of its own.
func (b *bed) iscsiTarget(ctx context.Context, t *testing.T, file string) {
	t.Helper()
	dir, err := tools.Debs("tgt", "libaio1", "libibverbs1", "librdmacm1", "libnl-3-200", "libnl-route-3-200")
	if err != nil {
		t.Skipf("needs Debian's tgt: %v", err)
	}
	libs, err := filepath.Glob(filepath.Join(dir, "usr/lib/*-linux-gnu"))
	if err != nil || len(libs) != 1 {
		t.Fatalf("the packages have the library directories %v, %v; want one", libs, err)
	}
	root, err := filepath.Glob(filepath.Join(dir, "lib/*-linux-gnu"))
	if err != nil {
		t.Fatal(err)
	}
	path := "LD_LIBRARY_PATH=" + libs[0]
	for _, r := range root {
		path += ":" + r
	}
	env := append(os.Environ(), path, "TGT_IPC_SOCKET="+filepath.Join(t.TempDir(), "tgt"))
	command := func(name string, args ...string) *exec.Cmd {
		cmd := b.Command(ctx, filepath.Join(dir, "usr/sbin", name), args...)
		cmd.Env = env
		return cmd
	}
	started(t, command("tgtd", "--foreground", "--iscsi", "portal="+iscsiPortal))
	until(ctx, t, "the iSCSI target answers", func() bool {
		return command("tgtadm", "--lld", "iscsi", "--mode", "target", "--op", "show").Run() == nil
	})
	for _, args := range [][]string{
		{"--mode", "target", "--op", "new", "--tid", "1", "--targetname", iscsiName},
		{"--mode", "logicalunit", "--op", "new", "--tid", "1", "--lun", "1", "--backing-store", file},
		{"--mode", "target", "--op", "bind", "--tid", "1", "--initiator-address", "ALL"},
	} {
		if out, err := command("tgtadm", append([]string{"--lld", "iscsi"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("tgtadm %v: %v, %s", args, err, out)
		}
	}
}

// What the node attaches by iSCSI is a disk of the machine as any block volume. The initiator is QEMU's, for it needs no driver in the
// kernel of whoever runs the tests.
func TestMachineISCSI(t *testing.T) {
	ctx, b := use(t)
	if found, err := filepath.Glob("/usr/lib/*-linux-gnu/qemu/block-iscsi.so"); err != nil || len(found) == 0 {
		t.Skip("needs QEMU's iSCSI initiator, of Debian's qemu-block-extra")
	}
	const size = 64 << 20
	file := backing(t, size)
	b.iscsiTarget(ctx, t, file)
	disk := loop(t, exported(ctx, t, b.Command, "--blockdev",
		"driver=iscsi,node-name=disk,transport=tcp,portal="+iscsiPortal+",target="+iscsiName+",lun=1,initiator-name=iqn.2024-01.test.vmruntime:node"))
	p := b.machinePod(ctx, t, images.Tiny)
	c := p.start(volumes(0, disk, "/dev/data")).up(1)
	c.says("blocks | cut -d ' ' -f 1-3", fmt.Sprintf("disk=vdb sectors=%d mode=rw", size/512))
	const mib = 1 << 20
	sum := c.sh("dd if=/dev/urandom of=/run/random bs=1M count=4 2>/dev/null; dd if=/run/random of=/dev/vdb bs=1M seek=7 conv=fsync 2>/dev/null; sha256sum </run/random")
	got := make([]byte, 4*mib)
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(got, 7*mib); err != nil {
		t.Fatal(err)
	}
	if want := sha256Sum(got); !bytes.HasPrefix([]byte(sum), []byte(want)) {
		t.Errorf("the target has a sum of %s, the guest wrote %s", want, sum)
	}
	c.stop(30)
	again := p.start(volumes(1, disk, "/dev/data")).up(1)
	again.expect("dd if=/dev/vdb bs=1M skip=7 count=4 2>/dev/null | sha256sum", sha256Sum(got)+"  -")
}

func sha256Sum(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }
