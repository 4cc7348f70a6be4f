package sshexec

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"
)

func TestKeys(t *testing.T) {
	k, err := NewKeys("pod-1")
	if err != nil {
		t.Fatal(err)
	}
	for _, pair := range [][2]string{{k.PrivateKey, k.AuthorizedKey}, {k.HostPrivateKey, k.HostPublicKey}} {
		signer, err := ssh.ParsePrivateKey([]byte(pair[0]))
		if err != nil {
			t.Fatal(err)
		}
		if want := keyLine(signer.PublicKey()) + " pod-1"; pair[1] != want || !strings.HasPrefix(want, "ssh-ed25519 ") {
			t.Errorf("public key %q, want %q", pair[1], want)
		}
	}
	if k.PrivateKey == k.HostPrivateKey {
		t.Error("the two keys are one")
	}
	if _, err := NewKeys("a\nb"); err == nil {
		t.Error("a comment of two lines")
	}
}

func TestDialRefuses(t *testing.T) {
	k, err := NewKeys("x")
	if err != nil {
		t.Fatal(err)
	}
	good := Options{Addresses: []string{"127.0.0.1"}, User: "root", PrivateKey: k.PrivateKey, HostKey: HostKey{Expected: k.HostPublicKey}}
	for name, change := range map[string]func(*Options){
		"no address":   func(o *Options) { o.Addresses = nil },
		"no user":      func(o *Options) { o.User = "" },
		"no key":       func(o *Options) { o.PrivateKey = "x" },
		"no policy":    func(o *Options) { o.HostKey = HostKey{} },
		"bad host key": func(o *Options) { o.HostKey.Expected = "ssh-ed25519 x" },
	} {
		o := good
		change(&o)
		if _, err := Dial(deadline(t, time.Second), o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDialPolicies(t *testing.T) {
	g := newGuest(t)
	other, err := NewKeys("other")
	if err != nil {
		t.Fatal(err)
	}
	// It waits for the guest's sshd, whatever the first attempts meet.
	c := g.dial(t, "root")
	_ = c
	o := g.options("root")
	o.HostKey.Expected = other.HostPublicKey
	if _, err := Dial(deadline(t, 2*time.Second), o); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "host key") {
		t.Errorf("another host key: %v", err)
	}
	o = g.options("root")
	o.PrivateKey = other.PrivateKey
	if _, err := Dial(deadline(t, 2*time.Second), o); !errdefs.IsPermissionDenied(err) {
		t.Errorf("another key: %v", err)
	}
	o = g.options("root")
	o.Port = 23
	if _, err := Dial(deadline(t, 2*time.Second), o); !errdefs.IsUnavailable(err) {
		t.Errorf("no sshd: %v", err)
	}
	var recorded string
	o = g.options("root")
	o.Addresses = []string{"127.0.0.1", "127.0.0.2"}
	o.HostKey = HostKey{Record: func(key string) error { recorded = key; return nil }}
	first, err := Dial(deadline(t, time.Minute), o)
	if err != nil {
		t.Fatal(err)
	}
	_ = first.Close()
	if recorded == "" || !strings.HasPrefix(g.keys.HostPublicKey, recorded+" ") {
		t.Errorf("recorded %q, the guest's is %q", recorded, g.keys.HostPublicKey)
	}
	o.HostKey = HostKey{Expected: recorded}
	second, err := Dial(deadline(t, time.Minute), o)
	if err != nil {
		t.Fatalf("with the recorded key: %v", err)
	}
	_ = second.Close()
	o.HostKey = HostKey{Record: func(string) error { return errdefs.ErrPermissionDenied }}
	if _, err := Dial(deadline(t, 2*time.Second), o); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a key that the caller refuses: %v", err)
	}
}

func testDialGuest(t *testing.T, g *testGuest, c *Client) {
	var l net.Listener
	if err := g.within(func() (err error) { l, err = net.Listen("tcp", "127.0.0.1:8080"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var server sync.WaitGroup
	defer server.Wait()
	server.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		// Answers when the request has ended, so that it needs the half-close.
		data, err := io.ReadAll(conn)
		if err == nil {
			_, _ = conn.Write([]byte(strings.ToUpper(string(data))))
		}
	})
	conn, err := c.DialGuest(deadline(t, time.Minute), "tcp", "localhost:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	big := strings.Repeat("abc", 1<<20)
	if _, err := io.WriteString(conn, big); err != nil {
		t.Fatal(err)
	}
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		t.Fatal("the connection has no CloseWrite")
	}
	if err := half.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != strings.ToUpper(big) {
		t.Errorf("%d bytes back, %v", len(got), err)
	}
	if _, err := c.DialGuest(deadline(t, time.Minute), "tcp", "localhost:9"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a port that nobody listens on: %v", err)
	}
	conn, err = c.DialGuest(deadline(t, time.Minute), "tcp", "127.0.0.1:22")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.HasPrefix(line, "SSH-2.0-") {
		t.Errorf("sshd says %q, %v", line, err)
	}
}

// bufferedConn is an end of a net.Pipe that takes what is written at once: both ends of SSH begin by writing.
type bufferedConn struct {
	net.Conn
	out chan []byte
}

func pipe() (near, far net.Conn) {
	a, b := net.Pipe()
	return newBuffered(a), newBuffered(b)
}

func newBuffered(c net.Conn) net.Conn {
	b := &bufferedConn{c, make(chan []byte, 100)}
	go func() {
		for data := range b.out {
			if _, err := c.Write(data); err != nil {
				return
			}
		}
	}()
	return b
}

func (b *bufferedConn) Write(p []byte) (int, error) {
	b.out <- bytes.Clone(p)
	return len(p), nil
}

// Close ends the writer's goroutine too, by its next write.
func (b *bufferedConn) Close() error {
	err := b.Conn.Close()
	select {
	case b.out <- nil:
	default:
	}
	return err
}

// fakeGuest is an SSH server that has hung: it lets in, and answers nothing afterwards unless told to.
func fakeGuest(t *testing.T, k *Keys, answers *atomic.Int32) func(context.Context, string, string) (net.Conn, error) {
	t.Helper()
	signer, err := ssh.ParsePrivateKey([]byte(k.HostPrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	config := &ssh.ServerConfig{PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
	config.AddHostKey(signer)
	var servers sync.WaitGroup
	t.Cleanup(servers.Wait)
	return func(context.Context, string, string) (net.Conn, error) {
		near, far := pipe()
		servers.Go(func() {
			sc, chans, reqs, err := ssh.NewServerConn(far, config)
			if err != nil {
				return
			}
			defer sc.Close()
			servers.Go(func() {
				for r := range reqs {
					if answers.Add(-1) >= 0 {
						_ = r.Reply(false, nil)
					}
				}
			})
			for ch := range chans {
				// A session that is never closed.
				_, channelRequests, err := ch.Accept()
				if err != nil {
					return
				}
				servers.Go(func() {
					for r := range channelRequests {
						_ = r.Reply(true, nil)
					}
				})
			}
		})
		return near, nil
	}
}

// A guest that has hung is noticed.
func TestKeepAlive(t *testing.T) {
	k, err := NewKeys("x")
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var answers atomic.Int32
		answers.Store(3)
		c, err := Dial(deadline(t, time.Minute), Options{
			Addresses: []string{"192.0.2.1"}, User: "root", PrivateKey: k.PrivateKey,
			HostKey: HostKey{Expected: k.HostPublicKey}, Dial: fakeGuest(t, k, &answers),
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		begin := time.Now()
		_, err = c.Exec(t.Context(), Command{Args: []string{"true"}})
		if took := time.Since(begin); !errdefs.IsUnavailable(err) || took < 4*keepAlive || took > 4*keepAlive+aliveTime+time.Second {
			t.Errorf("exec: %v after %s", err, took)
		}
	})
}

// A guest that neither ends the command nor its session does not hold up the caller.
func TestSessionNotClosed(t *testing.T) {
	k, err := NewKeys("x")
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var answers atomic.Int32
		answers.Store(1000)
		c, err := Dial(deadline(t, time.Minute), Options{
			Addresses: []string{"192.0.2.1"}, User: "root", PrivateKey: k.PrivateKey,
			HostKey: HostKey{Expected: k.HostPublicKey}, Dial: fakeGuest(t, k, &answers),
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		_, err = c.Exec(ctx, Command{Args: []string{"true"}})
		if took := time.Since(begin); !errors.Is(err, context.DeadlineExceeded) || took > time.Second+beginTime+closeTime+time.Second {
			t.Errorf("exec: %v after %s", err, took)
		}
	})
}
