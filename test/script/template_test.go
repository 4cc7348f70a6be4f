package script

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The daemon is killed at any point of a life whose VM begins as a template, between the clone's start and its resume too.
func TestCrashTemplate(t *testing.T) {
	killedEverywhere(t, map[string]map[string]any{"template": {"enabled": true}}, (*life).containerSteps, 30, 19)
}

// The same with a guest that waits for its pod, while the next one is made too.
func TestCrashSpare(t *testing.T) {
	killedEverywhere(t, map[string]map[string]any{"template": {"enabled": true, "spares": 1}}, (*life).containerSteps, 30, 19)
}

// The same with a pod that is larger than the template, and grows. No two are of one size, so that none has a template of its own.
func TestCrashGrown(t *testing.T) {
	t.Cleanup(func() {
		if noBed != "" {
			return
		}
		if err := os.RemoveAll(filepath.Join(theBed.records, "templates")); err != nil {
			t.Error(err)
		}
	})
	grown := func(l *life) []step {
		l.w.mu.Lock()
		defer l.w.mu.Unlock()
		l.w.limits = memoryLimit(300 + 2*int64(crc32.ChecksumIEEE([]byte(l.name))%500))
		return l.containerSteps()
	}
	killedEverywhere(t, map[string]map[string]any{"template": {"enabled": true}}, grown, 30, 25)
}

func memoryLimit(mib int64) *runtimeapi.LinuxContainerResources {
	return &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: mib << 20}
}

// spares tells whether guests wait for pods.
func (w *world) spares() bool { return w.changes["template"]["spares"] != nil }

// awaitTemplate waits until the daemon that runs has a template of pods without limits.
func (w *world) awaitTemplate() error { return w.awaitLog("guests begin as a template") }

// awaitLog waits until the daemon that runs has said something.
func (w *world) awaitLog(what string) error { return w.awaitLogs(what, 1) }

func (w *world) awaitLogs(what string, times int) error {
	if !w.until(func() bool {
		text, _ := os.ReadFile(w.bed.LogFile("vmruntime")) // missing is as good as empty
		return strings.Count(string(text[min(w.logFrom, int64(len(text))):]), what) >= times
	}) {
		return fmt.Errorf("the daemon has not said %q", what)
	}
	return nil
}

func templateCommand(w *world, args []string) (string, error) {
	times := 1
	if len(args) > 1 {
		_, _ = fmt.Sscan(args[1], &times) // or it is a file
	}
	switch args[0] {
	case "ready":
		return "", w.awaitLogs("guests begin as a template", times)
	case "waits":
		return "", w.awaitLogs("a guest waits for its pod", times)
	case "unmade":
		return "", w.awaitLog("no template could be made")
	}
	if len(args) != 2 {
		return "", fmt.Errorf("template damage|cut|remove|count FILE")
	}
	files, err := filepath.Glob(filepath.Join(w.bed.records, "templates", "*", args[1]))
	if err != nil || args[0] == "count" {
		return fmt.Sprintln(len(files)), err
	}
	if len(files) == 0 {
		return "", errors.New("there is no template")
	}
	var errs []error
	for _, file := range files {
		switch args[0] {
		case "damage":
			errs = append(errs, overwrite(file))
		case "cut":
			errs = append(errs, os.Truncate(file, 1))
		case "remove":
			errs = append(errs, os.Remove(file))
		default:
			errs = append(errs, fmt.Errorf("template %s: no such command", args[0]))
		}
	}
	return "", errors.Join(errs...)
}

// overwrite changes the first byte of a file.
func overwrite(file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte{0xff}, 0)
	return errors.Join(err, f.Close())
}

func limitCommand(w *world, args []string) (string, error) {
	mib, err := strconv.ParseInt(args[0], 10, 64)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.limits = memoryLimit(mib)
	return "", err
}

// beginsCommand holds how a pod's VM has begun.
func beginsCommand(w *world, args []string) (string, error) {
	p, err := w.pod(args[0])
	if err != nil {
		return "", err
	}
	ctx, cancel := call()
	defer cancel()
	resp, err := w.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		return "", err
	}
	var info struct {
		Guest struct {
			Template  string    `json:"template"`
			Spare     bool      `json:"spare"`
			GrownFrom *struct{} `json:"grownFrom"`
			Growing   bool      `json:"growing"`
		} `json:"guest"`
		MemoryBytes int64 `json:"memoryBytes"`
		Size        struct {
			BootBytes    int64 `json:"bootBytes"`
			PluggedBytes int64 `json:"pluggedBytes"`
		} `json:"size"`
	}
	if err := json.Unmarshal([]byte(resp.GetInfo()["info"]), &info); err != nil {
		return "", err
	}
	how := "boot"
	if info.Guest.Template != "" {
		how = "template"
	}
	if info.Guest.Spare {
		how = "spare"
	}
	if info.Guest.GrownFrom != nil {
		how += " grown"
	}
	// Memory comes in blocks of 2 MiB.
	if have, want := info.Size.BootBytes+info.Size.PluggedBytes, info.MemoryBytes; have < want || have >= want+2<<20 || info.Guest.Growing {
		return "", fmt.Errorf("the VM has %d bytes of memory, want %d; it grows: %v", have, want, info.Guest.Growing)
	}
	if want := strings.Join(args[1:], " "); how != want {
		return "", fmt.Errorf("the VM has begun by %s", how)
	}
	return "", nil
}
