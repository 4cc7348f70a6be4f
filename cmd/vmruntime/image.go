package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"text/tabwriter"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/vmruntime/vmruntime/image"
	"github.com/vmruntime/vmruntime/runtime"
)

const (
	// convertCommand re-executes this program as the confinement of one qemu-img; it is not for people.
	convertCommand = "convert"
	dialTimeout    = 10 * time.Second
)

// imageFlags are those of all image commands.
type imageFlags struct {
	config, address, namespace, temp string
}

func imageCommand(config *string) *cobra.Command {
	var flags imageFlags
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Pack disks into images, and look into images",
		Args:  cobra.NoArgs,
		PersistentPreRun: func(*cobra.Command, []string) {
			flags.config = *config
		},
	}
	cmd.PersistentFlags().StringVar(&flags.address, "address", "", "containerd's `socket` (default containerd.address of the configuration)")
	cmd.PersistentFlags().StringVar(&flags.namespace, "namespace", "k8s.io", "containerd's namespace; that of Kubernetes is k8s.io")
	cmd.PersistentFlags().StringVar(&flags.temp, "tmp", "", "`directory` for converted and unpacked disks (default $TMPDIR, or /tmp)")
	cmd.AddCommand(importCommand(&flags), inspectCommand(&flags))
	return cmd
}

// dial connects to containerd.
func (f *imageFlags) dial() (*containerd.Client, error) {
	address := f.address
	if address == "" {
		cfg, err := runtime.Load(f.config)
		if err != nil {
			return nil, err
		}
		address = cfg.Containerd.Address
	}
	address, err := filepath.Abs(address)
	if err != nil {
		return nil, err
	}
	client, err := containerd.New(address, containerd.WithTimeout(dialTimeout))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, err)
	}
	return client, nil
}

func importCommand(flags *imageFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import DISK NAME[:TAG]",
		Short: "Pack a disk into an image that boots as a pod",
		Long: `Pack a disk into an image that boots as a pod.

DISK is a file in one of the formats qcow2, raw, VMDK and VDI. All but qcow2 are converted to it by qemu-img, which runs
confined and needs root. The image has the disk at /disk/NAME.qcow2, where KubeVirt too looks for it.`,
		Args: cobra.ExactArgs(2),
	}
	output := cmd.Flags().StringP("output", "o", "", "write an OCI archive to `FILE` instead of an image into containerd")
	arch := cmd.Flags().String("arch", "", "architecture of the disk's system, amd64 or arm64 (default this machine's)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		show := &progress{w: cmd.ErrOrStderr()}
		packed, err := importDisk(cmd.Context(), flags, *output, image.PackOptions{
			Disk: args[0], Name: args[1], Architecture: *arch, TempDir: flags.temp,
			Launcher: []string{"/proc/self/exe", convertCommand}, Progress: show.report,
		})
		show.end()
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n  image ID  %s\n  manifest  %s\n  disk      /%s, %s, file %s, packed %s\n",
			packed.Name, packed.Config, packed.Manifest, packed.File, size(packed.VirtualSize), size(packed.FileSize), size(packed.LayerSize))
		return err
	}
	return cmd
}

func importDisk(ctx context.Context, flags *imageFlags, output string, o image.PackOptions) (_ *image.Packed, err error) {
	if output != "" {
		return image.WriteArchive(ctx, output, o)
	}
	if _, err := os.Stat(o.Disk); err != nil { // before waiting for containerd
		return nil, err
	}
	client, err := flags.dial()
	if err != nil {
		return nil, err
	}
	defer closing(&err, client.Close)
	return image.Import(ctx, client, flags.namespace, o)
}

func inspectCommand(flags *imageFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "inspect IMAGE|ARCHIVE",
		Short: "Say what is inside an image of containerd, or an OCI archive, and whether it boots as a machine",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := inspect(cmd.Context(), flags, args[0])
			if err != nil {
				return err
			}
			return printContents(cmd.OutOrStdout(), c)
		},
	}
}

// inspect takes what is a file for an archive, and all else for an image's name or ID.
func inspect(ctx context.Context, flags *imageFlags, arg string) (_ *image.Contents, err error) {
	if info, err := os.Stat(arg); err == nil && info.Mode().IsRegular() {
		return image.InspectArchive(ctx, arg, flags.temp)
	}
	client, err := flags.dial()
	if err != nil {
		return nil, err
	}
	defer closing(&err, client.Close)
	dir, err := os.MkdirTemp(flags.temp, "vmruntime-inspect-")
	if err != nil {
		return nil, err
	}
	defer closing(&err, func() error { return os.RemoveAll(dir) })
	store, err := image.New(image.Options{Root: dir, Client: client, Namespace: flags.namespace})
	if err != nil {
		return nil, err
	}
	defer closing(&err, store.Close)
	return store.Inspect(ctx, arg)
}

// printContents says first what a pod of the image would be.
func printContents(w io.Writer, c *image.Contents) error {
	verdict := "a machine that boots /" + c.Chosen
	switch {
	case errdefs.IsNotFound(c.Verdict):
		verdict = "an ordinary image: " + c.Verdict.Error()
	case c.Verdict != nil:
		verdict = "refused: " + c.Verdict.Error()
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, name+"\t"+format+"\n", args...) }
	row("image", "%s", c.Name)
	row("is", "%s", verdict)
	row("image ID", "%s", c.Digest)
	row("chain ID", "%s", c.ChainID)
	row("platform", "%s/%s", c.Platform.OS, c.Platform.Architecture)
	row("packed size", "%s", size(c.LayerSize))
	for _, d := range c.Disks {
		row("disk", "/%s", d.Name)
		if d.Refused != "" {
			row("  check", "refused: %s", d.Refused)
			continue
		}
		row("  format", "%s", d.Format)
		row("  size", "%s, allocated %s, file %s", size(d.VirtualSize), size(d.Allocated), size(d.FileSize))
		if q := d.Details; q != nil {
			row("  qcow2", "version %d, clusters of %s, compressed %t, internal snapshots %d", q.Version, size(q.ClusterSize), q.Compressed, q.Snapshots)
		}
		row("  check", "ok")
	}
	for _, k := range c.Kernels {
		row("kernel or initrd", "/%s", k)
	}
	return t.Flush()
}

// size writes bytes for people, and exactly.
func size(n int64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB"}
	v, unit := float64(n), 0
	for v >= 1024 && unit < len(units)-1 {
		v, unit = v/1024, unit+1
	}
	if unit == 0 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%.1f %s (%d bytes)", v, units[unit], n)
}

// progress writes one line for each stage, over itself on a terminal.
type progress struct {
	mu       sync.Mutex
	w        io.Writer
	stage    string
	terminal bool
	open     bool // a line has no end yet
	last     time.Time
}

const progressEvery = 200 * time.Millisecond

func (p *progress) report(stage string, done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if stage != p.stage {
		p.finish()
		p.stage, p.last = stage, time.Time{}
		if f, ok := p.w.(*os.File); ok {
			info, err := f.Stat()
			p.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
		}
		if !p.terminal {
			fmt.Fprintln(p.w, stage)
		}
	}
	now := time.Now()
	if !p.terminal || now.Sub(p.last) < progressEvery && done != total {
		return
	}
	p.last, p.open = now, true
	percent := ""
	if total > 0 {
		percent = fmt.Sprintf(" %3d %%", done*100/total)
	}
	fmt.Fprintf(p.w, "\r%s%s", stage, percent)
}

func (p *progress) finish() {
	if p.open {
		fmt.Fprintln(p.w)
		p.open = false
	}
}

func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.finish()
}
