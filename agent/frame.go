package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
)

// A frame on the wire is COBS(header | payload | checksum) followed by one zero byte. COBS leaves no zero
// inside, so a reader that starts anywhere finds the next frame behind the next zero.
const (
	headerSize   = 8 + 1 + 4
	checksumSize = 4
	// maxPayload keeps an encoded frame within one write of the guest's virtio-serial driver (32 KiB).
	maxPayload = 16 << 10
	maxDecoded = headerSize + maxPayload + checksumSize
	maxEncoded = maxDecoded + maxDecoded/254 + 2
)

type frameKind byte

const (
	kindHello frameKind = 1 // host to guest: begin the session with this nonce, end any other
	kindAck   frameKind = 2 // guest to host: the session with this nonce has begun
	kindData  frameKind = 3 // either way: bytes of the session
	kindBye   frameKind = 4 // guest to host: the session has ended
)

type frame struct {
	nonce   uint64
	kind    frameKind
	seq     uint32 // of data frames, from 0, for each direction
	payload []byte
}

var (
	errBadFrame = errors.New("damaged frame")
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
)

// appendFrame appends the encoded frame with its ending zero to dst.
func appendFrame(dst []byte, f frame) []byte {
	raw := make([]byte, headerSize, headerSize+len(f.payload)+checksumSize)
	binary.BigEndian.PutUint64(raw, f.nonce)
	raw[8] = byte(f.kind)
	binary.BigEndian.PutUint32(raw[9:], f.seq)
	raw = append(raw, f.payload...)
	raw = binary.BigEndian.AppendUint32(raw, crc32.Checksum(raw, castagnoli))
	return append(cobsEncode(dst, raw), 0)
}

// parseFrame decodes one frame without its ending zero. The payload does not alias p.
func parseFrame(p []byte) (frame, error) {
	raw, ok := cobsDecode(make([]byte, 0, len(p)), p)
	if !ok || len(raw) < headerSize+checksumSize || len(raw) > maxDecoded {
		return frame{}, errBadFrame
	}
	body, sum := raw[:len(raw)-checksumSize], raw[len(raw)-checksumSize:]
	if crc32.Checksum(body, castagnoli) != binary.BigEndian.Uint32(sum) {
		return frame{}, errBadFrame
	}
	return frame{
		nonce:   binary.BigEndian.Uint64(body),
		kind:    frameKind(body[8]),
		seq:     binary.BigEndian.Uint32(body[9:]),
		payload: body[headerSize:],
	}, nil
}

// cobsEncode appends the Consistent Overhead Byte Stuffing of src to dst: each block is its length plus
// one, then that many bytes without a zero; a length of 254 has no zero behind it.
func cobsEncode(dst, src []byte) []byte {
	for {
		n := bytes.IndexByte(src, 0)
		end := n < 0
		if end {
			n = len(src)
		}
		for n >= 254 {
			dst = append(append(dst, 255), src[:254]...)
			src, n = src[254:], n-254
		}
		dst = append(append(dst, byte(n+1)), src[:n]...)
		if end {
			return dst
		}
		src = src[n+1:]
	}
}

// cobsDecode appends what src encodes to dst. It tells false for what no encoder has written.
func cobsDecode(dst, src []byte) ([]byte, bool) {
	for len(src) > 0 {
		code := int(src[0])
		if code == 0 || code > len(src) {
			return nil, false
		}
		dst = append(dst, src[1:code]...)
		src = src[code:]
		if code < 255 && len(src) > 0 {
			dst = append(dst, 0)
		}
	}
	return dst, true
}

// frameReader cuts a byte stream into frames at the zero bytes.
type frameReader struct {
	buf []byte
	// lost is set while the bytes up to the next zero are to be dropped.
	lost bool
}

// feed takes bytes of the stream and calls each for every whole frame, damaged ones with an error. Empty
// frames are dropped.
func (r *frameReader) feed(p []byte, each func(frame, error)) {
	for len(p) > 0 {
		n := bytes.IndexByte(p, 0)
		if n < 0 {
			r.keep(p)
			return
		}
		r.keep(p[:n])
		p = p[n+1:]
		switch {
		case r.lost:
			each(frame{}, errBadFrame)
		case len(r.buf) > 0:
			each(parseFrame(r.buf))
		}
		r.buf, r.lost = r.buf[:0], false
	}
}

func (r *frameReader) keep(p []byte) {
	if r.lost || len(r.buf)+len(p) > maxEncoded {
		r.lost, r.buf = true, r.buf[:0]
		return
	}
	r.buf = append(r.buf, p...)
}
