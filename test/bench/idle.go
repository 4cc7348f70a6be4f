package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// What an idle VM pod may take, in MiB, of the daemon's memory, in KiB, and what the daemon may use for all, in percent of a core.
	podMemoryBar    = 60
	ownMemoryBar    = 25
	daemonMemoryBar = 300
	daemonCPUBar    = 1
	// idleMemoryLimit of the pods' containers and the guest's overhead of 64 MiB are VMs of 128 MiB.
	idleMemoryLimit = 64 << 20
	// idleNeeds is how much of the node's memory has to be available for each, so that none is measured while it is reclaimed.
	idleNeeds = 150 << 20
	// sharingPods are as many as tell what sharing a template's memory saves.
	sharingPods = 10
	// defaultSpares wait on a node that is not configured otherwise: one of the default size, one of that of the pods.
	defaultSpares = 2
)

// idlePods measures VM pods with one waiting container each, on a node with what it has by default: many, of which the first are started all
// at once, and a few that share the memory of their template. Nothing of them may be left.
func (b *bench) idlePods(ctx context.Context) error {
	for _, way := range []struct {
		section, with string
		burst, pods   int
	}{
		{"[template]\n", "", min(b.burst, b.idle), b.idle},
		{"[template]\nshare = \"node\"\n", " that share their template's memory", 0, min(sharingPods, b.idle)},
	} {
		if err := enoughMemory(way.pods); err != nil {
			return err
		}
		if err := b.withTemplateConfig(ctx, way.section, func() error {
			return b.measureIdle(ctx, way.burst, way.pods, fmt.Sprintf("%d VM pods%s", way.pods, way.with))
		}); err != nil {
			return err
		}
		lines, err := b.node.Leaks(ctx) // no guest waits any more
		if err != nil {
			return err
		}
		if len(lines) > 0 {
			return fmt.Errorf("left after %d VM pods:\n  %s", way.pods, strings.Join(lines, "\n  "))
		}
	}
	return nil
}

func enoughMemory(pods int) error {
	available, err := fileValue("/proc/meminfo", "MemAvailable:")
	if err != nil {
		return err
	}
	if need := int64(pods) * idleNeeds; available < need {
		return fmt.Errorf("%d MiB of memory are available, and %d VM pods need %d; let -idle be less", available>>20, pods, need>>20)
	}
	return nil
}

func (b *bench) measureIdle(ctx context.Context, burst, number int, name string) (err error) {
	without, err := b.daemonWithSpare(ctx)
	if err != nil {
		return err
	}
	if err := b.readyForIdle(ctx); err != nil {
		return err
	}
	var pods []*pod
	defer func() {
		begun := time.Now()
		err = errors.Join(err, removeAll(ctx, pods))
		if err == nil {
			b.report.add("removal of "+name+", one after the other", time.Since(begun).Seconds(), "s")
		}
	}()
	if err := b.fillNode(ctx, burst, number, &pods); err != nil {
		return err
	}
	if err := b.allAnswer(ctx, pods, name); err != nil {
		return err
	}
	if err := b.awaitSpares(ctx, defaultSpares); err != nil {
		return err
	}
	if err := sleep(ctx, manySettle); err != nil {
		return err
	}
	if err := b.reportMemory(pods, name); err != nil {
		return err
	}
	if err := b.idleCPU(ctx, name, pods); err != nil {
		return err
	}
	with, err := b.daemonWithSpare(ctx)
	if err != nil {
		return err
	}
	b.report.add("daemon's memory for each of "+name, float64(with-without)/float64(number)/(1<<10), "KiB").within(daemonMemoryBar)
	return nil
}

// daemonWithSpare is freshDaemon after what the daemon does by itself when it starts: it loads a template and has a guest wait.
func (b *bench) daemonWithSpare(ctx context.Context) (int64, error) {
	return b.freshDaemon(ctx, nil, func() error { return b.awaitSpares(ctx, 1) })
}

// readyForIdle starts a pod, so that there is a template of its size and a guest that waits.
func (b *bench) readyForIdle(ctx context.Context) error {
	from, err := b.logSize()
	if err != nil {
		return err
	}
	var first []*pod
	err = b.startMany(ctx, 1, 1, &first, &durations{})
	if err := errors.Join(err, removeAll(ctx, first)); err != nil {
		return err
	}
	if err := b.awaitTemplateFrom(ctx, from); err != nil {
		return err
	}
	return b.awaitSpares(ctx, defaultSpares)
}

// fillNode starts a burst, and then what is missing.
func (b *bench) fillNode(ctx context.Context, burst, number int, pods *[]*pod) error {
	if burst > 0 {
		progress(fmt.Sprintf("starting %d pods at once", burst))
		var took durations
		begun := time.Now()
		if err := b.startMany(ctx, burst, burst, pods, &took); err != nil {
			return err
		}
		of := fmt.Sprintf("burst of %d VM pods: ", burst)
		b.report.add(of+"from the first call to the last one's first line", float64(burst)/time.Since(begun).Seconds(), "pods/s")
		b.report.add(of+"start of one, p50", took.median(), "ms").Samples = took.milliseconds()
		b.report.add(of+"start of one, p99", took.at(0.99), "ms")
	}
	progress(fmt.Sprintf("starting %d more", number-burst))
	return b.startMany(ctx, number-burst, runtime.NumCPU(), pods, &durations{})
}

