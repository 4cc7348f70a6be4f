package vm_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/test/images"
)

// debianTimeout bounds a test with an operating system that takes most of a minute to boot when emulated.
const debianTimeout = 8 * time.Minute

// debian runs the machine of a Debian cloud image, and returns when cloud-init has done all of its work.
func (b *bed) debian(t *testing.T, cfg *runtimeapi.ContainerConfig, change ...func(*runtimeapi.PodSandboxConfig)) *ctr {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), debianTimeout)
	t.Cleanup(cancel)
	if err := b.pull(ctx, images.Debian); err != nil {
		t.Fatal(err)
	}
	two := func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 768 << 20, CpuQuota: 200000, CpuPeriod: 100000}
	}
	p := b.vmPod(ctx, t, append([]func(*runtimeapi.PodSandboxConfig){two}, change...)...)
	c := p.start(cfg)
	began := time.Now()
	untilWithin(ctx, t, debianTimeout, "cloud-init is done", func() bool {
		data, _ := os.ReadFile(c.logFile())
		return bytes.Contains(data, []byte("finished at"))
	})
	t.Logf("cloud-init was done after %s", time.Since(began).Round(time.Second))
	c.answers()
	return c
}

// A stock Debian: cloud-init makes it the pod, exec works by its own guest agent and SSH server, volumes are mounted and live.
func TestDebian(t *testing.T) {
	_, b := use(t)
	data, config := t.TempDir(), t.TempDir()
	for file, text := range map[string]string{
		filepath.Join(data, "given"):       "on the node\n",
		filepath.Join(config, "key"):       "one\n",
		filepath.Join(config, "user-data"): "#cloud-config\nwrite_files:\n- path: /etc/made\n  content: by cloud-init\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cfg := with(of("machine", images.Debian), func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "GREETING", Value: []byte("it's me")}}
		c.Mounts = []*runtimeapi.Mount{
			{HostPath: data, ContainerPath: "/data"},
			{HostPath: config, ContainerPath: "/etc/vm config", Readonly: true},
		}
	})
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHtdNbSLEcDSbDJxTyiFyWtyGeAFAtnLtOPHPfV/9zYl given"
	c := b.debian(t, cfg, annotated(
		"user-data-from", "/etc/vm config/user-data", "root-disk-size", "3Gi", "ssh-keys", key,
		"vendor-data", "#cloud-config\ngroups: [vendored]\n",
		"network-config", "version: 2\nethernets:\n  given:\n    match: {driver: virtio_net}\n    dhcp4: true\n    dhcp6: true\n    mtu: 1400\n",
	), func(p *runtimeapi.PodSandboxConfig) {
		p.Hostname = "debian-pod"
	})
	c.expect("grep -c ^vendored: /etc/group; cat /sys/class/net/en*/mtu; grep -c 'given$' /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys | cut -d : -f 2", "1\n1400\n1\n1")
	c.expect("hostname; cat /etc/made; echo; . /etc/vmruntime/env; echo \"$GREETING\"", "debian-pod\nby cloud-init\nit's me")
	c.expect("ip -4 -o addr show scope global | awk '{print $4}' | cut -d / -f 1", c.ip())
	c.expect("df -BM --output=size / | tail -n 1 | tr -d ' ' | cut -c 1-2; systemctl is-active ssh; systemctl --failed --quiet", "29\nactive") // of 3 GiB; the image has 2
	// Volumes: both ways, live, read-only held by the node.
	c.expect("cat /data/given '/etc/vm config/key'; echo from the guest >/data/made; chown 1000 /data/made", "on the node\none")
	if got := readFile(filepath.Join(data, "made")); got != "from the guest\n" {
		t.Errorf("the node reads %q, want what the guest wrote", got)
	}
	if err := os.WriteFile(filepath.Join(config, "key"), []byte("two\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c.until("the guest sees the change", func() bool { return c.sh("cat '/etc/vm config/key'") == "two\n" })
	c.expect("mount -o remount,rw '/etc/vm config' 2>/dev/null; echo no 2>/dev/null >'/etc/vm config/key' || echo refused", "refused")
	// What needs input goes by SSH, with the pod's own key, to the host that has ours.
	cmd := c.crictl("exec", "-i", c.id, "sh", "-c", "sha256sum; echo $SSH_CONNECTION | cut -d ' ' -f 3 >&2; exit 9")
	cmd.Stdin = bytes.NewReader(bytes.Repeat([]byte("input "), 100000))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	want := "9f5a4c91438747760b8434a627114c3e74009b0d33d5119db6d1e3d3df1dc481"
	if err == nil || !strings.Contains(stderr.String(), "exit code 9") || !strings.Contains(stderr.String(), c.ip()) || stdout.String() != want+"  -\n" {
		t.Errorf("crictl exec -i: %v, stdout %q, stderr %q; want the sum %s, the pod's address and exit code 9", err, &stdout, &stderr, want)
	}
	debianTerminal(t, c)
	// A port on the guest's loopback, also by SSH.
	c.sh("python3 -m http.server --bind 127.0.0.1 8099 --directory /etc/cloud >/dev/null 2>&1 &")
	forward := c.crictl("port-forward", c.pod.id, "18099:8099")
	if err := forward.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = forward.Process.Kill() // by its ID
		_ = forward.Wait()
	}()
	c.until("the forwarded port answers", func() bool {
		out, err := b.fetch(c.ctx, "http://127.0.0.1:18099/build.info")
		return err == nil && out != "" || strings.Contains(out, "404")
	})
	c.stop(90)
	if s := c.wait(); s.GetExitCode() != 0 || s.GetReason() != "Completed" {
		t.Errorf("stopped with exit code %d, %s; want 0, Completed", s.GetExitCode(), s.GetReason())
	}
}

