package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
)

// netns is the node's network namespace, with loopback up.
type netns struct {
	name string
	path string
}

func newNetNS(name string) (*netns, error) {
	ns := &netns{name: name, path: filepath.Join("/run/netns", name)}
	err := onThread(func() error {
		handle, err := vnetns.NewNamed(name) // the thread is in it now
		if err != nil {
			return err
		}
		defer handle.Close()
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		return nil, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	return ns, nil
}

// do runs f on a thread that is in the namespace.
func (ns *netns) do(f func() error) error {
	return onThread(func() error {
		handle, err := vnetns.GetFromName(ns.name)
		if err != nil {
			return err
		}
		defer handle.Close()
		if err := vnetns.Set(handle); err != nil {
			return err
		}
		return f()
	})
}

func (ns *netns) remove() error { return vnetns.DeleteNamed(ns.name) }

// onThread runs f on a thread of its own, which ends with f, so that f may
// change the thread's namespaces.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}

// registryServer serves the images on the node's loopback address.
type registryServer struct {
	server *http.Server
	addr   string
	done   chan error
}

func startRegistry(ns *netns, h http.Handler) (*registryServer, error) {
	var listener net.Listener
	err := ns.do(func() (err error) {
		listener, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen for the registry: %w", err)
	}
	r := &registryServer{
		server: &http.Server{Handler: h, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0)},
		addr:   listener.Addr().String(),
		done:   make(chan error, 1),
	}
	go func() { r.done <- r.server.Serve(listener) }()
	return r, nil
}

func (r *registryServer) close() error {
	if r == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := r.server.Shutdown(ctx)
	if serve := <-r.done; !errors.Is(serve, http.ErrServerClosed) {
		err = errors.Join(err, serve)
	}
	return err
}
