// Command guest builds what a container VM boots: Debian's cloud kernel, and an initramfs that holds the
// modules that it needs, crun with its libraries, and vmagent as PID 1.
//
// Invariants: nothing is used that apt has not verified by the archive's signatures; no root is needed and
// nothing outside the output and cache directories is written; the same packages and the same source give
// the same bytes, whoever builds them and when; manifest.json, written last, says what was used.
//
//	apt (private state) -> .deb -> in memory -> kernel, initramfs, manifest.json
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"time"
)

// buildTimeout bounds a whole build; fetching some 35 MB is the slow part.
const buildTimeout = 15 * time.Minute

// sizeLimit is what kernel and initramfs may take together.
const sizeLimit = 25 << 20

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	b := builder{log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	goarch := flag.String("goarch", runtime.GOARCH, "architecture of the guest: amd64 or arm64")
	flag.StringVar(&b.out, "o", "out/guest", "output `directory`")
	flag.StringVar(&b.cache, "cache", "out/guest-cache", "`directory` for apt's lists and packages, kept between builds")
	flag.StringVar(&b.sources, "sources", "", "apt sources `file` with Debian's repositories, in place of the host's")
	flag.StringVar(&b.version, "version", "dev", "version that the agent reports")
	flag.Parse()
	if err := b.run(ctx, *goarch); err != nil {
		b.log.Error("guest image", "error", err)
		os.Exit(1)
	}
}

// target is what differs between architectures.
type target struct {
	goarch     string // Go's name, which is Debian's too
	arch       string // the manifest's and QEMU's name
	kernelMeta string // Debian's metapackage of the newest cloud kernel
	console    string
	args       []string                           // kernel arguments of this architecture alone
	pack       func(image []byte) ([]byte, error) // Debian's kernel image to what fits and QEMU boots
}

func targetOf(goarch string) (target, error) {
	switch goarch {
	case "amd64":
		return target{
			goarch: goarch, arch: "x86_64", kernelMeta: "linux-image-cloud-amd64", console: "ttyS0", pack: asIs,
			// On a busy host an emulated timer can fail the kernel's check, which is a panic.
			args: []string{"no_timer_check"},
		}, nil
	case "arm64":
		return target{
			goarch: goarch, arch: "aarch64", kernelMeta: "linux-image-cloud-arm64", console: "ttyAMA0", pack: gzipped,
		}, nil
	}
	return target{}, fmt.Errorf("-goarch %q: amd64 or arm64 would be right", goarch)
}

type builder struct {
	log                          *slog.Logger
	out, cache, sources, version string
}

func (b *builder) run(ctx context.Context, goarch string) error {
	t, err := targetOf(goarch)
	if err != nil {
		return err
	}
	apt, err := newApt(filepath.Join(b.cache, goarch), goarch, b.sources)
	if err != nil {
		return err
	}
	if err := apt.update(ctx); err != nil {
		return err
	}
	kernelDeb, err := apt.fetchKernel(ctx, t.kernelMeta)
	if err != nil {
		return err
	}
	crunDebs, err := apt.fetchWithDependencies(ctx, "crun")
	if err != nil {
		return err
	}
	b.log.Info("packages", "kernel", kernelDeb.Version, "others", len(crunDebs))
	return b.assemble(ctx, t, kernelDeb, crunDebs)
}

func (b *builder) assemble(ctx context.Context, t target, kernelDeb debPackage, crunDebs []debPackage) error {
	kernelFiles, err := unpack(ctx, kernelDeb)
	if err != nil {
		return err
	}
	kernel, release, err := kernelOf(kernelFiles, t.pack)
	if err != nil {
		return err
	}
	mods, err := resolveModules(kernelFiles, "lib/modules/"+release, containerModules())
	if err != nil {
		return err
	}
	userland := fileTree{}
	for _, p := range crunDebs {
		files, err := unpack(ctx, p)
		if err != nil {
			return err
		}
		userland.add(files)
	}
	programs, owners, err := elfClosure(userland, "usr/bin/crun")
	if err != nil {
		return err
	}
	init, err := buildAgent(ctx, t.goarch, b.version)
	if err != nil {
		return err
	}
	initramfs, err := packInitramfs(init, programs, mods)
	if err != nil {
		return err
	}
	if size := len(kernel) + len(initramfs); size > sizeLimit {
		return fmt.Errorf("kernel and initramfs have %d bytes; at most %d would be right", size, sizeLimit)
	}
	m := manifest{
		Kernel: "kernel", Initramfs: "initramfs", Arch: t.arch, Cmdline: cmdline(t), KernelRelease: release,
		Packages: usedPackages(kernelDeb, crunDebs, owners),
	}
	if err := m.write(b.out, map[string][]byte{m.Kernel: kernel, m.Initramfs: initramfs, agentFile: init}); err != nil {
		return err
	}
	b.log.Info("guest image", "dir", b.out, "release", release, "kernel", len(kernel), "initramfs", len(initramfs))
	return nil
}

// usedPackages is the kernel's package and those of which a file is in the initramfs.
func usedPackages(kernel debPackage, others []debPackage, owners map[string]bool) []debPackage {
	used := []debPackage{kernel}
	for _, p := range others {
		if owners[p.Name] {
			used = append(used, p)
		}
	}
	return used
}
