package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Daemon is a process of the node. The nil daemon is one that never started.
type Daemon struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended and was waited for
}

// StartDaemon starts a program in the node's network namespace; what it prints
// is appended to its log file. Whoever starts it stops it before the node.
func (n *Node) StartDaemon(name, program string, args ...string) (*Daemon, error) {
	log, err := os.OpenFile(n.LogFile(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d := &Daemon{name: name, log: log.Name(), done: make(chan struct{})}
	d.cmd = n.Command(context.Background(), program, args...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.Dir = n.Root
	d.cmd.Env = append(os.Environ(), "PATH="+n.tools["runc"]+":"+n.tools["containerd"]+":"+os.Getenv("PATH"))
	// Signals of a terminal are for the test, which then ends the daemon.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	n.daemons = append(slices.DeleteFunc(n.daemons, func(d *Daemon) bool { return !d.Running() }), d)
	go func() {
		_ = d.cmd.Wait() // the state says how it ended
		close(d.done)
	}()
	return d, nil
}

// Running tells whether the daemon has not ended.
func (d *Daemon) Running() bool {
	if d == nil {
		return false
	}
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// PID is the daemon's process ID, 0 when it does not run.
func (d *Daemon) PID() int {
	if !d.Running() {
		return 0
	}
	return d.cmd.Process.Pid
}

// daemonStopTimeout is how long a daemon may take to end after SIGTERM.
const daemonStopTimeout = 20 * time.Second

// Stop ends the daemon with SIGTERM. One that does not heed it is killed, which
// is an error.
func (d *Daemon) Stop() error {
	if !d.Running() {
		return nil
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.done:
		return nil
	case <-time.After(daemonStopTimeout):
	}
	return errors.Join(fmt.Errorf("%s did not end within %s of SIGTERM, see %s", d.name, daemonStopTimeout, d.log), d.Kill())
}

// Kill ends the daemon with SIGKILL.
func (d *Daemon) Kill() error {
	if !d.Running() {
		return nil
	}
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-d.done
	return nil
}

// readyTimeout is how long a daemon may take until its CRI answers.
const readyTimeout = 60 * time.Second

// await returns when the daemon's CRI answers and its network is ready.
func (n *Node) await(ctx context.Context, d *Daemon, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := runtimeapi.NewRuntimeServiceClient(conn)
	for {
		call, stop := context.WithTimeout(ctx, time.Second)
		status, err := client.Status(call, &runtimeapi.StatusRequest{})
		stop()
		if err == nil {
			if err = unmet(status); err == nil {
				return nil
			}
		}
		select {
		case <-d.done:
			return fmt.Errorf("%s ended (%s) before it was ready:\n%s", d.name, d.cmd.ProcessState, tail(d.log))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w:\n%s", d.name, err, tail(d.log))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func unmet(status *runtimeapi.StatusResponse) error {
	for _, c := range status.GetStatus().GetConditions() {
		if !c.Status && (c.Type == runtimeapi.RuntimeReady || c.Type == runtimeapi.NetworkReady) {
			return fmt.Errorf("condition %s is false: %s", c.Type, c.Message)
		}
	}
	return nil
}

// tail is the end of a log file.
func tail(file string) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return string(data[max(0, len(data)-4000):])
}

// Tail is the end of what the daemon printed.
func (d *Daemon) Tail() string { return tail(d.log) }
