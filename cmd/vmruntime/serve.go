package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"github.com/vmruntime/vmruntime/runtime"
	"github.com/vmruntime/vmruntime/runtime/delegate"
)

// stopTimeout is how long calls that run may go on after SIGTERM. Below systemd's 90 s, and short, since the
// kubelet repeats what is broken off.
const stopTimeout = 5 * time.Second

// serve runs the daemon until ctx ends. The socket answers Unavailable until all pods are found again.
func serve(ctx context.Context, cfg runtime.Config) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.Server.Level()}))
	for _, dir := range []string{cfg.Server.Root, cfg.Server.State, filepath.Dir(cfg.Server.Socket), filepath.Dir(cfg.Server.AdminSocket)} {
		// QEMU's own user has to pass through, but need not look.
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	lock, err := takeLock(filepath.Join(cfg.Server.Root, "lock"))
	if err != nil {
		return err
	}
	defer closing(&err, lock.Close)
	listener, err := listenSocket("server.socket", cfg.Server.Socket)
	if err != nil {
		return err
	}
	// Who serves a listener closes it too.
	defer closing(&err, func() error { return ignoreClosed(listener.Close()) })
	admin, err := listenSocket("server.admin_socket", cfg.Server.AdminSocket)
	if err != nil {
		return err
	}
	defer closing(&err, func() error { return ignoreClosed(admin.Close()) })
	conn, err := delegate.Dial(cfg.Containerd.Address)
	if err != nil {
		return err
	}
	defer closing(&err, conn.Close)
	client, err := containerd.NewWithConn(conn)
	if err != nil {
		return err
	}
	rt, err := runtime.New(cfg, runtime.Dependencies{
		Containerd: client,
		CRI:        conn,
		Launcher:   []string{"/proc/self/exe", launchCommand},
		Logger:     log,
	})
	if err != nil {
		return err
	}
	defer closing(&err, rt.Close)
	spans, err := startTracing(ctx, cfg.Tracing, log)
	if err != nil {
		return err
	}
	defer spans.close()
	s := servers{
		cri: delegate.New(delegate.Options{VM: rt, Containerd: conn, Logger: log, Calls: spans.calls()}), criListener: listener,
		admin: runtime.NewAdminServer(rt), adminListener: admin,
	}
	if s.metrics, err = serveMetrics(cfg.Metrics, s.cri, rt); err != nil {
		return err
	}
	defer closing(&err, s.metrics.close)
	return s.answer(ctx, rt, log)
}

// servers are what the daemon answers.
type servers struct {
	cri           *delegate.Server
	criListener   net.Listener
	admin         *runtime.AdminServer
	adminListener net.Listener
	metrics       *metricsServer
}

// answer serves calls, recovers the pods, says that it is ready, and waits for the end.
func (s servers) answer(ctx context.Context, rt *runtime.Runtime, log *slog.Logger) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.cri.Serve(s.criListener) })
	g.Go(func() error { return s.admin.Serve(s.adminListener) })
	g.Go(s.metrics.serve)
	g.Go(func() error {
		if err := rt.Recover(ctx); err != nil {
			return fmt.Errorf("recover pods: %w", err)
		}
		s.cri.SetReady()
		s.admin.SetReady()
		log.Info("ready", "socket", s.criListener.Addr().String(), "version", runtime.Version())
		return notify(daemon.SdNotifyReady)
	})
	g.Go(func() error {
		<-ctx.Done()
		err := notify(daemon.SdNotifyStopping)
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		var end errgroup.Group
		end.Go(func() error { s.admin.Stop(stop); return nil })
		end.Go(s.metrics.close)
		s.cri.Stop(stop)
		return errors.Join(err, end.Wait())
	})
	err := g.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil // told to end while recovering
	}
	log.Info("stopped; VM pods go on")
	return err
}

func notify(state string) error {
	_, err := daemon.SdNotify(false, state)
	return err
}

// takeLock holds that no other daemon works on the same pods.
func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w; another vmruntime uses this server.root", path, err), f.Close())
	}
	return f, nil
}

// listenSocket makes the socket, only for root from its first moment on. It replaces the one that a killed daemon left.
// The key names it in the configuration.
func listenSocket(key, path string) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("%s %s is there and not a socket; remove it or set another path", key, path)
	default:
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// The mask is the whole process's, which does nothing else yet.
	defer syscall.Umask(syscall.Umask(0o177))
	return net.Listen("unix", path)
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// closing adds the error of a deferred close to the function's own.
func closing(err *error, f func() error) {
	*err = errors.Join(*err, f())
}
