package runtime

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/qemu"
	"github.com/vmruntime/vmruntime/runtime/cgroup"
)

// The huge pages of a container VM are the node's, beside the pod's memory, as Kubernetes counts them: QEMU takes them all when
// it starts, and the guest reserves as many. Containers have a cgroup limit each.

const (
	hugePageName = "2MB" // of qemu.HugeNodePage, as the kubelet and the kernel's cgroups write it
	hugetlbfs    = "hugetlbfs"
	// hugePageCost is how many bytes of huge pages the guest's kernel needs a byte for, to describe them: 64 for each 4 KiB.
	hugePageCost = 4096 / 64
)

// hugeBytes is how much the containers of a pod may have in huge pages together: what the sandbox's resources say, or, since the
// kubelet says nothing there, the limit of its cgroup. Sizes other than 2 MiB only a machine can have, which its container tells.
func hugeBytes(cfg *runtimeapi.PodSandboxConfig) (bytes int64, err error) {
	limits := cfg.GetLinux().GetResources().GetHugepageLimits()
	for _, l := range limits {
		page, err := hugePageSize(l.GetPageSize())
		if err != nil {
			return 0, err
		}
		if l.GetLimit()%uint64(page) != 0 || l.GetLimit() > uint64(maxHugeBytes) {
			return 0, fmt.Errorf("linux.resources.hugepage_limits %s is %d; it has to be a multiple of the page size, at most %d: %w", l.GetPageSize(), l.GetLimit(), maxHugeBytes, errdefs.ErrInvalidArgument)
		}
		if page == qemu.HugeNodePage {
			bytes = int64(l.GetLimit())
		}
	}
	if len(limits) > 0 {
		return bytes, nil
	}
	bytes, err = cgroup.HugetlbLimit(cfg.GetLinux().GetCgroupParent(), hugePageName)
	return min(bytes, maxHugeBytes) / qemu.HugeNodePage * qemu.HugeNodePage, err
}

// maxHugeBytes is more than any node has, and little enough to be counted with.
const maxHugeBytes = int64(1) << 46

// hugePageSize reads a size of huge pages as the kubelet writes it, like 2MB, in which MB are 2^20 bytes.
func hugePageSize(text string) (int64, error) {
	var n int64
	var unit string
	if _, err := fmt.Sscanf(text, "%d%s", &n, &unit); err == nil && n > 0 {
		for name, bytes := range map[string]int64{"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30} {
			if unit == name {
				return n * bytes, nil
			}
		}
	}
	return 0, fmt.Errorf("linux.resources.hugepage_limits.page_size %q has to be like 2MB: %w", text, errdefs.ErrInvalidArgument)
}

// checkHugeLimits refuses limits of a container that the pod's VM has no pages for.
func (p *pod) checkHugeLimits(limits []*runtimeapi.HugepageLimit) error {
	const field = "linux.resources.hugepage_limits"
	have := p.rec.Spec().HugeBytes
	for _, l := range limits {
		if l.GetLimit() == 0 {
			continue // the kubelet names every size of the node
		}
		page, err := hugePageSize(l.GetPageSize())
		if err != nil {
			return err
		}
		if page != qemu.HugeNodePage {
			return fmt.Errorf("%s %s is %d; containers in a VM can have huge pages of %s only (hugepages-2Mi): %w", field, l.GetPageSize(), l.GetLimit(), hugePageName, errdefs.ErrInvalidArgument)
		}
		if l.GetLimit() > uint64(have) {
			return fmt.Errorf("%s %s is %d; it has to be at most %d, what the VM of sandbox %s has: what the sandbox's %s say, or the hugetlb limit of its cgroup parent %q: %w",
				field, l.GetPageSize(), l.GetLimit(), have, p.id, field, p.config().GetLinux().GetCgroupParent(), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// enoughHugePages refuses a VM whose huge pages the node does not have; QEMU would only say that it cannot allocate memory.
func enoughHugePages(m qemu.Machine) error {
	page, bytes := m.HugePageBytes, m.MemoryBytes
	if page == 0 {
		page, bytes = qemu.HugeNodePage, m.HugeNodeBytes
	}
	if bytes == 0 {
		return nil
	}
	dir := fmt.Sprintf("/sys/kernel/mm/hugepages/hugepages-%dkB", page>>10)
	have, err := freeHugePages(dir)
	if err != nil {
		return err
	}
	if need := bytes / page; have < need {
		return fmt.Errorf("the node has %d free huge pages of %d KiB and the VM needs %d; reserve more in %s/nr_hugepages, or lower the pod's hugepages: %w", have, page>>10, need, dir, errdefs.ErrResourceExhausted)
	}
	return nil
}

// freeHugePages is how many pages whoever asks now gets: those that are free and promised to nobody, and those that the kernel may make
// when it is asked. A size that the kernel does not know has none.
func freeHugePages(dir string) (int64, error) {
	var pages int64
	for name, sign := range map[string]int64{"free_hugepages": 1, "resv_hugepages": -1, "nr_overcommit_hugepages": 1, "surplus_hugepages": -1} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s/%s: %w", dir, name, err)
		}
		pages += sign * n
	}
	return pages, nil
}

// onHugetlbfs tells whether a directory lies on a hugetlbfs of the node, which the kubelet makes for emptyDirs of huge pages.
func onHugetlbfs(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.HUGETLBFS_MAGIC
}

// resolveHugeVolume makes a volume of huge pages one of the guest's own: nothing that a container keeps in huge pages is the
// node's. Containers of the pod that have the same one share it.
func resolveHugeVolume(r resolvedMount) (resolvedMount, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(r.HostPath))
	if err != nil {
		return r, err
	}
	if len(mounts) == 0 || mounts[0].FSType != hugetlbfs || mounts[0].Root != "/" {
		return r, fmt.Errorf("host_path %q is a directory of a volume of huge pages; a VM can have such a volume only as a whole, without subPath: %w", r.HostPath, errdefs.ErrInvalidArgument)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(r.HostPath, &st); err != nil {
		return r, err
	}
	if st.Bsize != qemu.HugeNodePage {
		return r, fmt.Errorf("host_path %q has huge pages of %d bytes; containers in a VM can have those of 2 MiB only (medium: HugePages-2Mi): %w", r.HostPath, st.Bsize, errdefs.ErrInvalidArgument)
	}
	sum := sha256.Sum256([]byte(r.HostPath))
	r.Via, r.Name = viaHugePages, "huge-"+hex.EncodeToString(sum[:8])
	r.GuestPath = filepath.Join(guestHugePages, r.Name)
	return r, nil
}

// checkHugeVolumes refuses volumes of huge pages in a VM that has none.
func (p *pod) checkHugeVolumes(mounts []resolvedMount) error {
	for _, m := range mounts {
		if m.Via == viaHugePages && p.rec.Spec().HugeBytes == 0 {
			return fmt.Errorf("host_path %q is a volume of huge pages, and the VM of sandbox %s has none; the pod has to ask for hugepages-2Mi: %w", m.HostPath, p.id, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// hugeVolume is the volume with the owner and mode that it has on the node.
func (m resolvedMount) hugeVolume() (*agentpb.HugeVolume, error) {
	var st unix.Stat_t
	if err := unix.Stat(m.HostPath, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: m.HostPath, Err: err}
	}
	return &agentpb.HugeVolume{Name: m.Name, Mode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid}, nil
}
