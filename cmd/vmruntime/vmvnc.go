package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/vmruntime/vmruntime/runtime/vmpb"
)

// vncChunk bounds one message of a session in bytes.
const vncChunk = 64 << 10

func vncCommand(flags *vmFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "vnc VM",
		Short: "Bridge a machine's screen and keyboard to a local VNC viewer",
		Long: `Bridge a machine's screen and keyboard to a local VNC viewer.

Until Ctrl-C, the command listens on 127.0.0.1, or on a Unix socket, for one viewer at a time. Every user of this node can
connect to a port of 127.0.0.1; only this command's user can connect to the socket. From another computer:
ssh -L 5900:127.0.0.1:PORT NODE, or ssh -L 5900:/PATH NODE, and the viewer to 127.0.0.1::5900.`,
		Args: cobra.ExactArgs(1),
	}
	port := cmd.Flags().Uint16("port", 0, "listen on this `port` of 127.0.0.1; 0 takes a free one")
	socket := cmd.Flags().String("socket", "", "listen on a Unix socket at this `path` instead")
	cmd.MarkFlagsMutuallyExclusive("port", "socket")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return flags.ask(cmd.Context(), func(ctx context.Context, c vmpb.VMServiceClient) error {
			return serveVNC(ctx, c, args[0], func() (net.Listener, error) {
				if *socket != "" {
					return listenSocket("--socket", *socket)
				}
				return net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(*port))))
			}, cmd.OutOrStdout())
		})
	}
	return cmd
}

// serveVNC takes one viewer after the other until ctx or the machine ends.
func serveVNC(ctx context.Context, c vmpb.VMServiceClient, vm string, listen func() (net.Listener, error), out io.Writer) (err error) {
	// What has no screen is told before anybody starts a viewer.
	if err := bridge(ctx, c, vm, nil); err != nil {
		return err
	}
	l, err := listen()
	if err != nil {
		return err
	}
	defer closing(&err, func() error { return ignoreClosed(l.Close()) })
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	if a, ok := l.Addr().(*net.TCPAddr); ok {
		fmt.Fprintf(out, "VNC at %s, for one viewer at a time: vncviewer 127.0.0.1::%d. Ctrl-C ends it.\n", a, a.Port)
	} else {
		fmt.Fprintf(out, "VNC at %s, for one viewer at a time: vncviewer %s. Ctrl-C ends it.\n", l.Addr(), l.Addr())
	}
	for {
		viewer, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := bridge(ctx, c, vm, viewer); err != nil {
			return err
		}
	}
}

// bridge joins a viewer to the machine's screen until either ends. Without a viewer it only tries whether there is a screen.
func bridge(ctx context.Context, c vmpb.VMServiceClient, vm string, viewer net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if viewer != nil {
		defer viewer.Close()
	}
	stream, err := c.VNC(ctx)
	if err != nil {
		return err
	}
	open := &vmpb.VNCRequest{Message: &vmpb.VNCRequest_Open_{Open: &vmpb.VNCRequest_Open{Vm: vm}}}
	if err := stream.Send(open); err != nil && !errors.Is(err, io.EOF) {
		return err // io.EOF: Recv says why
	}
	if _, err := stream.Recv(); err != nil || viewer == nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		sendBytes(stream, viewer)
	}()
	err = receiveBytes(stream, viewer)
	_ = viewer.Close() // ends the reader
	<-done
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// sendBytes sends what comes from the viewer, however it ends.
func sendBytes(stream vmpb.VMService_VNCClient, viewer net.Conn) {
	defer func() { _ = stream.CloseSend() }() // Recv tells the stream's errors
	buf := make([]byte, vncChunk)
	for {
		n, err := viewer.Read(buf)
		if n > 0 && stream.Send(&vmpb.VNCRequest{Message: &vmpb.VNCRequest_Data{Data: buf[:n]}}) != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

// receiveBytes writes to the viewer until the session ends. A viewer that has gone is no error.
func receiveBytes(stream vmpb.VMService_VNCClient, viewer net.Conn) error {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := viewer.Write(m.GetData()); err != nil {
			return nil
		}
	}
}