// Debian again, by EFI with Secure Boot and ConfigDrive, with our own agent from a share.
func TestDebianWithAgent(t *testing.T) {
	_, b := use(t)
	c := b.debian(t, of("machine", images.Debian), annotated(
		"datasource", "configdrive", "firmware", "efi-secure-boot", "tpm", "true", "guest-agent-install", "true"))
	c.until("our agent runs", func() bool {
		resp, err := c.rt.ContainerStatus(c.ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
		return err == nil && strings.Contains(resp.GetInfo()["info"], `"agent":true`)
	})
	c.expect("systemctl is-active vmagent; cat /sys/class/tpm/tpm0/tpm_version_major; mokutil --sb-state 2>/dev/null || tail -c 1 /sys/firmware/efi/efivars/SecureBoot-* | od -An -tu1 | tr -d ' '", "active\n2\n1")
	cmd := c.crictl("exec", "-i", c.id, "cat")
	cmd.Stdin = strings.NewReader("through the agent\n")
	if out, err := cmd.Output(); err != nil || string(out) != "through the agent\n" {
		t.Errorf("crictl exec -i: %q, %v", out, err)
	}
	c.stop(90)
	if s := c.wait(); s.GetExitCode() != 0 {
		t.Errorf("stopped with exit code %d, %s %s; want 0", s.GetExitCode(), s.GetReason(), s.GetMessage())
	}
}

// debianTerminal has a terminal in the machine, by SSH.
func debianTerminal(t *testing.T, c *ctr) {
	t.Helper()
	cmd := c.crictl("exec", "-i", "-t", c.id, "sh")
	master, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 101})
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	screen := newScreen(master)
	defer screen.close()
	for _, say := range []struct{ line, want string }{
		{"echo size $(stty size)", "size 33 101"}, {"test -t 0 && echo a $((6*7)) terminal", "a 42 terminal"}, {"exit", ""},
	} {
		if _, err := io.WriteString(master, say.line+"\n"); err != nil {
			t.Fatal(err)
		}
		c.until("the terminal shows "+say.want, func() bool { return strings.Contains(screen.text(), say.want) })
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("crictl exec -it: %v\n%s", err, screen.text())
	}
}
