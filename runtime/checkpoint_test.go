package runtime

import (
	"testing"
	"time"
)

// A container that is created while a checkpoint waits for the pod, and is being started when that has it, is waited for too.
func TestStillWaitsForNewContainers(t *testing.T) {
	rt := withPods(t)
	c, err := rt.containerByID("cc1")
	if err != nil {
		t.Fatal(err)
	}
	p := c.pod
	p.life.Lock()
	still := make(chan func())
	go func() { still <- p.still() }()
	for deadline := time.Now().Add(20 * time.Second); c.life.TryLock(); time.Sleep(time.Millisecond) {
		c.life.Unlock()
		if time.Now().After(deadline) {
			t.Fatal("the container is not held")
		}
	}
	rec, err := rt.containerStore.Create("ff1", containerSpec{PodID: p.id}, containerStatus{})
	if err != nil {
		t.Fatal(err)
	}
	starts := &container{rt: rt, id: rec.ID(), pod: p, rec: rec}
	starts.life.Lock()
	rt.mu.Lock()
	rt.containers[starts.id] = starts
	rt.mu.Unlock()
	p.life.Unlock()
	select {
	case <-still:
		t.Fatal("the pod is still while a container is being started")
	case <-time.After(100 * time.Millisecond):
	}
	starts.life.Unlock()
	release := <-still
	if starts.life.TryLock() || c.life.TryLock() || p.life.TryLock() {
		t.Error("not all of the pod is held")
	}
	release()
}
