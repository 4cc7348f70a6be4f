package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"
)

// A guest's questions are answered at this rate, per interface, once it has asked a burst's worth. What it asks beyond waits
// in the socket's buffer, and is lost when that is full.
const (
	answersPerSecond = 50
	answerBurst      = 100
)

// ResponderOptions are what a guest is told beside its interfaces' addresses and routes.
type ResponderOptions struct {
	// DNS of the guest. Its options have no place in DHCP; without servers the guest is told of none.
	DNS DNS
	// Hostname is told by DHCPv4; empty means that none is. At most 253 letters, digits, '-' and '.'.
	Hostname string
	// Log takes what goes wrong; nil means slog.Default().
	Log *slog.Logger
}

func (o ResponderOptions) validate() error {
	errs := []error{o.DNS.validate()}
	if o.Hostname != "" && !domain(o.Hostname) {
		errs = append(errs, invalid("hostname", o.Hostname, "labels of 1 to 63 letters, digits and '-', at most 253 bytes"))
	}
	for _, s := range o.DNS.Searches {
		if s != "." && !domain(strings.TrimSuffix(s, ".")) {
			errs = append(errs, invalid("DNS search domain", s, "labels of 1 to 63 letters, digits, '-' and '_', at most 253 bytes"))
		}
	}
	return errors.Join(errs...)
}

// domain tells whether a name fits into DHCP's and NDP's form of it.
func domain(name string) bool {
	for label := range strings.SplitSeq(name, ".") {
		strange := strings.ContainsFunc(label, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
		})
		if len(label) < 1 || len(label) > 63 || strange {
			return false
		}
	}
	return len(name) <= 253
}

// Responder tells a guest, by DHCPv4, DHCPv6 and router advertisements, what CNI gave to its interfaces.
type Responder struct {
	log    *slog.Logger
	ports  []*port
	cancel context.CancelFunc
	work   sync.WaitGroup
}

// port is a lease with the sockets it is told through. Wire is nil when there is nothing to ask the network.
type port struct {
	*lease
	tap, wire *os.File
}

// Respond begins to answer the guest's questions for its network, on all interfaces, and keeps them, and foreign answers, from
// passing between the guest and the pod's network. That stays so when the Responder is closed or its process is killed, until
// Unguard or Teardown: a later Responder takes over where the last one ended. At most one should run for a pod.
//
// The guest is to be a machine that configures itself; one that an agent configures needs no Responder. Errors: ErrInvalidArgument for
// options that cannot be told, ErrFailedPrecondition when the addresses and routes do not fit into a packet, ErrNotFound or
// os.ErrNotExist when the network is gone.
func (m *Manager) Respond(a *Attachment, o ResponderOptions) (*Responder, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	leases, err := a.leases(o)
	if err != nil {
		return nil, err
	}
	r := &Responder{log: o.Log}
	if r.log == nil {
		r.log = slog.Default()
	}
	r.log = r.log.With("netns", a.NetNS)
	err = inNetNS(a.NetNS, func() error {
		if err := a.setGuards(); err != nil {
			return err
		}
		return r.open(a, leases)
	})
	if err != nil {
		r.closeFiles()
		return nil, fmt.Errorf("answer the guest's DHCP and router discovery in %s: %w", a.NetNS, err)
	}
	r.run()
	return r, nil
}

// Unguard takes away what Respond put between the guest and the pod's network, for a guest that is to have no Responder. It
// succeeds when there is nothing.
func (m *Manager) Unguard(a *Attachment) error {
	if err := inNetNS(a.NetNS, a.dropGuards); err != nil {
		return fmt.Errorf("let DHCP and router discovery pass in %s: %w", a.NetNS, err)
	}
	return nil
}

func (r *Responder) open(a *Attachment, leases []*lease) error {
	for n, l := range leases {
		p := &port{lease: l}
		r.ports = append(r.ports, p)
		filter, err := l.guestFilter()
		if err != nil {
			return err
		}
		if p.tap, err = openPackets(a.Interfaces[n].Tap, filter); err != nil {
			return err
		}
		if len(l.standIns()) == 0 {
			continue
		}
		if filter, err = l.wireFilter(); err != nil {
			return err
		}
		if p.wire, err = openPackets(a.Interfaces[n].Name, filter); err != nil {
			return err
		}
	}
	return nil
}

func (r *Responder) run() {
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	for _, p := range r.ports {
		if p.lostSearches > 0 {
			r.log.Warn("search domains left out: they do not fit into a packet", "interface", p.name, "count", p.lostSearches)
		}
		r.log.Debug("answering DHCP and router discovery", "interface", p.name, "addresses", p.told())
		r.work.Go(func() { r.serve(ctx, p.tap, p.guestAsks) })
		if p.wire != nil {
			r.work.Go(func() { r.serve(ctx, p.wire, p.wireSays) })
		}
	}
	r.work.Go(func() { r.advertise(ctx) })
}

// Close ends the answering and returns when all of it has ended.
func (r *Responder) Close() {
	r.cancel()
	r.closeFiles()
	r.work.Wait()
}

func (r *Responder) closeFiles() {
	for _, p := range r.ports {
		for _, f := range []*os.File{p.tap, p.wire} {
			if f != nil {
				f.Close()
			}
		}
	}
}

// serve handles frames until its socket is closed, not faster than the rate allows. Other errors are the link's, such as its being
// down; they pass.
func (r *Responder) serve(ctx context.Context, from *os.File, handle func([]byte)) {
	buf := make([]byte, 64<<10)
	var pace pacer
	for {
		n, err := from.Read(buf)
		if errors.Is(err, os.ErrClosed) || !pause(ctx, pace.next(time.Now())) {
			return
		}
		if err == nil {
			r.guarded(handle, buf[:n])
		}
	}
}

// guarded keeps a fault in the handling of one guest's bytes from ending the process, which serves others.
func (r *Responder) guarded(handle func([]byte), frame []byte) {
	defer func() {
		if v := recover(); v != nil {
			r.log.Error("a frame of the guest was not understood", "panic", v, "stack", string(debug.Stack()))
		}
	}()
	handle(frame)
}

// A write that fails is a frame lost, for which the other side asks again.

func (p *port) guestAsks(frame []byte) {
	toGuest, toWire := p.fromGuest(frame)
	for _, f := range toGuest {
		_, _ = p.tap.Write(f)
	}
	if toWire != nil {
		_, _ = p.wire.Write(toWire)
	}
}

func (p *port) wireSays(frame []byte) {
	for _, f := range p.fromWire(frame) {
		_, _ = p.tap.Write(f)
	}
}

// advertise tells the guest of its routers at once, for it may have forgotten them while nobody told it, and from time to time.
func (r *Responder) advertise(ctx context.Context) {
	for {
		for _, p := range r.ports {
			ads, _ := p.advertisements() // fit has made them before
			for _, f := range ads {
				_, _ = p.tap.Write(f)
			}
		}
		if !pause(ctx, advertiseEvery) {
			return
		}
	}
}

// pause waits; it returns false when the context has ended first.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// pacer spreads events over time when they come too fast.
type pacer struct{ due time.Time }

// next is how long the event of now has to wait.
func (p *pacer) next(now time.Time) time.Duration {
	const each = time.Second / answersPerSecond
	if full := now.Add(-answerBurst * each); p.due.Before(full) {
		p.due = full
	}
	p.due = p.due.Add(each)
	return p.due.Sub(now)
}
