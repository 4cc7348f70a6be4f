package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/vmruntime/vmruntime/runtime/vmpb"
)

// shortID is how much of an ID a table shows, as crictl does.
const shortID = 13

// outputFlag adds -o; the result tells whether it asks for JSON.
func outputFlag(cmd *cobra.Command) func() (bool, error) {
	output := cmd.Flags().StringP("output", "o", "text", "`format`: text or json")
	return func() (bool, error) {
		switch *output {
		case "text", "json":
			return *output == "json", nil
		}
		return false, fmt.Errorf("--output is %q; it has to be text or json", *output)
	}
}

func listCommand(flags *vmFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the VM pods of this node",
		Args:  cobra.NoArgs,
	}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		return flags.askSoon(cmd.Context(), func(ctx context.Context, c vmpb.VMServiceClient) error {
			resp, err := c.List(ctx, &vmpb.ListRequest{})
			if err != nil {
				return err
			}
			if wantJSON {
				return printJSON(cmd.OutOrStdout(), resp)
			}
			return printList(cmd.OutOrStdout(), resp, time.Now())
		})
	}
	return cmd
}

func showCommand(flags *vmFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show VM",
		Short: "Show all about one VM: its QEMU, disks, network, containers, and what its guest tells",
		Args:  cobra.ExactArgs(1),
	}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		return flags.askSoon(cmd.Context(), func(ctx context.Context, c vmpb.VMServiceClient) error {
			resp, err := c.Show(ctx, &vmpb.ShowRequest{Vm: args[0]})
			if err != nil {
				return err
			}
			if wantJSON {
				return printJSON(cmd.OutOrStdout(), resp)
			}
			return printVM(cmd.OutOrStdout(), resp, time.Now())
		})
	}
	return cmd
}

// printJSON writes a message with all its fields. What is JSON in a string becomes part of the whole.
func printJSON(w io.Writer, m proto.Message) error {
	data, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return err
	}
	if show, ok := m.(*vmpb.ShowResponse); ok {
		if data, err = withInfo(data, show.GetInfo()); err != nil {
			return err
		}
	}
	var out bytes.Buffer // protojson's own white space is random on purpose
	if err := json.Indent(&out, data, "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err = out.WriteTo(w)
	return err
}

func withInfo(data []byte, info map[string]string) ([]byte, error) {
	var object map[string]json.RawMessage
	if err := json.Unmarshal(data, &object); err != nil {
		return nil, err
	}
	parsed := make(map[string]json.RawMessage)
	for name, text := range info {
		parsed[name] = json.RawMessage(text)
	}
	var err error
	if object["info"], err = json.Marshal(parsed); err != nil {
		return nil, err
	}
	return json.Marshal(object)
}

func printList(w io.Writer, list *vmpb.ListResponse, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "POD ID\tNAMESPACE\tPOD\tFORM\tSTATE\tVCPUS\tMEMORY\tIP\tUPTIME")
	for _, vm := range list.GetVms() {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", vm.GetPodId()[:min(shortID, len(vm.GetPodId()))], vm.GetNamespace(), vm.GetName(), vm.GetForm(),
			vm.GetState(), vm.GetVcpus(), mebibytes(vm.GetMemoryBytes()), first(vm.GetAddresses()), uptime(vm, now))
	}
	return t.Flush()
}

func first(list []string) string {
	if len(list) == 0 {
		return "-"
	}
	return list[0]
}

func uptime(vm *vmpb.VM, now time.Time) string {
	if vm.GetStartedAtUnixNano() == 0 {
		return "-"
	}
	return now.Sub(time.Unix(0, vm.GetStartedAtUnixNano())).Truncate(time.Second).String()
}

func mebibytes(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }

// printVM says first what the VM is, then what it consists of, then what its guest tells.
func printVM(w io.Writer, v *vmpb.ShowResponse, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, name+"\t"+format+"\n", args...) }
	vm := v.GetVm()
	row("pod", "%s/%s", vm.GetNamespace(), vm.GetName())
	row("pod ID", "%s", vm.GetPodId())
	row("form", "%s", vm.GetForm())
	row("state", "%s", vm.GetState())
	row("vCPUs", "%d", vm.GetVcpus())
	row("memory", "%s", size(vm.GetMemoryBytes()))
	if v.GetQemuPid() != 0 {
		row("uptime", "%s", uptime(vm, now))
		row("QEMU", "process %d, acceleration %s", v.GetQemuPid(), cmp.Or(v.GetAcceleration(), "unknown"))
	}
	if m := v.GetMemory(); m != nil {
		row("balloon", "%s for the guest", size(m.GetActualBytes()))
		if m.GetTotalBytes() > 0 {
			row("guest memory", "%s of %s available", mebibytes(m.GetAvailableBytes()), mebibytes(m.GetTotalBytes()))
		}
	}
	for _, d := range v.GetDisks() {
		row("disk", "%s: read %s in %d, written %s in %d", d.GetSerial(), mebibytes(d.GetReadBytes()), d.GetReads(), mebibytes(d.GetWriteBytes()), d.GetWrites())
	}
	printInterfaces(row, "network", v.GetInterfaces())
	for _, c := range v.GetContainers() {
		end := ""
		if c.GetState() == "exited" {
			end = strings.TrimRight(fmt.Sprintf(", exit code %d, %s %s", c.GetExitCode(), c.GetReason(), c.GetMessage()), " ")
		}
		row("container", "%s %s, %s%s", c.GetName(), c.GetId(), c.GetState(), end)
		row("  image", "%s", c.GetImage())
	}
	if v.GetAgent() {
		row("agent", "vmagent answers")
	}
	printGuest(row, v.GetGuest())
	return t.Flush()
}

type rowFunc func(name, format string, args ...any)

func printInterfaces(row rowFunc, name string, list []*vmpb.Interface) {
	for _, i := range list {
		mtu := ""
		if i.GetMtu() != 0 {
			mtu = fmt.Sprintf(", MTU %d", i.GetMtu())
		}
		row(name, "%s: %s%s, %s", i.GetName(), i.GetMac(), mtu, cmp.Or(strings.Join(i.GetAddresses(), " "), "no addresses"))
	}
}

func printGuest(row rowFunc, g *vmpb.Guest) {
	if g == nil {
		return
	}
	row("guest agent", "qemu-guest-agent answers")
	row("  system", "%s", cmp.Or(g.GetOs(), "not told"))
	row("  kernel", "%s", cmp.Or(g.GetKernel(), "not told"))
	row("  host name", "%s", cmp.Or(g.GetHostname(), "not told"))
	printInterfaces(row, "  network", g.GetInterfaces())
	for _, f := range g.GetFileSystems() {
		row("  file system", "%s: %s, %s of %s used", f.GetMountPoint(), f.GetType(), mebibytes(f.GetUsedBytes()), mebibytes(f.GetTotalBytes()))
	}
	if len(g.GetUsers()) > 0 {
		row("  users", "%s", strings.Join(g.GetUsers(), " "))
	}
}
