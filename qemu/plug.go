package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/digitalocean/go-qemu/qmp"
)

// AddDisk plugs a disk into the running guest, which finds it by its serial. A disk of the same serial is
// errdefs.ErrAlreadyExists. What a failed attempt left is taken up by the next one.
func (v *VM) AddDisk(ctx context.Context, d Disk) (err error) {
	var p problems
	d.validate(&p, "disk")
	p.rule(d.Bus == BusSCSI, "disk.bus", d.Bus, "SCSI, to be plugged into a running guest")
	p.rule(d.Backing == nil, "disk.backing", d.Backing, "none, to be plugged into a running guest")
	if err := errors.Join(p...); err != nil {
		return err
	}
	v.plug.Lock()
	defer v.plug.Unlock()
	there, err := v.hasDevice(ctx, d.id())
	if err != nil {
		return err
	}
	if there {
		return fmt.Errorf("disk %s is plugged: %w", d.Serial, errdefs.ErrAlreadyExists)
	}
	if err := v.dropNode(ctx, d.id()); err != nil {
		return err
	}
	f, device, err := d.open()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := v.plugDisk(ctx, d, f, device); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
		defer cancel()
		return errors.Join(fmt.Errorf("plug disk %s: %w", d.Serial, err), v.dropNode(undo, d.id()))
	}
	return nil
}

func (v *VM) plugDisk(ctx context.Context, d Disk, f *os.File, device bool) error {
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := v.mon.Execute(ctx, "add-fd", props{"opaque": d.id()}, &set, f); err != nil {
		return err
	}
	if err := v.mon.Execute(ctx, "blockdev-add", d.node(set.ID, device), nil); err != nil {
		return err
	}
	return v.mon.Execute(ctx, "device_add", d.device(), nil)
}

// RemoveDisk unplugs a disk, waits until the guest has let go of it, and closes its file. A disk that is not plugged is
// no error.
func (v *VM) RemoveDisk(ctx context.Context, serial string) error {
	d := Disk{Serial: serial}
	v.plug.Lock()
	defer v.plug.Unlock()
	there, err := v.hasDevice(ctx, d.id())
	if err != nil {
		return err
	}
	if there {
		if err := v.unplug(ctx, d.id()); err != nil {
			return fmt.Errorf("unplug disk %s: %w", serial, err)
		}
	}
	return v.dropNode(ctx, d.id())
}

// unplug removes a device and waits until QEMU says that it is deleted: only then it has let go of its block node.
func (v *VM) unplug(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	events, err := v.mon.Events(ctx)
	if err != nil {
		return err
	}
	if err := v.mon.Execute(ctx, "device_del", props{"id": id}, nil); err != nil {
		return err
	}
	return deleted(ctx, events, id)
}

func deleted(ctx context.Context, events <-chan qmp.Event, id string) error {
	for e := range events {
		if e.Event == "DEVICE_DELETED" && e.Data["device"] == id {
			return nil
		}
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("the guest does not let go of %s: %w", id, err)
	}
	return fmt.Errorf("QEMU ended: %w", errdefs.ErrUnavailable)
}

// hasDevice tells whether a device with this ID is plugged.
func (v *VM) hasDevice(ctx context.Context, id string) (bool, error) {
	return v.has(ctx, "qom-list", props{"path": "/machine/peripheral"}, id)
}

// has looks for a name in a list of things.
func (v *VM) has(ctx context.Context, command string, args props, name string) (bool, error) {
	var list []struct {
		Name  string `json:"name"`      // of qom-list
		Node  string `json:"node-name"` // of query-named-block-nodes
		Label string `json:"label"`     // of query-chardev
	}
	if err := v.mon.Execute(ctx, command, args, &list); err != nil {
		return false, err
	}
	for _, e := range list {
		if e.Name == name || e.Node == name || e.Label == name {
			return true, nil
		}
	}
	return false, nil
}

// dropNode removes a disk's block node and descriptor set, as far as they are there.
func (v *VM) dropNode(ctx context.Context, id string) error {
	there, err := v.has(ctx, "query-named-block-nodes", props{"flat": true}, id)
	if err != nil {
		return err
	}
	if there {
		if err := v.mon.Execute(ctx, "blockdev-del", props{"node-name": id}, nil); err != nil {
			return err
		}
	}
	var sets []struct {
		ID  int `json:"fdset-id"`
		FDs []struct {
			Opaque string `json:"opaque"`
		} `json:"fds"`
	}
	if err := v.mon.Execute(ctx, "query-fdsets", nil, &sets); err != nil {
		return err
	}
	var errs []error
	for _, s := range sets {
		if len(s.FDs) > 0 && s.FDs[0].Opaque == id {
			errs = append(errs, v.mon.Execute(ctx, "remove-fd", props{"fdset-id": s.ID}, nil))
		}
	}
	return errors.Join(errs...)
}

