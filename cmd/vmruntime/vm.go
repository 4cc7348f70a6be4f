package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/vmruntime/vmruntime/runtime"
	"github.com/vmruntime/vmruntime/runtime/vmpb"
)

const (
	// answerTimeout bounds a call that is no stream. A guest that is asked to reboot may take most of it.
	answerTimeout = time.Minute
	// maxAnswer bounds one answer in bytes; screenshots are the largest.
	maxAnswer = 64 << 20
)

// vmFlags are those of all vm commands.
type vmFlags struct {
	config, address string
}

func vmCommand(config *string) *cobra.Command {
	var flags vmFlags
	cmd := &cobra.Command{
		Use:   "vm",
		Short: "List the VMs of this node, look into them, pause, reset and reboot them",
		Long: `List the VMs of this node, look into them, pause, reset and reboot them.

VM is the ID of a pod or of one of its containers, or the beginning of one, or NAMESPACE/NAME of a pod. The daemon has to
run; only root may speak to it.`,
		Args: cobra.NoArgs,
		PersistentPreRun: func(*cobra.Command, []string) {
			flags.config = *config
		},
	}
	cmd.PersistentFlags().StringVar(&flags.address, "address", "", "the daemon's `socket` for administrators (default server.admin_socket of the configuration)")
	cmd.AddCommand(listCommand(&flags), showCommand(&flags), screenshotCommand(&flags), consoleCommand(&flags), vncCommand(&flags), rebootCommand(&flags), cloneCommand(&flags))
	cmd.AddCommand(actionCommands(&flags)...)
	cmd.AddCommand(saveCommands(&flags)...)
	return cmd
}

// ask calls the daemon. An error of its is told in its own words.
func (f *vmFlags) ask(ctx context.Context, call func(context.Context, vmpb.VMServiceClient) error) (err error) {
	path := f.address
	if path == "" {
		cfg, err := runtime.Load(f.config)
		if err != nil {
			return err
		}
		path = cfg.Server.AdminSocket
	}
	// gRPC would say less clearly what is wrong with the socket.
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	first, err := dial(ctx, path)
	if err != nil {
		return fmt.Errorf("the daemon does not answer: %w; `vmruntime serve` has to run, with server.admin_socket at this path", err)
	}
	if err := first.Close(); err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:daemon", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dial), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
	if err != nil {
		return err
	}
	defer closing(&err, conn.Close)
	err = call(ctx, vmpb.NewVMServiceClient(conn))
	if s, ok := status.FromError(err); ok && err != nil {
		return errors.New(s.Message())
	}
	return err
}

// askSoon is ask for calls that are no streams.
func (f *vmFlags) askSoon(ctx context.Context, call func(context.Context, vmpb.VMServiceClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return f.ask(ctx, call)
}

// actionCommands are those that say nothing when they have succeeded.
func actionCommands(flags *vmFlags) []*cobra.Command {
	var out []*cobra.Command
	for _, a := range []struct {
		name, short string
		call        func(context.Context, vmpb.VMServiceClient, string) error
	}{
		{"pause", "Stop a guest's processors; its memory, disks and network stay", func(ctx context.Context, c vmpb.VMServiceClient, vm string) error {
			_, err := c.Pause(ctx, &vmpb.PauseRequest{Vm: vm})
			return err
		}},
		{"resume", "Let a paused guest go on", func(ctx context.Context, c vmpb.VMServiceClient, vm string) error {
			_, err := c.Resume(ctx, &vmpb.ResumeRequest{Vm: vm})
			return err
		}},
		{"reset", "Press a machine's reset button: its system ends without being asked, and boots again", func(ctx context.Context, c vmpb.VMServiceClient, vm string) error {
			_, err := c.Reset(ctx, &vmpb.ResetRequest{Vm: vm})
			return err
		}},
		{"nmi", "Send a guest an interrupt that cannot be masked, at which it may dump its memory", func(ctx context.Context, c vmpb.VMServiceClient, vm string) error {
			_, err := c.NMI(ctx, &vmpb.NMIRequest{Vm: vm})
			return err
		}},
	} {
		out = append(out, &cobra.Command{
			Use: a.name + " VM", Short: a.short, Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return flags.askSoon(cmd.Context(), func(ctx context.Context, c vmpb.VMServiceClient) error { return a.call(ctx, c, args[0]) })
			},
		})
	}
	return out
}

