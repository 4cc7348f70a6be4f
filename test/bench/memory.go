package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// settle is how long nothing is asked of a pod before it counts as idle.
const settle = 5 * time.Second

// mapped is the memory of processes in bytes, by what it is for; shared pages are divided among those that share them.
type mapped struct {
	guest     int64 // the guest's own
	code      int64 // machine code that was made at run time: the guest's, translated by TCG
	anonymous int64 // heap, and what else is nobody's file
	stacks    int64
	files     int64 // programs, libraries, what is mapped of devices

	private int64 // of all but the guest's, what no other process has
}

func (m *mapped) total() int64 { return m.guest + m.own() }

// own is what is not the guest's.
func (m *mapped) own() int64 { return m.code + m.anonymous + m.stacks + m.files }

func (m *mapped) add(n mapped) {
	m.guest += n.guest
	m.code += n.code
	m.anonymous += n.anonymous
	m.stacks += n.stacks
	m.files += n.files
	m.private += n.private
}

func (b *bench) startIn(ctx context.Context, p *pod) error {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	_, _, _, err := p.start(ctx, "c")
	return err
}

// freshDaemon starts vmruntime anew, as restart does, and returns its anonymous memory in bytes when it is ready and has settled. That of a
// daemon that has worked for a while has more garbage in it than pods.
func (b *bench) freshDaemon(ctx context.Context, change, ready func() error) (int64, error) {
	if err := b.restart(ctx, change); err != nil {
		return 0, err
	}
	if ready != nil {
		if err := ready(); err != nil {
			return 0, err
		}
	}
	if err := sleep(ctx, settle); err != nil {
		return 0, err
	}
	return fileValue(fmt.Sprintf("/proc/%d/status", b.node.VMRuntimePID()), "RssAnon:")
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// podsCPU is the processor time that the processes of pods have used.
func podsCPU(pods []*pod) (time.Duration, error) {
	pids, err := processesOfAll(pods)
	if err != nil {
		return 0, err
	}
	return processesCPU(pids)
}

func processesCPU(pids []int) (sum time.Duration, err error) {
	for _, pid := range pids {
		d, err := processCPU(pid)
		if err != nil {
			return 0, err
		}
		sum += d
	}
	return sum, nil
}

func processesOfAll(pods []*pod) ([]int, error) {
	var ids []string
	for _, p := range pods {
		ids = append(ids, p.id)
	}
	return processesOf(ids...)
}

// memoryOfAll adds up pods.
func memoryOfAll(pods []*pod) (sum mapped, err error) {
	for _, p := range pods {
		m, err := memoryOf(p.id)
		if err != nil {
			return sum, err
		}
		sum.add(m)
	}
	return sum, nil
}

// memoryOf adds up the processes in the cgroup that bears the pod's ID: QEMU and its helpers.
func memoryOf(podID string) (m mapped, err error) {
	pids, err := processesOf(podID)
	if err != nil {
		return m, err
	}
	for _, pid := range pids {
		f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
		if err != nil {
			return m, err
		}
		one, err := readMaps(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return m, fmt.Errorf("process %d: %w", pid, err)
		}
		m.add(one)
	}
	if m.guest == 0 {
		return m, fmt.Errorf("none of the processes %v of pod %s has a guest's memory", pids, podID)
	}
	return m, nil
}

// processesOf are those in cgroups that bear one of the IDs.
func processesOf(podIDs ...string) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil || !slices.ContainsFunc(podIDs, func(id string) bool { return strings.Contains(string(data), id) }) {
			continue // it has ended, or is another's
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// guestMappings begin the names of the mapping of the guest's memory: its own or a copy of a template's, and a template's.
func guestMappings() []string { return []string{"/memfd:memory", "/memfd:template"} }

// readMaps adds up /proc/PID/smaps. A mapping's first line is ADDRESSES PERMISSIONS OFFSET DEVICE INODE NAME, the others are KEY: VALUE.
func readMaps(r io.Reader) (m mapped, err error) {
	var here, before mapping
	kind := &m.anonymous
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		fields := strings.Fields(line)
		if len(fields) >= 5 && strings.Contains(fields[0], "-") {
			before = here
			if here, err = newMapping(fields); err != nil {
				return m, fmt.Errorf("smaps: %q: %w", line, err)
			}
			kind = here.kind(&m, before)
			continue
		}
		if len(fields) == 0 || !slices.Contains([]string{"Pss:", "Private_Clean:", "Private_Dirty:"}, fields[0]) {
			continue
		}
		bytes, err := kilobytes(strings.TrimPrefix(line, fields[0]))
		if err != nil {
			return m, fmt.Errorf("smaps: %q: %w", line, err)
		}
		switch {
		case fields[0] == "Pss:":
			*kind += bytes
		case kind != &m.guest:
			m.private += bytes
		}
	}
	return m, lines.Err()
}

// mapping is the first line of one.
type mapping struct {
	begin, end        uint64
	permissions, name string
}

func newMapping(fields []string) (m mapping, err error) {
	m.permissions = fields[1]
	if len(fields) > 5 {
		m.name = fields[5]
	}
	begin, end, _ := strings.Cut(fields[0], "-")
	var endErr error
	m.begin, err = strconv.ParseUint(begin, 16, 64)
	m.end, endErr = strconv.ParseUint(end, 16, 64)
	return m, errors.Join(err, endErr)
}

// kind is where a mapping counts. That of a thread's stack has no name, but right before it is a page that nobody may touch. What a heap has not
// used yet may nobody touch either, but that is more.
func (m mapping) kind(of *mapped, before mapping) *int64 {
	guard := before.end == m.begin && before.permissions == "---p" && before.end-before.begin == uint64(os.Getpagesize())
	switch {
	case slices.ContainsFunc(guestMappings(), func(name string) bool { return strings.HasPrefix(m.name, name) }):
		return &of.guest
	case strings.HasPrefix(m.name, "/"):
		return &of.files
	case m.name == "" && strings.HasPrefix(m.permissions, "rwx"):
		return &of.code
	case m.name == "[stack]" || m.name == "" && guard:
		return &of.stacks
	}
	return &of.anonymous
}
