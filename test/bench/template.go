package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/test/node"
)

// What a start from a template may take, and a command in a container.
const (
	templateBar    = 1.5  // of a pod of containerd
	templateBarKVM = 1.25 // the same where KVM runs the guest
	floorBar       = 2.0  // of QEMU restoring the template, and CNI
	execBar        = 2.0  // of one in a container of containerd

	templateTimeout = 3 * time.Minute
)

// templateStarts measures, in turns, a VM pod that begins as a template from RunPodSandbox to its container's first line in the log, a
// pod on containerd's own socket, and the floor: QEMU as a plain child that restores the same template until the agent's first
// byte, and CNI alone.
func (b *bench) templateStarts(ctx context.Context) error {
	return errors.Join(
		b.measureTemplateStarts(ctx, "start from a template", func(context.Context) error { return nil }),
		b.withTemplateConfig(ctx, "[template]\nspares = 1\n", func() error {
			return b.measureTemplateStarts(ctx, "start of a guest that waits", func(ctx context.Context) error { return b.awaitSpares(ctx, 1) })
		}),
	)
}

// awaitSpares waits until so many guests wait for their pods.
func (b *bench) awaitSpares(ctx context.Context, number float64) error {
	ctx, cancel := context.WithTimeout(ctx, templateTimeout)
	defer cancel()
	for {
		spares, err := b.scrape(ctx, "vmruntime_spare_guests")
		if err != nil {
			return err
		}
		if len(spares) == 1 && spares[0].GetGauge().GetValue() >= number {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("of the guests that are to wait for pods there are not %v: %w", number, err)
		}
	}
}

// measureTemplateStarts measures what is called so; before each turn the node is made ready, so that none has a guest made beside it.
func (b *bench) measureTemplateStarts(ctx context.Context, name string, ready func(context.Context) error) error {
	var vm, container, discarded starts
	var restored, cni, floor durations
	if err := b.freshTemplate(ctx); err != nil {
		return err
	}
	shape, err := b.warmUp(ctx, &discarded)
	if err != nil {
		return err
	}
	for i := range b.starts {
		turns := []func() error{
			func() error { return b.startClone(ctx, fmt.Sprintf("clone-%d", i), &vm) },
			func() error { return b.startOnce(ctx, b.direct, "", fmt.Sprintf("beside-%d", i), &container) },
			func() error {
				one, err := b.restoreBare(ctx, shape)
				if err != nil {
					return err
				}
				two, err := b.attachAlone(ctx, fmt.Sprintf("floor-%d", i))
				restored, cni, floor = append(restored, one), append(cni, two), append(floor, one+two)
				return err
			},
		}
		for j := range turns { // another one goes first each time
			if err := ready(ctx); err != nil {
				return err
			}
			if err := turns[(i+j)%len(turns)](); err != nil {
				return err
			}
		}
	}
	b.reportTemplates(name, vm, container, floor)
	r := &b.report
	r.add("  of the floor: QEMU to the agent's first byte, p50", restored.median(), "ms")
	r.add("  of the floor: CNI, p50", cni.median(), "ms")
	b.plot.add("VM pod: "+name, vm.total)
	b.plot.add("containerd's pod beside: "+name, container.total)
	b.plot.add("QEMU and CNI alone: "+name, floor)
	return nil
}

func (b *bench) reportTemplates(name string, vm, container starts, floor durations) {
	r, bar := &b.report, templateBar
	if b.accel == "kvm" {
		bar = templateBarKVM
	}
	r.medians(name+", over containerd's pod, p50", vm.total, container.total).within(bar)
	r.medians("  of it RunPodSandbox", vm.sandbox, container.sandbox)
	r.medians("  of it CreateContainer", vm.create, container.create)
	r.medians("  of it StartContainer", vm.start, container.start)
	r.medians("  of it until the line is in the log", vm.line, container.line)
	for _, q := range []struct {
		name     string
		quantile float64
	}{{"fastest", 0}, {"p25", 0.25}, {"p75", 0.75}, {"slowest", 1}} {
		r.compare(name+", over containerd's pod, "+q.name, vm.total.at(q.quantile), container.total.at(q.quantile), "ms")
	}
	r.medians(name+", over QEMU and CNI alone, p50", vm.total, floor).within(floorBar)
}

