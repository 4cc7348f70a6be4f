package runtime

import (
	"strings"

	"github.com/moby/sys/signal"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stopSignal is the number of the signal that the container is stopped with: the pod's, else the image's, else SIGTERM.
func (c *container) stopSignal() int32 {
	s, err := signal.ParseSignal(c.rec.Spec().StopSignal)
	if err != nil {
		return int32(unix.SIGTERM)
	}
	return int32(s)
}

// The CRI writes SIGNAL_SIGRTMINPLUS1 for what signal(7) calls SIGRTMIN+1.
var (
	toCRI   = strings.NewReplacer("+", "PLUS", "-", "MINUS")
	fromCRI = strings.NewReplacer("SIGNAL_", "", "PLUS", "+", "MINUS", "-")
)

// signalName is a CRI signal as signal(7) calls it.
func signalName(s runtimeapi.Signal) string { return fromCRI.Replace(s.String()) }

// signalOf is a signal's name or number as the CRI tells it; no name is SIGTERM.
func signalOf(name string) runtimeapi.Signal {
	if name == "" {
		return runtimeapi.Signal_SIGNAL_SIGTERM
	}
	s, err := signal.ParseSignal(name)
	if err != nil {
		return runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT
	}
	for known, number := range signal.SignalMap {
		if v, ok := runtimeapi.Signal_value["SIGNAL_SIG"+toCRI.Replace(known)]; ok && number == s && !aliases[known] {
			return runtimeapi.Signal(v)
		}
	}
	return runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT
}

// aliases are second names of signals.
var aliases = map[string]bool{"CLD": true, "IOT": true, "POLL": true}
