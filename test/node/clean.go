package node

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
)

// clean ends the processes and unmounts the mounts that survivors found.
func clean(root string, lines []string) error {
	var errs []error
	for _, line := range lines {
		var pid int
		if _, err := fmt.Sscanf(line, "process %d ", &pid); err != nil || processOf(pid, root) == "" {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
			errs = append(errs, fmt.Errorf("kill %d: %w", pid, err))
		}
	}
	slices.Reverse(lines) // the inner mounts first
	for _, line := range lines {
		if target, ok := strings.CutPrefix(line, "mount "); ok {
			if err := syscall.Unmount(target, syscall.MNT_DETACH); err != nil {
				errs = append(errs, fmt.Errorf("unmount %s: %w", target, err))
			}
		}
	}
	return errors.Join(errs...)
}
