package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/console"
	"github.com/spf13/cobra"

	"github.com/vmruntime/vmruntime/runtime/vmpb"
)

// escapeKey ends a console session: Ctrl-].
const escapeKey = 0x1d

var errEscape = errors.New("escape")

func consoleCommand(flags *vmFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "console VM",
		Short: "Join a machine's serial console; Ctrl-] ends it",
		Long: `Join a machine's serial console; Ctrl-] ends it.

All who have it open see the same, but only one may type; with --read-only one watches. What the terminal's keys send goes
to the guest as it is, Ctrl-C too. A serial line knows no size: in the guest, "stty rows 50 cols 160" sets it.

Of the guest of a pod of containers, --read-only shows the last messages of its kernel and agent.`,
		Args: cobra.ExactArgs(1),
	}
	replay := cmd.Flags().Int32("replay", 0, "show this many `lines` of before first, of the last 64 KiB since the daemon started")
	readOnly := cmd.Flags().Bool("read-only", false, "only watch")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		open := &vmpb.ConsoleRequest_Open{Vm: args[0], Input: !*readOnly, ReplayLines: *replay}
		return flags.ask(cmd.Context(), func(ctx context.Context, c vmpb.VMServiceClient) error {
			return runConsole(ctx, c, open, cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		})
	}
	return cmd
}

// runConsole joins in and out to a console until either ends, or the escape is typed. Notes go to a third writer.
func runConsole(ctx context.Context, c vmpb.VMServiceClient, open *vmpb.ConsoleRequest_Open, in io.Reader, out, notes io.Writer) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream, err := c.Console(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&vmpb.ConsoleRequest{Message: &vmpb.ConsoleRequest_Open_{Open: open}}); err != nil && !errors.Is(err, io.EOF) {
		return err // io.EOF: Recv says why
	}
	if open.GetInput() {
		restore, err := rawTerminal(in, notes)
		if err != nil {
			return err
		}
		defer closing(&err, restore)
		// Not waited for: it may stand in a Read of the terminal, which only the end of the process ends.
		go func() {
			if err := sendTyped(stream, in); err != nil {
				cancel(err)
			}
		}()
	}
	for {
		m, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF), err != nil && errors.Is(context.Cause(ctx), errEscape):
			return nil
		case err != nil && ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return err
		}
		if _, err := out.Write(m.GetData()); err != nil {
			return err
		}
	}
}

// sendTyped sends what is read. It returns errEscape for the escape, and nil at the end: then one goes on watching.
func sendTyped(stream vmpb.VMService_ConsoleClient, in io.Reader) error {
	buf := make([]byte, 4096)
	for {
		n, err := in.Read(buf)
		typed, _, escaped := bytes.Cut(buf[:n], []byte{escapeKey})
		if len(typed) > 0 {
			if err := stream.Send(&vmpb.ConsoleRequest{Message: &vmpb.ConsoleRequest_Data{Data: typed}}); err != nil {
				return nil // Recv says why
			}
		}
		if escaped {
			return errEscape
		}
		if errors.Is(err, io.EOF) {
			return stream.CloseSend()
		}
		if err != nil {
			return fmt.Errorf("read what is typed: %w", err)
		}
	}
}

// rawTerminal has a terminal send every key as it is, until restore. What is no terminal stays as it is.
func rawTerminal(in io.Reader, notes io.Writer) (restore func() error, err error) {
	f, ok := in.(*os.File)
	if !ok {
		return func() error { return nil }, nil
	}
	terminal, err := console.ConsoleFromFile(f)
	if err != nil {
		return func() error { return nil }, nil
	}
	fmt.Fprintln(notes, "Ctrl-] ends the console.")
	if err := terminal.SetRaw(); err != nil {
		return nil, fmt.Errorf("set the terminal: %w", err)
	}
	return func() error {
		fmt.Fprint(notes, "\r\n")
		return terminal.Reset()
	}, nil
}
