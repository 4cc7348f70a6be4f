package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

const (
	cgroupMount = "/sys/fs/cgroup"
	// podCgroup holds one cgroup for each container.
	podCgroup = "pod"
)

func (s *Server) cgroupRoot() string { return filepath.Join(cgroupMount, podCgroup) }

// killCgroup kills every process of a cgroup and of those below it. A cgroup that is not there is no error.
func killCgroup(dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// adopt moves the processes of a cgroup, and what they start meanwhile, to another.
func adopt(to, from string) error {
	for {
		pids, err := cgroupProcs(from)
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			err := os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("move process %d to cgroup %s: %w", pid, to, err)
			}
		}
	}
}

// removeCgroup kills and removes a cgroup with those below it.
func removeCgroup(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	err := poll(ctx, 2*time.Millisecond, func() (bool, error) {
		err := removeCgroupTree(dir)
		if errors.Is(err, unix.EBUSY) {
			return false, killCgroup(dir)
		}
		return err == nil, err
	})
	if err != nil {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}

func removeCgroupTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroupTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// cgroupProcs lists the processes of a cgroup and of those below it.
func cgroupProcs(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		data, err := readKernel(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return err
		}
		for field := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		err = nil
	}
	return pids, err
}

// oomKills is how many processes of the cgroup the kernel has killed for want of memory.
func oomKills(dir string) uint64 { return readFlat(filepath.Join(dir, "memory.events"))["oom_kill"] }

// readKernel reads a file that the kernel makes, by as few system calls as that takes: whoever asks for statistics does so often, and in a guest
// that is emulated each costs something.
func readKernel(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	for data := make([]byte, 0, 4096); ; data = slices.Grow(data, 4096) {
		n, err := unix.Read(fd, data[len(data):cap(data)])
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			return data, nil
		}
		data = data[:len(data)+n]
	}
}

// readFlat reads some numbers of a file of lines "KEY NUMBER", or all. What is not there reads as empty.
func readFlat(path string, wanted ...string) map[string]uint64 {
	data, err := readKernel(path)
	if err != nil {
		return nil
	}
	values := make(map[string]uint64, len(wanted))
	for line := range bytes.Lines(data) {
		key, val, _ := bytes.Cut(line, []byte(" "))
		name := strings.TrimSuffix(string(key), ":")
		if len(wanted) > 0 && !slices.Contains(wanted, name) {
			continue
		}
		if fields := bytes.Fields(val); len(fields) > 0 {
			if n, err := strconv.ParseUint(string(fields[0]), 10, 64); err == nil {
				values[name] = n
			}
		}
	}
	return values
}

