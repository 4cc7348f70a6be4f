package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
		data, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
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

// readFlat reads a file of lines "KEY NUMBER". What is not there reads as empty.
func readFlat(path string) map[string]uint64 {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	values := make(map[string]uint64)
	for line := range strings.Lines(string(data)) {
		if key, val, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			if n, err := strconv.ParseUint(strings.Fields(val)[0], 10, 64); err == nil {
				values[strings.TrimSuffix(key, ":")] = n
			}
		}
	}
	return values
}

// readNumber reads a file of one number. It tells false for "max" and for a file that is not there.
func readNumber(path string) (uint64, bool) {
	data, err := os.ReadFile(path)
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
	st.CpuUsageNano = readFlat(file("cpu.stat"))["usage_usec"] * 1000
	mem := readFlat(file("memory.stat"))
	st.MemoryUsageBytes, _ = readNumber(file("memory.current"))
	st.MemoryWorkingSetBytes = lessOrZero(st.MemoryUsageBytes, mem["inactive_file"])
	if limit, ok := readNumber(file("memory.max")); ok {
		st.MemoryAvailableBytes = lessOrZero(limit, st.MemoryWorkingSetBytes)
	}
	st.MemoryRssBytes = mem["anon"]
	st.PageFaults, st.MajorPageFaults = mem["pgfault"], mem["pgmajfault"]
	st.SwapUsageBytes, _ = readNumber(file("memory.swap.current"))
	if limit, ok := readNumber(file("memory.swap.max")); ok {
		st.SwapAvailableBytes = lessOrZero(limit, st.SwapUsageBytes)
	}
	st.ProcessCount, _ = readNumber(file("pids.current"))
	st.CpuPressure = readPressure(file("cpu.pressure"))
	st.MemoryPressure = readPressure(file("memory.pressure"))
	st.IoPressure = readPressure(file("io.pressure"))
	st.IoReadBytes, st.IoWriteBytes = readIO(file("io.stat"))
	return st
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
	vm := readFlat("/proc/vmstat")
	st.PageFaults, st.MajorPageFaults = vm["pgfault"], vm["pgmajfault"]
	st.ProcessCount, _ = readNumber(filepath.Join(cgroupMount, podCgroup, "pids.current"))
	st.CpuPressure = readPressure("/proc/pressure/cpu")
	st.MemoryPressure = readPressure("/proc/pressure/memory")
	st.IoPressure = readPressure("/proc/pressure/io")
	st.IoReadBytes, st.IoWriteBytes = readIO(cgroupMount + "/io.stat")
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

// readIO sums the bytes of all disks: lines of "MAJ:MIN rbytes=N wbytes=N ...".
func readIO(path string) (read, written uint64) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, 0
	}
	for field := range strings.FieldsSeq(string(data)) {
		key, val, _ := strings.Cut(field, "=")
		n, err := strconv.ParseUint(val, 10, 64)
		switch {
		case err != nil:
		case key == "rbytes":
			read += n
		case key == "wbytes":
			written += n
		}
	}
	return read, written
}

// readPressure reads lines of "some avg10=N avg60=N avg300=N total=N". It gives nil where the kernel has none.
func readPressure(path string) *agentpb.Pressure {
	data, err := os.ReadFile(path)
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
