package qga

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// canExec is the answer to guest-info of an agent that runs commands.
const canExec = `{"return": {"supported_commands": [{"name": "guest-exec", "enabled": true}, {"name": "guest-exec-status", "enabled": true}]}}` + "\n"

// soon is when a command has to have begun.
func soon() time.Time { return time.Now().Add(3 * time.Second) }

// notBegunBy fails the test unless the command is left to others in time.
func notBegunBy(t *testing.T, c *Client, by time.Time) {
	t.Helper()
	_, err := c.Exec(t.Context(), Command{Args: []string{"true"}, BeginBy: by})
	if late := time.Since(by); !errors.Is(err, ErrNotBegun) || late > 0 {
		t.Errorf("%v, %s after the command had to begin", err, late)
	}
}

// A command is left to others when the agent does not take it in time, and only then.
func TestExecNotBegun(t *testing.T) {
	t.Run("silent", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			c := newClient(near)
			notBegunBy(t, c, soon())
			_ = c.Close()
			_ = far.Close()
		})
	})
	t.Run("freezing", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var asked atomic.Int32
			frozen := make(chan struct{})
			c := scripted(t, func(command string, _ json.RawMessage) string {
				switch command {
				case "guest-info":
					return canExec
				case "guest-fsfreeze-freeze":
					<-frozen
					return "{\"return\": 1}\n"
				case "guest-exec":
					asked.Add(1)
				}
				return "{\"error\": {\"class\": \"GenericError\", \"desc\": \"the agent is in frozen state\"}}\n"
			})
			if _, err := c.knownInfo(t.Context()); err != nil {
				t.Fatal(err)
			}
			done := make(chan error)
			go func() {
				_, err := c.Freeze(t.Context())
				done <- err
			}()
			synctest.Wait()
			notBegunBy(t, c, soon())
			// Nobody waits for the agent's turn longer than for anything else, whatever it is to run.
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			begin := time.Now()
			if _, err := c.spawn(ctx, shell("true")); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > time.Second {
				t.Errorf("a program of our own: %v after %s", err, time.Since(begin))
			}
			if n := asked.Load(); n > 0 {
				t.Errorf("asked %d times to run what others run", n)
			}
			close(frozen)
			if err := <-done; err != nil {
				t.Error(err)
			}
			// What the agent refuses, others may run.
			if _, err := c.Exec(t.Context(), Command{Args: []string{"true"}}); !errors.Is(err, ErrNotBegun) || !errdefs.IsFailedPrecondition(err) {
				t.Errorf("while frozen: %v", err)
			}
		})
	})
	t.Run("taken", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := scripted(t, func(command string, _ json.RawMessage) string {
				if command == "guest-info" {
					return canExec
				}
				return "" // no answer
			})
			if _, err := c.Exec(t.Context(), Command{Args: []string{"true"}, BeginBy: soon()}); !errdefs.IsUnavailable(err) || errors.Is(err, ErrNotBegun) {
				t.Errorf("a command of which nobody knows whether it runs: %v", err)
			}
		})
	})
}

// An agent whose file systems are frozen says that it runs nothing; that is not for good.
func TestFrozenInfo(t *testing.T) {
	frozen := true
	c := scripted(t, func(command string, _ json.RawMessage) string {
		switch {
		case command == "guest-info" && frozen:
			return strings.ReplaceAll(canExec, "true", "false")
		case command == "guest-info":
			return canExec
		case command == "guest-exec":
			return "{\"return\": {\"pid\": 7}}\n"
		}
		return "{\"return\": {\"exited\": true, \"exitcode\": 3}}\n"
	})
	ctx := deadline(t, time.Minute)
	if _, err := c.Exec(ctx, Command{Args: []string{"true"}}); !errors.Is(err, ErrNotBegun) || !errdefs.IsNotImplemented(err) {
		t.Errorf("while frozen: %v", err)
	}
	frozen = false
	if code, err := c.Exec(ctx, Command{Args: []string{"true"}}); code != 3 || err != nil {
		t.Errorf("thereafter: code %d, %v", code, err)
	}
}
