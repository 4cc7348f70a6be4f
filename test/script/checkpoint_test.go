package script

import (
	"errors"
	"os"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What is to be stopped or removed does not wait for a checkpoint, which is given up and leaves nothing.
func TestEndCutsCheckpoint(t *testing.T) {
	if noBed != "" {
		t.Skip(noBed)
	}
	for _, tc := range []struct {
		name string
		do   func(*world) error
		end  string // of the container
	}{
		{"stop", func(w *world) error { return w.stop("app", 10) }, "exited 0 Completed"},
		{"stop pod", func(w *world) error { return w.stopPod("pod") }, "exited 137 Error"},
		{"remove", func(w *world) error { return w.removeContainer("app") }, ""},
		{"remove pod", func(w *world) error { return w.removePod("pod") }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(theBed, t.TempDir())
			_, err := guestCommand(w, []string{"step", "saving 30s"}) // far longer than the test waits
			if err := errors.Join(err, w.startDaemon(nil)); err != nil {
				t.Fatal(err)
			}
			defer func() {
				w.bed.control.watch(nil)
				if err := errors.Join(w.close(), w.repair()); err != nil {
					t.Error(err)
				}
			}()
			err = errors.Join(w.run("pod"), w.create("pod", "app", []string{"trap bye", "out up", "wait"}), w.start("app"))
			if err != nil {
				t.Fatal(err)
			}
			saving := make(chan struct{})
			w.bed.control.watch(func(r report) {
				if r.Kind == "state" {
					close(saving)
				}
			})
			dir := t.TempDir()
			ended := make(chan error, 1)
			go func() {
				ctx, cancel := call()
				defer cancel()
				_, err := w.rt.CheckpointPod(ctx, &runtimeapi.CheckpointPodRequest{
					PodSandboxId: w.pods["pod"].id, ContainerIds: []string{w.containers["app"].id}, OutputPath: dir,
				})
				ended <- err
			}()
			select {
			case <-saving:
			case err := <-ended:
				t.Fatalf("the checkpoint ended before its state was written: %v", err)
			}
			if err := tc.do(w); err != nil {
				t.Error(err)
			}
			if err := <-ended; status.Code(err) != codes.Aborted {
				t.Errorf("the checkpoint ended with %v, want Aborted", err)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("the checkpoint left %v (%v)", left, err)
			}
			if tc.end == "" {
				return
			}
			if line, err := w.containerLine("app"); err != nil || line != tc.end {
				t.Errorf("the container is %q (%v), want %q", line, err, tc.end)
			}
		})
	}
}

// A VM that went on while it was saved, whoever let it, is no checkpoint.
func TestRunOnSpoilsCheckpoint(t *testing.T) {
	if noBed != "" {
		t.Skip(noBed)
	}
	w := newWorld(theBed, t.TempDir())
	if err := w.startDaemon(nil); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(w.close(), w.repair()); err != nil {
			t.Error(err)
		}
	}()
	for fault, want := range map[string]codes.Code{"": codes.OK, "restless": codes.Aborted} {
		pod, app := "pod"+fault, "app"+fault
		_, err := guestCommand(w, []string{fault})
		if err := errors.Join(err, w.run(pod), w.create(pod, app, []string{"wait"}), w.start(app)); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		ctx, cancel := call()
		_, err = w.rt.CheckpointPod(ctx, &runtimeapi.CheckpointPodRequest{
			PodSandboxId: w.pods[pod].id, ContainerIds: []string{w.containers[app].id}, OutputPath: dir,
		})
		cancel()
		if status.Code(err) != want {
			t.Errorf("fault %q: %v, want %s", fault, err, want)
		}
		if left, err := os.ReadDir(dir); err != nil || (len(left) > 0) != (want == codes.OK) {
			t.Errorf("fault %q: the checkpoint left %v (%v)", fault, left, err)
		}
	}
}

// A command that the restored guest does not let go of is no reason to lose the pod.
func TestRestoreLeavesExecs(t *testing.T) {
	if noBed != "" {
		t.Skip(noBed)
	}
	w := newWorld(theBed, t.TempDir())
	_, err := guestCommand(w, []string{"refuse RemoveExec not today"})
	if err := errors.Join(err, w.startDaemon(nil)); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(w.close(), w.repair()); err != nil {
			t.Error(err)
		}
	}()
	l := &life{w: w, name: "pod"}
	if err := errors.Join(w.run(l.name), w.create(l.name, l.a(), []string{"wait"}), w.start(l.a())); err != nil {
		t.Fatal(err)
	}
	if _, err := w.exec(l.a(), 1, []string{"wait"}); status.Code(err) != codes.DeadlineExceeded {
		t.Fatalf("a command that does not end: %v", err)
	}
	if err := errors.Join(l.checkpoint(), l.tryRestore(), w.start(l.restored())); err != nil {
		t.Error(err)
	}
}
