package network

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
)

// TestRealMachine boots a real kernel on the pod's tap, which learns its network by itself, and again after a reset.
func TestRealMachine(t *testing.T) {
	n := newNode(t)
	out := filepath.Join("..", "out", "guest")
	for _, file := range []string{"kernel", "initramfs"} {
		if _, err := os.Stat(filepath.Join(out, file)); err != nil {
			t.Skipf("needs the guest of make guest: %v", err)
		}
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64")
	}
	busybox := staticBusybox(t)
	n.network(dualStack)
	a := n.setup(request("real"))
	defer respond(t, n, a, machineOptions).Close()
	capture := captureFrom(t, a)
	defer func() { checkNoLeak(t, capture()) }()
	lines := bootMachine(t, n, a, out, realInit(t, busybox, beyond(t, "10.55.0.1"), beyond(t, "fd55::1")))
	want := "told 10.99.0.2/24 router 10.99.0.1 dns 10.96.0.10 host web-0 mtu 1400 mac " + a.Interfaces[0].MAC +
		" router6 fe80::766d:7200:0:1 mtu6 1400 4 hello 6 hello"
	for boot := range 2 { // the machine resets itself at its end
		if got := toldBy(lines); got != want {
			t.Fatalf("boot %d: the machine was %q; want %q", boot, got, want)
		}
	}
}

func staticBusybox(t *testing.T) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(os.Getenv(busyboxEnv), "bin", "busybox"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// realInit is a program for the initramfs that prints what the machine was told and heard, and resets it.
func realInit(t *testing.T, busybox []byte, server4, server6 string) []byte {
	t.Helper()
	address := func(hostPort string) string {
		host, port, _ := net.SplitHostPort(hostPort)
		return host + " " + port
	}
	script := `#!/busybox sh
/busybox mkdir -p /proc /sys
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sys /sys
for m in $(/busybox cat /etc/vmagent/modules.json | /busybox tr -d '\n ' | /busybox sed 's/.*"boot":\[\([^]]*\)\].*/\1/' | /busybox tr -d '"' | /busybox tr , ' '); do
	/busybox insmod /lib/modules/$m
done
/busybox ip link set lo up
/busybox ip link set eth0 up
/busybox udhcpc -i eth0 -f -q -n -s /told -O mtu
until /busybox ip -6 route | /busybox grep -q ^default; do /busybox usleep 20000; done
/busybox ip -6 addr add fd99::2/128 dev eth0
until [ "$h4" ]; do h4=$(/busybox nc -w 5 ` + address(server4) + `); done
until [ "$h6" ]; do h6=$(/busybox nc -w 5 ` + address(server6) + `); done
set -- $(/busybox ip -6 route | /busybox grep ^default)
echo "TOLD $(/busybox cat /told.out) mac $(/busybox cat /sys/class/net/eth0/address) router6 $3 mtu6 $(/busybox cat /proc/sys/net/ipv6/conf/eth0/mtu) 4 $h4 6 $h6 END"
/busybox reboot -f
`
	told := `#!/busybox sh
[ $1 = bound ] || exit 0
echo "$ip/$mask router $router dns $dns host $hostname mtu $mtu" >/told.out
/busybox ip link set eth0 mtu $mtu
/busybox ip addr add $ip/$mask dev eth0
/busybox ip route add default via $router
`
	var archive bytes.Buffer
	w := cpio.Newc.Writer(&archive)
	for name, text := range map[string]string{"busybox": string(busybox), "test-init": script, "told": told} {
		if err := w.WriteRecord(cpio.StaticFile(name, text, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	return archive.Bytes()
}

// bootMachine runs QEMU on the pod's first tap until the test ends, and gives its console's lines.
func bootMachine(t *testing.T, n *node, a *Attachment, guest string, archive []byte) <-chan string {
	t.Helper()
	base, err := os.ReadFile(filepath.Join(guest, "initramfs"))
	if err != nil {
		t.Fatal(err)
	}
	initrd := filepath.Join(n.dir, "initrd") // compressed archives may only be at the end
	if err := os.WriteFile(initrd, append(archive, base...), 0o644); err != nil {
		t.Fatal(err)
	}
	manifest, err := os.ReadFile(filepath.Join(guest, "manifest.json"))
	var m struct{ Arch, Cmdline string }
	if err == nil {
		err = json.Unmarshal(manifest, &m)
	}
	if err != nil {
		t.Fatal(err)
	}
	if m.Arch != "x86_64" {
		t.Skipf("needs a guest of x86_64, not %s", m.Arch)
	}
	taps, err := n.OpenTaps(a)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35",
		"-accel", "tcg", "-cpu", "max", "-m", "512", "-kernel", filepath.Join(guest, "kernel"), "-initrd", initrd,
		"-append", m.Cmdline+" rdinit=/test-init", "-serial", "stdio", "-netdev", "tap,id=net0,fd=3",
		"-device", fmt.Sprintf("virtio-net-pci,netdev=net0,mac=%s,romfile=", a.Interfaces[0].MAC))
	cmd.ExtraFiles, cmd.Stderr = taps, os.Stderr
	console, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	taps[0].Close()
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	lines := make(chan string, 4096)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(console); s.Scan(); {
			lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		cancel()
		for range lines { // until the console's reader has ended
		}
		_ = cmd.Wait()
	})
	return lines
}

// toldBy gives what the machine's program prints, or the whole console when that does not come.
func toldBy(lines <-chan string) string {
	var all []string
	for line := range lines {
		if _, text, ok := strings.Cut(line, "TOLD "); ok {
			text, _, _ = strings.Cut(text, " END")
			return "told " + text
		}
		all = append(all, line)
		if strings.Contains(line, "Kernel panic") {
			break
		}
	}
	return "silent; the console has\n" + strings.Join(all, "\n")
}