const (
	// saveTimeout bounds saving and restoring a VM, cloneTimeout copying a disk.
	saveTimeout  = 10 * time.Minute
	cloneTimeout = time.Hour
)

// saveCommands are those of snapshots.
func saveCommands(flags *vmFlags) []*cobra.Command {
	var out []*cobra.Command
	for _, a := range []struct {
		name, short, long string
		call              func(context.Context, vmpb.VMServiceClient, string, string) error
	}{
		{
			"snapshot", "Write a VM that runs, its memory and its disk, into an empty directory",
			`Write a VM that runs, its memory and its disk, into an empty directory.

The guest stands still meanwhile. The directory has all of the guest's memory, and so its secrets. That of a machine is for
"vm restore"; that of a pod of containers is what CheckpointPod of the CRI writes.`,
			func(ctx context.Context, c vmpb.VMServiceClient, vm, dir string) error {
				_, err := c.Snapshot(ctx, &vmpb.SnapshotRequest{Vm: vm, Directory: dir})
				return err
			},
		},
		{
			"restore", "Make a machine that runs what it was at a snapshot",
			`Make a machine that runs what it was at a snapshot.

What it has done since is lost. The snapshot has to be of the same sandbox; its container, network and log go on.`,
			func(ctx context.Context, c vmpb.VMServiceClient, vm, dir string) error {
				_, err := c.Restore(ctx, &vmpb.RestoreRequest{Vm: vm, Directory: dir})
				return err
			},
		},
	} {
		out = append(out, &cobra.Command{
			Use: a.name + " VM DIRECTORY", Short: a.short, Long: a.long, Args: cobra.ExactArgs(2),
			RunE: func(cmd *cobra.Command, args []string) error {
				dir, err := filepath.Abs(args[1])
				if err != nil {
					return err
				}
				ctx, cancel := context.WithTimeout(cmd.Context(), saveTimeout)
				defer cancel()
				return flags.ask(ctx, func(ctx context.Context, c vmpb.VMServiceClient) error { return a.call(ctx, c, args[0], dir) })
			},
		})
	}
	return out
}

func cloneCommand(flags *vmFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "clone VM FILE",
		Short: "Write a machine's disk to a file, from which other machines can be made",
		Long: `Write a machine's disk to a file, from which other machines can be made: with "vmruntime image import FILE NAME".

The disk is as it is at one moment; the machine runs meanwhile. qemu-guest-agent, where the machine runs it, freezes the file
systems for that moment. Otherwise the disk is as after a power cut. The file must not exist; it becomes a qcow2 image. What makes the machine itself,
such as the machine ID and SSH host keys, is on it too.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), cloneTimeout)
			defer cancel()
			return flags.ask(ctx, func(ctx context.Context, c vmpb.VMServiceClient) error {
				resp, err := c.Clone(ctx, &vmpb.CloneRequest{Vm: args[0], File: file})
				if err != nil {
					return err
				}
				how := "as after a power cut: no guest agent has frozen the file systems"
				if resp.GetFrozen() {
					how = "with frozen file systems"
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "copied %s\n", how)
				return err
			})
		},
	}
}

func rebootCommand(flags *vmFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "reboot VM",
		Short: "Ask a machine's system to boot again, and say who was asked",
		Long: `Ask a machine's system to boot again, and say who was asked.

That is the agent vmagent, else qemu-guest-agent, else the keyboard by Ctrl-Alt-Del: ACPI has a button for powering off
only. The command does not wait, and cannot know whether the system obeys.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return flags.askSoon(cmd.Context(), func(ctx context.Context, c vmpb.VMServiceClient) error {
				resp, err := c.Reboot(ctx, &vmpb.RebootRequest{Vm: args[0]})
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "asked %s\n", resp.GetBy())
				return err
			})
		},
	}
}

func screenshotCommand(flags *vmFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "screenshot VM FILE.png",
		Short: "Write what a machine shows to a PNG file, or to standard output for the file -",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return flags.askSoon(cmd.Context(), func(ctx context.Context, c vmpb.VMServiceClient) error {
				resp, err := c.Screenshot(ctx, &vmpb.ScreenshotRequest{Vm: args[0]})
				if err != nil {
					return err
				}
				if args[1] == "-" {
					_, err := cmd.OutOrStdout().Write(resp.GetPng())
					return err
				}
				return os.WriteFile(args[1], resp.GetPng(), 0o600) // a screen may show what is secret
			})
		},
	}
}
