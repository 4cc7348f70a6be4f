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
	st.Disks = diskIO("/sys/block")
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

// diskIO tells what was read from and written to the disks themselves, not to what lies on them.
func diskIO(dir string) []*agentpb.DiskIO {
	devices, err := filepath.Glob(filepath.Join(dir, "*/device"))
	if err != nil {
		return nil
	}
	var disks []*agentpb.DiskIO
	for _, d := range devices {
		disk := filepath.Dir(d)
		data, err := os.ReadFile(filepath.Join(disk, "stat"))
		fields := strings.Fields(string(data))
		if err != nil || len(fields) < 7 {
			continue
		}
		figure := func(i int) uint64 { n, _ := strconv.ParseUint(fields[i], 10, 64); return n }
		disks = append(disks, &agentpb.DiskIO{
			Device: filepath.Base(disk), Reads: figure(0), ReadBytes: figure(2) * 512, Writes: figure(4), WriteBytes: figure(6) * 512,
		})
	}
	return disks
}
