package network

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestUsualClients lets the DHCP clients of distributions ask.
func TestUsualClients(t *testing.T) {
	n := newNode(t)
	n.network(dualStack)
	a := n.setup(request("clients"))
	defer respond(t, n, a, machineOptions).Close()
	capture := captureFrom(t, a)
	m := startMachine(t, n, a)
	m.client6(a.Interfaces[0]).Close() // its address is usable now
	script := filepath.Join(n.dir, "told")
	told := script + ".out"
	// Each writes what it was told into its script's environment.
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho event=$1$reason >>"+told+"\nenv >>"+told+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	lease := filepath.Join(n.dir, "leases")
	for name, c := range map[string]struct {
		args []string
		want []string
	}{
		"udhcpc": {
			[]string{"busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-s", script, "-O", "search", "-O", "mtu", "-O", "staticroutes"},
			[]string{
				"event=bound", "ip=10.99.0.2", "mask=24", "router=10.99.0.1", "dns=10.96.0.10", "hostname=web-0", "mtu=1400",
				"search=default.svc.cluster.local cluster.local", "lease=4294967295",
			},
		},
		"dhclient -4": {
			[]string{"dhclient", "-4", "-1", "-d", "-v", "-sf", script, "-lf", lease + "4", "-pf", lease + "4.pid", "-cf", "/dev/null", "eth0"},
			[]string{
				"event=BOUND", "new_ip_address=10.99.0.2", "new_subnet_mask=255.255.255.0", "new_routers=10.99.0.1",
				"new_domain_name_servers=10.96.0.10",
			},
		},
		"dhclient -6": {
			[]string{"dhclient", "-6", "-1", "-d", "-v", "-sf", script, "-lf", lease + "6", "-pf", lease + "6.pid", "-cf", "/dev/null", "eth0"},
			[]string{
				"event=BOUND6", "new_ip6_address=fd99::2", "new_max_life=4294967295", "new_dhcp6_name_servers=fd96::10",
				"new_dhcp6_domain_search=default.svc.cluster.local. cluster.local.",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(c.args[0]); err != nil {
				t.Skipf("needs %s: %v", c.args[0], err)
			}
			if err := os.WriteFile(told, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + m.netns}, c.args...)...)
			var out strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			missing := c.want
			for len(missing) > 0 && ctx.Err() == nil {
				missing = missingLines(t, told, c.want)
				time.Sleep(50 * time.Millisecond) // the script tells of nothing but by its file
			}
			_ = cmd.Process.Kill() // those that stay to renew
			_ = cmd.Wait()
			if len(missing) > 0 {
				all, _ := os.ReadFile(told)
				t.Errorf("the client was not told %q; it was told\n%s\nand said\n%s", missing, all, out.String())
			}
		})
	}
	checkNoLeak(t, append(capture(), make(frame, etherLen)))
}

func missingLines(t *testing.T, path string, want []string) (out []string) {
	t.Helper()
	all, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range want {
		if !strings.Contains("\n"+string(all), "\n"+line+"\n") {
			out = append(out, line)
		}
	}
	return out
}