// Share is a virtiofs file system for the guest.
type Share struct {
	// Tag is what the guest mounts: 1 to 20 of a-z, 0-9 and dash.
	Tag string
	// Socket is the path of a virtiofsd's listening socket; this process connects to it.
	Socket string
}

func (s Share) validate(p *problems, field string) {
	p.rule(serialRE.MatchString(s.Tag), field+".tag", s.Tag, "1 to 20 of a-z, 0-9 and dash")
	p.rule(filepath.IsAbs(s.Socket), field+".socket", s.Socket, "an absolute path")
}

// AddShare plugs a virtiofs device into a free root port. A share of the same tag is errdefs.ErrAlreadyExists, no
// free port errdefs.ErrResourceExhausted.
func (v *VM) AddShare(ctx context.Context, s Share) error {
	var p problems
	s.validate(&p, "share")
	if err := errors.Join(p...); err != nil {
		return err
	}
	v.plug.Lock()
	defer v.plug.Unlock()
	id := s.id()
	there, err := v.hasDevice(ctx, id)
	if err != nil {
		return err
	}
	if there {
		return fmt.Errorf("share %s is plugged: %w", s.Tag, errdefs.ErrAlreadyExists)
	}
	if err := v.dropChardev(ctx, id); err != nil {
		return err
	}
	if err := v.plugShare(ctx, s, id); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
		defer cancel()
		return errors.Join(fmt.Errorf("plug share %s: %w", s.Tag, err), v.dropChardev(undo, id))
	}
	return nil
}

// HasShare tells whether a share is plugged, or was from the start.
func (v *VM) HasShare(ctx context.Context, tag string) (bool, error) {
	return v.hasDevice(ctx, Share{Tag: tag}.id())
}

func (v *VM) plugShare(ctx context.Context, s Share, id string) error {
	port, err := v.freePort(ctx)
	if err != nil {
		return err
	}
	if err := v.passConnection(ctx, s.Socket, id); err != nil {
		return err
	}
	backend := props{"type": "socket", "data": props{
		"addr":   props{"type": "fd", "data": props{"str": id}},
		"server": false,
	}}
	if err := v.mon.Execute(ctx, "chardev-add", props{"id": id, "backend": backend}, nil); err != nil {
		return errors.Join(err, v.mon.Execute(ctx, "closefd", props{"fdname": id}, nil))
	}
	return v.mon.Execute(ctx, "device_add", s.device(port), nil)
}

// passConnection connects to a socket, which QEMU cannot see, and gives QEMU the connection.
func (v *VM) passConnection(ctx context.Context, path, name string) error {
	f, err := dialFile(ctx, path)
	if err != nil {
		return err
	}
	defer f.Close()
	return v.mon.Execute(ctx, "getfd", props{"fdname": name}, nil, f)
}

// dialFile connects to a socket and returns the connection as a file to hand over.
func dialFile(ctx context.Context, path string) (*os.File, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	f, err := conn.(*net.UnixConn).File()
	return f, errors.Join(err, conn.Close())
}

func (v *VM) dropChardev(ctx context.Context, id string) error {
	there, err := v.has(ctx, "query-chardev", props{}, id)
	if err != nil || !there {
		return err
	}
	return v.mon.Execute(ctx, "chardev-remove", props{"id": id}, nil)
}

var portRE = regexp.MustCompile(`^` + portPrefix + `[0-9]+$`)

// port is a root port for devices that are plugged, with the ID of what is behind it, empty if that is nothing.
type port struct{ id, device string }

func (v *VM) ports(ctx context.Context) (out []port, err error) {
	type device struct {
		ID     string `json:"qdev_id"`
		Bridge struct {
			Devices []struct {
				ID string `json:"qdev_id"`
			} `json:"devices"`
		} `json:"pci_bridge"`
	}
	var buses []struct {
		Devices []device `json:"devices"`
	}
	if err := v.mon.Execute(ctx, "query-pci", nil, &buses); err != nil {
		return nil, err
	}
	for _, b := range buses {
		for _, d := range b.Devices {
			if !portRE.MatchString(d.ID) {
				continue
			}
			p := port{id: d.ID}
			for _, behind := range d.Bridge.Devices {
				p.device = behind.ID
			}
			out = append(out, p)
		}
	}
	return out, nil
}

// freePort finds a root port with nothing behind it.
func (v *VM) freePort(ctx context.Context) (string, error) {
	ports, err := v.ports(ctx)
	if err != nil {
		return "", err
	}
	var used []string
	for _, p := range ports {
		if p.device == "" {
			return p.id, nil
		}
		used = append(used, p.id)
	}
	return "", fmt.Errorf("no root port is free (in use: %s): %w", strings.Join(used, ", "), errdefs.ErrResourceExhausted)
}
