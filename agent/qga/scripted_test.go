package qga

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// scripted answers commands as told: those that would harm the machine that a real agent runs on here, and faults. The
// function gives the whole line, nothing for no answer.
func scripted(t *testing.T, answer func(command string, arguments json.RawMessage) string) *Client {
	t.Helper()
	near, far := net.Pipe()
	var agent sync.WaitGroup
	agent.Go(func() {
		lines := bufio.NewScanner(far)
		for lines.Scan() {
			var req struct {
				Execute   string          `json:"execute"`
				Arguments json.RawMessage `json:"arguments"`
			}
			if err := json.Unmarshal([]byte(strings.TrimPrefix(lines.Text(), "\xff")), &req); err != nil {
				t.Errorf("a request that is none: %q", lines.Text())
			}
			line := answer(req.Execute, req.Arguments)
			if req.Execute == "guest-sync-delimited" {
				var a struct {
					ID int64 `json:"id"`
				}
				_ = json.Unmarshal(req.Arguments, &a)
				line = fmt.Sprintf("\xff{\"return\": %d}\n", a.ID)
			}
			if _, err := far.Write([]byte(line)); err != nil {
				return
			}
		}
	})
	c := newClient(near)
	t.Cleanup(func() {
		_ = c.Close()
		_ = far.Close()
		agent.Wait()
	})
	return c
}

func TestRequests(t *testing.T) {
	var got []string
	c := scripted(t, func(command string, arguments json.RawMessage) string {
		got = append(got, command+" "+string(arguments))
		switch command {
		case "guest-fsfreeze-freeze":
			return "{\"return\": 3}\n"
		case "guest-fsfreeze-thaw":
			return "{\"return\": 2}\n"
		case "guest-fsfreeze-status":
			return "{\"return\": \"frozen\"}\n"
		case "guest-ping":
			return "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"Command guest-ping has been disabled: the agent is in frozen state\"}}\n"
		}
		return "{\"return\": {}}\n"
	})
	ctx := deadline(t, time.Minute)
	if n, err := c.Freeze(ctx); n != 3 || err != nil {
		t.Errorf("freeze: %d, %v", n, err)
	}
	if frozen, err := c.Frozen(ctx); !frozen || err != nil {
		t.Errorf("frozen: %v, %v", frozen, err)
	}
	if err := c.Ping(ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a command while frozen: %v", err)
	}
	if n, err := c.Thaw(ctx); n != 2 || err != nil {
		t.Errorf("thaw: %d, %v", n, err)
	}
	if err := c.SetTime(ctx, time.Unix(1, 2)); err != nil {
		t.Errorf("set time: %v", err)
	}
	want := `guest-fsfreeze-freeze ,guest-fsfreeze-status ,guest-ping ,guest-fsfreeze-thaw ,guest-set-time {"time":1000000002}`
	if g := strings.Join(got[1:], ","); g != want {
		t.Errorf("requests %q, want %q", g, want)
	}
}

// Answers that the protocol does not have are errors, and the next command works.
func TestHostileAnswers(t *testing.T) {
	for name, line := range map[string]string{
		"noise":       "\x00\x01\x02\n",
		"null":        "{\"return\": null}\n",
		"other type":  "{\"return\": [1, 2]}\n",
		"too long":    strings.Repeat("x", maxMessage+1) + "\n",
		"deep":        "{\"return\": " + strings.Repeat("[", 1<<20) + "\n",
		"huge number": "{\"return\": {\"host-name\": 1e999999}}\n",
		"two answers": "{\"return\": {\"host-name\": 1}}\n{\"return\": {\"host-name\": \"late\"}}\n",
	} {
		t.Run(name, func(t *testing.T) {
			first := true
			c := scripted(t, func(command string, _ json.RawMessage) string {
				if command == "guest-get-host-name" && first {
					first = false
					return line
				}
				return "{\"return\": {\"host-name\": \"guest\"}}\n"
			})
			if name, err := c.HostName(deadline(t, time.Minute)); err == nil {
				t.Errorf("host name %q, want an error", name)
			}
			if name, err := c.HostName(deadline(t, time.Minute)); err != nil || name != "guest" {
				t.Errorf("then %q, %v", name, err)
			}
		})
	}
}

func TestPortClosed(t *testing.T) {
	c := scripted(t, func(string, json.RawMessage) string { return "{\"return\": {}}\n" })
	if err := c.Ping(deadline(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	_ = c.conn.Close()
	if err := c.Ping(deadline(t, time.Minute)); !errdefs.IsUnavailable(err) {
		t.Errorf("error %v", err)
	}
	<-c.Done()
	if _, err := Dial(t.Context(), t.TempDir()+"/none"); !errdefs.IsUnavailable(err) || errors.Is(err, errSilent) {
		t.Errorf("dial of no socket: %v", err)
	}
}
