// Command bench measures what a VM pod costs and what passing through vmruntime costs, on a private node with
// real containerd, QEMU and guest, and in a Kubernetes of such a node.
//
// Every figure that is compared is taken in the same run as its baseline, in turns with it, so that a load that
// comes and goes meets both. It fails when something cannot be measured, never because a bar is missed. What it
// starts is gone when it ends, also on an error or a signal.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vmruntime/vmruntime/test/images"
	"github.com/vmruntime/vmruntime/test/node"
)

// runTimeout bounds the measurements; what follows is the teardown.
const runTimeout = 2 * time.Hour

func main() {
	var o options
	flag.StringVar(&o.out, "o", "out/bench.json", "where the figures are written")
	flag.StringVar(&o.vmruntime, "vmruntime", "bin/vmruntime", "the program that make build leaves")
	flag.StringVar(&o.guest, "guest", "out/guest", "the directory that make guest leaves")
	flag.StringVar(&o.accel, "accel", "tcg", "tcg or kvm")
	flag.StringVar(&o.plot, "plot", "", "where a picture of the starts is written, as SVG")
	flag.IntVar(&o.starts, "starts", 20, "repetitions of each start")
	flag.IntVar(&o.execs, "execs", 50, "repetitions of a command in a container")
	flag.IntVar(&o.calls, "calls", 1000, "repetitions of each unary call")
	flag.IntVar(&o.containers, "containers", 30, "repetitions of a container's start")
	flag.IntVar(&o.lists, "lists", 300, "repetitions of each list of stored pods")
	flag.IntVar(&o.burst, "burst", 50, "VM pods that are started at once")
	flag.IntVar(&o.idle, "idle", 100, "idle VM pods whose memory and processor time is measured, those of the burst among them; each needs 150 MiB")
	flag.IntVar(&o.stored, "stored", 500, "VM pods in the store while lists are measured")
	flag.IntVar(&o.machines, "machines", 5, "repetitions of each boot of a machine")
	flag.IntVar(&o.sharing, "sharing", 10, "machines of one image whose disk and memory is measured")
	flag.IntVar(&o.fio, "fio", 3, "repetitions of fio in a machine")
	flag.IntVar(&o.downloads, "downloads", 5, "repetitions of a download from a machine")
	flag.IntVar(&o.critest, "critest", 5, "repetitions of critest's benchmarks, in each of two rounds")
	flag.IntVar(&o.pods, "pods", 50, "repetitions of each start of a pod in a cluster")
	flag.IntVar(&o.many, "many", 100, "pods of the cluster's node that is measured while idle; a VM pod takes about 150 MiB")
	flag.StringVar(&o.only, "only", "", "measure only what has this in its name")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		cancel()
		os.Exit(1)
	}
}

type options struct {
	out, plot, vmruntime, guest, accel         string
	execs                                      int
	starts, calls, containers, lists, stored   int
	machines, sharing, fio, downloads, critest int
	burst, idle, pods, many                    int
	only                                       string
}

func (o *options) check() error {
	for _, n := range []struct {
		flag  string
		value int
	}{{"starts", o.starts}, {"execs", o.execs}, {"calls", o.calls}, {"containers", o.containers}, {"lists", o.lists}, {"burst", o.burst}, {"idle", o.idle}, {"stored", o.stored}, {"machines", o.machines}, {"sharing", o.sharing}, {"fio", o.fio}, {"downloads", o.downloads}, {"critest", o.critest}, {"pods", o.pods}, {"many", o.many}} {
		if n.value < 1 {
			return fmt.Errorf("-%s is %d; it has to be at least 1", n.flag, n.value)
		}
	}
	if o.accel != "tcg" && o.accel != "kvm" {
		return fmt.Errorf("-accel is %q; it has to be tcg or kvm, so that the baseline has the same", o.accel)
	}
	var err, guestErr error
	o.vmruntime, err = filepath.Abs(o.vmruntime)
	o.guest, guestErr = filepath.Abs(o.guest)
	return errors.Join(err, guestErr)
}

// bench is one run.
type bench struct {
	options
	node   *node.Node
	vm     *cri // vmruntime's socket
	direct *cri // containerd's own
	logs   string
	report report
	plot   plot
}

// run measures everything, and writes what it found, also when it could not measure all.
func run(ctx context.Context, o options) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	b := &bench{options: o}
	if err := b.describe(ctx); err != nil {
		return err
	}
	progress("starting a private node")
	if b.node, err = node.Start(ctx, node.Options{VMRuntime: o.vmruntime, GuestDir: o.guest, Accel: o.accel}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.node.Stop()) }()
	err = b.measure(ctx)
	b.report.print(os.Stdout)
	return errors.Join(err, b.report.write(o.out), b.plot.write(o.plot, b.report.machine))
}

func (b *bench) measure(ctx context.Context) (err error) {
	if b.vm, err = dial(b.node.Socket()); err != nil {
		return err
	}
	defer b.vm.close()
	if b.direct, err = dial(b.node.ContainerdSocket()); err != nil {
		return err
	}
	defer b.direct.close()
	b.logs = filepath.Join(b.node.Root, "pod-logs")
	if err := b.vm.pull(ctx, images.Busybox); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"cold starts", b.coldStarts},
		{"starts from a template", b.templateStarts},
		{"starts of other sizes", b.sizedStarts},
		{"commands in containers", b.execTimes},
		{"ends of killed VMs", b.killedVMs},
		{"delegated calls", b.delegatedCalls},
		{"a burst and many idle pods", b.idlePods},
		{"lists of stored VM pods", b.storedPods},
		{"calls by method", b.callTimes},
		{"critest's benchmarks", b.criBenchmarks},
		{"starts of pods in a cluster", b.inCluster((*bench).clusterStarts)},
		{"a cluster's idle node", b.inCluster((*bench).clusterMany)},
		{"boots of machines", b.machineBoots},
		{"machines of one image", b.sharedImage},
		{"disks and networks of machines", b.machineIO},
	} {
		if !strings.Contains(step.name, b.only) {
			continue
		}
		progress("measuring " + step.name)
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

var began = time.Now()

// progress tells on the error output what takes time.
func progress(what string) {
	fmt.Fprintf(os.Stderr, "%6.1fs %s\n", time.Since(began).Seconds(), what)
}
