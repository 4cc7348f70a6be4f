package delegate

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// frame is a message that is passed on as the bytes it came as.
type frame struct{ bytes []byte }

// joined is one message in two pieces.
type joined [2][]byte

// codec is protobuf, except that bytes are taken as they are. It calls itself proto, since on the wire it is.
type codec struct{}

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	switch v := v.(type) {
	case *frame:
		return mem.BufferSlice{mem.SliceBuffer(v.bytes)}, nil
	case *joined:
		return mem.BufferSlice{mem.SliceBuffer(v[0]), mem.SliceBuffer(v[1])}, nil
	}
	return encoding.GetCodecV2(proto.Name).Marshal(v)
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*frame); ok {
		f.bytes = data.Materialize()
		return nil
	}
	return encoding.GetCodecV2(proto.Name).Unmarshal(data, v)
}

func (codec) Name() string { return proto.Name }
