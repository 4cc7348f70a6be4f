package guest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vmruntime/vmruntime/agent/agentpb"
)

// userTick is the unit of /proc/stat: USER_HZ is 100 on every architecture that Go knows.
const userTick = time.Second / 100

// machineStats reads the figures of a guest whose cgroups are its own affair.
func machineStats() *agentpb.CgroupStats {
	st := guestStats()
	st.CpuUsageNano = uint64(cpuTime())
	st.ProcessCount = processCount()
	st.IoReadBytes, st.IoWriteBytes = diskBytes("/sys/block")
	return st
}

// cpuTime is what all CPUs have worked since boot.
func cpuTime() time.Duration {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(data), "\n")
	var ticks uint64
	// cpu, user, nice, system, idle, iowait, irq, softirq, steal, and times that user and nice have in them.
	for i, field := range strings.Fields(line) {
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		if n, err := strconv.ParseUint(field, 10, 64); err == nil {
			ticks += n
		}
	}
	return time.Duration(ticks) * userTick
}

func processCount() uint64 {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	var n uint64
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil {
			n++
		}
	}
	return n
}

// diskBytes sums what was read from and written to the disks themselves, not to what lies on them.
func diskBytes(dir string) (read, written uint64) {
	devices, err := filepath.Glob(filepath.Join(dir, "*/device"))
	if err != nil {
		return 0, 0
	}
	for _, d := range devices {
		data, err := os.ReadFile(filepath.Join(filepath.Dir(d), "stat"))
		fields := strings.Fields(string(data))
		if err != nil || len(fields) < 7 {
			continue
		}
		r, _ := strconv.ParseUint(fields[2], 10, 64)
		w, _ := strconv.ParseUint(fields[6], 10, 64)
		read, written = read+r*512, written+w*512
	}
	return read, written
}