// freshTemplate starts the daemon anew and waits until it has a template.
func (b *bench) freshTemplate(ctx context.Context) error {
	from, err := b.logSize()
	if err != nil {
		return err
	}
	if err := b.restart(ctx, nil); err != nil {
		return err
	}
	return b.awaitTemplateFrom(ctx, from)
}

// logSize is how long the daemon's log is.
func (b *bench) logSize() (int64, error) {
	info, err := os.Stat(b.node.LogFile("vmruntime"))
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// awaitTemplateFrom waits until the log beyond an offset says that there is a template.
func (b *bench) awaitTemplateFrom(ctx context.Context, from int64) error {
	ctx, cancel := context.WithTimeout(ctx, templateTimeout)
	defer cancel()
	for {
		text, err := os.ReadFile(b.node.LogFile("vmruntime"))
		if err != nil {
			return err
		}
		if bytes.Contains(text[min(from, int64(len(text))):], []byte("guests begin as a template")) {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("no template is ready: %w", err)
		}
	}
}

// startClone is startOnce of a pod that has to begin as a template.
func (b *bench) startClone(ctx context.Context, name string, s *starts) (err error) {
	begun := time.Now()
	call, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	p, err := b.runPod(call, b.vm, vmHandler, name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	if err := b.finishStart(call, p, begun, s); err != nil {
		return err
	}
	status, err := b.vm.PodSandboxStatus(call, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		return err
	}
	var info struct {
		Guest struct {
			Template string `json:"template"`
		} `json:"guest"`
	}
	if err := json.Unmarshal([]byte(status.GetInfo()["info"]), &info); err != nil {
		return err
	}
	if info.Guest.Template == "" {
		return fmt.Errorf("pod %s did not begin as a template", name)
	}
	return nil
}

// restoreBare runs QEMU as a plain child, as root and without any confinement, on the files of the daemon's template, whose memory it
// maps privately, and takes the time from before the fork to the agent's answer.
func (b *bench) restoreBare(ctx context.Context, shape machineShape) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	dir, err := os.MkdirTemp(b.node.Root, "bare-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	template, err := b.templateDir(shape)
	if err != nil {
		return 0, err
	}
	cmd, err := b.bareQEMU(dir, shape, func(m *qemu.Machine) { m.Incoming, m.Memory = true, qemu.MemoryPrivate })
	if err != nil {
		return 0, err
	}
	defer closeAll(cmd.ExtraFiles)
	for i, a := range cmd.Args {
		cmd.Args[i] = strings.Replace(a, `"mem-path":"/fd/0"`, fmt.Sprintf(`"mem-path":%q`, filepath.Join(template, "memory")), 1)
	}
	state, err := os.Open(filepath.Join(template, "state"))
	if err != nil {
		return 0, err
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles, state)
	var said bytes.Buffer
	cmd.Stderr = &said
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		if err != nil && said.Len() > 0 {
			err = fmt.Errorf("%w; QEMU said: %s", err, said.Bytes())
		}
	}()
	if err := restoreState(ctx, filepath.Join(dir, "qmp.sock"), 2+len(cmd.ExtraFiles)); err != nil {
		return 0, err
	}
	client, err := agent.Dial(ctx, filepath.Join(dir, "agent.sock"))
	if err != nil {
		return 0, err
	}
	took = time.Since(begun)
	return took, client.Close()
}

// restoreState has QEMU load its state from a descriptor that it has inherited, and go on.
func restoreState(ctx context.Context, socket string, fd int) (err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	m := qemu.NewMonitor(conn.(*net.UnixConn), nil, slog.Default())
	defer func() { err = errors.Join(err, m.Disconnect()) }()
	if err := m.Connect(); err != nil {
		return err
	}
	events, err := m.Events(ctx)
	if err != nil {
		return err
	}
	type args map[string]any
	capabilities := []args{{"capability": "events", "state": true}, {"capability": "x-ignore-shared", "state": true}}
	if err := errors.Join(
		m.Execute(ctx, "migrate-set-capabilities", args{"capabilities": capabilities}, nil),
		m.Execute(ctx, "migrate-incoming", args{"uri": fmt.Sprintf("fd:%d", fd)}, nil),
	); err != nil {
		return err
	}
	for e := range events {
		switch e.Data["status"] {
		case "completed":
			return m.Execute(ctx, "cont", nil, nil)
		case "failed":
			return errors.New("QEMU cannot load the template")
		}
	}
	return errors.Join(errors.New("QEMU ended"), ctx.Err())
}

// templateDir finds the template of a shape by the size of its memory.
func (b *bench) templateDir(shape machineShape) (string, error) {
	files, err := filepath.Glob(filepath.Join(b.store("templates"), "*", "memory"))
	if err != nil {
		return "", err
	}
	for _, file := range files {
		if info, err := os.Stat(file); err == nil && info.Size() == shape.MemoryBytes {
			return filepath.Dir(file), nil
		}
	}
	return "", fmt.Errorf("none of the templates %q has %d bytes of memory", files, shape.MemoryBytes)
}

// attachAlone makes a pod's network as the daemon does, and takes the time of that.
func (b *bench) attachAlone(ctx context.Context, id string) (took time.Duration, err error) {
	m, err := network.New(network.Options{
		ConfDir: filepath.Join(b.node.Root, "cni", "conf"), BinDirs: []string{filepath.Dir(b.node.Tool("cni", "bridge"))},
		NetNSDir: filepath.Join(b.node.Root, "run", "bench-netns"),
	})
	if err != nil {
		return 0, err
	}
	r := network.Request{ID: id, Name: id, Namespace: "bench", UID: id, CgroupParent: b.node.CgroupParent()}
	err = b.node.Do(func() error {
		begun := time.Now()
		_, err := m.Setup(ctx, r)
		took = time.Since(begun)
		return errors.Join(err, m.Teardown(ctx, r))
	})
	return took, err
}

// execRest is how long there is no exec where they are rare, as those of probes are.
const execRest = 2 * time.Second

// execTimes measures, in turns, ExecSync of true in a container of a VM pod and of a pod of containerd, each on its own socket: one after the
// other, and with a rest between.
func (b *bench) execTimes(ctx context.Context) (err error) {
	var pods []*pod
	var ids []string
	defer func() { err = errors.Join(err, removeAll(ctx, pods)) }()
	for _, way := range []struct {
		cri           *cri
		handler, name string
	}{{b.vm, vmHandler, "vm-exec"}, {b.direct, "", "container-exec"}} {
		p, err := b.runPod(ctx, way.cri, way.handler, way.name)
		if err != nil {
			return err
		}
		pods = append(pods, p)
		id, err := p.create(ctx, "c")
		if err != nil {
			return err
		}
		if _, err := p.cri.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
			return err
		}
		ids = append(ids, id)
	}
	return errors.Join(b.execTurns(ctx, pods, ids, 0, ""), b.execTurns(ctx, pods, ids, execRest, " after a rest"))
}

