package main

import (
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/vmruntime/vmruntime/runtime"
)

// metricsTimeout bounds a scrape. The figures are in memory; what is slow is the reader.
const metricsTimeout = 10 * time.Second

// metricsServer serves /metrics; nil where the configuration names no address.
type metricsServer struct {
	http     *http.Server
	listener net.Listener
}

// serveMetrics listens where the configuration says. serve then answers, until close.
func serveMetrics(cfg runtime.MetricsConfig, all ...prometheus.Collector) (*metricsServer, error) {
	if cfg.Address == "" {
		return nil, nil
	}
	registry := prometheus.NewRegistry()
	for _, c := range append(all, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})) {
		if err := registry.Register(c); err != nil {
			return nil, err
		}
	}
	listener, err := listenMetrics(cfg)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{Timeout: metricsTimeout}))
	return &metricsServer{
		listener: listener,
		http:     &http.Server{Handler: mux, ReadHeaderTimeout: metricsTimeout, ReadTimeout: metricsTimeout, WriteTimeout: metricsTimeout, IdleTimeout: 2 * time.Minute},
	}, nil
}

func listenMetrics(cfg runtime.MetricsConfig) (net.Listener, error) {
	network, address := cfg.Listen()
	if network == "unix" {
		return listenSocket("metrics.address", address)
	}
	return net.Listen(network, address)
}

func (m *metricsServer) serve() error {
	if m == nil {
		return nil
	}
	if err := m.http.Serve(m.listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil // close came first
}

// close breaks off what is being answered. It may be called again, and before serve.
func (m *metricsServer) close() error {
	if m == nil {
		return nil
	}
	return errors.Join(m.http.Close(), ignoreClosed(m.listener.Close()))
}
