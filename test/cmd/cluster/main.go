// Command cluster brings up a Kubernetes of one node on vmruntime and leaves it up, in the background, until it is told
// to take it down:
//
//	cluster up     returns when the cluster is ready, and prints how to use it
//	cluster down   removes the pods and the cluster
//
// There is one such cluster for a state directory.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/test/cluster"
)

const (
	upTimeout   = 10 * time.Minute
	downTimeout = 5 * time.Minute
)

// lockFD is the descriptor of the lock in the owner.
const lockFD = 3

type flags struct{ state, vmruntime, guest, accel string }

func main() {
	var f flags
	flag.StringVar(&f.state, "state", "out/cluster", "`directory` of the process ID, the log and a link to kubectl's configuration")
	flag.StringVar(&f.vmruntime, "vmruntime", "bin/vmruntime", "vmruntime's `program`")
	flag.StringVar(&f.guest, "guest", "out/guest", "`directory` that make guest wrote")
	flag.StringVar(&f.accel, "accel", "auto", "kvm, tcg or auto")
	flag.Parse()
	if err := run(f, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(f flags, command string) error {
	for _, p := range []*string{&f.state, &f.vmruntime, &f.guest} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	switch command {
	case "up":
		return f.up()
	case "down":
		return f.down()
	case "serve": // what up leaves in the background
		return f.serve()
	}
	return fmt.Errorf("command %q is unknown, want up or down", command)
}

func (f flags) file(name string) string { return filepath.Join(f.state, name) }

// up starts a process that is the cluster's owner, and waits until it says how to use the cluster.
func (f flags) up() error {
	if err := os.MkdirAll(f.state, 0o755); err != nil {
		return err
	}
	lock, err := f.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := os.Remove(f.file("usage")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	log, err := os.Create(f.file("log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", "-state", f.state, "-vmruntime", f.vmruntime, "-guest", f.guest, "-accel", f.accel, "serve")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{lock} // held until the owner ends
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	deadline := time.After(upTimeout)
	for {
		if usage, err := os.ReadFile(f.file("usage")); err == nil {
			fmt.Print(string(usage))
			return nil
		}
		select {
		case err := <-ended:
			return fmt.Errorf("the cluster did not come up: %w\n%s", err, readFile(log.Name()))
		case <-deadline:
			return errors.Join(fmt.Errorf("the cluster is not up after %s, see %s", upTimeout, log.Name()), cmd.Process.Signal(syscall.SIGTERM))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// lock is held by the cluster's owner for as long as it lives.
func (f flags) lock() (*os.File, error) {
	lock, err := os.OpenFile(f.file("pid"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("a cluster of %s is up (process %s): take it down first", f.state, readFile(lock.Name())), lock.Close())
	}
	return lock, nil
}

// down ends the owner, and fails when it did.
func (f flags) down() error {
	lock, err := f.lock()
	if err == nil {
		fmt.Println("no cluster is up")
		return lock.Close()
	}
	pid, err := strconv.Atoi(strings.TrimSpace(readFile(f.file("pid"))))
	if err != nil {
		return err
	}
	owner, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("find process %d: %w", pid, err)
	}
	defer unix.Close(owner)
	if err := unix.PidfdSendSignal(owner, unix.SIGTERM, nil, 0); err != nil {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	fds := []unix.PollFd{{Fd: int32(owner), Events: unix.POLLIN}}
	for deadline := time.Now().Add(downTimeout); ; {
		n, err := unix.Poll(fds, int(time.Until(deadline).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return errors.Join(fmt.Errorf("the cluster is not down after %s, see %s", downTimeout, f.file("log")), err)
		}
		break
	}
	if log := readFile(f.file("log")); log != "" {
		return errors.New(log)
	}
	return nil
}

// serve owns the cluster until it is told to end.
func (f flags) serve() error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := os.WriteFile(f.file("pid"), []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
		return err
	}
	unix.CloseOnExec(lockFD) // what the cluster leaves running is not its owner
	start := time.Now()
	c, err := cluster.Start(ctx, cluster.Options{VMRuntime: f.vmruntime, GuestDir: f.guest, Accel: f.accel})
	if err != nil {
		return err
	}
	tmp := f.file("usage.tmp")
	err = errors.Join(os.WriteFile(tmp, []byte(usage(c, time.Since(start))), 0o644), os.Rename(tmp, f.file("usage")))
	if err == nil {
		<-ctx.Done()
	}
	return errors.Join(err, c.Stop(), os.Remove(f.file("usage")))
}

func usage(c *cluster.Cluster, took time.Duration) string {
	return fmt.Sprintf(`The cluster is up, after %s. Its logs are in %s. Talk to it with:

  export KUBECONFIG=%s
  export PATH=%s:$PATH
  kubectl get nodes,runtimeclasses
  kubectl apply -f pod.yaml          # runtimeClassName: vm makes a VM of it

Any image name resolves to the test's own registry, see test/images. Service and pod addresses are those of the node's
network namespace: %s
Take it down with: make cluster-down
`, took.Round(time.Second), filepath.Dir(c.LogFile("kubelet")), c.Kubeconfig(), filepath.Dir(c.KubectlProgram()),
		strings.Join(c.Node().Command(context.Background(), "curl").Args, " "))
}

func readFile(name string) string {
	data, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	return string(data)
}