func (b *bench) execTurns(ctx context.Context, pods []*pod, ids []string, rest time.Duration, when string) error {
	took := make([]durations, len(pods))
	for i := range b.execs + 1 { // the first does not count
		if err := sleep(ctx, rest); err != nil {
			return err
		}
		for j, p := range pods {
			d, err := unary(func(ctx context.Context, c *cri) error {
				_, err := c.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: ids[j], Cmd: []string{"true"}, Timeout: 20})
				return err
			})(ctx, p.cri)
			if err != nil {
				return fmt.Errorf("ExecSync: %w", err)
			}
			if i > 0 {
				took[j] = append(took[j], d)
			}
		}
	}
	b.report.medians("ExecSync of true"+when+", over one in containerd's pod, p50", took[0], took[1]).within(execBar)
	b.report.compare("ExecSync of true"+when+", over one in containerd's pod, p90", took[0].at(0.9), took[1].at(0.9), "ms")
	return nil
}

// withoutTemplates does something while every guest boots.
func (b *bench) withoutTemplates(ctx context.Context, do func() error) error {
	return b.withTemplateConfig(ctx, "[template]\nenabled = false\n", do)
}

// withTemplateConfig has another section about templates in the daemon's configuration for as long as something takes.
func (b *bench) withTemplateConfig(ctx context.Context, section string, do func() error) error {
	config := filepath.Join(b.node.Root, "vmruntime", "vmruntime.toml")
	before, err := os.ReadFile(config)
	if err != nil {
		return err
	}
	changed := bytes.Replace(before, []byte(node.TemplateConfig), []byte(section), 1)
	if err := b.restart(ctx, func() error { return os.WriteFile(config, changed, 0o644) }); err != nil {
		return err
	}
	err = do()
	return errors.Join(err, b.restart(context.WithoutCancel(ctx), func() error { return os.WriteFile(config, before, 0o644) }))
}
