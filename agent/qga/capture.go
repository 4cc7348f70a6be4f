package qga

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/vmruntime/vmruntime/agent/posixsh"
)

// capture runs a command whose output the agent keeps until its end: through /bin/sh, or by itself where there is none.
func (c *Client) capture(ctx context.Context, cmd Command, line string) (int32, error) {
	pid, err := c.start(ctx, cmd, shell(captureScript("cd /; "+line)), nil)
	kill := c.killSession
	if _, refused := errors.AsType[*Error](err); refused {
		kill = c.killDirect
		pid, err = c.start(ctx, cmd, cmd.Args, cmd.Env)
		if e, refused := errors.AsType[*Error](err); refused {
			return notStarted(cmd, e)
		}
	}
	if err != nil {
		return 0, err
	}
	st, err := c.wait(ctx, pid)
	if err != nil {
		return 0, errors.Join(err, kill(ctx, pid))
	}
	if _, err := cmd.Stdout.Write(st.OutData); err != nil {
		return 0, fmt.Errorf("write output: %w", err)
	}
	if _, err := cmd.Stderr.Write(st.ErrData); err != nil {
		return 0, fmt.Errorf("write output: %w", err)
	}
	if st.OutTruncated || st.ErrTruncated {
		return 0, fmt.Errorf("the guest's agent has kept only the first %d bytes of stdout and %d of stderr: %w",
			len(st.OutData), len(st.ErrData), errdefs.ErrResourceExhausted)
	}
	return st.code(), nil
}

// notStarted gives a shell's exit status for a program that the agent could not start.
func notStarted(cmd Command, e *Error) (int32, error) {
	if !strings.Contains(e.Desc, "Failed to execute") {
		return 0, notBegun(e)
	}
	if _, err := fmt.Fprintf(cmd.Stderr, "%s: %s\n", cmd.Args[0], e.Desc); err != nil {
		return 0, fmt.Errorf("write output: %w", err)
	}
	if strings.Contains(e.Desc, "No such file") {
		return 127, nil
	}
	return 126, nil
}

func (c *Client) killSession(ctx context.Context, pid int64) error {
	n := strconv.FormatInt(pid, 10)
	return c.killBy(ctx, pid, shell(posixsh.KillSession+"; kill_session "+n+"; kill -KILL "+n))
}

func (c *Client) killDirect(ctx context.Context, pid int64) error {
	n := strconv.FormatInt(pid, 10)
	err := c.killBy(ctx, pid, []string{"kill", "-KILL", n})
	if _, refused := errors.AsType[*Error](err); refused {
		err = c.killBy(ctx, pid, []string{"taskkill", "/T", "/F", "/PID", n})
	}
	return err
}

// killBy runs a program that kills another one, and waits for that one's end.
func (c *Client) killBy(ctx context.Context, pid int64, args []string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	killer, err := c.spawn(ctx, args)
	if err == nil {
		_, err = c.wait(ctx, killer)
	}
	if err == nil {
		_, err = c.wait(ctx, pid)
	}
	if err != nil {
		return fmt.Errorf("the command may still run in the guest, it could not be killed: %w", err)
	}
	return nil
}
