package qga

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// maxDesc bounds the guest's text inside an error.
const maxDesc = 1 << 10

func commandError(command, class, desc string) error {
	if len(desc) > maxDesc {
		desc = strings.ToValidUTF8(desc[:maxDesc], "") + "..."
	}
	e := &Error{Command: command, Class: class, Desc: desc, kind: errdefs.ErrUnknown}
	switch {
	case strings.Contains(desc, "frozen"):
		e.kind = errdefs.ErrFailedPrecondition
	case class == "CommandNotFound":
		e.kind = errdefs.ErrNotImplemented
	}
	return e
}

// Info is what the agent is and can do.
type Info struct {
	Version  string `json:"version"`
	Commands []struct {
		Name    string `json:"name"`
		Enabled bool   `json:"enabled"`
	} `json:"supported_commands"`
}

// Can tells whether the agent knows all these commands and none of them is blocked by its configuration, as guest-exec
// and guest-file-open are on RHEL and Fedora.
func (i *Info) Can(commands ...string) bool {
	for _, command := range commands {
		found := false
		for _, c := range i.Commands {
			found = found || c.Name == command && c.Enabled
		}
		if !found {
			return false
		}
	}
	return true
}

// ask runs a command without arguments.
func ask[T any](ctx context.Context, c *Client, command string) (T, error) {
	var r T
	err := c.call(ctx, command, nil, &r)
	return r, err
}

// Ping tells whether an agent answers.
func (c *Client) Ping(ctx context.Context) error { return c.call(ctx, "guest-ping", nil, nil) }

// Info tells the agent's version and commands.
func (c *Client) Info(ctx context.Context) (*Info, error) {
	return ask[*Info](ctx, c, "guest-info")
}

// knownInfo is Info, asked once for each boot, or until the agent runs programs: while file systems are frozen it says that it does not.
func (c *Client) knownInfo(ctx context.Context) (*Info, error) {
	if err := c.begin(ctx); err != nil {
		return nil, err
	}
	info := c.info
	<-c.turn
	if info != nil {
		return info, nil
	}
	info, err := c.Info(ctx)
	if err != nil || !info.Can("guest-exec") {
		return info, err
	}
	if err := c.begin(ctx); err != nil {
		return nil, err
	}
	c.info = info
	<-c.turn
	return info, nil
}

// OSInfo describes the guest's operating system; what the guest does not know is empty.
type OSInfo struct {
	ID            string `json:"id"` // "debian", "fedora", "mswindows"
	Name          string `json:"name"`
	PrettyName    string `json:"pretty-name"`
	Version       string `json:"version"`
	VersionID     string `json:"version-id"`
	Machine       string `json:"machine"`
	KernelRelease string `json:"kernel-release"`
	KernelVersion string `json:"kernel-version"`
}

// OSInfo describes the operating system.
func (c *Client) OSInfo(ctx context.Context) (*OSInfo, error) {
	return ask[*OSInfo](ctx, c, "guest-get-osinfo")
}

// HostName is the guest's host name.
func (c *Client) HostName(ctx context.Context) (string, error) {
	r, err := ask[struct {
		HostName string `json:"host-name"`
	}](ctx, c, "guest-get-host-name")
	return r.HostName, err
}

// Interface is one network interface of the guest.
type Interface struct {
	Name            string `json:"name"`
	HardwareAddress string `json:"hardware-address"`
	Addresses       []struct {
		Type   string `json:"ip-address-type"` // "ipv4" or "ipv6"
		IP     string `json:"ip-address"`
		Prefix int    `json:"prefix"`
	} `json:"ip-addresses"`
	Statistics *struct {
		RxBytes   uint64 `json:"rx-bytes"`
		RxPackets uint64 `json:"rx-packets"`
		RxErrors  uint64 `json:"rx-errs"`
		RxDropped uint64 `json:"rx-dropped"`
		TxBytes   uint64 `json:"tx-bytes"`
		TxPackets uint64 `json:"tx-packets"`
		TxErrors  uint64 `json:"tx-errs"`
		TxDropped uint64 `json:"tx-dropped"`
	} `json:"statistics"`
}