// startMany starts so many pods with a container each, as many of them beside one another as is said, and adds them to those that there are, also when
// it fails. It takes the time of each, from RunPodSandbox to the first line in the log.
func (b *bench) startMany(ctx context.Context, number, beside int, pods *[]*pod, took *durations) error {
	ctx, cancel := context.WithTimeout(ctx, manyTimeout)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(beside)
	started, times, have := make([]*pod, number), make(durations, number), len(*pods)
	for i := range number {
		group.Go(func() (err error) {
			begun := time.Now()
			started[i], err = b.runPodWith(ctx, b.vm, vmHandler, fmt.Sprintf("idle-%d", have+i), func(c *runtimeapi.PodSandboxConfig) {
				c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: idleMemoryLimit}
			})
			if err != nil {
				return err
			}
			_, _, _, err = started[i].start(ctx, "c")
			times[i] = time.Since(begun)
			return err
		})
	}
	err := group.Wait()
	*pods = append(*pods, slices.DeleteFunc(started, func(p *pod) bool { return p == nil })...)
	*took = append(*took, times...)
	return err
}

// allAnswer runs a command in every pod's container, one after the other.
func (b *bench) allAnswer(ctx context.Context, pods []*pod, name string) error {
	list, err := b.vm.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err := errors.Join(err, count(len(list.GetContainers()), len(pods))); err != nil {
		return err
	}
	var took durations
	for _, c := range list.Containers {
		d, err := unary(func(ctx context.Context, cri *cri) error {
			answer, err := cri.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.Id, Cmd: []string{"echo", "here"}, Timeout: 20})
			if said := string(answer.GetStdout()); err == nil && said != "here\n" {
				err = fmt.Errorf("it says %q", said)
			}
			return err
		})(ctx, b.vm)
		if err != nil {
			return fmt.Errorf("ExecSync in container %s of sandbox %s: %w", c.Id, c.PodSandboxId, err)
		}
		took = append(took, d)
	}
	b.report.add("ExecSync of echo in each of "+name+", p50", took.median(), "ms").Samples = took.milliseconds()
	b.report.add("ExecSync of echo in each of "+name+", p99", took.at(0.99), "ms")
	return nil
}

// reportMemory tells what processes of pods take, and where.
func (b *bench) reportMemory(pods []*pod, name string) error {
	sum, err := memoryOfAll(pods)
	if err != nil {
		return err
	}
	each := func(bytes int64) float64 { return float64(bytes) / float64(len(pods)) / (1 << 20) }
	r := &b.report
	r.add("memory (PSS) of each of "+name+", with QEMU and helpers", each(sum.total()), "MiB").within(podMemoryBar)
	r.add("  of it the guest's own, touched", each(sum.guest), "MiB")
	r.add("  of it code translated by TCG", each(sum.code), "MiB")
	r.add("  of it heap and other anonymous memory", each(sum.anonymous), "MiB")
	r.add("  of it stacks", each(sum.stacks), "MiB")
	r.add("  of it programs, libraries and other files", each(sum.files), "MiB")
	r.add("private memory beyond the guest's, of each of "+name, each(sum.private), "MiB").within(ownMemoryBar)
	return nil
}

// idleCPU reports what the daemon, pods and the whole machine do while nothing is asked of them.
func (b *bench) idleCPU(ctx context.Context, name string, pods []*pod) error {
	pids, err := processesOfAll(pods) // which takes a while itself
	if err != nil {
		return err
	}
	before, err := b.used(pids)
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := sleep(ctx, watched); err != nil {
		return err
	}
	after, err := b.used(pids)
	if err != nil {
		return err
	}
	took := time.Since(begun)
	percent := func(before, after time.Duration) float64 { return float64(after-before) / float64(took) * 100 }
	b.report.add("daemon's processor time while idle, with "+name, percent(before.daemon, after.daemon), "% of a core").within(daemonCPUBar)
	if len(pods) > 0 {
		b.report.add("  processor time of all these pods", percent(before.pods, after.pods), "% of a core")
		b.report.add("  processor time of the whole machine", percent(before.machine, after.machine), "% of a core")
	}
	return nil
}

// used is the processor time that has been used.
type used struct{ daemon, pods, machine time.Duration }

func (b *bench) used(pids []int) (u used, err error) {
	var errs [3]error
	u.machine, errs[0] = machineCPU()
	u.daemon, errs[1] = b.daemonCPU()
	u.pods, errs[2] = processesCPU(pids)
	return u, errors.Join(errs[:]...)
}

// machineCPU is the processor time that the machine has used.
func machineCPU() (time.Duration, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return readStat(string(stat))
}

// readStat adds up /proc/stat: its first line is "cpu" and the ticks, of which there are 100 in a second,
// as user, nice, system, idle, waiting for disks, in two kinds of interrupts, and what other machines took.
func readStat(stat string) (sum time.Duration, err error) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	for _, i := range []int{1, 2, 3, 6, 7} {
		ticks, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		sum += time.Duration(ticks) * time.Second / 100
	}
	return sum, nil
}