// readNumber reads a file of one number. It tells false for "max" and for a file that is not there.
func readNumber(path string) (uint64, bool) {
	data, err := readKernel(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(string(bytes.TrimSpace(data)), 10, 64)
	return n, err == nil
}

// cgroupStats reads the figures of one container's cgroup.
func cgroupStats(dir string) *agentpb.CgroupStats {
	file := func(name string) string { return filepath.Join(dir, name) }
	st := &agentpb.CgroupStats{}
	cpu := readFlat(file("cpu.stat"))
	st.CpuUsageNano, st.CpuUserNano, st.CpuSystemNano = cpu["usage_usec"]*1000, cpu["user_usec"]*1000, cpu["system_usec"]*1000
	st.CpuPeriods, st.CpuThrottledPeriods, st.CpuThrottledNano = cpu["nr_periods"], cpu["nr_throttled"], cpu["throttled_usec"]*1000
	readMemory(st, dir)
	st.ProcessCount = processesIn(dir)
	st.ThreadCount, _ = readNumber(file("pids.current"))
	st.ThreadLimit, _ = readNumber(file("pids.max"))
	st.CpuPressure = readPressure(file("cpu.pressure"))
	st.MemoryPressure = readPressure(file("memory.pressure"))
	st.IoPressure = readPressure(file("io.pressure"))
	st.Disks = readIO(file("io.stat"))
	return st
}

func readMemory(st *agentpb.CgroupStats, dir string) {
	file := func(name string) string { return filepath.Join(dir, name) }
	mem := readFlat(file("memory.stat"), "anon", "file", "kernel", "file_mapped", "active_file", "inactive_file", "pgfault", "pgmajfault")
	events := readFlat(file("memory.events"), "max", "oom_kill")
	st.MemoryUsageBytes, _ = readNumber(file("memory.current"))
	st.MemoryMaxUsageBytes, _ = readNumber(file("memory.peak"))
	st.MemoryWorkingSetBytes = lessOrZero(st.MemoryUsageBytes, mem["inactive_file"])
	if limit, ok := readNumber(file("memory.max")); ok {
		st.MemoryAvailableBytes = lessOrZero(limit, st.MemoryWorkingSetBytes)
	}
	st.MemoryRssBytes, st.MemoryCacheBytes, st.MemoryKernelBytes = mem["anon"], mem["file"], mem["kernel"]
	st.MemoryMappedFileBytes, st.MemoryActiveFileBytes, st.MemoryInactiveFileBytes = mem["file_mapped"], mem["active_file"], mem["inactive_file"]
	st.PageFaults, st.MajorPageFaults = mem["pgfault"], mem["pgmajfault"]
	st.MemoryLimitHits, st.OomKills = events["max"], events["oom_kill"]
	st.SwapUsageBytes, _ = readNumber(file("memory.swap.current"))
	if limit, ok := readNumber(file("memory.swap.max")); ok {
		st.SwapAvailableBytes = lessOrZero(limit, st.SwapUsageBytes)
	}
}

// processesIn counts the processes of a cgroup; what cannot be read has none.
func processesIn(dir string) uint64 {
	pids, _ := cgroupProcs(dir)
	return uint64(len(pids))
}

// descriptorsIn counts the open files of a cgroup's processes, and those of them that are sockets. Processes and files that vanish
// meanwhile do not count.
func descriptorsIn(dir string) (files, sockets uint64) {
	pids, _ := cgroupProcs(dir)
	for _, pid := range pids {
		fds := filepath.Join("/proc", strconv.Itoa(pid), "fd")
		entries, _ := os.ReadDir(fds)
		for _, e := range entries {
			target, err := os.Readlink(filepath.Join(fds, e.Name()))
			if err != nil {
				continue
			}
			files++
			if strings.HasPrefix(target, "socket:") {
				sockets++
			}
		}
	}
	return files, sockets
}

// guestStats reads the figures of the whole guest, the agent and the kernel included.
func guestStats() *agentpb.CgroupStats {
	st := &agentpb.CgroupStats{}
	st.CpuUsageNano = readFlat(cgroupMount + "/cpu.stat")["usage_usec"] * 1000
	info := readMeminfo()
	st.MemoryUsageBytes = lessOrZero(info["MemTotal"], info["MemFree"])
	st.MemoryWorkingSetBytes = lessOrZero(st.MemoryUsageBytes, info["Inactive(file)"])
	st.MemoryAvailableBytes = lessOrZero(info["MemTotal"], st.MemoryWorkingSetBytes)
	st.MemoryRssBytes = info["AnonPages"]
	st.SwapUsageBytes = lessOrZero(info["SwapTotal"], info["SwapFree"])
	st.SwapAvailableBytes = info["SwapFree"]
	vm := readFlat("/proc/vmstat", "pgfault", "pgmajfault")
	st.PageFaults, st.MajorPageFaults = vm["pgfault"], vm["pgmajfault"]
	st.ProcessCount = processesIn(filepath.Join(cgroupMount, podCgroup))
	st.CpuPressure = readPressure("/proc/pressure/cpu")
	st.MemoryPressure = readPressure("/proc/pressure/memory")
	st.IoPressure = readPressure("/proc/pressure/io")
	st.Disks = readIO(cgroupMount + "/io.stat")
	return st
}

// readMeminfo reads /proc/meminfo in bytes.
func readMeminfo() map[string]uint64 {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil
	}
	values := make(map[string]uint64)
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		key, rest, _ := strings.Cut(lines.Text(), ":")
		if fields := strings.Fields(rest); len(fields) > 0 {
			if n, err := strconv.ParseUint(fields[0], 10, 64); err == nil {
				values[key] = n << 10
			}
		}
	}
	return values
}

func lessOrZero(a, b uint64) uint64 {
	if b > a {
		return 0
	}
	return a - b
}

// readIO reads lines of "MAJ:MIN rbytes=N wbytes=N rios=N wios=N ...", one for each disk.
func readIO(path string) []*agentpb.DiskIO {
	data, err := readKernel(path)
	if err != nil {
		return nil
	}
	var disks []*agentpb.DiskIO
	for line := range strings.Lines(string(data)) {
		device, figures, _ := strings.Cut(line, " ")
		d := &agentpb.DiskIO{Device: device}
		into := map[string]*uint64{"rbytes": &d.ReadBytes, "wbytes": &d.WriteBytes, "rios": &d.Reads, "wios": &d.Writes}
		for field := range strings.FieldsSeq(figures) {
			key, val, _ := strings.Cut(field, "=")
			if n, err := strconv.ParseUint(val, 10, 64); err == nil && into[key] != nil {
				*into[key] = n
			}
		}
		disks = append(disks, d)
	}
	return disks
}

// readPressure reads lines of "some avg10=N avg60=N avg300=N total=N". It gives nil where the kernel has none.
func readPressure(path string) *agentpb.Pressure {
	data, err := readKernel(path)
	if err != nil || len(data) == 0 {
		return nil
	}
	p := &agentpb.Pressure{}
	for line := range strings.Lines(string(data)) {
		l := &agentpb.PressureLine{}
		kind := ""
		for i, field := range strings.Fields(line) {
			if i == 0 {
				kind = field
				continue
			}
			key, val, _ := strings.Cut(field, "=")
			switch key {
			case "avg10":
				l.Avg10, _ = strconv.ParseFloat(val, 64)
			case "avg60":
				l.Avg60, _ = strconv.ParseFloat(val, 64)
			case "avg300":
				l.Avg300, _ = strconv.ParseFloat(val, 64)
			case "total":
				l.TotalUsec, _ = strconv.ParseUint(val, 10, 64)
			}
		}
		switch kind {
		case "some":
			p.Some = l
		case "full":
			p.Full = l
		}
	}
	return p
}