// Interfaces lists the network interfaces with their addresses.
func (c *Client) Interfaces(ctx context.Context) ([]Interface, error) {
	return ask[[]Interface](ctx, c, "guest-network-get-interfaces")
}

// User is someone logged in.
type User struct {
	Name      string  `json:"user"`
	Domain    string  `json:"domain"`     // of Windows only
	LoginTime float64 `json:"login-time"` // seconds since the epoch
}

// Users lists who is logged in.
func (c *Client) Users(ctx context.Context) ([]User, error) {
	return ask[[]User](ctx, c, "guest-get-users")
}

// FileSystem is one mounted file system on a disk.
type FileSystem struct {
	Name       string `json:"name"` // of the device
	MountPoint string `json:"mountpoint"`
	Type       string `json:"type"`
	UsedBytes  uint64 `json:"used-bytes"`
	TotalBytes uint64 `json:"total-bytes"`
	Disks      []struct {
		Serial string `json:"serial"`
		Dev    string `json:"dev"`
	} `json:"disk"`
}

// FileSystems lists the mounted file systems on disks. Of sizes that the guest does not tell, 0 is left.
func (c *Client) FileSystems(ctx context.Context) ([]FileSystem, error) {
	return ask[[]FileSystem](ctx, c, "guest-get-fsinfo")
}

// Mode is how Shutdown ends the guest.
type Mode string

// The modes of guest-shutdown.
const (
	PowerDown Mode = "powerdown"
	Reboot    Mode = "reboot"
	Halt      Mode = "halt"
)

// Shutdown asks the guest to end in an orderly manner. It returns when the agent has passed that on; the guest takes
// its time.
func (c *Client) Shutdown(ctx context.Context, mode Mode) error {
	const command = "guest-shutdown"
	if err := c.begin(ctx); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	defer func() { <-c.turn }()
	// It answers nothing but errors. What is asked behind it is answered when it is done, unless the agent is
	// already gone by then.
	c.heard = time.Time{}
	var a answer
	err := c.timed(ctx, syncTime, func() (err error) {
		if err = c.send(false, command, map[string]Mode{"mode": mode}); err != nil {
			return err
		}
		if err = c.send(false, "guest-ping", nil); err != nil {
			return err
		}
		a, err = c.reader.answer(maxMessage)
		return err
	})
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", command, context.Cause(ctx))
	case err == nil && a.Error != nil:
		return commandError(command, a.Error.Class, a.Error.Desc)
	case err != nil && errors.Is(err, errMalformed):
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// Freeze flushes and freezes all file systems and tells how many. Thaw must follow; until then the agent runs nearly
// nothing else.
func (c *Client) Freeze(ctx context.Context) (int, error) {
	var n int
	err := c.callWithin(ctx, freezeTime, maxMessage, "guest-fsfreeze-freeze", nil, &n)
	return n, err
}

// Thaw ends Freeze and tells how many file systems it thawed.
func (c *Client) Thaw(ctx context.Context) (int, error) {
	return ask[int](ctx, c, "guest-fsfreeze-thaw")
}

// Frozen tells whether file systems are frozen.
func (c *Client) Frozen(ctx context.Context) (bool, error) {
	status, err := ask[string](ctx, c, "guest-fsfreeze-status")
	return status == "frozen", err
}

// SetTime sets the guest's clock, and its hardware clock from that.
func (c *Client) SetTime(ctx context.Context, t time.Time) error {
	return c.call(ctx, "guest-set-time", map[string]int64{"time": t.UnixNano()}, nil)
}

// AddAuthorizedKeys adds lines to the user's ~/.ssh/authorized_keys. Agents before 5.2 cannot: ErrNotImplemented.
func (c *Client) AddAuthorizedKeys(ctx context.Context, user string, keys []string) error {
	return c.call(ctx, "guest-ssh-add-authorized-keys", map[string]any{"username": user, "keys": keys}, nil)
}
