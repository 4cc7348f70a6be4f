package runtime

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming"
)

// streamServer serves exec, attach and port-forward over HTTP.
type streamServer struct {
	streaming.Server
	http  *http.Server
	log   *slog.Logger
	owned sync.WaitGroup
}

// serveStreams listens before any URL is given out, so that port 0 can mean a free one.
func (rt *Runtime) serveStreams(address string) (*streamServer, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("server.stream_address: %w", err)
	}
	cfg := streaming.DefaultConfig
	cfg.Addr = l.Addr().String()
	cfg.BaseURL = &url.URL{Scheme: "http", Host: cfg.Addr}
	server, err := streaming.NewServer(cfg, streams{rt})
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	s := &streamServer{Server: server, http: &http.Server{Addr: cfg.Addr, ReadHeaderTimeout: time.Minute}, log: rt.log}
	s.http.Handler = s
	s.owned.Go(func() {
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			rt.log.Error("serving streams", "error", err)
		}
	})
	return s, nil
}

func (s *streamServer) close() error {
	err := s.http.Close()
	s.owned.Wait()
	return err
}
