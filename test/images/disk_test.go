package images

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// guest is a QEMU with nothing of ours around it, whose serial console is its standard input and output.
type guest struct {
	t     *testing.T
	in    io.WriteCloser
	stop  func()
	begun time.Time

	mu   sync.Mutex
	more *sync.Cond
	out  bytes.Buffer
	done bool
}

// needVM skips where no test disk can boot.
func needVM(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a VM: run by make test")
	}
	if arch() != "amd64" {
		t.Skip("test disks are made on amd64 only")
	}
	if os.Geteuid() != 0 {
		t.Skip("making a disk needs root")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64, which test/tools/install-deps.sh installs")
	}
}

func testDisk(t *testing.T, name string) string {
	t.Helper()
	path, err := Disk(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// overlay is a new disk in front of one that stays as it is.
func overlay(t *testing.T, base string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "overlay.qcow2")
	cmd := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, name)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return name
}

// firmware gives the arguments for a way to boot.
func firmware(t *testing.T, kind string) []string {
	t.Helper()
	const dir = "/usr/share/OVMF/"
	code, vars := map[string]string{"efi": "OVMF_CODE_4M.fd", "secure": "OVMF_CODE_4M.ms.fd"}[kind], map[string]string{"efi": "OVMF_VARS_4M.fd", "secure": "OVMF_VARS_4M.ms.fd"}[kind]
	if code == "" {
		return nil
	}
	data, err := os.ReadFile(dir + vars)
	if err != nil {
		t.Skipf("needs Debian's ovmf: %v", err)
	}
	own := filepath.Join(t.TempDir(), "vars.fd")
	if err := os.WriteFile(own, data, 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + dir + code, "-drive", "if=pflash,unit=1,format=raw,file=" + own}
	if kind == "secure" {
		args = append(args, "-global", "driver=cfi.pflash01,property=secure,value=on", "-machine", "smm=on")
	}
	return args
}

// boot starts a guest that ends with the test.
func boot(t *testing.T, args ...string) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	args = append([]string{"-M", "q35", "-accel", "tcg,thread=multi", "-smp", "2", "-m", "512", "-nodefaults", "-display", "none", "-vga", "none", "-serial", "stdio"}, args...)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	g := &guest{t: t, stop: cancel, begun: time.Now()}
	g.more = sync.NewCond(&g.mu)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	g.in, cmd.Stdout, cmd.Stderr = in, g, g
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // tests ask what it printed
		g.mu.Lock()
		defer g.mu.Unlock()
		g.done = true
		g.more.Broadcast()
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		if t.Failed() {
			t.Logf("the console:\n%s", g.out.Bytes())
		}
	})
	return g
}

// Write takes what the guest prints.
func (g *guest) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.out.Write(bytes.ReplaceAll(p, []byte("\r"), nil))
	g.more.Broadcast()
	return len(p), nil
}

// patience bounds every wait for the guest.
const patience = 2 * time.Minute

// until waits for a text after what was waited for before, and gives what came until then.
func (g *guest) until(text string) string {
	g.t.Helper()
	late := time.AfterFunc(patience, g.stop)
	defer late.Stop()
	g.mu.Lock()
	defer g.mu.Unlock()
	for {
		if i := bytes.Index(g.out.Bytes(), []byte(text)); i >= 0 {
			return string(g.out.Next(i + len(text)))
		}
		if g.done {
			g.t.Fatalf("the guest ended without %q", text)
		}
		g.more.Wait()
	}
}

// end waits for the end of QEMU.
func (g *guest) end() {
	late := time.AfterFunc(patience, g.stop)
	defer late.Stop()
	g.mu.Lock()
	defer g.mu.Unlock()
	for !g.done {
		g.more.Wait()
	}
}

const prompt = "tiny# "

// sh runs a command in the tiny system, at its prompt.
func (g *guest) sh(command string) string {
	g.t.Helper()
	if _, err := fmt.Fprintln(g.in, command); err != nil {
		g.t.Fatal(err)
	}
	g.until("\n")
	return strings.TrimSuffix(g.until(prompt), prompt)
}

func (g *guest) took(what string) {
	g.t.Helper()
	g.t.Logf("%s after %s", what, time.Since(g.begun).Round(10*time.Millisecond))
}

func wantLines(t *testing.T, output string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !strings.Contains("\n"+output, "\n"+line) {
			t.Errorf("no line begins with %q in\n%s", line, output)
		}
	}
}

