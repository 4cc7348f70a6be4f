// Command vmruntime is the CRI runtime of a node: pods of the runtime handler vm become virtual machines, everything else is containerd's.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	goruntime "runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/vmruntime/vmruntime/image"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime"
)

// launchCommand re-executes this program as the launcher of one QEMU; it is not for people.
const launchCommand = "launch"

func main() {
	// The launcher runs between fork and QEMU for every VM: nothing may come before it.
	if len(os.Args) > 1 && os.Args[1] == launchCommand {
		qemu.LaunchMain(os.Args[2:])
		return
	}
	if len(os.Args) == 2 && os.Args[1] == convertCommand {
		image.ConvertMain()
		return
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "vmruntime:", err)
		cancel()
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "vmruntime",
		Short:         "Virtual machines as ordinary Kubernetes pods, beside containers, behind one CRI socket",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	config := root.PersistentFlags().StringP("config", "c", "", "configuration `file` (default "+runtime.DefaultConfigPath+", if it is there)")
	root.AddCommand(
		&cobra.Command{
			Use:   "serve",
			Short: "Serve the CRI until SIGTERM; VM pods go on without the daemon",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, err := runtime.Load(*config)
				if err != nil {
					return err
				}
				return serve(cmd.Context(), cfg)
			},
		},
		&cobra.Command{
			Use:   "check",
			Short: "Say what this node lacks to run VM pods, and how to get it",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return printChecks(cmd.OutOrStdout(), runtime.Check(cmd.Context(), *config))
			},
		},
		configCommand(config),
		imageCommand(config),
		vmCommand(config),
		&cobra.Command{
			Use:   "version",
			Short: "Print the version",
			Args:  cobra.NoArgs,
			Run: func(cmd *cobra.Command, _ []string) {
				fmt.Fprintf(cmd.OutOrStdout(), "vmruntime %s, CRI v1, %s\n", runtime.Version(), goruntime.Version())
			},
		},
	)
	return root
}

func configCommand(path *string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the configuration in force, with comments",
		Args:  cobra.NoArgs,
	}
	defaults := cmd.Flags().Bool("default", false, "print the defaults instead")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg := runtime.Default()
		if !*defaults {
			var err error
			if cfg, err = runtime.Load(*path); err != nil {
				return err
			}
		}
		text, err := cfg.Text()
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(text)
		return err
	}
	return cmd
}

// printChecks writes one line for each result, and another for what is to be done.
func printChecks(w io.Writer, results []runtime.CheckResult) error {
	anyFailed := false
	for _, r := range results {
		anyFailed = anyFailed || r.State == runtime.CheckFail
		indented := strings.ReplaceAll(r.Found, "\n", "\n"+strings.Repeat(" ", 26))
		if _, err := fmt.Fprintf(w, "%-5s %-19s %s\n", r.State, r.Name, indented); err != nil {
			return err
		}
		if r.Fix == "" {
			continue
		}
		if _, err := fmt.Fprintf(w, "%26s-> %s\n", "", r.Fix); err != nil {
			return err
		}
	}
	if anyFailed {
		return errors.New("this node cannot run VM pods yet, or not all")
	}
	return nil
}
