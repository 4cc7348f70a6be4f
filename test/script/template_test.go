package script

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The daemon is killed at any point of a life whose VM begins as a template, between the clone's start and its resume too.
func TestCrashTemplate(t *testing.T) {
	killedEverywhere(t, map[string]map[string]any{"template": {"enabled": true}}, (*life).containerSteps, 30, 19)
}

// awaitTemplate waits until the daemon that runs has a template of pods without limits.
func (w *world) awaitTemplate() error { return w.awaitLog("guests begin as a template") }

// awaitLog waits until the daemon that runs has said something.
func (w *world) awaitLog(what string) error {
	if !w.until(func() bool {
		text, _ := os.ReadFile(w.bed.LogFile("vmruntime")) // missing is as good as empty
		return strings.Contains(string(text[min(w.logFrom, int64(len(text))):]), what)
	}) {
		return fmt.Errorf("the daemon has not said %q", what)
	}
	return nil
}

func templateCommand(w *world, args []string) (string, error) {
	switch args[0] {
	case "ready":
		return "", w.awaitTemplate()
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
			Template string `json:"template"`
		} `json:"guest"`
	}
	if err := json.Unmarshal([]byte(resp.GetInfo()["info"]), &info); err != nil {
		return "", err
	}
	how := "boot"
	if info.Guest.Template != "" {
		how = "template"
	}
	if how != args[1] {
		return "", fmt.Errorf("the VM has begun by %s", how)
	}
	return "", nil
}
