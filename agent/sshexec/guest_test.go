package sshexec

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"go.uber.org/goleak"

	"github.com/vmruntime/vmruntime/test/tools"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testGuest is Debian's sshd in network, mount and PID namespaces of its own.
type testGuest struct {
	keys *Keys
	dir  string
	cmd  *exec.Cmd
}

const (
	passwd = `root:*:0:0::/run/home/root:/bin/sh
sshd:*:100:65534::/run/sshd:/usr/sbin/nologin
noisy:*:1001:1001::/run/home/noisy:/bin/bash
nologin:*:1002:1002::/run/home/nologin:/usr/sbin/nologin
closed:*:1003:1003::/run/home/closed:/bin/sh
nobody:*:65534:65534::/nonexistent:/usr/sbin/nologin
`
	config = `Port 22
HostKey /run/hostkey
AuthorizedKeysFile /run/keys
StrictModes no
UsePAM no
PidFile none
PasswordAuthentication no
MaxStartups 100
Match User closed
	AllowTcpForwarding no
	PermitTTY no
`
	setup = `set -e
ip link set lo up
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /run/sshd /run/home/root /run/home/noisy /run/home/nologin /run/home/closed
for f in passwd shadow; do mount --bind $1/$f /etc/$f; done
cp $1/hostkey $1/keys /run
chmod 600 /run/hostkey
printf 'echo noise from .bashrc; echo more noise >&2\n' >/run/home/noisy/.bashrc
$2 -D -e -f $1/config -E $1/log & wait
`
)

func newGuest(t *testing.T) *testGuest {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root and Debian's openssh-server: run by make test")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root for namespaces")
	}
	root, err := tools.Debs("openssh-server")
	if err != nil {
		t.Skipf("needs Debian's openssh-server: %v", err)
	}
	program := filepath.Join(root, "usr/sbin/sshd")
	if out, err := exec.Command("ldd", program).CombinedOutput(); err != nil || bytes.Contains(out, []byte("not found")) {
		t.Skipf("needs the libraries of openssh-server: %v, %s", err, out)
	}
	g := &testGuest{}
	if g.keys, err = NewKeys("pod-1"); err != nil {
		t.Fatal(err)
	}
	if g.dir, err = os.MkdirTemp("/var/tmp", "vmruntime-ssh-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(g.dir) })
	shadow := ""
	for line := range strings.Lines(passwd) {
		shadow += strings.Split(line, ":")[0] + ":*:19000:0:99999:7:::\n"
	}
	for name, data := range map[string]string{
		"passwd": passwd, "shadow": shadow, "config": config, "hostkey": g.keys.HostPrivateKey, "keys": g.keys.AuthorizedKey + "\n",
	} {
		if err := os.WriteFile(filepath.Join(g.dir, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	g.cmd = exec.Command("unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child", "/bin/sh", "-c", setup, "sh", g.dir, program)
	g.cmd.Stderr = os.Stderr
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.halt)
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(g.dir, "log")); err == nil && t.Failed() {
			t.Logf("sshd: %s", log)
		}
	})
	return g
}

func (g *testGuest) halt() {
	if g.cmd != nil {
		_ = g.cmd.Process.Kill()
		_ = g.cmd.Wait()
		g.cmd = nil
	}
}

// pid is that of the first process in the guest's namespaces.
func (g *testGuest) pid() (string, error) {
	list, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", g.cmd.Process.Pid))
	if err != nil || len(bytes.Fields(list)) == 0 {
		return "", fmt.Errorf("the guest does not run: %w", err)
	}
	return string(bytes.Fields(list)[0]), nil
}

// within runs f in the guest's network namespace.
func (g *testGuest) within(f func() error) error {
	pid, err := g.pid()
	if err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		done <- func() error {
			// Not unlocked: the thread ends with the goroutine.
			runtime.LockOSThread()
			ns, err := netns.GetFromPath(filepath.Join("/proc", pid, "ns/net"))
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := netns.Set(ns); err != nil {
				return err
			}
			return f()
		}()
	}()
	return <-done
}

func (g *testGuest) dialNet(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = g.within(func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

func (g *testGuest) options(user string) Options {
	return Options{
		Addresses: []string{"127.0.0.2"}, User: user, PrivateKey: g.keys.PrivateKey,
		HostKey: HostKey{Expected: g.keys.HostPublicKey}, Dial: g.dialNet,
	}
}

func (g *testGuest) dial(t *testing.T, user string) *Client {
	t.Helper()
	c, err := Dial(deadline(t, time.Minute), g.options(user))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

// processes are the command lines of the guest's living processes that contain text.
func (g *testGuest) processes(t *testing.T, text string) []string {
	t.Helper()
	pid, err := g.pid()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join("/proc", pid, "root/proc/[0-9]*/cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range files {
		if line, err := os.ReadFile(f); err == nil && bytes.Contains(line, []byte(text)) {
			found = append(found, strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return found
}

func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}
