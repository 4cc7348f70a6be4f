// Command vmagent is PID 1 of a guest: it makes the machine ready and serves package agentpb's service on
// the virtio-serial port. As "vmagent pause" it holds a pod's PID namespace, and as "modprobe -q -- ALIAS" it
// is what the kernel starts when it lacks a module.
package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/guest"
)

// version is set by the build.
var version = "dev"

func main() {
	if len(os.Args) == 2 && os.Args[1] == "pause" {
		guest.Pause()
	}
	if filepath.Base(os.Args[0]) == "modprobe" {
		modprobe(os.Args)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if os.Getpid() != 1 {
		log.Error("vmagent runs as PID 1 of a guest, or as: vmagent pause")
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
