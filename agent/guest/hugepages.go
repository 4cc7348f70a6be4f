package guest

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// hugePool is the file, below a NUMA node and below hugePools, with the number of huge pages of 2 MiB that are reserved.
const hugePool = "hugepages/hugepages-2048kB/nr_hugepages"

// reserveHugePages has the kernel keep so many huge pages of 2 MiB for whoever maps some. The last NUMA node comes first: it is the one that
// the host's own huge pages are behind.
func reserveHugePages(want int64) error {
	if want == 0 {
		return nil
	}
	pools, err := filepath.Glob("/sys/devices/system/node/node*/" + hugePool)
	if err != nil {
		return err
	}
	if len(pools) == 0 { // a kernel that knows no nodes
		pools = []string{"/sys/kernel/mm/" + hugePool}
	}
	slices.SortFunc(pools, func(a, b string) int { return cmp.Or(cmp.Compare(len(b), len(a)), cmp.Compare(b, a)) })
	left := want
	for _, pool := range pools {
		if err := os.WriteFile(pool, []byte(strconv.FormatInt(left, 10)), 0); err != nil {
			return err
		}
		got, ok := readNumber(pool)
		if !ok {
			return fmt.Errorf("%s has no number", pool)
		}
		left -= int64(got)
	}
	if left > 0 {
		return fmt.Errorf("the guest's memory has room for %d of %d huge pages: %w", want-left, want, errdefs.ErrResourceExhausted)
	}
	return nil
}

// mountHugeVolume mounts a volume of huge pages, once.
func (s *Server) mountHugeVolume(v *agentpb.HugeVolume) error {
	if err := checkID("name", v.Name); err != nil {
		return err
	}
	s.sandbox.Lock()
	defer s.sandbox.Unlock()
	target := filepath.Join(s.opts.Root, "hugepages", v.Name)
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if isMountPoint(target) {
		return nil
	}
	uid, gid := s.owner(v.Uid, v.Gid)
	opts := []string{"pagesize=2M", fmt.Sprintf("uid=%d", uid), fmt.Sprintf("gid=%d", gid)}
	if err := unix.Mount("hugetlbfs", target, "hugetlbfs", unix.MS_NOSUID|unix.MS_NODEV, strings.Join(opts, ",")); err != nil {
		return fmt.Errorf("mount hugetlbfs at %s: %w", target, err)
	}
	return unix.Chmod(target, v.Mode) // as a mount option it would lose its set-group-ID bit
}
