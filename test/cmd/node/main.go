// Command node shows both runtimes behind one socket: it brings up a private
// node, runs a normal pod and a VM pod from real images with crictl, and shows
// what runs in them. With -machine it shows a machine instead: a pod that boots
// Debian from the disk in its image. With -keep it then leaves the node up until
// it is interrupted.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vmruntime/vmruntime/test/images"
	"github.com/vmruntime/vmruntime/test/node"
)

func main() {
	keep := flag.Bool("keep", false, "leave the node up until interrupted")
	vmruntime := flag.String("vmruntime", "bin/vmruntime", "vmruntime's `program`")
	guest := flag.String("guest", "out/guest", "`directory` that make guest wrote")
	accel := flag.String("accel", "auto", "kvm, tcg or auto")
	machine := flag.Bool("machine", false, "show a machine, which boots Debian")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, *vmruntime, *guest, *accel, *machine, *keep); err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		cancel()
		os.Exit(1)
	}
}

func run(ctx context.Context, program, guest, accel string, machine, keep bool) (err error) {
	program, err = filepath.Abs(program)
	if err != nil {
		return err
	}
	guest, err = filepath.Abs(guest)
	if err != nil {
		return err
	}
	if machine {
		if err := makeDisk(); err != nil {
			return err
		}
	}
	fmt.Println("bringing up a node: containerd and vmruntime, with CNI and a registry of test images")
	n, err := node.Start(ctx, node.Options{VMRuntime: program, GuestDir: guest, Accel: accel})
	if err != nil {
		return err
	}
	s := show{ctx: ctx, node: n}
	defer func() {
		fmt.Println("\nremoving the pods and the node")
		err = errors.Join(err, n.Stop())
	}()
	show := s.pods
	if machine {
		show = func() error { return s.machine(keep) }
	}
	if err := show(); err != nil {
		return err
	}
	if !keep {
		return nil
	}
	fmt.Printf("\nThe node is up; its logs are in %s. Talk to it with:\n\n  %s\n\nPress Ctrl-C to remove it.\n",
		filepath.Dir(n.LogFile("vmruntime")), strings.Join(n.Command(ctx, n.Tool("cri-tools", "crictl"), n.CrictlFlags()...).Args, " "))
	<-ctx.Done()
	return nil
}

// show runs crictl commands and prints them with what they print.
type show struct {
	ctx  context.Context
	node *node.Node
}

func (s show) crictl(args ...string) (string, error) {
	fmt.Printf("\n$ crictl %s\n", strings.Join(args, " "))
	start := time.Now()
	var out strings.Builder
	cmd := s.node.Command(s.ctx, s.node.Tool("cri-tools", "crictl"), append(s.node.CrictlFlags(), args...)...)
	cmd.Stdout, cmd.Stderr = io.MultiWriter(os.Stdout, &out), os.Stdout
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("crictl %s: %w", args[0], err)
	}
	fmt.Printf("  (%s)\n", time.Since(start).Round(10*time.Millisecond))
	return strings.TrimSpace(out.String()), err
}

// pods runs one pod of each kind and looks into both.
func (s show) pods() error {
	for _, image := range []string{images.Busybox, images.Nginx} {
		if _, err := s.crictl("pull", image); err != nil {
			return err
		}
	}
	var containers []string
	for _, handler := range []string{"", "vm"} {
		id, err := s.runPod(handler)
		if err != nil {
			return err
		}
		containers = append(containers, id)
	}
	for _, id := range containers {
		for _, command := range []string{"uname -r", "cat /etc/hostname", "wget -q -O - 127.0.0.1"} {
			if _, err := s.crictl(append([]string{"exec", id}, strings.Fields(command)...)...); err != nil {
				return err
			}
		}
		if _, err := s.crictl("logs", id); err != nil {
			return err
		}
	}
	for _, args := range [][]string{{"pods"}, {"ps"}} {
		if _, err := s.crictl(args...); err != nil {
			return err
		}
	}
	return nil
}

// runPod runs nginx in a pod and returns its container.
func (s show) runPod(handler string) (string, error) {
	name := "normal"
	if handler != "" {
		name = handler
	}
	dir := filepath.Join(s.node.Root, "pods", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	pod, err := writeJSON(dir, "pod.json", map[string]any{
		"metadata":      map[string]any{"name": name, "namespace": "default", "uid": name + "-uid"},
		"hostname":      name,
		"log_directory": dir,
		"linux":         map[string]any{"cgroup_parent": s.node.CgroupParent()},
	})
	if err != nil {
		return "", err
	}
	container, err := writeJSON(dir, "container.json", map[string]any{
		"metadata": map[string]any{"name": "web"},
		"image":    map[string]any{"image": images.Nginx},
		"labels":   map[string]any{"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "default"},
		"log_path": "web.log",
		"linux":    map[string]any{},
	})
	if err != nil {
		return "", err
	}
	args := []string{"runp"}
	if handler != "" {
		args = append(args, "--runtime", handler)
	}
	podID, err := s.crictl(append(args, pod)...)
	if err != nil {
		return "", err
	}
	id, err := s.crictl("create", podID, container, pod)
	if err != nil {
		return "", err
	}
	if _, err := s.crictl("start", id); err != nil {
		return "", err
	}
	return id, s.await(filepath.Join(dir, "web.log"), "start worker process")
}

// await returns when a container's log has the text.
func (s show) await(file, text string) error {
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	for {
		log, err := os.ReadFile(file)
		if err == nil && strings.Contains(string(log), text) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the log %s has no %q: %w\n%s", file, text, ctx.Err(), log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func writeJSON(dir, name string, value any) (string, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, name)
	return file, os.WriteFile(file, data, 0o644)
}
