package runtime

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// Today's clients speak version 5 of the remote command protocol over WebSockets, in which the end of standard input can be told;
// cri-streaming answers versions up to 4. What such a client asks is asked again over SPDY, and what goes to and fro is copied. Which
// streams there are is in the query of the URL: cri-streaming alone knows what its token stands for.

// The channels of version 5, by number.
const (
	channelStdin = iota
	channelStdout
	channelStderr
	channelError
	channelResize
)

var channelTypes = []wsstream.ChannelType{
	channelStdin: wsstream.ReadChannel, channelStdout: wsstream.WriteChannel, channelStderr: wsstream.WriteChannel,
	channelError: wsstream.WriteChannel, channelResize: wsstream.ReadChannel,
}

func (s *streamServer) GetExec(req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	resp, err := s.Server.GetExec(req)
	if err == nil {
		resp.Url = withStreams(resp.GetUrl(), req)
	}
	return resp, err
}

func (s *streamServer) GetAttach(req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	resp, err := s.Server.GetAttach(req)
	if err == nil {
		resp.Url = withStreams(resp.GetUrl(), req)
	}
	return resp, err
}

// withStreams adds what is asked for to a URL.
func withStreams(of string, req interface {
	GetStdin() bool
	GetStdout() bool
	GetStderr() bool
	GetTty() bool
},
) string {
	q := url.Values{}
	for stream, asked := range map[string]bool{
		remotecommand.StreamTypeStdin: req.GetStdin(), remotecommand.StreamTypeStdout: req.GetStdout(),
		remotecommand.StreamTypeStderr: req.GetStderr(), remotecommand.StreamTypeResize: req.GetTty(),
	} {
		if asked {
			q.Set(stream, "1")
		}
	}
	return of + "?" + q.Encode()
}

func (s *streamServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) {
		s.Server.ServeHTTP(w, r)
		return
	}
	conn, err := s.dial(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	defer conn.Close()
	if err := translate(w, r, conn); err != nil {
		s.log.Debug("remote command over WebSockets", "path", r.URL.Path, "error", err)
	}
}

// dial asks this server again, over SPDY.
func (s *streamServer) dial(r *http.Request) (net.Conn, error) {
	again, err := http.NewRequestWithContext(r.Context(), http.MethodPost, "http://"+s.http.Addr+r.URL.Path, nil)
	if err != nil {
		return nil, err
	}
	again.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
	again.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
	again.Header.Set(httpstream.HeaderProtocolVersion, remotecommand.StreamProtocolV4Name)
	conn, err := (&net.Dialer{}).DialContext(r.Context(), "tcp", s.http.Addr)
	if err != nil {
		return nil, err
	}
	err = conn.SetDeadline(time.Now().Add(streaming.DefaultConfig.StreamCreationTimeout))
	if err == nil {
		err = upgrade(conn, again)
	}
	if err = errors.Join(err, conn.SetDeadline(time.Time{})); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// upgrade sends the request. Nothing comes after the answer before a stream is made.
func upgrade(conn net.Conn, req *http.Request) error {
	if err := req.Write(conn); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return errors.Join(fmt.Errorf("%s: %s", resp.Status, text), err)
	}
	return nil
}

// translate copies between a client's WebSocket and a SPDY connection until the command has ended or the client is gone.
func translate(w http.ResponseWriter, r *http.Request, socket net.Conn) error {
	conn, err := spdy.NewClientConnection(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	streams := map[string]httpstream.Stream{}
	for _, kind := range []string{
		remotecommand.StreamTypeError, remotecommand.StreamTypeStdin, remotecommand.StreamTypeStdout, remotecommand.StreamTypeStderr,
		remotecommand.StreamTypeResize,
	} {
		if kind != remotecommand.StreamTypeError && !r.URL.Query().Has(kind) {
			continue
		}
		stream, err := conn.CreateStream(http.Header{remotecommand.StreamType: {kind}})
		if err != nil {
			return fmt.Errorf("stream %s: %w", kind, err)
		}
		streams[kind] = stream
	}
	ws := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{remotecommand.StreamProtocolV5Name: {Binary: true, Channels: channelTypes}})
	ws.SetIdleTimeout(streaming.DefaultConfig.StreamIdleTimeout)
	_, channels, err := ws.Open(w, r)
	if err != nil {
		return err
	}
	var in, out sync.WaitGroup
	in.Go(func() {
		if to, ok := streams[remotecommand.StreamTypeStdin]; ok {
			_, _ = io.Copy(to, channels[channelStdin])
			_ = to.Close()
		}
	})
	in.Go(func() {
		to := io.Discard
		if resize, ok := streams[remotecommand.StreamTypeResize]; ok {
			to = resize
		}
		_, _ = io.Copy(to, channels[channelResize])
		_ = socket.Close() // only the client's end ends this channel
	})
	for kind, channel := range map[string]int{remotecommand.StreamTypeStdout: channelStdout, remotecommand.StreamTypeStderr: channelStderr} {
		if from, ok := streams[kind]; ok {
			out.Go(func() { _, _ = io.Copy(channels[channel], from) })
		}
	}
	var status bytes.Buffer
	_, readErr := io.Copy(&status, streams[remotecommand.StreamTypeError])
	out.Wait()
	_, writeErr := channels[channelError].Write(status.Bytes()) // after all output
	err = errors.Join(readErr, writeErr, ws.Close())
	in.Wait()
	return err
}
