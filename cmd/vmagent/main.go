// Command vmagent is PID 1 of a guest: it makes the machine ready and serves package agentpb's service on
// the virtio-serial port. As "vmagent pause" it holds a pod's namespaces, and as "modprobe -q -- ALIAS" it
// is what the kernel starts when it lacks a module. As "vmagent machine [PORT]" it is a daemon of a guest that
// has booted an operating system of its own; PORT is a device file, by default that of the virtio-serial port.
package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/guest"
)

// version is set by the build.
var version = "dev"

func main() {
	if len(os.Args) > 1 && os.Args[1] == "pause" { // more follows if a script says so
		guest.Pause()
	}
	if filepath.Base(os.Args[0]) == "modprobe" {
		modprobe(os.Args)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if len(os.Args) > 1 && len(os.Args) < 4 && os.Args[1] == "machine" {
		if err := machine(log, os.Args[2:]); err != nil {
			log.Error("vmagent machine", "error", err)
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		log.Error("vmagent runs as PID 1 of a guest, or as: vmagent machine [PORT]")
		os.Exit(2)
	}
	if err := run(log); err != nil {
		log.Error("vmagent", "error", err)
	}
	// Without an agent the guest is of no use, and its end tells the host.
	guest.PowerOff(log)
}

// modprobe loads the module that the last argument names. Nobody reads what the kernel's modprobe prints, so
// the exit status is all that tells a failure. It does not return.
func modprobe(args []string) {
	if err := guest.Modprobe(args[len(args)-1]); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func run(log *slog.Logger) error {
	if err := guest.Boot(); err != nil {
		return err
	}
	ctx := context.Background()
	port, err := guest.OpenPort(ctx)
	if err != nil {
		return err
	}
	server, err := guest.New(guest.Options{
		Version: version, Log: log, PowerOff: func() { guest.PowerOff(log) },
	})
	if err != nil {
		return err
	}
	return server.Serve(ctx, agent.Listen(port))
}

// machine serves until it is told to end, or the port fails: whoever started it starts it again then.
func machine(log *slog.Logger, args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	port, err := openPort(ctx, args)
	if err != nil {
		return err
	}
	server, err := guest.NewMachine(guest.Options{
		Version: version, Log: log, PowerOff: func() { guest.PowerOff(log) },
	})
	if err != nil {
		return err
	}
	listener := agent.Listen(port)
	defer context.AfterFunc(ctx, func() { _ = listener.Close() })()
	err = server.Serve(ctx, listener)
	if ctx.Err() != nil {
		err = nil
	}
	return errors.Join(err, server.Close())
}

func openPort(ctx context.Context, args []string) (*os.File, error) {
	if len(args) == 0 {
		return guest.OpenPort(ctx)
	}
	return os.OpenFile(args[0], os.O_RDWR|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
}
