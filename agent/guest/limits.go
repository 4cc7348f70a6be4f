package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// derived are limits in /proc/sys that the kernel derives at boot from the memory that there is then, in proportion to it.
var derived = []string{
	"fs/file-max", "fs/epoll/max_user_watches", "kernel/threads-max", "net/ipv4/tcp_mem", "net/ipv4/udp_mem", "user/max_*_namespaces",
}

// memoryLimits keeps the derived limits in proportion to the memory, when it changes. What somebody else has set stays.
type memoryLimits struct {
	total uint64            // the memory when the limits were first looked at
	boot  map[string]string // what they were then, by file
	set   map[string]string // what they were set to last
}

// follow sets the limits below a directory for so much memory. The first time it takes note of them instead.
func (l *memoryLimits) follow(dir string, total uint64) error {
	if l.boot == nil {
		return l.note(dir, total)
	}
	var errs []error
	for file, boot := range l.boot {
		now, err := os.ReadFile(file)
		value := inProportion(boot, total, l.total)
		if err == nil && sameValues(string(now), l.set[file]) && !sameValues(value, l.set[file]) {
			err = os.WriteFile(file, []byte(value), 0)
			l.set[file] = value
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (l *memoryLimits) note(dir string, total uint64) error {
	l.total, l.boot, l.set = total, make(map[string]string), make(map[string]string)
	for _, pattern := range derived {
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		for _, file := range files {
			value, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			l.boot[file], l.set[file] = string(value), string(value)
		}
	}
	return nil
}

// inProportion multiplies each number of a text.
func inProportion(numbers string, by, of uint64) string {
	var out []string
	for field := range strings.FieldsSeq(numbers) {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil || n > 1<<32 { // no limit
			out = append(out, field)
			continue
		}
		out = append(out, strconv.FormatUint(n*(by>>12)/(of>>12), 10))
	}
	return strings.Join(out, " ")
}

func sameValues(a, b string) bool {
	return strings.Join(strings.Fields(a), " ") == strings.Join(strings.Fields(b), " ")
}

// usedTimeout is how long the kernel may take to use memory that its driver has taken, of which the host hears first.
const usedTimeout = 5 * time.Second

// awaitMemory waits until the kernel uses so many bytes more than when the limits were first looked at, less what it needs to describe them.
func (l *memoryLimits) awaitMemory(ctx context.Context, more int64) error {
	if more <= 0 || l.boot == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, usedTimeout)
	defer cancel()
	var total uint64
	err := poll(ctx, devicePoll, func() (_ bool, err error) {
		total, err = totalMemory()
		return total >= l.total+uint64(more-more/32), err
	})
	if err != nil {
		return fmt.Errorf("of %d bytes more than %d the kernel uses %d: %w", more, l.total, total, err)
	}
	return nil
}

func totalMemory() (uint64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("sysinfo: %w", err)
	}
	return info.Totalram * uint64(info.Unit), nil
}

// followMemory has the kernel's limits follow the memory that there is now.
func (l *memoryLimits) followMemory() error {
	total, err := totalMemory()
	if err != nil {
		return err
	}
	if err := l.follow("/proc/sys", total); err != nil {
		return fmt.Errorf("limits for the memory: %w", err)
	}
	return nil
}
