package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/vmruntime/vmruntime/test/images"
)

const (
	// bootTimeout bounds Debian's first boot, which takes minutes where it is emulated.
	bootTimeout = 10 * time.Minute
	// stopGrace is the time that Debian gets to shut down, in seconds.
	stopGrace = "90"
	// bootDone is in the last line that cloud-init writes to the console.
	bootDone = "finished at"
)

const userData = `#cloud-config
write_files:
- path: /etc/greeting
  content: |
    written by cloud-init
`

// makeDisk makes Debian's disk unless the cache has it.
func makeDisk() error {
	fmt.Println("looking for the disk of Debian 12, which is made from packages if the cache lacks it; that takes minutes")
	path, err := images.Disk(images.DebianDisk)
	if err != nil {
		return fmt.Errorf("make the disk: %w", err)
	}
	fmt.Println("  " + path)
	return nil
}

// machine runs Debian as a pod: it shows the boot, has commands run in it, and stops it unless it is to be kept.
func (s show) machine(keep bool) error {
	if _, err := s.crictl("pull", images.Debian); err != nil {
		return err
	}
	dir := filepath.Join(s.node.Root, "pods", "machine")
	pod, container, err := s.machineFiles(dir)
	if err != nil {
		return err
	}
	fmt.Printf("\nThe pod's annotation vmruntime.io/user-data:\n\n%s", indent(userData))
	podID, err := s.crictl("runp", "--runtime", "vm", pod)
	if err != nil {
		return err
	}
	id, err := s.crictl("create", podID, container, pod)
	if err != nil {
		return err
	}
	if _, err := s.crictl("start", id); err != nil {
		return err
	}
	if err := s.watchBoot(filepath.Join(dir, "machine.log")); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"exec", id, "uname", "-a"},
		{"exec", id, "cat", "/etc/greeting"},
		{"exec", id, "hostname"},
		// wait: what cloud-init ends with is still a job of systemd.
		{"exec", id, "systemctl", "is-system-running", "--wait"},
		{"ps"},
	} {
		if _, err := s.crictl(args...); err != nil {
			return err
		}
	}
	if keep {
		return nil
	}
	fmt.Println("\nStopping it: Debian is asked to shut down, and powers off.")
	if _, err := s.crictl("--timeout", "120s", "stop", "--timeout", stopGrace, id); err != nil {
		return err
	}
	end, err := s.crictl("inspect", "--output", "go-template", "--template", "exit code {{.status.exitCode}}, {{.status.reason}}", id)
	if err == nil && end != "exit code 0, Completed" {
		err = fmt.Errorf("the machine ended with %q; one that powers off ends with exit code 0, Completed", end)
	}
	return err
}

// machineFiles writes what describes the pod and its container.
func (s show) machineFiles(dir string) (pod, container string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", "", err
	}
	pod, err = writeJSON(dir, "pod.json", map[string]any{
		"metadata":      map[string]any{"name": "machine", "namespace": "default", "uid": "machine-uid"},
		"hostname":      "machine",
		"log_directory": dir,
		"annotations":   map[string]any{"vmruntime.io/user-data": userData},
		"linux": map[string]any{
			"cgroup_parent": s.node.CgroupParent(),
			// The kubelet's sum of the containers' limits: 2 vCPUs and 768 MiB.
			"resources": map[string]any{"cpu_period": 100000, "cpu_quota": 200000, "memory_limit_in_bytes": 768 << 20},
		},
	})
	if err != nil {
		return "", "", err
	}
	container, err = writeJSON(dir, "container.json", map[string]any{
		"metadata": map[string]any{"name": "debian"},
		"image":    map[string]any{"image": images.Debian},
		"labels":   map[string]any{"io.kubernetes.pod.name": "machine", "io.kubernetes.pod.namespace": "default"},
		"log_path": "machine.log",
		"linux":    map[string]any{},
	})
	return pod, container, err
}

// watchBoot prints the console's lines as they come to the container's log, until cloud-init is done.
func (s show) watchBoot(file string) error {
	fmt.Print("\nThe serial console, which is the container's log:\n\n")
	ctx, cancel := context.WithTimeout(s.ctx, bootTimeout)
	defer cancel()
	start := time.Now()
	log, err := os.Open(file)
	if err != nil {
		return err
	}
	defer log.Close()
	var rest []byte
	for {
		more, err := io.ReadAll(log)
		if err != nil {
			return err
		}
		rest = append(rest, more...)
		for {
			line, after, whole := bytes.Cut(rest, []byte("\n"))
			if !whole {
				break
			}
			rest = after
			text := consoleText(string(line))
			fmt.Printf("  %6.1fs | %s\n", time.Since(start).Seconds(), text)
			if strings.Contains(text, bootDone) {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the console %s has no %q: %w", file, bootDone, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// escapes are what a console writes for terminals only.
var escapes = regexp.MustCompile(`\x1b(\[[0-9;?=]*[A-Za-z]|[()][A-Za-z0-9]|[A-Za-z78=>])|[\x00-\x08\x0b-\x1f\x7f]`)

// consoleText is the text of a line of a CRI log: TIME stdout TAG TEXT.
func consoleText(line string) string {
	fields := strings.SplitN(line, " ", 4)
	return escapes.ReplaceAllString(fields[len(fields)-1], "")
}

func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n    ") + "\n"
}
