package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// settle is how long nothing is asked of a pod before it counts as idle.
const settle = 5 * time.Second

// What an idle VM pod may take, in MiB, and of the daemon's memory, in KiB.
const (
	podMemoryBar    = 60
	ownMemoryBar    = 25
	daemonMemoryBar = 300
	// idleMemoryLimit of the pods' containers and the guest's overhead of 64 MiB are VMs of 128 MiB.
	idleMemoryLimit = 64 << 20
)

// mapped is the memory of processes in bytes, shared pages divided among those that share them.
type mapped struct {
	total int64
	guest int64 // of it the guest's own memory
	code  int64 // of it machine code that was made at run time: the guest's, translated by TCG
}

func (m *mapped) add(n mapped) {
	m.total += n.total
	m.guest += n.guest
	m.code += n.code
}

// idleMemory measures VM pods that have one waiting container each, and what the daemon needs for them: the difference
// between a daemon that has just started and found them, and one that found none.
func (b *bench) idleMemory(ctx context.Context) (err error) {
	before, err := b.freshDaemon(ctx, nil)
	if err != nil {
		return err
	}
	var pods []*pod
	defer func() { err = errors.Join(err, removeAll(ctx, pods)) }()
	for i := range b.idle {
		p, err := b.runPodWith(ctx, b.vm, vmHandler, fmt.Sprintf("idle-%d", i), func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: idleMemoryLimit}
		})
		if err != nil {
			return err
		}
		pods = append(pods, p)
		if err := b.startIn(ctx, p); err != nil {
			return err
		}
	}
	if err := sleep(ctx, settle); err != nil {
		return err
	}
	var sum mapped
	for _, p := range pods {
		m, err := memoryOf(p.id)
		if err != nil {
			return err
		}
		sum.add(m)
	}
	busy, err := podsCPU(pods)
	if err != nil {
		return err
	}
	looked := time.Now()
	if err := b.idleCPU(ctx, fmt.Sprintf("%d VM pods", len(pods))); err != nil {
		return err
	}
	busier, err := podsCPU(pods)
	if err != nil {
		return err
	}
	b.report.add("processor time of an idle VM pod", float64(busier-busy)/float64(time.Since(looked))/float64(len(pods))*100, "% of a core")
	after, err := b.freshDaemon(ctx, nil)
	if err != nil {
		return err
	}
	each := float64(len(pods)) * (1 << 20)
	b.report.add("memory (PSS) per idle VM pod, with QEMU and helpers", float64(sum.total)/each, "MiB").within(podMemoryBar)
	b.report.add("memory per idle VM pod beyond the guest's", float64(sum.total-sum.guest)/each, "MiB").within(ownMemoryBar)
	b.report.add("  of it code translated by TCG", float64(sum.code)/each, "MiB")
	b.report.add("  not of it: the guest's own, touched", float64(sum.guest)/each, "MiB")
	b.report.add(fmt.Sprintf("daemon's memory per VM pod, of %d running", len(pods)), float64(after-before)/each*1024, "KiB").within(daemonMemoryBar)
	return nil
}

func (b *bench) startIn(ctx context.Context, p *pod) error {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	_, _, _, err := p.start(ctx, "c")
	return err
}

// freshDaemon starts vmruntime anew, as restart does, and returns its anonymous memory in bytes. That of a daemon
// that has worked for a while has more garbage in it than pods.
func (b *bench) freshDaemon(ctx context.Context, change func() error) (int64, error) {
	if err := b.restart(ctx, change); err != nil {
		return 0, err
	}
	if err := sleep(ctx, settle); err != nil {
		return 0, err
	}
	return fileValue(fmt.Sprintf("/proc/%d/status", b.node.VMRuntimePID()), "RssAnon:")
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// podsCPU is the processor time that the processes of pods have used.
func podsCPU(pods []*pod) (sum time.Duration, err error) {
	for _, p := range pods {
		pids, err := processesOf(p.id)
		if err != nil {
			return 0, err
		}
		for _, pid := range pids {
			d, err := processCPU(pid)
			if err != nil {
				return 0, err
			}
			sum += d
		}
	}
	return sum, nil
}

// memoryOf adds up the processes in the cgroup that bears the pod's ID: QEMU and its helpers.
func memoryOf(podID string) (m mapped, err error) {
	pids, err := processesOf(podID)
	if err != nil {
		return m, err
	}
	for _, pid := range pids {
		f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
		if err != nil {
			return m, err
		}
		one, err := readMaps(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return m, fmt.Errorf("process %d: %w", pid, err)
		}
		m.add(one)
	}
	if m.guest == 0 {
		return m, fmt.Errorf("none of the processes %v of pod %s has a guest's memory", pids, podID)
	}
	return m, nil
}

func processesOf(podID string) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(data), podID) {
			continue // it has ended, or is another's
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// guestMappings begin the names of the mapping of the guest's memory: its own or a copy of a template's, and a template's.
func guestMappings() []string { return []string{"/memfd:memory", "/memfd:template"} }

// readMaps adds up the Pss of /proc/PID/smaps. A mapping's first line is ADDRESSES PERMISSIONS OFFSET DEVICE INODE NAME,
// the others are KEY: VALUE.
func readMaps(r io.Reader) (m mapped, err error) {
	guest, code := false, false
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		if fields := strings.Fields(line); len(fields) >= 5 && strings.Contains(fields[0], "-") {
			guest = len(fields) > 5 && slices.ContainsFunc(guestMappings(), func(name string) bool { return strings.HasPrefix(fields[5], name) })
			code = len(fields) == 5 && strings.HasPrefix(fields[1], "rwx")
			continue
		}
		rest, ok := strings.CutPrefix(line, "Pss:")
		if !ok {
			continue
		}
		pss, err := kilobytes(rest)
		if err != nil {
			return m, fmt.Errorf("smaps: %q: %w", line, err)
		}
		m.total += pss
		if guest {
			m.guest += pss
		}
		if code {
			m.code += pss
		}
	}
	return m, lines.Err()
}
