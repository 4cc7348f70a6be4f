// Command vmagent is PID 1 of a guest: it makes the machine ready and serves package agentpb's service on
// the virtio-serial port. As "vmagent pause" it holds a pod's PID namespace.
package main

import (
	"context"
	"log/slog"
	"os"

	"github.com/vmruntime/vmruntime/agent"
	"github.com/vmruntime/vmruntime/agent/guest"
)

// version is set by the build.
var version = "dev"

func main() {
	if len(os.Args) == 2 && os.Args[1] == "pause" {
		guest.Pause()
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