// Other firmware, panics, kernels without a disk, and Debian, boot in test/vm, as machines.
func TestTinyBoots(t *testing.T) {
	needVM(t)
	for _, c := range []struct {
		firmware string
		want     []string
	}{
		{"secure", []string{"firmware=efi", "secureboot=on"}},
	} {
		t.Run(c.firmware, func(t *testing.T) {
			disk := overlay(t, testDisk(t, TinyDisk))
			g := boot(t, append(firmware(t, c.firmware), "-drive", "if=none,id=d,format=qcow2,file="+disk, "-device", "virtio-blk-pci,drive=d,serial=root")...)
			g.until("Linux version")
			g.took("the kernel's first line")
			g.until("tiny: up boot=1 root=/dev/vda1")
			g.until(prompt)
			g.took("the prompt")
			wantLines(t, g.sh("info"), append(c.want, "boots=1", "cpus=2", "disk=vda sectors=")...)
			g.sh("echo kept >/kept; sync; reboot")
			g.until("tiny: up boot=2")
			g.until(prompt)
			wantLines(t, g.sh("cat /kept"), "kept")
			if _, err := fmt.Fprintln(g.in, "poweroff"); err != nil {
				t.Fatal(err)
			}
			g.end()
		})
	}
}

// monitor speaks to QEMU over QMP.
type monitor struct {
	t    *testing.T
	conn net.Conn
	from *bufio.Scanner
}

func dialMonitor(t *testing.T, socket string) *monitor {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(5 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	m := &monitor{t: t, conn: conn, from: bufio.NewScanner(conn)}
	m.until("QMP")
	m.command("qmp_capabilities")
	return m
}

func (m *monitor) command(name string) {
	m.t.Helper()
	if _, err := fmt.Fprintf(m.conn, "{\"execute\": %q}\n", name); err != nil {
		m.t.Fatal(err)
	}
	m.until("\"return\"")
}

// until reads lines up to one with the text.
func (m *monitor) until(text string) {
	m.t.Helper()
	for m.from.Scan() {
		if strings.Contains(m.from.Text(), text) {
			return
		}
	}
	m.t.Fatalf("QEMU says nothing of %q: %v", text, m.from.Err())
}

func drive(id, file, format string) []string {
	return []string{"-drive", fmt.Sprintf("if=none,id=%s,format=%s,file=%s", id, format, file), "-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s", id, id)}
}

// What the tests of machines ask of the tiny system, with QEMU's own network.
func TestTinyBehaves(t *testing.T) {
	needVM(t)
	socket := filepath.Join(t.TempDir(), "qmp")
	args := append(drive("root", overlay(t, testDisk(t, TinyDisk)), "qcow2"), "-qmp", "unix:"+socket+",server=on,wait=off",
		"-uuid", "11111111-2222-4333-8444-555555555555", "-smbios", "type=1,serial=pod-7", "-no-shutdown",
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:07",
		"-device", "pvpanic-pci", "-device", "i6300esb", "-action", "watchdog=none", "-device", "virtio-balloon-pci", "-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci", "-chardev", "null,id=q", "-device", "virtserialport,chardev=q,name=org.qemu.guest_agent.0")
	g := boot(t, args...)
	g.until(prompt)
	m := dialMonitor(t, socket)
	g.sh("until [ -e /run/late ]; do sleep 0.2; done")
	wantLines(t, g.sh("info"), "uuid=11111111-2222-4333-8444-555555555555", "serial=pod-7", "port=org.qemu.guest_agent.0",
		"module=virtio_balloon", "module=virtio_rng", "module=pvpanic_pci", "disk=vda sectors=", "cmdline=BOOT_IMAGE=/vmlinuz "+tinyCmdline)
	wantLines(t, g.sh("net 4"), "link=eth0 mac=52:54:00:00:00:07 mtu=1500", "addr=eth0 10.0.2.15/24", "route=default via 10.0.2.2", "resolv=nameserver 10.0.2.3")
	wantLines(t, g.sh("net"), "addr=eth0 10.0.2.15/24", "addr=eth0 fec0::", "route6=default via fe80::2", "resolv=nameserver 10.0.2.3")
	wantLines(t, g.sh("serve"), "serving 8080 8081")
	wantLines(t, g.sh("wget -q -O - http://127.0.0.1:8081/"), "tiny")
	wantLines(t, g.sh("flood 3"), "flood 000000000001 0123", "flood 000000000003 end")
	wantLines(t, g.sh("pidof qemu-ga >/dev/null && echo agent runs"), "agent runs")
	wantLines(t, g.sh("starve"), "watchdog armed")
	m.until("WATCHDOG")
	m.command("system_powerdown")
	g.until("tiny: power button")
	m.until("SHUTDOWN")
}
