package seed

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// part is one part of a MIME message. One without contentType is a message of its own, with its own headers.
type part struct {
	contentType, name string
	body              []byte
	merge             string // how cloud-init merges this cloud-config into those before it
}

// multipart is a message of all parts (RFC 2046), of which cloud-init handles one after the other, in a nested message too.
func multipart(parts []part) []byte {
	boundary := boundaryOf(parts)
	var b bytes.Buffer
	fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=\"%s\"\nMIME-Version: 1.0\n", boundary)
	for _, p := range parts {
		fmt.Fprintf(&b, "\n--%s\n", boundary)
		if p.contentType == "" {
			b.Write(p.body)
			continue
		}
		fmt.Fprintf(&b, "Content-Type: %s; charset=\"utf-8\"\nMIME-Version: 1.0\nContent-Transfer-Encoding: base64\n", p.contentType)
		fmt.Fprintf(&b, "Content-Disposition: attachment; filename=\"%s\"\n", p.name)
		if p.merge != "" {
			fmt.Fprintf(&b, "Merge-Type: %s\n", p.merge)
		}
		b.WriteByte('\n')
		writeBase64(&b, p.body)
	}
	fmt.Fprintf(&b, "\n--%s--\n", boundary)
	return b.Bytes()
}

// boundaryOf is a line that is in none of the parts, and the same for the same parts.
func boundaryOf(parts []part) string {
	sum := sha256.New()
	for _, p := range parts {
		sum.Write(p.body)
	}
	for {
		boundary := fmt.Sprintf("vmruntime-%x", sum.Sum(nil)[:16])
		found := false
		for _, p := range parts {
			found = found || bytes.Contains(p.body, []byte(boundary))
		}
		if !found {
			return boundary
		}
		sum.Write([]byte(boundary))
	}
}

func writeBase64(b *bytes.Buffer, data []byte) {
	text := base64.StdEncoding.EncodeToString(data)
	for len(text) > 76 {
		b.WriteString(text[:76] + "\n")
		text = text[76:]
	}
	b.WriteString(text)
}

// foreignPart takes data as a user gives it to cloud-init: a MIME message, as cloud-init recognizes it, becomes a part as it is; of anything else cloud-init
// finds out what it is by its first line, which text/plain tells it to do. Compressed data has to be unpacked, since it would not be recognized in a part.
func foreignPart(data []byte) (part, error) {
	if bytes.HasPrefix(data, []byte{0x1f, 0x8b}) {
		var err error
		if data, err = gunzip(data); err != nil {
			return part{}, fmt.Errorf("vendor-data is compressed, and wrongly: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	if bytes.Contains(bytes.ToLower(data[:min(len(data), 4096)]), []byte("mime-version:")) {
		return part{body: data}, nil
	}
	return part{contentType: "text/plain", name: "vendor-data", body: data}, nil
}

func gunzip(data []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	const most = 8 * MaxData
	out, err := io.ReadAll(io.LimitReader(z, most+1))
	if err == nil && len(out) > most {
		err = fmt.Errorf("unpacked it has more than %d bytes", most)
	}
	return out, err
}
